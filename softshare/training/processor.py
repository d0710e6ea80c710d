"""Keeps PyTorch away from matrix units that crash it.

Some virtual machines report Intel's AMX but hide the table of its tile sizes (CPUID leaf 0x1D). oneDNN then configures no
tiles, and PyTorch's first matrix product in bfloat16 hits an illegal instruction, which kills the interpreter. So if a CPU
reports AMX, one such product is tried in a separate process, once per boot. If that process crashes, oneDNN is set to use
AVX-512 instead, before its first use. An interpreter that cannot start itself, as inside an application, tries nothing; if
PyTorch crashes there, set ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import signal
import subprocess
import sys
from pathlib import Path

import torch

_VARIABLE = "ONEDNN_MAX_CPU_ISA"
_PROBING = "SOFTSHARE_PROBING"  # set for the process that probes, so that it does not start another
_WITHOUT_AMX = "AVX512_CORE_BF16"
_PROBE = "import torch; torch.ones(128, 256, dtype=torch.bfloat16) @ torch.ones(256, 256, dtype=torch.bfloat16)"


def interpreter() -> str | None:
    """The Python interpreter that runs this process; None if there is none, as in an application that embeds Python."""
    path = sys.executable
    if not path or getattr(sys, "frozen", False):
        return None
    return path if re.fullmatch(r"(python|pypy)w?[\d.]*(t|d|-dbg)?(\.exe)?", os.path.basename(path).lower()) else None


def avoid_crashing_units(cache: Path) -> bool:
    """Set ONEDNN_MAX_CPU_ISA if AMX is reported but crashes; returns whether it was set. An existing value is kept.

    Args:
        cache: folder in which the outcome is remembered until the next boot.
    """
    if os.environ.get(_VARIABLE) or platform.system() != "Linux" or platform.machine() != "x86_64":
        return False
    try:
        if " amx_bf16" not in Path("/proc/cpuinfo").read_text(encoding="utf-8"):
            return False
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        kept = cache / f"amx-{hashlib.sha256(f'{boot} {torch.__version__}'.encode()).hexdigest()[:16]}.txt"
        outcome = ""
        with contextlib.suppress(OSError):
            outcome = kept.read_text(encoding="utf-8").strip()
        if outcome not in ("crashes", "works"):
            outcome = _probed()
            if outcome:
                with contextlib.suppress(OSError):  # a read-only folder: the next process tries again
                    kept.parent.mkdir(parents=True, exist_ok=True)
                    kept.write_text(outcome + "\n", encoding="utf-8")
    except (OSError, subprocess.TimeoutExpired):
        return False  # nothing is known: leave everything as it is
    crashes = outcome == "crashes"
    if crashes:
        os.environ[_VARIABLE] = _WITHOUT_AMX
    return crashes


def _probed() -> str:
    """Try one product in a separate process: "works", "crashes", or "" if that shows neither."""
    python = interpreter()
    if python is None or os.environ.get(_PROBING):
        return ""
    environment = {**os.environ, _PROBING: "1"}
    status = subprocess.run([python, "-c", _PROBE], capture_output=True, timeout=120, env=environment).returncode
    if status == 0:
        return "works"
    return "crashes" if -status in (signal.SIGILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT) else ""


def bfloat16_pays() -> bool:
    """Whether this CPU computes in bfloat16 faster than in float32.

    True with matrix units (Intel AMX), and with bfloat16 dot products (AVX-512 BF16) on a CPU that does not report matrix
    units, if ONEDNN_MAX_CPU_ISA lets oneDNN use them. An Intel CPU whose matrix units cannot be used computes
    dot products at the speed of float32.
    """
    reported, dots = (
        bool(check and check())
        for check in (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("amx_tile", "avx512_bf16"))
    )
    limit = os.environ.get(_VARIABLE, "").upper()
    units = limit in ("", "ALL", "DEFAULT") or "AMX" in limit
    return (reported and units) or (dots and not reported and (units or "BF16" in limit or "FP16" in limit))


def processor_name() -> str:
    """The processor's name, as the machine reports it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
