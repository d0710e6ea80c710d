"""Checkpoints on disk: written so that a kill, a full disk or a damaged file never destroys an earlier one.

A checkpoint is one safetensors file: tensors, and everything else as JSON in its header. Its name, such as
``step-00001173-9f2c51aa-5c0e9a0f4d1b7e83.safetensors``, holds the step, a digest of the run's identity, and the first 16
digits of the SHA-256 of its bytes, so a file is known to be whole before a byte of it is parsed. It is written under a
temporary name, flushed to the disk, and renamed. Nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import atomic_file, user_path

FORMAT = "softshare checkpoint 1"
_NAME = re.compile(r"step-(\d{8,})-([0-9a-f]{8})-([0-9a-f]{16})\.safetensors")


class ForeignCheckpoint(ValueError):
    """A file that is intact, but not a checkpoint of this run."""


def _tag(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(dict(identity), sort_keys=True).encode()).hexdigest()[:8]


def write_checkpoint(
    folder: Path, step: int, identity: Mapping[str, Any], tensors: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> Path:
    """Write one checkpoint; returns its path. After an error, such as a full disk, the folder is as it was before.

    Args:
        folder: made if it does not exist; on any file system, including a mounted drive.
        step: optimizer steps done.
        identity: JSON; what decides the outcome of the run. Only a run with the same identity resumes from the checkpoint.
        tensors: by name; copied to the CPU.
        facts: JSON; anything else.
    """
    from safetensors.torch import save

    plain = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    data = save(plain, {"format": FORMAT, "identity": json.dumps(dict(identity)), "facts": json.dumps(dict(facts))})
    path = folder / f"step-{step:08d}-{_tag(identity)}-{hashlib.sha256(data).hexdigest()[:16]}.safetensors"
    with atomic_file(path) as file:
        file.write(data)
    return path


def read_checkpoint(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    """Identity, tensors (on the CPU) and facts of a checkpoint.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged file.
        ForeignCheckpoint: a name or content that `write_checkpoint` did not make.
    """
    from safetensors import SafetensorError, safe_open

    path = user_path(path)
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ForeignCheckpoint(
            f"{path} is not a checkpoint: their names are like step-00000100-<8>-<16 digits>.safetensors"
        )
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    if digest.hexdigest()[:16] != match[3]:
        raise ValueError(f"{path} is damaged: its bytes do not match the checksum in its name")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise ForeignCheckpoint(f"{path} is not of format {FORMAT!r}, but of {header.get('format')!r}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            return json.loads(header["identity"]), tensors, json.loads(header["facts"])
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ForeignCheckpoint(f"{path} is not a checkpoint: {error}") from error


def _listed(folder: Path) -> list[tuple[int, str, Path]]:
    """Step, tag and path of all files named like checkpoints, the newest first; [] without the folder."""
    found = [(match, path) for path in folder.glob("step-*") if (match := _NAME.fullmatch(path.name))]
    return sorted(((int(match[1]), match[2], path) for match, path in found), reverse=True)


def newest_checkpoint(
    folder: Path, identity: Mapping[str, Any]
) -> tuple[Path, dict[str, Tensor], dict[str, Any]] | None:
    """Path, tensors and facts of the newest whole checkpoint of this run; None if there is none.

    Damaged and foreign files are left where they are and named in a warning, and the next older one is used.

    Raises:
        OSError: a file cannot be read now. It may well be intact, so no older one is used in its place.
        ForeignCheckpoint: the folder holds only checkpoints of other runs. Training into it would mix two runs.
    """
    foreign: ForeignCheckpoint | None = None
    damaged = False
    for _, tag, path in _listed(folder):
        try:
            found, tensors, facts = read_checkpoint(path)
            if tag == _tag(identity) == _tag(found):
                return path, tensors, facts
            differing = sorted(key for key in {*identity, *found} if identity.get(key) != found.get(key))
            pairs = "; ".join(f"{key} {_short(found.get(key))}, here {_short(identity.get(key))}" for key in differing)
            raise ForeignCheckpoint(f"{path} belongs to another run ({pairs})")
        except ForeignCheckpoint as error:
            foreign = foreign or error
            warnings.warn(f"refused: {error}", stacklevel=2)
        except ValueError as error:
            damaged = True
            warnings.warn(f"refused: {error}; looking for an earlier one", stacklevel=2)
    if foreign and not damaged:
        raise ForeignCheckpoint(f"{foreign}; give this run its own folder, or empty that one")
    return None


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def prune_checkpoints(folder: Path, step: int, identity: Mapping[str, Any], keep: int = 2) -> None:
    """Delete this run's checkpoints up to `step`, except the newest `keep`, and any half-written file of a killed process.

    Other runs' files are left alone.
    """
    own = [path for at, tag, path in _listed(folder) if tag == _tag(identity) and at <= step]
    for path in [*own[keep:], *folder.glob(f"step-*-{_tag(identity)}-*.part")]:
        with contextlib.suppress(OSError):
            path.unlink()


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by "<parameter number>.<name>"; rates and decay belong to the schedule, not to the state."""
    state = optimizer.state_dict()["state"]
    return {f"{number}.{name}": value for number, entry in state.items() for name, value in entry.items()
            if isinstance(value, Tensor)}  # fmt: skip


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`, into an optimizer made for the same parameters in the same order."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, name = key.split(".", 1)
        parameter = parameters[int(number)]
        if value.shape == parameter.shape and value.dim() > 0:
            # In the parameter's own memory order: another order uses other vector instructions, which round differently.
            value = torch.empty_like(parameter).copy_(value)
        state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


class RunFolder:
    """The checkpoints of one run: written when they are due, read when the run resumes; the newest two are kept.

    Args:
        folder: the folder of this run; None: nothing is ever written or found.
        identity: see `write_checkpoint`.
        pause: the least time between two checkpoints, in seconds; 0: one after every step.

    Attributes:
        last_good: the newest checkpoint that was written or read; None if there is none.
    """

    def __init__(self, folder: Path | None, identity: Mapping[str, Any], pause: float) -> None:
        self.folder, self.identity, self.pause = folder, identity, pause
        self.last_good: Path | None = None
        self.saved = time.perf_counter()

    def due(self) -> bool:
        """Whether a checkpoint should be written now."""
        return self.folder is not None and time.perf_counter() - self.saved >= self.pause

    def touch(self) -> None:
        """Restart the pause."""
        self.saved = time.perf_counter()

    def save(self, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Write a checkpoint and prune older ones; if that fails, as on a full disk, warn and change nothing."""
        assert self.folder is not None
        try:
            self.last_good = write_checkpoint(self.folder, step, self.identity, tensors, facts)
        except OSError as error:
            kept = f"the last one is {self.last_good}" if self.last_good else "there is none yet"
            warnings.warn(f"no checkpoint could be written ({error}); {kept}; training continues", stacklevel=2)
            return
        prune_checkpoints(self.folder, step, self.identity)

    def newest(self) -> tuple[Path, dict[str, Tensor], dict[str, Any]] | None:
        """See `newest_checkpoint`."""
        return None if self.folder is None else newest_checkpoint(self.folder, self.identity)

    def told(self) -> str:
        """The last good checkpoint, for an error message."""
        if self.last_good is not None:
            return f"the last good checkpoint is {self.last_good}"
        return "no checkpoint was kept" if self.folder is None else "no checkpoint was written yet"
