"""The GPU list: what is worth a GPU's time, in order of value, as far as the time goes.

Every run is a process of its own under a time limit, writes a record when it is done and checkpoints before, so the same
command goes on where the last one stopped. A rehearsal executes the same list at toy sizes on any machine.
"""

from __future__ import annotations

import contextlib
import math
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from . import recipes
from .benchmark import default_output, load_benchmark
from .experiments import checkpoints_folder
from .processor import processor_name
from .records import find_records, runs_folder, slug

Run = tuple[str, int, "str | None"]
"""Recipe, seed and data set; None: the recipe's first."""

_WORTH_BEGINNING = 300.0  # seconds


@dataclass(frozen=True)
class Entry:
    """One entry: runs that belong together, or the benchmark.

    Attributes:
        title: what it is for.
        runs: none for the benchmark.
        small: whether networks are so small that several train side by side: one alone leaves a GPU waiting for the next
            kernel to be launched.
    """

    title: str
    runs: tuple[Run, ...] = ()
    small: bool = False


def entries() -> list[Entry]:
    """The list, from the top."""
    curriculum = [(name, seed, None) for seed in range(5) for name in ("CNN", "SCNN", "SCNN lambda 0.01")]
    found = [Entry("benchmark"), Entry("shortest-path curriculum, five seeds", tuple(curriculum), small=True)]
    for seed in range(3):  # seed by seed, so that every pair is complete before the next one begins
        pair = (("WRN 28-6 cutout", seed, None), ("SWRN 28-6-2 cutout", seed, None))
        found.append(Entry(f"fewer parameters at equal width, seed {seed}", pair))
    found.append(Entry("similarity and folding", (("SWRN 40-8-8", 0, None),)))
    found += [Entry("width 10 with cutout", ((name, 0, None),)) for name in ("WRN 28-10 cutout", "SWRN 28-10-2 cutout")]
    dropout = [name for name in recipes.RECIPES if name.endswith("*")]
    found += [Entry("dropout rows", ((name, 0, data),)) for data in ("cifar10", "cifar100") for name in dropout]
    return found


def run_list(
    hours: float,
    rehearse: bool = False,
    device: str = "cpu",
    runs: str | Path = "",
    checkpoints: str | Path = "",
    parallel: int = 5,
    download: bool = False,
) -> int:
    """Work down the list; an entry that is not expected to fit into the time left is passed over.

    If time is left at the end, the first entry that was passed over is begun all the same: its checkpoint is kept, and what
    it then still needs may fit the next time.

    Args:
        hours: how much time there is.
        rehearse: toy sizes (profile "fast" in place of "paper"), every step executed.
        device: "cuda" or "cpu".
        runs: folder of records; the benchmark's goes to its subfolder "benchmarks". Default: data/runs, data/benchmarks.
        checkpoints: see `softshare.experiments.checkpoints_folder`.
        parallel: how many small networks train side by side; the estimate takes it that they do not slow each other down,
            which was not measured.
        download: fetch data sets of which no copy is found.

    Returns: 0, or 1 if a run failed by itself. Raises ValueError for hours or parallel not above 0.
    """
    if not hours > 0 or parallel < 1:
        raise ValueError(f"hours must be above 0 and parallel at least 1, got {hours} and {parallel}")
    deadline = time.monotonic() + 3600 * hours
    profile = "fast" if rehearse else "paper"
    speed: float | None = None
    outcomes: list[tuple[str, str, str]] = []

    def tell(title: str, what: str, outcome: str) -> None:
        outcomes.append((title, what, outcome))
        print(f"[{max(0.0, deadline - time.monotonic()) / 3600:.2f} h left] {title}: {what}: {outcome}", flush=True)

    def train(entry: Entry, waiting: Sequence[Run], needs: float) -> None:
        side = parallel if entry.small else 1
        limit = min(deadline - time.monotonic(), 600 + 3 * needs)
        command = ["--profile", profile, "--device", device, "--runs", str(runs), "--checkpoints", str(checkpoints)]
        command += ["--download"] * download + ["--quiet"] * (side > 1 or rehearse)
        for run, outcome in _side_by_side(waiting, command, side, limit, with_data=not rehearse):
            tell(entry.title, _name(run), outcome)

    passed: list[tuple[Entry, list[Run], float]] = []
    with _terminated_like_ctrl_c():
        for entry in entries():
            if not entry.runs:
                output = _benchmark_output(rehearse, device, runs)
                if output and _is_full_benchmark(output):
                    tell(entry.title, "pairwise timings", "has its record")
                else:
                    outcome, seconds = _benchmark(rehearse, device, output, deadline)
                    tell(entry.title, "pairwise timings", f"{outcome} after {seconds:.0f} s")
                speed = _measured_speed(output) if output else None
                continue
            waiting = [run for run in entry.runs if not _recorded(*run, profile, runs)]
            for run in entry.runs:
                if run not in waiting:
                    tell(entry.title, _name(run), "has its record")
            needs = sum(_still_needs(run, profile, device, speed, checkpoints) for run in waiting)
            needs /= parallel if entry.small else 1
            if waiting and needs > deadline - time.monotonic():
                passed.append((entry, waiting, needs))
                tell(entry.title, ", ".join(map(_name, waiting)), f"passed over: needs about {needs / 3600:.2f} h")
            elif waiting:
                train(entry, waiting, needs)
        if passed and deadline - time.monotonic() > _WORTH_BEGINNING:
            train(*passed[0])
    print(f"\n{'entry':38} {'run':34} outcome")
    for title, what, outcome in outcomes:
        print(f"{title:38} {what[:34]:34} {outcome}")
    return int(any(outcome.startswith("failed") for _, _, outcome in outcomes))


@contextlib.contextmanager
def _terminated_like_ctrl_c() -> Iterator[None]:
    """Let SIGTERM end the runs that were started, as Ctrl-C does, and not leave them going without a limit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _name(run: Run) -> str:
    name, seed, data = run
    return f"{name}, seed {seed}" + (f", {data}" if data else "")


def _still_needs(run: Run, profile: str, device: str, speed: float | None, checkpoints: str | Path) -> float:
    """Expected seconds, less what a checkpoint of the run has behind it."""
    name, seed, _ = run
    plan = recipes.plan(name, profile, seed)
    steps = plan.settings.epochs * math.ceil((plan.sizes.get("train") or 50_000) / plan.settings.batch_size)
    folder = checkpoints_folder(Path(f"{slug(name)}-{profile}-s{seed}-"), checkpoints)
    found = [int(path.name[5:13]) for path in folder.parent.glob(f"{folder.name}*/step-*.safetensors")]
    share = min(1.0, max(found, default=0) / steps)
    return (1 - share) * recipes.expected_seconds(plan, device.startswith("cuda"), speed)


def _recorded(name: str, seed: int, data: str | None, profile: str, runs: str | Path) -> bool:
    wanted = recipes.plan(name, profile, seed)
    title = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}.get(data or "".join(wanted.recipe.data[:1]))
    return any(
        record.config == wanted.config()
        and record.seed == seed
        and (title is None or profile == "fast" or record.data["source"].split(" (")[0] == title)
        for record in find_records(runs_folder(runs, profile), name, profile)
    )


def _benchmark_output(rehearse: bool, device: str, runs: str | Path) -> Path | None:
    if runs:
        return Path(runs) / "benchmarks" / "benchmark.json"
    hardware = torch.cuda.get_device_name(device) if device.startswith("cuda") else processor_name()
    return None if rehearse else default_output(hardware)


def _benchmark(rehearse: bool, device: str, output: Path | None, deadline: float) -> tuple[str, float]:
    command = [sys.executable, "-m", "softshare.benchmark", "--device", device.partition(":")[0]]
    command += ["--quick"] if rehearse else []
    command += ["--output", str(output)] if output else []
    started = time.monotonic()
    try:
        status = subprocess.run(command, timeout=max(1.0, min(1800.0, deadline - started))).returncode
    except subprocess.TimeoutExpired:
        return "stopped at its limit", time.monotonic() - started
    return "done" if status == 0 else f"failed with status {status}", time.monotonic() - started


def _side_by_side(
    waiting: Sequence[Run], arguments: Sequence[str], side: int, limit: float, with_data: bool
) -> list[tuple[Run, str]]:
    """Run up to `side` of the given runs at once; all are stopped `limit` seconds from now."""
    deadline = time.monotonic() + limit
    queue, outcomes = list(waiting), []
    going: dict[Run, tuple[subprocess.Popen[bytes], float]] = {}
    try:
        while queue or going:
            while queue and len(going) < side and time.monotonic() < deadline:
                name, seed, data = run = queue.pop(0)
                command = [sys.executable, "-m", "softshare", "run", name, "--seed", str(seed), *arguments]
                command += ["--data", data] if data and with_data else []
                going[run] = subprocess.Popen(command), time.monotonic()
            for run, (process, started) in list(going.items()):
                if process.poll() is not None:
                    outcome = "done" if process.returncode == 0 else f"failed with status {process.returncode}"
                    outcomes.append((run, f"{outcome} after {time.monotonic() - started:.0f} s"))
                    del going[run]
            if time.monotonic() >= deadline:
                outcomes += [(run, "stopped at its limit; the same command goes on with it") for run in going]
                outcomes += [(run, "not begun: no time left") for run in queue]
                break
            time.sleep(0.05)
    finally:  # also when this process is interrupted
        for process, _ in going.values():
            process.kill()
            process.wait()
    return outcomes


def _is_full_benchmark(path: Path) -> bool:
    try:
        return not load_benchmark(path)["quick"]
    except (OSError, ValueError):
        return False


def _measured_speed(path: Path) -> float | None:
    """Multiply-adds a second in training, from a benchmark's record; None if it holds none."""
    try:
        record = load_benchmark(path)
        steps, forward = record["steps"], record["ceiling"]["multiply-adds an image"]
        return 3 * float(forward) * steps["batch"] / statistics.median(steps["seconds"]["ours"])
    except (OSError, ValueError, KeyError):
        return None
