"""Where and how a run is carried out: hardware, versions, revision, precision; of every process that takes part."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
import warnings
from typing import Any

import numpy as np
import torch

from .. import files
from . import distributed
from .devices import precision_name
from .processor import processor_name
from .settings import Settings

REVISION = "SOFTSHARE_REVISION"
"""The environment variable that names the revision where there is no git: a commit, with "+changes" behind it if the code
was changed since."""


def environment(device: str | torch.device = "cpu") -> dict[str, Any]:
    """This machine and this code: device, versions, git revision or None, and the date (UTC)."""
    device = str(device)
    on_cuda = device.startswith("cuda")
    return {
        "device": device,
        "hardware": torch.cuda.get_device_name(device) if on_cuda else processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        **({"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()} if on_cuda else {}),
        "softshare": sys.modules[__name__.partition(".")[0]].__version__,
        **_revision(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _revision() -> dict[str, Any]:
    """The checkout's commit and whether it has uncommitted changes; where there is no git what `REVISION` says, or None."""
    top = files.checkout()
    if top is not None and (found := _git(top)) is not None:
        return found
    given = os.environ.get(REVISION, "").strip()
    commit = given.removesuffix("+changes")
    return {"revision": commit or None, "dirty": given != commit if commit else None}


def _git(top: os.PathLike[str]) -> dict[str, Any] | None:
    def asked(*command: str) -> str:
        call = ["git", "-C", str(top), *command]
        return subprocess.run(call, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        if not os.path.samefile(asked("rev-parse", "--show-toplevel"), top):
            return None  # unpacked into somebody else's repository
        revision = asked("rev-parse", "HEAD")
        return {
            "revision": revision,
            "dirty": bool(asked("status", "--porcelain", "--", "softshare", "pyproject.toml")),
        }
    except (OSError, subprocess.SubprocessError):
        return None


class Execution:
    """How a run is carried out, as a record has it; earlier processes of the same run, known from checkpoints, included.

    Attributes:
        now: of this process: its `environment`, precision in use, TF32, whether the model is compiled.
        earlier: the same of the processes before, where the run was interrupted.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, settings: Settings) -> None:
        self.now: dict[str, Any] = environment(device) | {
            "precision": precision_name(dtype),
            "tf32": settings.tf32 and device.type == "cuda" and dtype is torch.float32,
            "channels_last": settings.channels_last,
            "compiled": False,
            "processes": distributed.world_size(),
        }
        others = distributed.gathered(self.now)[1:]
        if others:
            self.now["others"] = others
        self.earlier: list[dict[str, Any]] = []

    def follow(self, before: list[dict[str, Any]]) -> None:
        """Take up what `states` of the process before has told; a warning says if the precision is another one."""
        self.earlier = before
        last = before[-1]["precision"] if before else self.now["precision"]
        if last != self.now["precision"]:
            warnings.warn(
                f"the checkpoint was written in {last}, and training goes on in {self.now['precision']}: the outcome is "
                'that of neither alone, and the record says so. Settings(precision="...") chooses one',
                stacklevel=2,
            )

    def states(self) -> list[dict[str, Any]]:
        """JSON for a checkpoint: all processes so far, this one last."""
        return [*self.earlier, self.now]

    def record(self) -> dict[str, Any]:
        """JSON for a record: this process, and those before it as "earlier" if there were any."""
        return self.now | ({"earlier": self.earlier} if self.earlier else {})
