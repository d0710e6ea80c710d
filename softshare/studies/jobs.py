"""Jobs: the runs and folds of a reproduction, each with its command, what it still needs, and whether its record is there.

The pipeline and ``softshare gpu`` share them. Every job is a process of its own. A run writes checkpoints and, at the end,
its record, so the same command goes on where the last one stopped.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import files
from ..training.processor import interpreter, processor_name
from . import costs, folding
from .recipes import make_plan, study_of
from .records import find_records, read_record, record_path
from .running import checkpoints_folder
from .study import Plan

STARTUP = 25.0
"""Seconds that a process needs before its first step and after its last; assumed, not measured."""


class Job(NamedTuple):
    """One run, or the folds of its network.

    Attributes:
        recipe, seed: see `softshare.studies.running.train`.
        profile: one of `softshare.studies.records.PROFILES`; a rehearsal uses "fast" instead.
        data: the data set by name or path; None: the recipe's first.
        folds: whether this folds the trained network at many thresholds, see `softshare.studies.folding`.
    """

    recipe: str
    seed: int
    profile: str = "paper"
    data: str | None = None
    folds: bool = False

    def __str__(self) -> str:
        what = f"{self.recipe}, {self.profile}, seed {self.seed}" + (f", {self.data}" if self.data else "")
        return f"folds of {what}" if self.folds else what

    @property
    def run(self) -> Job:
        """The run whose network this folds; for a run, itself."""
        return self._replace(folds=False)


@dataclass(frozen=True)
class Places:
    """Where jobs run and what they may use.

    Attributes:
        device: "cuda" or "cpu".
        runs: folder of records; the benchmark's goes to its subfolder "benchmarks". Default: data/runs, data/benchmarks.
        checkpoints: see `softshare.studies.running.checkpoints_folder`.
        download: whether to fetch data sets if no copy is found.
        rehearse: toy sizes of profile "fast", every step executed; of several seeds only the first.
        elsewhere: the hardware's name if jobs run on another machine than this process; "?" if it is not known.
        fingerprints: of the data of each job, found once.

    Raises RuntimeError inside an application, which has no Python interpreter to start the runs with.
    """

    device: str = "cpu"
    runs: str | Path = ""
    checkpoints: str | Path = ""
    download: bool = False
    rehearse: bool = False
    elsewhere: str = ""
    fingerprints: dict[Any, str] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("runs", "checkpoints"):
            given = getattr(self, name)
            object.__setattr__(self, name, files.user_path(given) if given else "")
        self.python()

    def python(self) -> str:
        """The Python of this installation; ``-m softshare`` behind it is the command ``softshare``."""
        python = interpreter()
        if python is None:
            raise RuntimeError(
                f"{sys.executable!r} is not a Python interpreter, so it cannot start runs; call `softshare` on a terminal"
            )
        return python

    @property
    def on_cuda(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def hardware(self) -> str:
        """What the jobs run on, by name."""
        if self.elsewhere:
            return self.elsewhere
        return torch.cuda.get_device_name(self.device) if self.on_cuda else processor_name()

    def command(self, job: Job, checkpoint_seconds: float = 120.0, processes: int = 1) -> list[str]:
        """The command that does a job; a run of several processes, one per GPU, starts under torchrun."""
        module = ["-m", "softshare"]
        if processes > 1 and not job.folds:
            module = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *module]
        command = [self.python(), *module, "fold" if job.folds else "run", job.recipe, "--seed", str(job.seed)]
        command += ["--profile", "fast" if self.rehearse else job.profile, "--device", self.device]
        command += ["--runs", str(self.runs)] if self.runs else []
        command += ["--checkpoints", str(self.checkpoints)] if self.checkpoints else []
        command += ["--data", job.data] if job.data and not self.rehearse else []
        command += ["--rehearse"] * self.rehearse
        if job.folds:
            return [*command, "--sweep"]
        command += [] if checkpoint_seconds == 120.0 else ["--checkpoint-seconds", f"{checkpoint_seconds:g}"]
        return command + ["--download"] * self.download + ["--quiet"] * self.rehearse


def plan_of_job(job: Job, places: Places) -> Plan:
    """The plan of a job's run."""
    return make_plan(job.recipe, "fast" if places.rehearse else job.profile, job.seed, places.rehearse)


def path_of(job: Job, places: Places) -> Path:
    """Where the record of a job is or will be.

    Raises FileNotFoundError or ValueError if the data of its run are not here.
    """
    plan = plan_of_job(job, places)
    study, data = study_of(plan), None if places.rehearse else job.data
    # Grids are generated from the seed; images are the same for all seeds.
    generated = not plan.recipe.data and data is None
    key = (plan.recipe.study, plan.recipe.data, plan.profile, data, plan.seed if generated else None)
    if key not in places.fingerprints:
        places.fingerprints[key] = study.fingerprint(plan, data, places.download)
    identity = study.identity(plan, places.fingerprints[key])
    return record_path(folding.fold_identity(identity) if job.folds else identity, places.runs)


def recorded(job: Job, places: Places) -> bool:
    """Whether a job has its record, for the data found on this machine; for folds, of the network that is recorded now.

    Raises ValueError for a damaged record.
    """
    path = path_of(job, places)
    if not path.exists() or (job.folds and not path_of(job.run, places).exists()):
        return False
    try:
        record = read_record(path)
        if record.snapshots:
            record.similarity()
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"{error}; move {path.name} away to have it made again") from error
    of = record.execution.get("record folded")
    return not job.folds or of in (None, files.file_checksum(path_of(job.run, places)))


def has_weights(job: Job, places: Places) -> bool:
    """Whether checkpoints of a job's run are here; with its record, they hold the trained weights."""
    return any(checkpoints_folder(path_of(job.run, places), places.checkpoints).glob("step-*"))


def expected(job: Job, places: Places, speed: costs.Speed | None) -> float:
    """Expected seconds of a job from its beginning, from its network's multiply-adds and `speed`; needs no data."""
    plan = plan_of_job(job, places)
    estimate = costs.fold_seconds if job.folds else costs.expected_seconds
    return STARTUP + estimate(plan, places.on_cuda, speed)


def still_needs(job: Job, places: Places, speed: costs.Speed | None) -> float:
    """Expected seconds of a job, minus the share that its newest checkpoint has done.

    They are those of the slowest run that differs only by its seed or data set on this hardware, if there is a record of
    one; otherwise `expected`.
    """
    if job.folds:
        return expected(job, places, speed)
    seconds = _measured(job, places) or expected(job, places, speed) - STARTUP
    return STARTUP + (1 - share_done(job, places)) * seconds


def total_steps(plan: Plan) -> int:
    """The training steps of a plan."""
    return plan.settings.epochs * math.ceil(study_of(plan).examples(plan) / plan.settings.batch_size)


def share_done(job: Job, places: Places) -> float:
    """The share of a run's steps that its newest checkpoint has done, 0 to 1."""
    steps = total_steps(plan_of_job(job, places))
    folder = checkpoints_folder(path_of(job.run, places), places.checkpoints)
    found = [int(path.name[5:13]) for path in folder.glob("step-*.safetensors") if path.name[5:13].isdecimal()]
    return min(1.0, max(found, default=0) / steps)


def _measured(job: Job, places: Places) -> float | None:
    """How long the slowest recorded run took that differs from a job only by its seed or data set, on this hardware."""
    plan, folder = plan_of_job(job, places), path_of(job, places).parent
    chosen = study_of(plan).identity(plan).chosen
    runs = [
        record.execution
        for record in find_records(folder, job.recipe, plan.profile)
        if record.identity.chosen == chosen and record.recipe == plan.recipe.name
    ]
    # The seconds of a run that was interrupted count all its processes, which may have been elsewhere.
    alike = [run for run in runs if run.get("hardware") == places.hardware and "earlier" not in run]
    # Several processes, one per GPU, are taken to be as many times as fast as one.
    return max((float(run["seconds"]) * run.get("processes", 1) for run in alike if "seconds" in run), default=None)


def print_costs(groups: Iterable[tuple[str, Sequence[Job]]], places: Places, speed: costs.Speed | None) -> float:
    """Print by group how many jobs lack their record, and how long they are expected to take; returns hours in all."""
    total = 0.0
    for title, jobs in groups:
        seconds, waiting, without = 0.0, 0, 0
        for job in jobs:
            try:
                if not recorded(job, places):
                    seconds += still_needs(job, places, speed)
                    waiting += 1
            except (OSError, ValueError):
                without += 1
        told = f"{waiting} of {len(jobs)} jobs to do" + (f", {without} without data" if without else "")
        print(f"{title:50} {told:34} {costs.duration(seconds) if seconds else '':>9}", flush=True)
        total += seconds
    how = "at the speed measured on it" if speed else "at an assumed speed, not measured"
    print(f"{costs.duration(total)} in all on {places.hardware}, {how}")
    return total / 3600
