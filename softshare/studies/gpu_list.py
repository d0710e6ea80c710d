"""The GPU list: what is worth a GPU's time, in order of value, as far as time allows.

Every run, and every fold of a trained network, is a process of its own under a limit of its own. Runs write checkpoints and,
at the end, records, so the same command goes on where the last one stopped. A rehearsal executes the same list at toy sizes
on any machine.

Runs take turns instead of running side by side: on an H100, ten processes that trained grid networks took as long as they
would have taken one after another.
"""

from __future__ import annotations

import contextlib
import math
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import files
from ..speed.benchmark import default_output, load_benchmark
from ..training.processor import interpreter, processor_name
from . import costs, folding
from .paths import HALF, LADDER, named
from .recipes import RECIPES, make_plan, study_of
from .records import find_records, read_record, record_path
from .running import checkpoints_folder
from .study import Plan

STARTUP = 25.0
"""Seconds that a process needs before its first step and after its last; assumed, not measured."""

BENCHMARK_SECONDS, BENCHMARK_LIMIT = 90.0, 180.0
"""How long the benchmark is assumed to take on a GPU, and its limit."""

MARGIN = 1.25
"""A run that cannot go on elsewhere is begun only if this multiple of its expected time is left."""

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
        carry: the largest checkpoint, in MB, that will still exist at the next call; up to two are kept per run. A run with
            a larger one is begun only if it fits into the time left.
        download: whether to fetch data sets if no copy is found.
        rehearse: toy sizes of profile "fast", every step executed; of several seeds only the first.
        fingerprints: of the data of each job, found once.

    Raises RuntimeError inside an application, which has no Python interpreter to start the runs with.
    """

    device: str = "cpu"
    runs: str | Path = ""
    checkpoints: str | Path = ""
    carry: float = math.inf
    download: bool = False
    rehearse: bool = False
    fingerprints: dict[Any, str] = field(default_factory=dict, repr=False, compare=False)

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

    deep = Job("SWRN 40-8-8", 1, "short")  # seed 0 was run before the claims that it would judge
    shuffled = Job("SWRN 40-8-8 shuffled", 1, "short")
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
    explored = ("SCNN lambda 0.01 per pair", "SCNN unit", "CNN gain", "SCNN shuffled")
    readings = [named(name, each) for each in HALF[1:] for name in ("CNN", "SCNN")]
    found += [
        Entry("other curricula", (*pairs(others, range(10, 13)), Job("SCNN 100 layers", 10))),
        Entry("curricula explored", pairs(explored, range(10, 13), "short")),
        Entry("ingredients of search", pairs(tuple(LADDER), range(10, 13), "short")),
        Entry("other readings of the curriculum", pairs(("CNN", "SCNN", *readings), (10,), "short")),
        Entry("sharing at width 6, 30 epochs, three seeds", pairs(widths(6), range(3), "short")),
        Entry("sharing at width 10, 30 epochs", pairs(widths(10), (0,), "short")),
        Entry("sharing at width 6", pairs(("SWRN 28-6-2 cutout", "WRN 28-6 cutout", "WRN 16-6 cutout"), (0,))),
    ]
    dropout = [recipe.name for recipe in RECIPES.values() if recipe.network.endswith("*")]
    for data in ("cifar10", "cifar100"):
        found += [Entry("dropout rows", (Job(name, 0, data=data),)) for name in dropout]
    return found


def run_list(minutes: float, places: Places) -> int:
    """Work down the list: do what is expected to fit into the time left, start what a later call can continue, skip the
    rest.

    Jobs that were stopped at their limit get a second turn at the end. Returns 0, or 1 if a job failed by itself.

    Raises:
        ValueError: minutes or `Places.carry` that are not above 0.
        OSError: nothing can be written to a folder of `places`.
    """
    if not minutes > 0 or not places.carry > 0:
        raise ValueError(f"minutes and carry must be above 0, got {minutes} and {places.carry}")
    for folder in (places.runs, places.checkpoints):
        if folder:
            files.writable(Path(folder))
    return _List(time.monotonic() + 60 * minutes, places).work()


def tell_costs(places: Places) -> float:
    """Print how long the jobs without a record are expected to take on this machine, and start nothing; returns hours."""
    output, total = _benchmark_output(places), 0.0
    speed = costs.measured_speed(output, quick=places.rehearse) if output else None
    for entry in entries():
        hours, waiting, missing = 0.0, 0, 0
        for job in entry.jobs:
            try:
                if not recorded(job, places):
                    hours += still_needs(job, places, speed) / 3600
                    waiting += 1
            except (OSError, ValueError):
                missing += 1
        told = f"{waiting} of {len(entry.jobs)} jobs to do" if entry.jobs else "timings"
        told += f", {missing} without data" if missing else ""
        print(f"{entry.title:50} {told:34} {hours:9.1f} h", flush=True)
        total += hours
    how = "from the speed that was measured on it" if speed else "from an assumed speed, not measured"
    print(f"{total:.1f} h in all on {_hardware(places)}, {how}")
    return total


class _List:
    """One call of `run_list`."""

    def __init__(self, deadline: float, places: Places) -> None:
        self.deadline, self.places = deadline, places
        self.outcomes: dict[tuple[str, str], str] = {}  # by entry and job
        self.speed: costs.Speed | None = None

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def work(self) -> int:
        jobs = [(job, entry) for entry in entries() for job in entry.jobs]
        if self.places.rehearse:  # one seed of each, on the one data set of profile fast
            jobs = list({(job.recipe, job.folds): (job, entry) for job, entry in reversed(jobs)}.values())[::-1]
        try:
            with _terminated_like_ctrl_c():
                for entry in entries():
                    if not entry.jobs:
                        self.attempt("pairwise timings", entry, self.benchmark)
                for job, entry in jobs:
                    self.attempt(self.named(job), entry, partial(self.outcome, job, entry))
                for job, entry in jobs:
                    if (
                        self.outcomes[entry.title, self.named(job)].startswith(_STOPPED)
                        and self.left() > _WORTH_STARTING
                    ):
                        self.attempt(self.named(job), entry, partial(self.outcome, job, entry))
        finally:
            print(f"\n{'entry':50} {'job':44} outcome")
            for (title, what), outcome in self.outcomes.items():
                print(f"{title:50} {what[:44]:44} {outcome}")
        return int(any(outcome.startswith("failed") for outcome in self.outcomes.values()))

    def named(self, job: Job) -> str:
        return f"{job} (rehearsal)" if self.places.rehearse else str(job)

    def attempt(self, what: str, entry: Entry, act: Callable[[], str]) -> None:
        """Do something and tell its outcome; errors such as missing data cost no other job its turn."""
        try:
            outcome = act()
        except (OSError, ValueError) as error:
            outcome = f"failed: {error}"
        self.outcomes[entry.title, what] = outcome
        print(f"[{max(0.0, self.left()) / 60:.1f} min left] {entry.title}: {what}: {outcome}", flush=True)

    def outcome(self, job: Job, entry: Entry) -> str:
        """Do one job, if there is need and time; returns what became of it."""
        places = self.places
        if self.left() <= 0:
            return "skipped: no time left"
        if recorded(job, places):
            return "already recorded"
        if job.folds and not recorded(job.run, places):
            return "skipped: its network is not trained yet"
        if job.folds and not any(checkpoints_folder(_path(job.run, places), places.checkpoints).glob("step-*")):
            return "skipped: the weights of its network are not here"
        needs = whole = still_needs(job, places, self.speed)
        goes_on = not job.folds and costs.checkpoint_bytes(_plan(job, places)) <= 1e6 * places.carry
        if goes_on and self.left() > STARTUP + _WORTH_STARTING:
            return done(places.command(job), min(self.left(), 120 + 2 * needs), "the same command goes on")
        # What is made of its weights must fit, too.
        whole += sum(still_needs(each, places, self.speed) for each in entry.jobs if each.folds and each.run == job)
        if MARGIN * whole > self.left():
            return f"skipped: needs about {math.ceil(whole / 60)} min, {self.left() / 60:.1f} min left"
        return done(places.command(job), self.left(), "it starts afresh next time")

    def benchmark(self) -> str:
        output, rehearse = _benchmark_output(self.places), self.places.rehearse
        if output and _is_full_benchmark(output):
            outcome = "already recorded"
        elif self.left() < BENCHMARK_SECONDS and not rehearse:
            outcome = f"skipped: needs about {BENCHMARK_SECONDS:.0f} s"
        else:
            command = [*self.places.itself(), "bench", "--device", self.places.device.partition(":")[0]]
            command += ["--quick"] if rehearse else ["--rounds", "5", "--no-compile"]
            command += ["--output", str(output)] if output else []
            outcome = done(command, min(BENCHMARK_LIMIT, self.left()), "it starts afresh next time")
        self.speed = costs.measured_speed(output, quick=rehearse) if output else None
        return outcome


_STOPPED = "stopped at its limit"


def done(command: Sequence[str], limit: float, next_time: str) -> str:
    """Run a command for at most `limit` seconds; returns "done after 9 s", or how it failed or was stopped."""
    started, process = time.monotonic(), None
    try:
        with _held_back():
            process = subprocess.Popen(command)
        # One second at a time: Python would not see a signal that arrives just before an endless wait.
        while (status := process.poll()) is None:
            if time.monotonic() - started >= limit:
                return f"{_STOPPED} of {limit:.0f} s; {next_time}"
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(min(1.0, max(0.01, limit)))
    finally:
        if process:  # if this process was interrupted, too
            process.kill()
            process.wait()
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


@contextlib.contextmanager
def _held_back() -> Iterator[None]:
    """Let SIGTERM and Ctrl-C wait until the end: between a process's start and its assignment they would leave it behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, lambda received_number, _: received.append(received_number)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
        if received:
            signal.raise_signal(received[0])


def _plan(job: Job, places: Places) -> Plan:
    return make_plan(job.recipe, "fast" if places.rehearse else job.profile, job.seed, places.rehearse)


def _path(job: Job, places: Places) -> Path:
    """Where the record of a job is or will be; for folds, their run must have its record."""
    plan = _plan(job, places)
    study, data = study_of(plan), None if places.rehearse else job.data
    key = (plan.recipe.study, plan.recipe.data, plan.profile, plan.seed, data)
    if key not in places.fingerprints:
        places.fingerprints[key] = study.fingerprint(plan, data, places.download)
    path = record_path(study.identity(plan, places.fingerprints[key]), places.runs)
    return record_path(folding.fold_identity(read_record(path)), places.runs) if job.folds else path


def recorded(job: Job, places: Places) -> bool:
    """Whether a job has its record, for the data found on this machine; for folds, of the network that is recorded now.

    Raises ValueError for a damaged record.
    """
    if job.folds and not _path(job.run, places).exists():
        return False
    path = _path(job, places)
    if not path.exists():
        return False
    try:
        record = read_record(path)
        if record.snapshots:
            record.similarity()
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"{error}; move {path.name} away to have it made again") from error
    of = record.execution.get("record folded")
    return not job.folds or of in (None, files.file_checksum(_path(job.run, places)))


def still_needs(job: Job, places: Places, speed: costs.Speed | None) -> float:
    """Expected seconds of a job, minus the share that its newest checkpoint has done.

    They are those of the slowest run that differs only by its seed on this hardware, if there is a record of one; otherwise
    they follow from the network's multiply-adds and `speed`, as in `softshare.studies.costs`.
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
    """How long the slowest recorded run took that differs from a job only by its seed or data set, on this hardware."""
    plan, folder = _plan(job, places), _path(job, places).parent
    chosen = study_of(plan).identity(plan).chosen
    runs = [
        record.execution
        for record in find_records(folder, job.recipe, plan.profile)
        if record.identity.chosen == chosen and record.recipe == plan.recipe.name
    ]
    # The seconds of a run that was interrupted count all its processes, which may have been elsewhere.
    alike = [run for run in runs if run.get("hardware") == _hardware(places) and "earlier" not in run]
    return max((float(run["seconds"]) for run in alike if "seconds" in run), default=None)


def _hardware(places: Places) -> str:
    return torch.cuda.get_device_name(places.device) if places.on_cuda else processor_name()


def _benchmark_output(places: Places) -> Path | None:
    """Where the benchmark of this hardware is or will be; None for a rehearsal that leaves none."""
    usual = default_output(_hardware(places))
    if places.runs:
        return Path(places.runs) / "benchmarks" / usual.name
    return None if places.rehearse else usual


def _is_full_benchmark(path: Path) -> bool:
    """Whether there is one of steps as they are made now: older records do not say whether steps were captured."""
    try:
        record = load_benchmark(path)
        return not record["quick"] and "captured" in record["steps"]
    except (OSError, ValueError):
        return False
