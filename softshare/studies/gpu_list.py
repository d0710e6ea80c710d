"""The GPU list: what is worth a GPU's time, in order of value, as far as time allows.

Every run, and every fold of a trained network, is a process of its own under a limit of its own. Runs write checkpoints and,
at the end, records, so the same command goes on where the last one stopped. A rehearsal executes the same list at toy sizes
on any machine.

Runs take turns instead of running side by side: on an H100, ten processes that trained grid networks took as long as one
after the other.
"""

from __future__ import annotations

import contextlib
import math
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from .. import files
from ..speed.benchmark import default_output, load_benchmark
from ..training.processor import interpreter, processor_name
from . import costs, folding
from .recipes import RECIPES, make_plan, study_of
from .records import find_records, read_record, record_path
from .running import checkpoints_folder
from .study import Plan

STARTUP = 25.0
"""Seconds that a process needs before its first step and after its last; assumed, not measured."""

BENCHMARK_SECONDS = 180.0
"""The benchmark's limit; it is made to take about 90."""

_WORTH_STARTING = 60.0  # seconds of training


class Job(NamedTuple):
    """One run of the list, or the folds of its network.

    Attributes:
        recipe, seed: see `softshare.studies.running.train`.
        profile: "short" or "paper"; a rehearsal uses "fast" instead.
        data: the data set; None: the recipe's first.
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
class Entry:
    """One entry: jobs that belong together, in order, or the benchmark.

    Attributes:
        title: what it is for.
        jobs: none for the benchmark.
    """

    title: str
    jobs: tuple[Job, ...] = ()


@dataclass(frozen=True)
class Places:
    """Where a list runs and what it may use.

    Attributes:
        device: "cuda" or "cpu".
        runs: folder of records; the benchmark's goes to its subfolder "benchmarks". Default: data/runs, data/benchmarks.
        checkpoints: see `softshare.studies.running.checkpoints_folder`.
        carry: the largest checkpoint, in MB, that will still be there when the list goes on. A run with a larger one is
            begun only if it fits into the time left.
        download: whether to fetch data sets if no copy is found.
        rehearse: toy sizes of profile "fast", every step executed; of several seeds only the first.

    Raises RuntimeError inside an application, which has no Python interpreter to start the runs with.
    """

    device: str = "cpu"
    runs: str | Path = ""
    checkpoints: str | Path = ""
    carry: float = math.inf
    download: bool = False
    rehearse: bool = False

    def __post_init__(self) -> None:
        for name in ("runs", "checkpoints"):
            given = getattr(self, name)
            object.__setattr__(self, name, files.user_path(given) if given else "")
        self.itself()

    def itself(self) -> list[str]:
        """The command ``softshare`` of this installation."""
        python = interpreter()
        if python is None:
            raise RuntimeError(
                f"{sys.executable!r} is not a Python interpreter, so it cannot start runs; call `softshare gpu`"
            )
        return [python, "-m", "softshare"]

    @property
    def on_cuda(self) -> bool:
        return self.device.startswith("cuda")

    def command(self, job: Job) -> list[str]:
        """The command that does a job in a separate process."""
        profile = "fast" if self.rehearse else job.profile
        command = [*self.itself(), "fold" if job.folds else "run", job.recipe, "--seed", str(job.seed)]
        command += ["--profile", profile, "--device", self.device]
        command += ["--runs", str(self.runs), "--checkpoints", str(self.checkpoints)]
        command += ["--data", job.data] if job.data and not self.rehearse else []
        command += ["--rehearse"] * self.rehearse
        if job.folds:
            return [*command, "--sweep"]
        # Checkpoints that outlive this machine are worth writing often.
        often = costs.checkpoint_bytes(_plan(job, self)) <= 12e6
        command += ["--checkpoint-seconds", "20"] if often else []
        return command + ["--download"] * self.download + ["--quiet"] * self.rehearse


def entries() -> list[Entry]:
    """The list, from the top."""

    def pairs(names: Sequence[str], seeds: Sequence[int], profile: str = "paper") -> tuple[Job, ...]:
        """Seed by seed, so that every comparison is complete before the next one starts."""
        return tuple(Job(name, seed, profile) for seed in seeds for name in names)

    def widths(width: int) -> list[str]:
        names = ("WRN 28-{}", "SWRN 28-{}-2", "SWRN 28-{}-1", "SWRN 28-{}", "WRN 16-{}")
        return [f"{name.format(width)} cutout" for name in names]

    deep = Job("SWRN 40-8-8", 0, "short")
    shuffled = Job("SWRN 40-8-8 shuffled", 0, "short")
    found = [
        Entry("benchmark"),
        Entry("shortest-path curriculum, five seeds", pairs(("CNN", "SCNN"), range(10, 15))),
        Entry("similarity and folding, 30 epochs", (deep, deep._replace(folds=True))),
        Entry("shortest-path curriculum, five more seeds", pairs(("CNN", "SCNN"), range(15, 20))),
        Entry(
            "the curriculum regularised, and with one template", pairs(("SCNN lambda 0.01", "SCNN-1"), range(10, 15))
        ),
        Entry("sharing at width 2, 30 epochs, eight seeds", pairs(widths(2), range(8), "short")),
        Entry("similarity where nothing can be learned", (shuffled,)),
    ]
    others = ("SCNN-5", "SCNN lambda 0.001", "SCNN lambda 0.0001")
    found += [
        Entry("other curricula", (*pairs(others, range(10, 13)), Job("SCNN 100 layers", 10))),
        Entry("sharing at width 6, 30 epochs, three seeds", pairs(widths(6), range(3), "short")),
        Entry("sharing at width 10, 30 epochs", pairs(widths(10), (0,), "short")),
        Entry("sharing at width 6", pairs(("SWRN 28-6-2 cutout", "WRN 28-6 cutout", "WRN 16-6 cutout"), (0,))),
    ]
    dropout = [recipe.name for recipe in RECIPES.values() if recipe.network.endswith("*")]
    for data in ("cifar10", "cifar100"):
        found += [Entry("dropout rows", (Job(name, 0, data=data),)) for name in dropout]
    return found


def run_list(minutes: float, places: Places) -> int:
    """Work down the list: do what is expected to fit into the time left, begin what can go on next time, skip the rest.

    Returns 0, or 1 if a job failed by itself. Raises ValueError for minutes or `Places.carry` that are not above 0.
    """
    if not minutes > 0 or not places.carry > 0:
        raise ValueError(f"minutes and carry must be above 0, got {minutes} and {places.carry}")
    return _List(time.monotonic() + 60 * minutes, places).work()


class _List:
    """One call of `run_list`."""

    def __init__(self, deadline: float, places: Places) -> None:
        self.deadline, self.places = deadline, places
        self.outcomes: list[tuple[str, str, str]] = []
        self.speed: float | None = None

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def work(self) -> int:
        seen: set[tuple[str, bool]] = set()
        with _terminated_like_ctrl_c():
            for entry in entries():
                if not entry.jobs:
                    self.benchmark(entry)
                for job in entry.jobs:
                    if self.places.rehearse and (job.recipe, job.folds) in seen:
                        continue
                    seen.add((job.recipe, job.folds))
                    try:
                        outcome = self.outcome(job, entry)
                    except (OSError, ValueError) as error:  # such as missing data; other jobs may have theirs
                        outcome = f"failed: {error}"
                    self.tell(entry, str(job), outcome)
        print(f"\n{'entry':50} {'job':44} outcome")
        for title, what, outcome in self.outcomes:
            print(f"{title:50} {what[:44]:44} {outcome}")
        return int(any(outcome.startswith("failed") for _, _, outcome in self.outcomes))

    def outcome(self, job: Job, entry: Entry) -> str:
        """Do one job, if there is need and time; returns what became of it."""
        places = self.places
        if recorded(job, places):
            return "has its record"
        if job.folds and not recorded(job.run, places):
            return "skipped: its network is not trained yet"
        if job.folds and not any(checkpoints_folder(_path(job.run, places), places.checkpoints).glob("step-*")):
            return "skipped: the weights of its network are not here"
        needs = whole = still_needs(job, places, self.speed)
        carried = job.folds or costs.checkpoint_bytes(_plan(job, places)) <= 1e6 * places.carry
        if not carried:  # what is made of its weights must fit, too
            whole += sum(still_needs(each, places, self.speed) for each in entry.jobs if each.folds and each.run == job)
        goes_on = carried and not job.folds and self.left() > STARTUP + _WORTH_STARTING
        if whole > self.left() and not goes_on:
            return f"skipped: needs about {math.ceil(whole / 60)} min"
        return done(places.command(job), min(self.left(), 120 + 2 * needs))

    def tell(self, entry: Entry, what: str, outcome: str) -> None:
        self.outcomes.append((entry.title, what, outcome))
        print(f"[{max(0.0, self.left()) / 60:.1f} min left] {entry.title}: {what}: {outcome}", flush=True)

    def benchmark(self, entry: Entry) -> None:
        output = _benchmark_output(self.places)
        if output and _is_full_benchmark(output):
            self.tell(entry, "pairwise timings", "has its record")
        else:
            command = [*self.places.itself(), "bench", "--device", self.places.device.partition(":")[0]]
            command += ["--quick"] if self.places.rehearse else ["--rounds", "5", "--no-compile"]
            command += ["--output", str(output)] if output else []
            self.tell(entry, "pairwise timings", done(command, min(BENCHMARK_SECONDS, self.left())))
        self.speed = costs.measured_speed(output) if output else None


def done(command: Sequence[str], limit: float) -> str:
    """Run a command for at most `limit` seconds; returns "done after 9 s", or how it failed or was stopped."""
    started = time.monotonic()
    with subprocess.Popen(command) as process:
        try:
            # One second at a time: Python would not see a signal that arrives just before an endless wait.
            while (status := process.poll()) is None:
                if time.monotonic() - started >= limit:
                    return f"stopped at its limit of {limit:.0f} s; the same command goes on"
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(min(1.0, max(0.01, limit)))
        finally:
            process.kill()  # if this process was interrupted, too
    outcome = "done" if status == 0 else f"failed with status {status}"
    return f"{outcome} after {time.monotonic() - started:.0f} s"


@contextlib.contextmanager
def _terminated_like_ctrl_c() -> Iterator[None]:
    """Let SIGTERM end the runs that were started, as Ctrl-C does, instead of leaving them running without a limit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _plan(job: Job, places: Places) -> Plan:
    return make_plan(job.recipe, "fast" if places.rehearse else job.profile, job.seed, places.rehearse)


def _path(job: Job, places: Places) -> Path:
    """Where the record of a job is or will be; for folds, their run must have its record."""
    plan = _plan(job, places)
    study = study_of(plan)
    fingerprint = study.fingerprint(plan, None if places.rehearse else job.data, places.download)
    path = record_path(study.identity(plan, fingerprint), places.runs)
    return record_path(folding.fold_identity(read_record(path)), places.runs) if job.folds else path


def recorded(job: Job, places: Places) -> bool:
    """Whether a job has its record, for the data found on this machine."""
    if job.folds and not _path(job.run, places).exists():
        return False
    return _path(job, places).exists()


def still_needs(job: Job, places: Places, speed: float | None) -> float:
    """Expected seconds of a job, minus the share that its newest checkpoint has done.

    They are those of the slowest run of the same recipe, profile and data on this hardware, if there is a record of one;
    otherwise they follow from the network's multiply-adds and `speed`, as in `softshare.studies.costs`.
    """
    plan = _plan(job, places)
    if job.folds:
        return STARTUP + costs.fold_seconds(plan, places.on_cuda, speed)
    seconds = _measured(job, places) or costs.expected_seconds(plan, places.on_cuda, speed)
    steps = plan.settings.epochs * math.ceil(study_of(plan).examples(plan) / plan.settings.batch_size)
    folder = checkpoints_folder(_path(job, places), places.checkpoints)
    found = [int(path.name[5:13]) for path in folder.glob("step-*.safetensors") if path.name[5:13].isdecimal()]
    return STARTUP + (1 - min(1.0, max(found, default=0) / steps)) * seconds


def _measured(job: Job, places: Places) -> float | None:
    """How long the slowest recorded run took that differs from a job only by seed or data set, on this hardware."""
    profile = "fast" if places.rehearse else job.profile
    runs = [record.execution for record in find_records(_path(job, places).parent, job.recipe, profile)]
    # The seconds of a run that was interrupted count all its processes, which may have been elsewhere.
    alike = [run for run in runs if run.get("hardware") == _hardware(places) and "earlier" not in run]
    return max((float(run["seconds"]) for run in alike if "seconds" in run), default=None)


def _hardware(places: Places) -> str:
    return torch.cuda.get_device_name(places.device) if places.on_cuda else processor_name()


def _benchmark_output(places: Places) -> Path | None:
    if places.runs:
        return Path(places.runs) / "benchmarks" / "benchmark.json"
    return None if places.rehearse else default_output(_hardware(places))


def _is_full_benchmark(path: Path) -> bool:
    try:
        return not load_benchmark(path)["quick"]
    except (OSError, ValueError):
        return False
