"""What tests of the whole pipeline share: the call, its environment, and what of a record is the same everywhere."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

TOP = Path(__file__).resolve().parents[2]


def without_speed(record):
    """What a run found: everything in its record but how fast it was."""
    metrics = {name: value for name, value in record.metrics.items() if "per_second" not in name}
    history = [{name: value for name, value in row.items() if name not in ("seconds", "examples_per_second")}
               for row in record.history]  # fmt: skip
    return record.identity, metrics, history, record.snapshots


def command(top, *options):
    return [sys.executable, str(top / "book" / "reproduce.py"), *options]


def environment(**more):
    """Embedded digits, and no number of threads from outside."""
    kept = {
        name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
    }
    return kept | {"SOFTSHARE_DATA": "", "PYTHONPATH": str(TOP)} | more


def processes_with(text: str) -> list[int]:
    """Running processes with this text in their command, other than this one."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if text in path.read_bytes().decode(errors="replace") and int(path.parent.name) != os.getpid():
                found.append(int(path.parent.name))
    return found
