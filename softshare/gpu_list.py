"""The GPU list: what is worth a GPU's time, in order of value, as far as the time goes.

Every run is a process of its own under a time limit, writes a record when it is done and checkpoints before, so the same
command goes on where the last one stopped. A rehearsal executes the same list at toy sizes on any machine.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from . import recipes
from .benchmark import default_output, load_benchmark
from .processor import processor_name
from .records import find_records, runs_folder


@dataclass(frozen=True)
class Entry:
    """One entry: runs that belong together, or the benchmark.

    Attributes:
        title: what it is for.
        runs: recipe, seed and data set (None: the recipe's first) of each.
        small: whether networks are so small that several train side by side: one alone leaves a GPU waiting for the next
            kernel to be launched.
    """

    title: str
    runs: tuple[tuple[str, int, str | None], ...] = ()
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
) -> int:
    """Work down the list; an entry that is not expected to fit into the time left is passed over.

    Args:
        hours: how much time there is.
        rehearse: toy sizes (profile "fast" in place of "paper"), every step executed.
        device: "cuda" or "cpu".
        runs: folder of records; the benchmark's goes to its subfolder "benchmarks". Default: data/runs, data/benchmarks.
        checkpoints: see `softshare.experiments.checkpoints_folder`.
        parallel: how many small networks train side by side.

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

    for entry in entries():
        if not entry.runs:
            output = _benchmark_output(rehearse, device, runs)
            outcome, seconds = _benchmark(rehearse, device, output, deadline)
            speed = _measured_speed(output) if output and not rehearse else None
            tell(entry.title, "pairwise timings", f"{outcome} after {seconds:.0f} s")
            continue
        waiting = [each for each in entry.runs if not _recorded(*each, profile, runs)]
        for name, seed, _ in set(entry.runs) - set(waiting):
            tell(entry.title, f"{name}, seed {seed}", "has its record")
        side = parallel if entry.small else 1
        needs = sum(_expected(name, profile, device, speed) for name, _, _ in waiting) / side
        left = deadline - time.monotonic()
        if waiting and needs > left:
            tell(
                entry.title, ", ".join(name for name, _, _ in waiting), f"passed over: needs about {needs / 3600:.2f} h"
            )
            continue
        limit = min(left, 600 + 3 * needs)
        for (name, seed, _), outcome in _side_by_side(
            waiting, profile, device, runs, checkpoints, side, rehearse, limit
        ):
            tell(entry.title, f"{name}, seed {seed}", outcome)
    print(f"\n{'entry':40} {'run':32} outcome")
    for title, what, outcome in outcomes:
        print(f"{title:40} {what[:32]:32} {outcome}")
    return int(any(outcome.startswith("failed") for _, _, outcome in outcomes))


def _expected(name: str, profile: str, device: str, speed: float | None) -> float:
    return recipes.expected_seconds(recipes.plan(name, profile), device.startswith("cuda"), speed)


def _recorded(name: str, seed: int, data: str | None, profile: str, runs: str | Path) -> bool:
    title = {"cifar100": "CIFAR-100"}.get(data or "")
    return any(
        record.seed == seed and (title is None or profile == "fast" or record.data["source"].startswith(title))
        for record in find_records(runs_folder(runs, profile), name, profile)
    )


def _benchmark_output(rehearse: bool, device: str, runs: str | Path) -> Path | None:
    if runs:
        return Path(runs) / "benchmarks" / "benchmark.json"
    hardware = torch.cuda.get_device_name(device) if device.startswith("cuda") else processor_name()
    return None if rehearse else default_output(hardware)


def _benchmark(rehearse: bool, device: str, output: Path | None, deadline: float) -> tuple[str, float]:
    command = [sys.executable, "-m", "softshare.benchmark", "--device", device]
    command += ["--quick"] if rehearse else []
    command += ["--output", str(output)] if output else []
    started = time.monotonic()
    try:
        status = subprocess.run(command, timeout=max(1.0, min(1800.0, deadline - started))).returncode
    except subprocess.TimeoutExpired:
        return "stopped at its limit", time.monotonic() - started
    return "done" if status == 0 else f"failed with status {status}", time.monotonic() - started


def _side_by_side(
    waiting: Sequence[tuple[str, int, str | None]],
    profile: str,
    device: str,
    runs: str | Path,
    checkpoints: str | Path,
    side: int,
    rehearse: bool,
    limit: float,
) -> list[tuple[tuple[str, int, str | None], str]]:
    """Run up to `side` of the given runs at once; all are stopped `limit` seconds from now."""
    deadline = time.monotonic() + limit
    queue, outcomes = list(waiting), []
    going: dict[tuple[str, int, str | None], tuple[subprocess.Popen[bytes], float]] = {}
    try:
        while queue or going:
            while queue and len(going) < side and time.monotonic() < deadline:
                name, seed, data = each = queue.pop(0)
                command = [sys.executable, "-m", "softshare", "run", name, "--profile", profile, "--seed", str(seed)]
                command += ["--device", device, "--runs", str(runs), "--checkpoints", str(checkpoints)]
                command += ["--data", data] if data and not rehearse else []
                command += ["--quiet"] if side > 1 or rehearse else []
                going[each] = subprocess.Popen(command), time.monotonic()
            for each, (process, started) in list(going.items()):
                if process.poll() is not None:
                    took = f"{time.monotonic() - started:.0f} s"
                    outcome = "done" if process.returncode == 0 else f"failed with status {process.returncode}"
                    outcomes.append((each, f"{outcome} after {took}"))
                    del going[each]
            if time.monotonic() >= deadline:
                outcomes += [(each, "stopped at its limit; the same command goes on with it") for each in going]
                outcomes += [(each, "not begun: no time left") for each in queue]
                break
            time.sleep(0.05)
    finally:  # also when this process is interrupted
        for process, _ in going.values():
            process.kill()
            process.wait()
    return outcomes


def _measured_speed(path: Path) -> float | None:
    """Multiply-adds a second in training, from a benchmark's record; None if it holds none."""
    try:
        record = load_benchmark(path)
        steps, forward = record["steps"], record["ceiling"]["multiply-adds an image"]
        return 3 * float(forward) * steps["batch"] / statistics.median(steps["seconds"]["ours"])
    except (OSError, ValueError, KeyError):
        return None
