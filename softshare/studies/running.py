"""From recipe to record, in the same way for commands, chapters and lists of runs.

``run("SWRN 28-10-2*", "paper", seed=0)`` trains a recipe and writes its record; a second call finds the record.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from torch import nn

from .. import files, models
from ..training import distributed
from ..training.checkpoints import read_checkpoint
from ..training.devices import convolution_kernels, pick_device, standard_defaults
from ..training.loop import fit
from ..training.recorder import SimilarityRecorder
from .recipes import make_plan, study_of
from .records import Record, read_record, record_path, write_record
from .study import Plan, Study, Tasks

SNAPSHOTS = 20
"""Snapshots of coefficients in each of a recipe's first epochs that are recorded densely."""


def checkpoints_folder(record: Path, checkpoints: str | Path = "") -> Path:
    """Where the checkpoints of the run with that record are kept.

    This is a subfolder with the record's name in the given folder, by default data/checkpoints in a checkout (ignored by
    git) or ./checkpoints without one.
    """
    folder = files.user_path(checkpoints) if checkpoints else files.data_folder("checkpoints")
    return folder / record.stem


@standard_defaults()
def run(
    name: str,
    profile: str = "fast",
    seed: int = 0,
    data: str | None = None,
    *,
    download: bool = False,
    rehearse: bool = False,
    runs: str | Path = "",
    **options: Any,
) -> Record:
    """The record of a run: found if it was run before, else made by `train`, which takes the same arguments."""
    plan = make_plan(name, profile, seed, rehearse)
    study = study_of(plan)
    path = record_path(study.identity(plan, study.fingerprint(plan, data, download)), runs)
    if path.exists() and not options.get("again"):
        return read_record(path)
    return _train(plan, study.tasks(plan, data, download), runs=runs, **options)[0]


@standard_defaults()
def train(
    name: str,
    profile: str = "fast",
    seed: int = 0,
    data: str | None = None,
    *,
    download: bool = False,
    rehearse: bool = False,
    **options: Any,
) -> tuple[Record, nn.Module]:
    """The record of a run and its network with the trained weights, in eval mode; trains unless both are available.

    If there is a record but no weights, nothing is trained: training may take days, and a committed record must not be
    replaced unasked.

    A run that was killed resumes from its checkpoint. The last checkpoint, with the trained weights, is kept; see `trained`.
    Under ``torchrun`` all its processes train together.

    Args:
        name: one of `softshare.studies.recipes.RECIPES`.
        profile: "fast", "gpu", "short" or "paper", see `softshare.studies.records.PROFILES`.
        seed: of weights, split, order, augmentation and dropout.
        data: a data set by name or path, see `softshare.images.load`; for ImageNet recipes the path of a folder. Default:
            the first one of the recipe; in profile fast CIFAR-10 if a copy is found, else the embedded digits.
        download: fetch the data set if no copy is found.
        rehearse: toy sizes, to try every step.
        device: default: CUDA if available.
        runs: folder of records, see `softshare.studies.records.runs_folder`.
        checkpoints: see `checkpoints_folder`.
        progress: whether to show progress.
        checkpoint_seconds: the least time between two checkpoints.
        again: train from the start in any case: the record of an earlier run is replaced and its checkpoints are removed.
            New checkpoints are written only if `checkpoints` names a folder.

    Raises:
        ValueError: an unknown recipe, profile or data set.
        FileNotFoundError: there is no copy of the data, or a record without its weights.
    """
    plan = make_plan(name, profile, seed, rehearse)
    return _train(plan, study_of(plan).tasks(plan, data, download), **options)


def _train(
    plan: Plan,
    tasks: Tasks,
    *,
    device: str | None = None,
    runs: str | Path = "",
    checkpoints: str | Path = "",
    progress: bool = True,
    checkpoint_seconds: float = 120.0,
    again: bool = False,
) -> tuple[Record, nn.Module]:
    study = study_of(plan)
    identity = study.identity(plan, tasks.data["fingerprint"])
    path = record_path(identity, runs)
    folder = checkpoints_folder(path, checkpoints)
    with distributed.process_group(pick_device(device)) as place:
        kept = None if again and not checkpoints else folder
        for each in filter(None, (path.parent, kept)):
            files.writable(each)
        if again:
            _clear(folder)
        elif path.exists():
            record = read_record(path)
            return record, trained(record, checkpoints).to(place)
        model = study.network(plan, tasks.classes)
        similarity = SimilarityRecorder(plan.recipe.dense_epochs, per_epoch=SNAPSHOTS)
        watchers = study.watchers(plan, tasks)
        title = f"{plan.recipe.name} ({plan.profile}, seed {plan.seed})"
        history = fit(
            model, tasks.train, plan.settings, [similarity, *watchers], place, title, progress, kept, checkpoint_seconds
        )
        metrics: dict[str, Any] = {
            f"last_{key}": value for key, value in history[-1].items() if key not in ("epoch", "rate", "seconds")
        }
        metrics["parameters"] = sum(parameter.numel() for parameter in model.parameters())
        with convolution_kernels(place, plan.settings.tf32):
            metrics |= study.measure(model, plan, tasks, watchers)
        if distributed.rank() == 0:
            write_record(
                identity,
                metrics,
                data=tasks.data,
                config=study.used(plan, tasks),
                history=study.rows(history, watchers),
                execution=history.execution | {"seconds": round(sum(row["seconds"] for row in history), 3)},
                similarity=similarity,
                runs=runs,
            )
        distributed.barrier()
        return read_record(path), model


def _clear(folder: Path) -> None:
    """Remove a run's own checkpoints."""
    if distributed.rank() == 0:
        for path in folder.glob("step-*"):
            with contextlib.suppress(OSError):
                os.unlink(path)
    distributed.barrier()


@standard_defaults()
def trained(record: Record, checkpoints: str | Path = "") -> nn.Module:
    """The network of a record with its trained weights, from the last checkpoint, in eval mode on the CPU.

    Raises FileNotFoundError if that checkpoint is gone.
    """
    folder = checkpoints_folder(record.path, checkpoints)
    for path in sorted(folder.glob("step-*.safetensors"), reverse=True):
        with contextlib.suppress(ValueError):
            _, tensors, facts = read_checkpoint(path)
            if facts["epoch"] > len(record.history):
                break
    else:
        raise FileNotFoundError(
            f"no checkpoint of the end of {record.path.name} is in {folder}; records travel, checkpoints do not. To train "
            "it again, move the record away and run the recipe, or call train(..., again=True)"
        )
    state = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
    classes = len(state["classifier.bias"]) if "classifier.bias" in state else None
    model = models.build(record.network, classes, **record.config.get("options", {}))
    model.load_state_dict(state)
    return model.eval()


def plan_of(record: Record) -> tuple[Study, Plan]:
    """The study and plan of a record. Raises ValueError if its recipe has changed since."""
    for rehearse in (False, True):
        plan = make_plan(record.recipe, record.profile, record.seed, rehearse)
        study = study_of(plan)
        if study.identity(plan, record.identity.fingerprint) == record.identity:
            return study, plan
    raise ValueError(f"{record.path.name} does not match the current plan of {record.recipe}; run the recipe again")


@standard_defaults()
def tasks_of(record: Record, data: str | None = None) -> Tasks:
    """The tasks of a record's run, to test its network again.

    Raises ValueError if the data found here are not the same, or the recipe has changed since.
    """
    study, plan = plan_of(record)
    tasks = study.tasks(plan, data)
    if tasks.data != record.data:
        raise ValueError(
            f"the record {record.path.name} was made with {record.data}, but the data here are {tasks.data}"
        )
    return tasks
