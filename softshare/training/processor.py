"""Keeps PyTorch off matrix units that crash it.

Some virtual machines announce Intel's AMX but hide the table of its tile sizes (CPUID leaf 0x1D). oneDNN then configures
no tiles, and PyTorch's first matrix product in bfloat16 dies of an illegal instruction and takes the interpreter along. So
where AMX is announced one such product is tried in a process of its own, once after every start of the machine; where that
one dies, oneDNN is told to use AVX-512 instead, before its first use.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

import torch

_VARIABLE = "ONEDNN_MAX_CPU_ISA"
_WITHOUT_AMX = "AVX512_CORE_BF16"
_PROBE = "import torch; torch.ones(128, 256, dtype=torch.bfloat16) @ torch.ones(256, 256, dtype=torch.bfloat16)"


def avoid_crashing_units(cache: Path) -> bool:
    """Set ONEDNN_MAX_CPU_ISA if AMX is announced and crashes; returns whether it was set. A value already set is kept.

    Args:
        cache: folder in which the outcome is remembered until the machine is started again.
    """
    if _VARIABLE in os.environ or platform.system() != "Linux" or platform.machine() != "x86_64":
        return False
    try:
        if " amx_bf16" not in Path("/proc/cpuinfo").read_text(encoding="utf-8"):
            return False
        start = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        kept = cache / f"amx-{hashlib.sha256(f'{start} {torch.__version__}'.encode()).hexdigest()[:16]}.txt"
        outcome = ""
        with contextlib.suppress(OSError):
            outcome = kept.read_text(encoding="utf-8").strip()
        if outcome not in ("crashes", "works"):
            status = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, timeout=120).returncode
            outcome = "crashes" if status == -signal.SIGILL else "works"
            with contextlib.suppress(OSError):  # a read-only place: the next process tries again
                kept.parent.mkdir(parents=True, exist_ok=True)
                kept.write_text(outcome + "\n", encoding="utf-8")
    except (OSError, subprocess.TimeoutExpired):
        return False  # nothing is known: leave everything as it is
    crashes = outcome == "crashes"
    if crashes:
        os.environ[_VARIABLE] = _WITHOUT_AMX
    return crashes


def bfloat16_pays() -> bool:
    """Whether this CPU computes in bfloat16 faster than in float32.

    True with matrix units (Intel AMX), and with bfloat16 dot products (AVX-512 BF16) on a CPU that does not announce
    matrix units. An Intel CPU whose matrix units cannot be used does its dot products at the rate of float32.
    """
    announced, dots = (
        bool(check and check())
        for check in (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("amx_tile", "avx512_bf16"))
    )
    return (announced and os.environ.get(_VARIABLE) != _WITHOUT_AMX) or (dots and not announced)


def processor_name() -> str:
    """What the machine says that its processor is."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
