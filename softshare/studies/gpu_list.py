"""The GPU list: what is worth a GPU's time, in order of value, as far as the minutes reach for which a GPU is lent.

Every job has a limit of its own; the same command goes on where the last one stopped. A rehearsal executes the list at toy
sizes on any machine. For a machine that stays, or a cluster, there is the pipeline (`softshare.studies.pipeline`), which
takes jobs, costs and order from here.

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
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from .. import files
from ..speed.benchmark import default_output, load_benchmark
from . import costs
from .jobs import STARTUP, Job, Places, has_weights, plan_of_job, print_costs, recorded, still_needs
from .paths import HALF, LADDER, named
from .recipes import RECIPES

BENCHMARK_SECONDS, BENCHMARK_LIMIT = 90.0, 180.0
"""How long the benchmark is assumed to take on a GPU, and its limit."""

MARGIN = 1.25
"""A run that cannot go on elsewhere is begun only if this multiple of its expected time is left."""

CARRY = 12.0
"""The largest checkpoint, in MB, that is taken to outlive a lent machine."""

_WORTH_STARTING = 60.0  # seconds of training


@dataclass(frozen=True)
class Entry:
    """One entry: jobs that belong together, in order, or the benchmark.

    Attributes:
        title: what it is for.
        jobs: none for the benchmark.
    """

    title: str
    jobs: tuple[Job, ...] = ()


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


def run_list(minutes: float, places: Places, carry: float = CARRY) -> int:
    """Work down the list: do what is expected to fit into the time left, start what a later call can continue, skip the
    rest.

    A run whose checkpoints are larger than `carry` MB, of which up to two are kept, is begun only if it fits into the time
    left. Returns 0, or 1 if a job failed by itself.

    Raises:
        ValueError: `minutes` or `carry` that are not above 0.
        OSError: nothing can be written to a folder of `places`.
    """
    if not minutes > 0 or not carry > 0:
        raise ValueError(f"minutes and carry must be above 0, got {minutes} and {carry}")
    for folder in (places.runs, places.checkpoints):
        if folder:
            files.writable(Path(folder))
    return _List(time.monotonic() + 60 * minutes, places, carry).work()


def tell_costs(places: Places) -> float:
    """Print how long the jobs without a record are expected to take on this machine, and start nothing; returns hours."""
    output = benchmark_output(places)
    speed = costs.measured_speed(output, quick=places.rehearse) if output else None
    return print_costs([(entry.title, entry.jobs) for entry in entries() if entry.jobs], places, speed)


class _List:
    """One call of `run_list`."""

    def __init__(self, deadline: float, places: Places, carry: float) -> None:
        self.deadline, self.places, self.carry = deadline, places, carry
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
        if job.folds and not has_weights(job, places):
            return "skipped: the weights of its network are not here"
        needs = whole = still_needs(job, places, self.speed)
        size = costs.checkpoint_bytes(plan_of_job(job, places))
        # Checkpoints that outlive this machine are worth writing often.
        command = places.command(job, 20.0 if size <= 1e6 * min(CARRY, self.carry) else 120.0)
        goes_on = not job.folds and size <= 1e6 * self.carry
        if goes_on and self.left() > STARTUP + _WORTH_STARTING:
            return done(command, min(self.left(), 120 + 2 * needs), "the same command goes on")
        # What is made of its weights must fit, too.
        whole += sum(still_needs(each, places, self.speed) for each in entry.jobs if each.folds and each.run == job)
        if MARGIN * whole > self.left():
            return f"skipped: needs about {math.ceil(whole / 60)} min, {self.left() / 60:.1f} min left"
        return done(command, self.left(), "it starts afresh next time")

    def benchmark(self) -> str:
        output, rehearse = benchmark_output(self.places), self.places.rehearse
        if output and _is_full_benchmark(output):
            outcome = "already recorded"
        elif self.left() < BENCHMARK_SECONDS and not rehearse:
            outcome = f"skipped: needs about {BENCHMARK_SECONDS:.0f} s"
        else:
            command = [
                self.places.python(),
                "-m",
                "softshare",
                "bench",
                "--device",
                self.places.device.partition(":")[0],
            ]
            command += ["--quick"] if rehearse else ["--rounds", "5", "--no-compile"]
            command += ["--output", str(output)] if output else []
            outcome = done(command, min(BENCHMARK_LIMIT, self.left()), "it starts afresh next time")
        self.speed = costs.measured_speed(output, quick=rehearse) if output else None
        return outcome


def done(command: Sequence[str], limit: float, next_time: str) -> str:
    """Run a command for at most `limit` seconds; returns "done after 9 s", or how it failed or was stopped."""
    started, process = time.monotonic(), None
    try:
        with _held_back():
            process = subprocess.Popen(command)
        # One second at a time: Python would not see a signal that arrives just before an endless wait.
        while (status := process.poll()) is None:
            if time.monotonic() - started >= limit:
                return f"stopped at its limit of {limit:.0f} s; {next_time}"
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


def benchmark_output(places: Places) -> Path | None:
    """Where the benchmark of this hardware is or will be; None for a rehearsal that leaves none."""
    usual = default_output(places.hardware)
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
