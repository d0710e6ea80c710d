"""Where and how a run is carried out: hardware, versions, revision, precision, for every process that takes part."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
import sys
import warnings
from typing import Any

import numpy as np
import torch

from .. import files
from . import distributed
from .devices import pick_precision, precision_name
from .processor import processor_name
from .settings import Settings

REVISION = "SOFTSHARE_REVISION"
"""The environment variable that names the revision if git does not: a commit in hexadecimal digits, followed by
"+changes" if the code was changed since."""


def environment(device: str | torch.device = "cpu") -> dict[str, Any]:
    """This machine and this code: device, versions, git revision or None, and the date (UTC).

    Raises ValueError if $SOFTSHARE_REVISION is needed and is not a commit.
    """
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
    """The checkout's commit and whether it has uncommitted changes.

    Without git, or if git only knows a commit that is older than the files (a copy that was updated by other means),
    `REVISION` decides; None if it is not set.
    """
    top = files.checkout()
    found = None if top is None else _git(top)
    given = os.environ.get(REVISION, "").strip()
    if found and (not found["dirty"] or not given):
        return found
    commit = given.removesuffix("+changes")
    if given and not re.fullmatch(r"[0-9a-fA-F]{6,64}", commit):
        raise ValueError(
            f'{REVISION} must be a commit, 6 to 64 hexadecimal digits, optionally followed by "+changes", got {given!r}'
        )
    return {"revision": commit or None, "dirty": given != commit if commit else None}


def _git(top: os.PathLike[str]) -> dict[str, Any] | None:
    def asked(*command: str) -> str:
        call = ["git", "-C", str(top), *command]
        # Without GIT_DIR and the like: inside a hook they name another repository.
        clean = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
        done = subprocess.run(call, capture_output=True, check=True, timeout=10, env=clean)
        return os.fsdecode(done.stdout).strip()

    try:
        if not os.path.samefile(asked("rev-parse", "--show-toplevel"), top):
            return None  # unpacked inside another repository
        revision = asked("rev-parse", "HEAD")
        return {
            "revision": revision,
            "dirty": bool(asked("status", "--porcelain", "--", "softshare", "pyproject.toml")),
        }
    except (OSError, subprocess.SubprocessError):
        return None


def execution_facts(
    device: torch.device, settings: Settings, parameters: torch.dtype = torch.float32
) -> dict[str, Any]:
    """The `environment`, and how `settings` are executed on a device: precision, TF32, memory format.

    "tf32" is whether convolutions in float32 may round their inputs to TF32. `parameters` is the dtype of the model's
    parameters: a float64 model computes in float64 whatever the settings.
    """
    dtype = pick_precision(settings.precision, device, parameters)
    return environment(device) | {
        "precision": precision_name(dtype),
        "tf32": settings.tf32 and device.type == "cuda" and dtype is torch.float32,
        "channels_last": settings.channels_last,
    }


class Execution:
    """How a run is carried out, for its record; includes earlier processes of the same run, known from checkpoints.

    Attributes:
        now: this process, or process 0 for all: `execution_facts`, whether steps are captured and compiled, how many
            processes train together, and as "others" the same facts about the other ones.
        earlier: the same for the processes before, if the run was interrupted.
        after: the same for a process that found the training finished and only measured; None if there was none.
    """

    def __init__(self, device: torch.device, settings: Settings, parameters: torch.dtype = torch.float32) -> None:
        self.now = execution_facts(device, settings, parameters)
        self.now |= {"captured": False, "compiled": False, "processes": distributed.world_size()}
        others = distributed.gathered(self.now)[1:]
        if others:
            self.now["others"] = others
        self.earlier: list[dict[str, Any]] = []
        self.after: dict[str, Any] | None = None

    def note(self, **outcomes: bool | str) -> None:
        """Note whether steps were "captured" and "compiled"; all processes decide that together."""
        for each in (self.now, *self.now.get("others", ())):
            each.update(outcomes)

    def finished(self, states: list[dict[str, Any]]) -> None:
        """Note that nothing is left to train; a checkpoint's `states` describe the processes that trained."""
        self.after = self.now
        *self.earlier, self.now = states

    def follow(self, before: list[dict[str, Any]]) -> None:
        """Continue after the processes in `before`, from `states`; warns if the precision has changed."""
        self.earlier = before
        last = before[-1]["precision"] if before else self.now["precision"]
        if last != self.now["precision"]:
            warnings.warn(
                f"the checkpoint was written in {last}, and training resumes in {self.now['precision']}: the outcome is "
                'that of neither alone, as the record shows. Settings(precision="...") chooses one',
                stacklevel=2,
            )

    def states(self) -> list[dict[str, Any]]:
        """JSON for a checkpoint: all processes so far, this one last."""
        return [*self.earlier, self.now]

    def record(self) -> dict[str, Any]:
        """JSON for a record: the last process that trained, "earlier" ones, and one that only measured as "measured by"."""
        found = self.now | ({"earlier": self.earlier} if self.earlier else {})
        return found | ({"measured by": self.after} if self.after else {})
