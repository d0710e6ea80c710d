"""Timings, pair by pair: our training step against the plain network's, the authors' scheme and the machine's ceiling.

The candidates take turns in one process, round after round, so that other load affects them all equally. What counts is
the median over rounds of the ratio within a round. "authors" is the authors' scheme: each layer mixed separately,
float32, NCHW, and images augmented one by one on the CPU by loader workers, which the step waits for.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import math
import os
import sys
import time
import warnings
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from .. import files, models, shortest_path
from ..folded import fold
from ..folding import plan_fold
from ..models import Network, multiply_adds
from ..sharing import banks
from ..training.devices import pick_device, pick_precision, precision_name, standard_defaults
from ..training.environment import environment
from ..training.processor import processor_name
from ..training.tasks import Classification
from . import networks
from .records import check_content, check_seconds, default_output, in_six_digits, load, read_fields
from .steps import Call, authors, batches, noise, ours

FORMAT = "softshare benchmark 3"
NOT_MEASURED = "not measured"
IMAGES = 50_000
PATH = 20
"""Batches per epoch when the data path is timed alone."""
STEPS = {"cpu": ("ours", "plain", "authors"), "cuda": ("ours", "plain", "authors, TF32 off", "authors, TF32 on")}
LOWER = " (95%: from)"
TARGETS = (  # device, model, ratio, bound, value, what is aimed for beyond it
    ("cpu", "SWRN 16-4-2", "authors / ours", "at least", 2.8, ", aim 3.3"),
    ("cpu", "SWRN 16-4-2", "ours / plain", "at most", 1.01, LOWER),
    ("cpu", "SWRN 16-4-2", "data path / ours", "at most", 0.05, ""),
    ("cpu", "SWRN 16-4-2", "SWRN 28-1-6 / plain", "at most", 1.03, LOWER),
    ("cuda", "SWRN 28-10-2", "authors, TF32 off / ours", "at least", 6.0, ""),
    ("cuda", "SWRN 28-10-2", "authors, TF32 on / ours", "at least", 2.5, ""),
    ("cuda", "SWRN 28-10-2", "milliseconds of ours", "at most", 13.0, ""),
    ("cuda", "SWRN 28-10-2", "ours / plain", "at most", 1.03, ""),
    ("cuda", "SWRN 28-10-2", "data path / ours", "at most", 0.05, ""),
    ("cuda", "SWRN 28-10-2", "share of the matrix ceiling", "at least", 0.3, ", aim 0.4"),
)
# The sections with seconds, round by round, and everything that a record holds besides its format.
_TIMED = ("steps", "generator", "folding", "inference", "cost by templates")
_PARTS: dict[str, type] = dict.fromkeys((*_TIMED, "memory", "epoch", "ceiling", "ratios", "machine", "versions"), dict)
_PARTS |= {"targets": list, "notes": list, "quick": bool, "threads": int, "rounds": int}
_PARTS |= {"gpu": str, "device": str, "precision": str, "content": str}


def in_turn(candidates: Mapping[str, Call], rounds: int) -> dict[str, list[float]]:
    """Seconds per call of each candidate: one turn per round, in alternating order, of about 0.1 s each."""
    settle: Call = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    calls = dict.fromkeys(candidates, 1)
    for turn in range(-2, rounds):  # two extra rounds first: to warm up, and to see how many calls a turn takes
        for name in list(candidates)[:: 1 if turn % 2 == 0 else -1]:
            settle()
            started = time.perf_counter()
            for _ in range(calls[name]):
                candidates[name]()
            settle()
            seconds[name].append((time.perf_counter() - started) / calls[name])
            if turn == -1:
                calls[name] = math.ceil(0.1 / seconds[name][-1])
    return {name: each[2:] for name, each in seconds.items()}


def ratio(seconds: Mapping[str, Sequence[float]], name: str, to: str, factor: float = 1) -> tuple[float, float, float]:
    """The median, lowest and highest of `name`'s time over `to`'s (times a factor), round by round."""
    ratios = [factor * a / b for a, b in zip(seconds[name], seconds[to], strict=True)]
    return median(ratios), min(ratios), max(ratios)


def interval(seconds: Mapping[str, Sequence[float]], name: str, to: str) -> tuple[float, float]:
    """A 95% interval of the median ratio of `name`'s time to `to`'s, by order statistics: it assumes no distribution.

    Of n rounds, the ratios of rank r from below and from above enclose the median with probability
    ``1 - 2 P(B < r)``, B binomial(n, 1/2); the largest r is taken that keeps 95%. With fewer than 6 rounds there is none,
    and these are the least and the largest.
    """
    ratios = sorted(a / b for a, b in zip(seconds[name], seconds[to], strict=True))
    n, rank, beyond = len(ratios), 0, 1  # beyond: how many of the 2^n outcomes have at most `rank` below
    while 2 * beyond <= 0.05 * 2**n:
        rank += 1
        beyond += math.comb(n, rank)
    rank = max(0, rank - 1)
    return ratios[rank], ratios[-1 - rank]


def make_step(setup: Namespace, task: Classification, name: str) -> Call:
    """The step with that name in `STEPS`."""
    if name.startswith("authors"):
        return authors(task, setup.model, setup.batch, setup.workers, tf32=name.endswith(" on"))
    chosen = str(Network.parse(setup.model).plain) if name == "plain" else setup.model
    return ours(task, chosen, setup.batch, setup.compile)


@standard_defaults()
def measure(setup: Namespace) -> dict[str, Any]:
    """Measure all sections of a record, with progress on stderr. Sets the number of threads of this process."""
    torch.set_num_threads(setup.threads)
    task, started = noise(IMAGES, setup.device), time.perf_counter()
    found: dict[str, Any] = {}
    with warnings.catch_warnings(record=True) as caught:
        for section in (_memory, _steps, _others, _costs):
            print(f"{time.perf_counter() - started:6.0f} s  {section.__name__[1:]}", file=sys.stderr, flush=True)
            found |= section(setup, task)
    found["ratios"]["folded / unfolded"] = ratio(found["inference"]["seconds"], "folded", "unfolded")
    workers = f"the loader's {setup.workers} workers may use other cores than the {setup.threads} compute thread(s)"
    return found | {"notes": [workers, *(str(each.message) for each in caught)]}


def _memory(setup: Namespace, _: Classification) -> dict[str, Any]:
    """Peak memory of all steps, each in a process of its own, since a peak never falls."""
    peaks: dict[str, int | str] = {}
    for name in STEPS[setup.device.type]:
        with ProcessPoolExecutor(1, get_context("spawn"), torch.set_num_threads, (setup.threads,)) as process:
            peak = process.submit(_peak, setup, name)
            # A GPU may admit only one process, and only Linux has /proc; the rest can still be measured.
            peaks[name] = f"{NOT_MEASURED}: {peak.exception()!r}" if peak.exception() else peak.result()
    return {"memory": {"bytes": peaks, "how": "what steps add to a process's peak; on CUDA, that of its allocations"}}


def _peak(setup: Namespace, name: str) -> int:
    def peak() -> int:
        if setup.cuda:
            return torch.cuda.max_memory_allocated()
        # Not getrusage's ru_maxrss: a new process starts with the peak of the one that started it.
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024

    setup.workers, task = 0, noise(IMAGES, setup.device)
    before, step = peak(), make_step(setup, task, name)
    for _ in range(3):
        if setup.cuda:
            torch.cuda.reset_peak_memory_stats()  # what cuDNN tries out in the first steps does not count
        step()
    return peak() - before


def _steps(setup: Namespace, task: Classification) -> dict[str, Any]:
    """Time all steps in turn with the data path alone, a large matrix product and a large copy."""
    device, batch, dtype = setup.device, setup.batch, pick_precision("auto", setup.device)
    side, numbers = (256, 2**20) if setup.quick else (8192, 2**28) if setup.cuda else (2048, 2**26)
    # Random numbers: a GPU multiplies constants faster, since they cost it less power.
    matrix, source = torch.randn(side, side, device=device, dtype=dtype), torch.ones(numbers, device=device)
    target, data = torch.empty_like(source), batches(noise(PATH * batch, device), batch)
    steps = {name: make_step(setup, task, name) for name in STEPS[device.type]}
    # Whole epochs of few batches, since much of the path's work is done once per epoch.
    path: Call = lambda: collections.deque(itertools.islice(data, PATH), maxlen=0)  # noqa: E731
    others: dict[str, Call] = {"data path": path, "matrix product": lambda: matrix @ matrix}
    seconds = in_turn(steps | others | {"copy": lambda: target.copy_(source)}, setup.rounds)
    seconds["data path"] = [each / PATH for each in seconds["data path"]]
    forward = multiply_adds(setup.model, 32)
    needed, product = 3 * 2 * forward * batch, 2 * side**3  # flops of a step and of the matrix product
    moved, copied = batch * 3 * 32 * 32 * 5, 2 * source.nbytes  # bytes; a batch is read as uint8, written as float32
    ratios = {f"{name} / ours": ratio(seconds, name, "ours") for name in (*STEPS[device.type][2:], "data path")}
    ratios["ours / plain"] = ratio(seconds, "ours", "plain")
    ratios["share of the matrix ceiling"] = ratio(seconds, "matrix product", "ours", needed / product)
    ratios["data path's share of a copy's rate"] = ratio(seconds, "copy", "data path", moved / copied)
    given = {"model": setup.model, "batch": batch, "compile": setup.compile, "workers": setup.workers}
    given |= {"captured": steps["ours"]()}
    epoch = {name: IMAGES / batch * median(seconds[name]) for name in steps}
    return {
        "precision": precision_name(dtype),
        "steps": given | {"seconds": seconds},
        "epoch": {"how": f"{IMAGES} images, from the median step, not run", "seconds": epoch},
        "ratios": ratios,
        "ceiling": {
            "how": "a step is 3 x forward, 3 x 2 x multiply-adds x images; mixing is not counted",
            "matrix side": side,
            "multiply-adds an image": forward,
            "flop/s of the matrix product": product / median(seconds["matrix product"]),
            "bytes/s read and written by the copy": copied / median(seconds["copy"]),
        },
    }


def _others(setup: Namespace, _: Classification) -> dict[str, Any]:
    """Time grids with answers (seconds per grid), networkx if installed, and folding a loop into SWRN 40-1-8."""
    makers: dict[str, Call] = {"generate": lambda: shortest_path.generate(2000, box=9)}
    with contextlib.suppress(ImportError):
        import networkx as nx

        some = itertools.cycle(shortest_path.generate(50, box=9).inputs.numpy())

        def answered() -> None:
            query, obstacles = next(some)
            graph = nx.grid_2d_graph(*obstacles.shape)
            graph.remove_nodes_from(map(tuple, np.argwhere(obstacles).tolist()))
            start, goal = map(tuple, np.argwhere(query).tolist())
            _ = {node for path in nx.all_shortest_paths(graph, start, goal) for node in path}

        makers["networkx"] = answered
    grids = in_turn(makers, setup.rounds)
    grids["generate"] = [each / 2000 for each in grids["generate"]]
    name, x = "SWRN 40-1-8", torch.randn(64, 3, 32, 32, device=setup.device)
    model = models.build(name).eval().to(setup.device)
    coefficients = banks(model)["stage2"].coefficients.detach()
    coefficients[4::2], coefficients[5::2] = coefficients[2], coefficients[3]
    plan = plan_fold(model, 0.999)
    folded = fold(model, plan)
    folds = in_turn({"plan": lambda: plan_fold(model, 0.999), "fold": lambda: fold(model, plan)}, setup.rounds)
    with torch.inference_mode():
        runs = in_turn({"folded": lambda: folded(x), "unfolded": lambda: model(x)}, setup.rounds)
    grid = {"networkx / generate": ratio(grids, "networkx", "generate")} if "networkx" in grids else {}
    return {
        "generator": {"ratios": grid, "box": 9, "grids": 2000, "seconds": grids},
        "folding": {"model": name, "plan": str(plan).split("\n"), "seconds": folds},
        "inference": {"model": name, "batch": len(x), "seconds": runs},
    }


def _costs(setup: Namespace, task: Classification) -> dict[str, Any]:
    """Time our step, from 1 template to one per layer, and the plain one; not compiled, to see the sharing alone."""
    size, layers, batch = ("16-1", 2, 16) if setup.quick else ("28-10", 6, 128) if setup.cuda else ("28-1", 6, 32)
    names = {"plain": f"WRN {size}"} | {str(k): f"SWRN {size}-{k}" for k in range(1, layers + 1)}
    seconds = in_turn({k: ours(task, name, batch) for k, name in names.items()}, setup.rounds)
    given = {"model": f"SWRN {size}-k", "plain": f"WRN {size}", "batch": batch, "compile": False, "seconds": seconds}
    return {"cost by templates": given | {"ratios": {k: ratio(seconds, k, "plain") for k in names if k != "plain"}}}


def targets(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The targets, with what was measured and whether that meets them (None where nothing was measured)."""
    steps, found = record["steps"], []
    here = (record["device"].split(":")[0], steps["model"], steps["batch"], record["quick"])
    for device, model, what, bound, value, aim in TARGETS:
        judged: dict[str, Any] = {"measured": NOT_MEASURED, "met": None}
        if here == (device, model, 128, False):
            measured = _measured(record, what, lower=aim == LOWER)
            judged = {"measured": measured, "met": measured >= value if bound == "at least" else measured <= value}
        found.append({"what": f"{device}, {model}: {what}", "target": f"{bound} {value}{aim}"} | judged)
    return found


def _measured(record: Mapping[str, Any], what: str, lower: bool) -> float:
    """The median ratio of that name or the lower end of its interval; from the seconds, which older records hold, too."""
    steps, costs = record["steps"]["seconds"], record["cost by templates"]["seconds"]
    if what == "milliseconds of ours":
        return 1000 * median(steps["ours"])
    name, to = what.split(" / ")
    seconds = steps if name in steps else costs
    if not lower:
        return float(record["ratios"][what][0])
    return interval(seconds, name.rpartition("-")[2] if seconds is costs else name, to)[0]


def table(record: Mapping[str, Any]) -> str:
    """The record as a readable table, at most 100 columns wide."""
    machine, steps, costs = record["machine"], record["steps"], record["cost by templates"]

    def row(name: str, *cells: float | str) -> str:
        text = "".join(f"{cell:>13.12}" if isinstance(cell, str) else f"{cell:13,.3f}" for cell in cells)
        return name.ljust(100 - len(text)) + text

    ratios = (
        record["ratios"]
        | record["generator"]["ratios"]
        | {f"{costs['model'][:-1]}{k} / plain": each for k, each in costs["ratios"].items()}
    )
    pairs = [("ours / plain", interval(steps["seconds"], "ours", "plain"))]
    pairs += [(f"{costs['model'][:-1]}{k} / plain", interval(costs["seconds"], k, "plain")) for k in costs["ratios"]]
    times = {f"{part}: {name}": each for part in _TIMED[:-1] for name, each in record[part]["seconds"].items()}
    peaks = {name: each if isinstance(each, str) else each / 2**20 for name, each in record["memory"]["bytes"].items()}
    met = {True: "yes", False: "no", None: "-"}
    lines = [
        f"{machine['processor']}, {machine['cores']} cores; GPU: {record['gpu']}{'; quick' * record['quick']}"[:100],
        f"{record['threads']} thread(s), load {machine['load before']:.2f} before, {machine['load after']:.2f} after",
        f"torch {record['versions']['torch']}, {record['precision']}, torch.compile {steps['compile']}",
        f"{steps['model']}, {steps['batch']} images per step",
        "\n" + row("ratio, round by round", "median", "least", "most"),
        *(row(name, *each) for name, each in ratios.items()),
        "\n" + row("95% interval of the median ratio", "from", "to"),
        *(row(name, *each) for name, each in pairs),
        "\n" + row("median time of one", "ms"),
        *(row(name, 1000 * median(each)) for name, each in times.items()),
        "\n" + row("training", "images/s", "s per epoch", "peak MiB"),
        *(row(name, IMAGES / each, each, peaks[name]) for name, each in record["epoch"]["seconds"].items()),
        "\n" + row("target", "measured", "met"),
        *(row(f"{each['what']}, {each['target']}", each["measured"], met[each["met"]]) for each in record["targets"]),
        *("", *(f"note: {note}"[:100] for note in record["notes"])),
    ]
    return "\n".join(lines)


def load_benchmark(path: str | Path) -> dict[str, Any]:
    """Read a record. Raises a ValueError that says what is wrong with it, FileNotFoundError if there is none."""
    record = read_fields(path, FORMAT, _PARTS)
    for part in _TIMED:
        check_seconds(path, record, record[part].get("seconds"), part)
    for each in record["targets"]:
        if not isinstance(each, dict) or not {"what", "target", "measured", "met"} <= set(each):
            raise ValueError(f"{path}: a target lacks what, target, measured or met: {each!r}")
    check_content(path, record)
    return record


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table and write the record; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if "--networks" in argv:
        return networks.main([each for each in argv if each != "--networks"])
    parser = ArgumentParser(prog="softshare bench", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--networks", action="store_true", help="time all networks of the poster (--networks --help)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1: the steadiest)")
    parser.add_argument("--rounds", type=int, default=15, help="turns per candidate (default 15)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if available")
    parser.add_argument("--model", help="default SWRN 16-4-2 on a CPU, SWRN 28-10-2 on CUDA")
    parser.add_argument("--batch", type=int, default=128, help="images per step (default 128)")
    parser.add_argument("--compile", action=BooleanOptionalAction, help="torch.compile; default: on CUDA")
    parser.add_argument("--output", help="the record; default data/benchmarks/<hardware>.json in a checkout")
    parser.add_argument("--quick", action="store_true", help="toy sizes, to try every step; no record without --output")
    if parser.parse_args(argv).quick:
        parser.set_defaults(model="SWRN 16-1-2", batch=16, rounds=2)
    setup = parser.parse_args(argv)
    try:
        setup.device = pick_device(setup.device)
        setup.cuda = setup.device.type == "cuda"
        setup.workers = min(4, os.cpu_count() or 4)  # of the authors' loader
        setup.model = setup.model or ("SWRN 28-10-2" if setup.cuda else "SWRN 16-4-2")
        setup.compile = setup.cuda if setup.compile is None else setup.compile
        network = Network.parse(setup.model)
        if (
            network.family != "WRN"
            or not network.shared
            or not 0 < setup.batch <= IMAGES
            or min(setup.rounds, setup.threads) < 1
        ):
            raise ValueError(f"needs an SWRN like SWRN 16-4-2, a batch up to {IMAGES:,}, at least one round and thread")
        models.build(setup.model)
    except (RuntimeError, ValueError) as error:
        parser.error(str(error))
    machine = {"processor": processor_name(), "cores": os.cpu_count(), "load before": load()}
    record = {"format": FORMAT, "quick": setup.quick, "threads": setup.threads, "rounds": setup.rounds} | measure(setup)
    record |= {"device": str(setup.device), "versions": environment(setup.device) | {"precision": record["precision"]}}
    record["gpu"] = torch.cuda.get_device_name(setup.device) if setup.cuda else NOT_MEASURED
    record["machine"] = machine | {"load after": load()}
    record = in_six_digits(record)
    record["targets"] = targets(record)
    print(table(record), flush=True)
    given = files.user_path(setup.output) if setup.output else None
    if output := given or (None if setup.quick else default_output(record["versions"]["hardware"])):
        files.write_json(output, record)
        print(f"wrote {output}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
