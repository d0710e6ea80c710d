"""The GPU list: what is worth a GPU's time, in order of value, as far as time allows.

Every run is a separate process under a time limit. It writes checkpoints and, at the end, a record, so the same command
resumes where the last one stopped. A rehearsal executes the same list at toy sizes on any machine.
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
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from .. import files
from ..models import Network
from ..speed.benchmark import default_output, load_benchmark
from ..training.processor import interpreter, processor_name
from . import costs
from .recipes import RECIPES, make_plan, study_of
from .records import record_path
from .running import checkpoints_folder
from .study import Plan

_WORTH_STARTING = 300.0  # seconds


class Job(NamedTuple):
    """One run of the list.

    Attributes:
        recipe, seed: see `softshare.studies.running.train`.
        profile: "short" or "paper"; a rehearsal uses "fast" instead.
        data: the data set; None: the recipe's first.
    """

    recipe: str
    seed: int
    profile: str = "paper"
    data: str | None = None

    def __str__(self) -> str:
        return f"{self.recipe}, {self.profile}, seed {self.seed}" + (f", {self.data}" if self.data else "")


@dataclass(frozen=True)
class Entry:
    """One entry: runs that belong together, or the benchmark.

    Attributes:
        title: what it is for.
        jobs: none for the benchmark.
        small: whether networks are so small that several should train side by side: a single one leaves a GPU waiting for
            the next kernel launch.
    """

    title: str
    jobs: tuple[Job, ...] = ()
    small: bool = False


@dataclass(frozen=True)
class Places:
    """Where a list runs and what it may use.

    Attributes:
        device: "cuda" or "cpu".
        runs: folder of records; the benchmark's goes to its subfolder "benchmarks". Default: data/runs, data/benchmarks.
        checkpoints: see `softshare.studies.running.checkpoints_folder`.
        parallel: how many small networks train side by side; the estimate assumes that they do not slow each other down,
            which was not measured.
        download: whether to fetch data sets if no copy is found.
        rehearse: toy sizes of profile "fast", every step executed.

    Raises RuntimeError inside an application, which has no Python interpreter to start the runs with.
    """

    device: str = "cpu"
    runs: str | Path = ""
    checkpoints: str | Path = ""
    parallel: int = 5
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

    def command(self, job: Job, quiet: bool) -> list[str]:
        """The command that runs a job in a separate process."""
        profile = "fast" if self.rehearse else job.profile
        command = [*self.itself(), "run", job.recipe, "--seed", str(job.seed), "--profile", profile]
        command += ["--device", self.device, "--runs", str(self.runs), "--checkpoints", str(self.checkpoints)]
        command += ["--data", job.data] if job.data and not self.rehearse else []
        return command + ["--download"] * self.download + ["--rehearse"] * self.rehearse + ["--quiet"] * quiet


def entries() -> list[Entry]:
    """The list, from the top."""
    curriculum = [Job(name, seed) for seed in range(10, 15) for name in ("CNN", "SCNN")]
    found = [
        Entry("benchmark"),
        Entry("shortest-path curriculum, five seeds", tuple(curriculum), small=True),
        Entry("similarity and folding, 30 epochs", (Job("SWRN 40-8-8", 0, "short"),)),
    ]
    others = [Job(name, seed) for seed in range(10, 15) for name in ("SCNN lambda 0.01", "SCNN-1")]
    found.append(Entry("the curriculum regularised, and with one template", tuple(others), small=True))
    for seed in range(3):  # seed by seed, so that every pair is complete before the next one starts
        pair = (Job("WRN 28-6 cutout", seed), Job("SWRN 28-6-2 cutout", seed))
        found.append(Entry(f"fewer parameters at equal width, seed {seed}", pair))
    found.append(Entry("similarity and folding", (Job("SWRN 40-8-8", 0),)))
    found += [Entry("width 10 with cutout", (Job(name, 0),)) for name in ("WRN 28-10 cutout", "SWRN 28-10-2 cutout")]
    dropout = [recipe.name for recipe in RECIPES.values() if Network.parse(recipe.network).dropout]
    for data in ("cifar10", "cifar100"):
        found += [Entry("dropout rows", (Job(name, 0, data=data),)) for name in dropout]
    return found


def run_list(minutes: float, places: Places) -> int:
    """Work down the list, skipping entries that are not expected to fit into the time left.

    If time is left at the end, the first skipped entry is started after all: its checkpoint is kept, and the rest may fit
    next time.

    Returns 0, or 1 if a run failed by itself. Raises ValueError for minutes or `Places.parallel` not above 0.
    """
    if not minutes > 0 or places.parallel < 1:
        raise ValueError(f"minutes must be above 0 and parallel at least 1, got {minutes} and {places.parallel}")
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
        passed: list[tuple[Entry, list[Job], float]] = []  # skipped so far
        with _terminated_like_ctrl_c():
            for entry in entries():
                if not entry.jobs:
                    self.benchmark(entry)
                    continue
                waiting = self.waiting(entry)
                needs = sum(still_needs(job, self.places, self.speed) for job in waiting)
                needs /= self.places.parallel if entry.small else 1
                if waiting and needs > self.left():
                    passed.append((entry, waiting, needs))
                    outcome = f"skipped: needs about {needs / 60:.0f} min"
                    self.tell(entry, ", ".join(map(str, waiting)), outcome)
                elif waiting:
                    self.train(entry, waiting, needs)
            if passed and self.left() > _WORTH_STARTING:
                self.train(*passed[0])
        print(f"\n{'entry':50} {'run':34} outcome")
        for title, what, outcome in self.outcomes:
            print(f"{title:50} {what[:34]:34} {outcome}")
        return int(any(outcome.startswith("failed") for _, _, outcome in self.outcomes))

    def waiting(self, entry: Entry) -> list[Job]:
        """The jobs of an entry that have no record yet and whose data are available; the others do not stop the list."""
        found = []
        for job in entry.jobs:
            try:
                if recorded(job, self.places):
                    self.tell(entry, str(job), "has its record")
                else:
                    found.append(job)
            except (OSError, ValueError) as error:
                self.tell(entry, str(job), f"failed: {error}")
        return found

    def tell(self, entry: Entry, what: str, outcome: str) -> None:
        self.outcomes.append((entry.title, what, outcome))
        print(f"[{max(0.0, self.left()) / 60:.1f} min left] {entry.title}: {what}: {outcome}", flush=True)

    def train(self, entry: Entry, waiting: Sequence[Job], needs: float) -> None:
        side = self.places.parallel if entry.small else 1
        limit = min(self.left(), 600 + 3 * needs)
        for job, outcome in side_by_side(waiting, self.places, side, limit):
            self.tell(entry, str(job), outcome)

    def benchmark(self, entry: Entry) -> None:
        output = _benchmark_output(self.places)
        if output and _is_full_benchmark(output):
            self.tell(entry, "pairwise timings", "has its record")
        else:
            outcome, seconds = _benchmark(self.places, output, self.left())
            self.tell(entry, "pairwise timings", f"{outcome} after {seconds:.0f} s")
        self.speed = costs.measured_speed(output) if output else None


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


def _path(job: Job, places: Places) -> tuple[Plan, Path]:
    """The plan of a job, and where its record is or will be."""
    plan = make_plan(job.recipe, "fast" if places.rehearse else job.profile, job.seed, places.rehearse)
    study = study_of(plan)
    fingerprint = study.fingerprint(plan, None if places.rehearse else job.data, places.download)
    return plan, record_path(study.identity(plan, fingerprint), places.runs)


def still_needs(job: Job, places: Places, speed: float | None) -> float:
    """Expected seconds of a job, minus the share that its newest checkpoint has done."""
    plan, path = _path(job, places)
    steps = plan.settings.epochs * math.ceil(study_of(plan).examples(plan) / plan.settings.batch_size)
    folder = checkpoints_folder(path, places.checkpoints)
    found = [int(path.name[5:13]) for path in folder.glob("step-*.safetensors") if path.name[5:13].isdecimal()]
    share = min(1.0, max(found, default=0) / steps)
    return (1 - share) * costs.expected_seconds(plan, places.device.startswith("cuda"), speed)


def recorded(job: Job, places: Places) -> bool:
    """Whether a job has its record, for the data found on this machine."""
    return _path(job, places)[1].exists()


def _benchmark_output(places: Places) -> Path | None:
    if places.runs:
        return Path(places.runs) / "benchmarks" / "benchmark.json"
    on_cuda = places.device.startswith("cuda")
    hardware = torch.cuda.get_device_name(places.device) if on_cuda else processor_name()
    return None if places.rehearse else default_output(hardware)


def _benchmark(places: Places, output: Path | None, left: float) -> tuple[str, float]:
    command = [*places.itself(), "bench", "--device", places.device.partition(":")[0]]
    command += ["--quick"] if places.rehearse else []
    command += ["--output", str(output)] if output else []
    started = time.monotonic()
    try:
        status = subprocess.run(command, timeout=max(1.0, min(1800.0, left))).returncode
    except subprocess.TimeoutExpired:
        return "stopped at its limit", time.monotonic() - started
    return "done" if status == 0 else f"failed with status {status}", time.monotonic() - started


def side_by_side(waiting: Sequence[Job], places: Places, side: int, limit: float) -> list[tuple[Job, str]]:
    """Run up to `side` jobs at once, each in a separate process; all are stopped `limit` seconds from now."""
    deadline = time.monotonic() + limit
    going: list[subprocess.Popen[bytes]] = []

    def outcome_of(job: Job) -> str:
        started = time.monotonic()
        if started >= deadline:
            return "not started: no time left"
        with subprocess.Popen(places.command(job, quiet=side > 1 or places.rehearse)) as process:
            going.append(process)
            try:
                status = process.wait(deadline - started)
            except subprocess.TimeoutExpired:
                process.kill()
                return "stopped at its limit; the same command resumes it"
        outcome = "done" if status == 0 else f"failed with status {status}"
        return f"{outcome} after {time.monotonic() - started:.0f} s"

    with ThreadPoolExecutor(side) as pool:
        try:
            outcomes = [pool.submit(outcome_of, job) for job in waiting]
            # One second at a time: Python would not see a signal that arrives just before an endless wait.
            while wait(outcomes, timeout=1).not_done:
                pass
            return [(job, outcome.result()) for job, outcome in zip(waiting, outcomes, strict=True)]
        except BaseException:  # this process is interrupted: end its children too
            deadline = 0.0
            pool.shutdown(wait=False, cancel_futures=True)
            for process in going:
                process.kill()
            raise


def _is_full_benchmark(path: Path) -> bool:
    try:
        return not load_benchmark(path)["quick"]
    except (OSError, ValueError):
        return False
