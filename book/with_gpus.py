"""Runs a command with GPUs of this machine that no other such command uses.

    python with_gpus.py 2 COMMAND ...

Waits until as many are free, names them in CUDA_VISIBLE_DEVICES, and gives them back when the command ends, however it ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO


def visible() -> list[str]:
    """The GPUs that there are: CUDA_VISIBLE_DEVICES if it is set, otherwise all."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name.strip() for name in given.split(",") if name.strip()]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def take(count: int, names: Sequence[str], folder: Path, locks: contextlib.ExitStack) -> dict[str, TextIO]:
    """As many of these GPUs as are free, at most `count`, with their locks; they are taken as long as those are open."""
    taken: dict[str, TextIO] = {}
    for name in names:
        if len(taken) < count:
            lock: TextIO = (folder / f"gpu-{name.replace('/', '-')}").open("w")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.close()
            else:
                taken[name] = locks.enter_context(lock)
    return taken


def main(arguments: Sequence[str]) -> int:
    count, command, names = int(arguments[0]), list(arguments[1:]), visible()
    if len(names) < count:
        print(f"error: {count} GPUs are needed, {len(names)} found", file=sys.stderr)
        return 1
    folder = Path(tempfile.gettempdir()) / f"softshare-gpus-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    while True:
        with contextlib.ExitStack() as locks:
            taken = take(count, names, folder, locks)
            if len(taken) == count:
                environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(taken)}
                # The command holds the locks too, in case this program is killed.
                held = [lock.fileno() for lock in taken.values()]
                return subprocess.run(command, env=environment, pass_fds=held, check=False).returncode
        time.sleep(1 + os.getpid() % 10 / 10)  # not all at the same time again


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
