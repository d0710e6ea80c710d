"""Timings, pair by pair: what a softly shared step and a grid cost beside their alternatives and the machine's ceiling.

Run as ``make bench`` or ``python -m softshare.benchmark``. Everything that is compared runs in turn, round after round, in
one process, so that a machine's other load meets all alike; what counts is the median over rounds of the ratio within a
round. Training steps on random images of 32 x 32:

- ours: data path on the device, forward, backward, optimizer, as `softshare.training.fit` does them;
- plain: the WRN of the same size, in the same way;
- authors: the authors' scheme. Each layer mixes its weight on its own, float32, NCHW, images augmented one by one on the
  CPU by loader workers; the step includes waiting for them. On CUDA once with TF32 off and once with TF32 on.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from . import models, shortest_path
from .contenders import Bench, Call, Setup, plain
from .files import written_whole
from .folding import fold, plan_fold
from .processor import bfloat16_pays, processor_name
from .sharing import banks
from .training import pick_device

FORMAT = "softshare benchmark 2"
NOT_MEASURED = "not measured"
TARGETS = (  # device, model, ratio, bound, value, aim
    ("cpu", "SWRN 16-4-2", "authors / ours", "at least", 2.8, 3.3),
    ("cpu", "SWRN 16-4-2", "ours / plain", "at most", 1.03, None),
    ("cpu", "SWRN 16-4-2", "data path / ours", "at most", 0.05, None),
    ("cuda", "SWRN 28-10-2", "authors, TF32 off / ours", "at least", 6.0, None),
    ("cuda", "SWRN 28-10-2", "ours / plain", "at most", 1.03, None),
    ("cuda", "SWRN 28-10-2", "data path / ours", "at most", 0.05, None),
    ("cuda", "SWRN 28-10-2", "share of the matrix ceiling", "at least", 0.3, 0.4),
)
# The sections with seconds, round by round; and all that a record holds besides its format.
_TIMED = ("steps", "generator", "folding", "inference", "cost by templates")
_PARTS: dict[str, type] = dict.fromkeys((*_TIMED, "memory", "epoch", "ceiling", "ratios", "machine", "versions"), dict)
_PARTS |= {"targets": list, "notes": list, "quick": bool, "threads": int, "gpu": str, "device": str, "precision": str}


def in_turn(
    candidates: Mapping[str, Call], rounds: int, warmup: int = 2, calls: Mapping[str, int] | None = None
) -> dict[str, list[float]]:
    """Seconds of one call of each candidate, a turn a round, in an order that alternates from round to round.

    A turn is several calls where `calls` says so. It starts and ends when the device has nothing left to do.
    """
    settle: Call = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    for _ in range(warmup):
        for call in candidates.values():
            call()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(rounds):
        for name in list(candidates)[:: 1 if turn % 2 == 0 else -1]:
            repeats = (calls or {}).get(name, 1)
            settle()
            started = time.perf_counter()
            for _ in range(repeats):
                candidates[name]()
            settle()
            seconds[name].append((time.perf_counter() - started) / repeats)
    return seconds


def ratio(
    seconds: Mapping[str, Sequence[float]], name: str, to: str, factor: float = 1.0
) -> tuple[float, float, float]:
    """The median, lowest and highest of `name`'s time over `to`'s (times a factor), round by round."""
    ratios = [factor * a / b for a, b in zip(seconds[name], seconds[to], strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def multiply_adds(name: str) -> tuple[int, float]:
    """Of a plain network: multiply-adds of one image's forward pass; (forward + backward) / forward."""
    with torch.device("meta"):
        model, images = models.build(name), torch.empty(2, 3, 32, 32)
        with FlopCounterMode(display=False) as forward:
            model(images)
        with FlopCounterMode(display=False) as both:
            model(images).sum().backward()
    flops = forward.get_total_flops()  # two a multiply-add
    return flops // 2 // len(images), both.get_total_flops() / flops


def measure(setup: Setup, rounds: int, quick: bool, progress: Callable[[str], None]) -> dict[str, Any]:
    """All sections of a record. The sizes of what is not a training step depend on the device and on `quick` alone."""
    progress("memory")
    found = {"memory": _memory(setup)}
    progress("steps, data path, ceiling, epoch")
    found |= _steps(setup, rounds, quick)
    gc.collect()  # ends the loader's workers
    progress("generator")
    found["generator"] = _generator(100 if quick else 2000, 5 if quick else 50, rounds)
    progress("folding, inference")
    found |= _folding(setup.device, 8 if quick else 64, rounds)
    progress("cost by templates")
    found["cost by templates"] = _costs(setup, rounds, quick)
    if "networkx" in found["generator"]["seconds"]:
        found["ratios"]["networkx / generate"] = ratio(found["generator"]["seconds"], "networkx", "generate")
    found["ratios"]["folded / unfolded"] = ratio(found["inference"]["seconds"], "folded", "unfolded")
    return found


def _steps(setup: Setup, rounds: int, quick: bool) -> dict[str, Any]:
    """Steps of all candidates in turn with the data path alone, a large matrix product and a large copy; an epoch."""
    cuda, bench = setup.device.type == "cuda", Bench(setup)
    steps = {name: make() for name, make in bench.candidates().items()}
    side, numbers = (256, 2**20) if quick else (8192, 2**28) if cuda else (2048, 2**26)
    # Random numbers: a GPU multiplies constants faster, since they cost it less power.
    matrix = torch.randn(side, side, device=setup.device, dtype=bench.dtype)
    source = torch.ones(numbers, device=setup.device)
    target, batches = torch.empty_like(source), bench.batches()
    others: dict[str, Call] = {"data path": lambda: next(batches)}
    others |= {"matrix product": lambda: matrix @ matrix, "copy": lambda: target.copy_(source)}
    calls = dict.fromkeys(steps, 10 if cuda and not quick else 1)
    calls |= {"data path": 20, "matrix product": 10 if cuda else 1, "copy": 3}
    seconds = in_turn(steps | others, rounds, calls=calls)

    forward, factor = multiply_adds(plain(setup.model))
    product, copied = 2 * side**3, 2 * source.nbytes  # flops of a matrix product, bytes that a copy reads and writes
    moved = 5 * setup.batch * 3 * 32 * 32  # bytes: the augmentation reads uint8 and writes float32
    ratios = {f"{name} / ours": ratio(seconds, name, "ours") for name in steps if name.startswith("authors")}
    ratios |= {"ours / plain": ratio(seconds, "ours", "plain"), "data path / ours": ratio(seconds, "data path", "ours")}
    needed = 3 * 2 * forward * setup.batch
    ratios["share of the matrix ceiling"] = ratio(seconds, "matrix product", "ours", needed / product)
    ratios["data path's share of a copy's rate"] = ratio(seconds, "copy", "data path", moved / copied)
    ceiling: dict[str, Any] = {"matrix side": side, "multiply-adds an image": forward, "bytes moved a batch": moved}
    ceiling["flop/s of the matrix product"] = product / statistics.median(seconds["matrix product"])
    ceiling["bytes/s read and written by the copy"] = copied / statistics.median(seconds["copy"])
    ceiling["how"] = (
        f"a step needs 3 x 2 x the multiply-adds of the forward pass of {plain(setup.model)} (convolutions and classifier, "
        f"no mixing) x images; counted directly, its forward and backward need {factor:.4f} x forward"
    )

    count = math.ceil((setup.images if cuda else 50_000) / setup.batch)
    whole = in_turn(steps, 1, 0, dict.fromkeys(steps, count)) if cuda else seconds
    epoch: dict[str, Any] = {
        "how": f"{count} steps in a row, once" if cuda else f"{count} times the median step, not run"
    }
    epoch["seconds"] = {name: count * statistics.median(whole[name]) for name in steps}
    notes = [f"the loader's {setup.workers} workers may use other cores than the {setup.threads} compute thread(s)"]
    notes += ["cudnn.benchmark is on for all"] * cuda + bench.notes
    given = setup._asdict() | {"device": str(setup.device), "plain": plain(setup.model), "calls a turn": calls}
    found = {
        "steps": given | {"seconds": seconds},
        "ceiling": ceiling,
        "epoch": epoch,
        "ratios": ratios,
        "notes": notes,
    }
    return found | {"precision": str(bench.dtype).removeprefix("torch.")}


def _memory(setup: Setup) -> dict[str, Any]:
    """Peak bytes of each candidate, each in a fresh interpreter, since a peak never falls."""
    how = (
        "torch.cuda.max_memory_allocated in a step" if setup.device.type == "cuda" else "peak resident memory in steps"
    )
    how += " of a process of its own, less that of one without steps; the loader's workers are not counted"

    def alone(name: str) -> int:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            return process.submit(_peak, setup, name).result()

    names = list(Bench(setup._replace(images=setup.batch)).candidates())
    try:
        with ThreadPoolExecutor(2) as two:  # at a time: nothing is timed here
            nothing, *peaks = two.map(alone, ("", *names))
    except Exception as error:  # of any kind: a GPU that lets one process in, no /proc; the rest can still be measured
        return {"how": how, "bytes": f"{NOT_MEASURED}: {type(error).__name__}: {error}"}
    return {"how": how, "bytes": {name: peak - nothing for name, peak in zip(names, peaks, strict=True)}}


def _peak(setup: Setup, name: str) -> int:
    """Peak bytes of this process in steps of the named candidate; "": in none. Raises OSError where Linux is missing."""
    bench, cuda = Bench(setup), setup.device.type == "cuda"
    step = bench.candidates()[name]() if name else lambda: None
    for _ in range(3):
        if cuda:
            torch.cuda.reset_peak_memory_stats()  # what cuDNN tries out in the first steps does not count
        step()
    if cuda:
        return torch.cuda.max_memory_allocated()
    # Not getrusage's ru_maxrss: a new process starts with the peak of the one that started it.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def _generator(n: int, few: int, rounds: int) -> dict[str, Any]:
    """A grid with its exact answer, n at once, beside the answer alone by networkx, grid by grid; seconds a grid."""
    calls: dict[str, Call] = {"generate": lambda: shortest_path.generate(n, box=9)}
    sizes, found = {"generate": n, "networkx": few}, {}
    try:
        import networkx as nx

        def by_networkx() -> None:
            for queries, obstacles in grids.inputs.numpy():
                graph = nx.grid_2d_graph(*obstacles.shape)
                graph.remove_nodes_from([(int(row), int(column)) for row, column in np.argwhere(obstacles)])
                start, goal = [(int(row), int(column)) for row, column in np.argwhere(queries)]
                from_start = nx.single_source_shortest_path_length(graph, start)
                from_goal = nx.single_source_shortest_path_length(graph, goal)
                _ = [node for node in from_start if from_start[node] + from_goal[node] == from_start[goal]]

        grids, calls["networkx"] = shortest_path.generate(few, box=9), by_networkx
    except ImportError:
        found = {"networkx": f"{NOT_MEASURED}: needs networkx"}
    seconds = in_turn(calls, rounds, warmup=1)
    seconds = {name: [each / sizes[name] for each in times] for name, times in seconds.items()}
    return found | {"box": 9, "grids": sizes, "seconds": seconds}


def _folding(device: torch.device, batch: int, rounds: int) -> dict[str, Any]:
    """Planning and folding SWRN 40-1-8 with a loop of stage 2 (layers 3 and 4, four times), and what inference gains."""
    model = models.build("SWRN 40-1-8").eval().to(device)
    with torch.no_grad():
        coefficients = banks(model)["stage2"].coefficients
        coefficients[4::2], coefficients[5::2] = coefficients[2].clone(), coefficients[3].clone()
    plan = plan_fold(model, 0.999)
    folded, x = fold(model, plan), torch.randn(batch, 3, 32, 32, device=device)
    folds = in_turn({"plan": lambda: plan_fold(model, 0.999), "fold": lambda: fold(model, plan)}, rounds)
    with torch.inference_mode():
        runs = in_turn({"folded": lambda: folded(x), "unfolded": lambda: model(x)}, rounds)
    folding = {"model": "SWRN 40-1-8", "plan": str(plan).split("\n"), "seconds": folds}
    return {"folding": folding, "inference": {"model": "SWRN 40-1-8", "batch": batch, "seconds": runs}}


def _costs(setup: Setup, rounds: int, quick: bool) -> dict[str, Any]:
    """Our step with 1 template to one a layer, beside the plain network's; not compiled, to see the sharing alone."""
    cuda = setup.device.type == "cuda"
    size, layers, batch = ("16-1", 2, 16) if quick else ("28-10", 6, setup.batch) if cuda else ("28-1", 6, 32)
    bench = Bench(setup._replace(batch=batch))
    steps = {"plain": bench.ours(f"WRN {size}")}
    steps |= {str(k): bench.ours(f"SWRN {size}-{k}") for k in range(1, layers + 1)}
    seconds = in_turn(steps, rounds, calls=dict.fromkeys(steps, 1 if quick else 10 if cuda else 3))
    found = {"model": f"SWRN {size}-k", "plain": f"WRN {size}", "batch": batch, "compile": False, "seconds": seconds}
    return found | {"ratios": {k: ratio(seconds, k, "plain") for k in seconds if k != "plain"}}


def targets(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What is aimed for, with what was measured and whether that meets it (None where nothing was measured)."""
    found, steps = [], record["steps"]
    here = (record["device"].split(":")[0], steps["model"], steps["batch"], record["quick"])
    for device, model, what, bound, value, aim in TARGETS:
        each: dict[str, Any] = {
            "what": f"{device}, {model}: {what}",
            "target": f"{bound} {value}" + (f", aim {aim}" if aim else ""),
        }
        each |= {"measured": NOT_MEASURED, "met": None}
        if here == (device, model, 128, False):
            measured = record["ratios"][what][0]
            each |= {"measured": measured, "met": measured >= value if bound == "at least" else measured <= value}
        found.append(each)
    return found


def table(record: Mapping[str, Any]) -> str:
    """The record for a person to read, at most 100 columns wide."""
    machine, steps, costs = record["machine"], record["steps"], record["cost by templates"]
    middle = {name: statistics.median(each) for part in _TIMED[:-1] for name, each in record[part]["seconds"].items()}
    lines = [
        f"{machine['processor']}, {machine['cores']} cores; GPU: {record['gpu']}{'; quick' * record['quick']}"[:100],
        f"{record['threads']} thread(s), load {machine['load before']} before and {machine['load after']} after, torch "
        f"{record['versions']['torch']}",
        f"{steps['model']}, batch {steps['batch']}, {record['precision']}, torch.compile {steps['compile']}",
        f"\n{'ratio, round by round':60} {'median':>12} {'least':>12} {'most':>12}",
    ]
    rows = record["ratios"] | {f"{costs['model'][:-1]}{k} / plain": each for k, each in costs["ratios"].items()}
    lines += [f"{name:60} " + " ".join(f"{value:12.3f}" for value in each) for name, each in rows.items()]
    lines.append(f"\n{'':48} {'ms':>12} {'images/s':>12} {'s an epoch':>12} {'peak MiB':>12}")
    for name, epoch in record["epoch"]["seconds"].items():
        ms, speed, peaks = 1000 * middle[name], steps["batch"] / middle[name], record["memory"]["bytes"]
        peak = NOT_MEASURED if isinstance(peaks, str) else f"{peaks[name] / 2**20:.0f}"
        lines.append(f"step, {name:42} {ms:12.2f} {speed:12,.0f} {epoch:12.1f} {peak:>12}")
    for name in ("data path", "matrix product", "copy", "plan", "fold", "folded", "unfolded"):
        lines.append(f"{name:48} {1000 * middle[name]:12.2f}")
    for name in ("generate", "networkx"):
        rate = f"{1 / middle[name]:,.0f} a second" if name in middle else record["generator"][name]
        lines.append(f"{f'grids, {name}':48} {rate}")
    lines.append(f"\n{'target':52} {'':22} {'measured':>12} met")
    for each in record["targets"]:
        measured = each["measured"] if isinstance(each["measured"], str) else f"{each['measured']:.3f}"
        met = {True: "yes", False: "no", None: "-"}[each["met"]]
        lines.append(f"{each['what']:52} {each['target']:22} {measured:>12} {met}")
    return "\n".join([*lines, "", *(f"note: {note}"[:100] for note in record["notes"])])


def load_benchmark(path: str | Path) -> dict[str, Any]:
    """Read a record. Raises ValueError that says what is wrong with it, FileNotFoundError if there is none."""
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError(f'{path} lacks "format": "{FORMAT}"')
    for part, kind in _PARTS.items():
        if not isinstance(record.get(part), kind):
            raise ValueError(f"{path}: {part!r} is missing or not a {kind.__name__}")
    for part in _TIMED:
        seconds = record[part].get("seconds")
        if not isinstance(seconds, dict) or not seconds or not all(isinstance(each, list) for each in seconds.values()):
            raise ValueError(f"{path}: {part!r} has no lists of seconds")
        for name, each in seconds.items():
            good = all(type(value) in (int, float) and 0 < value < math.inf for value in each)
            if not good or not each or len(each) != len(next(iter(seconds.values()))):
                raise ValueError(f"{path}: seconds of {name!r} in {part!r} are not one positive number a round")
    for each in record["targets"]:
        if not isinstance(each, dict) or not {"what", "target", "measured", "met"} <= set(each):
            raise ValueError(f"{path}: a target lacks what, target, measured or met: {each!r}")
    return record


def _rounded(value: Any) -> Any:
    """The same with every number rounded to six digits."""
    if isinstance(value, Mapping):
        return {name: _rounded(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(each) for each in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _load() -> float | str:
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else NOT_MEASURED


def default_output(hardware: str) -> Path:
    """Where the record of a machine stands: data/benchmarks of a checkout, else the current folder."""
    slug = re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm|c)\)", "", hardware.lower())).strip("-")
    checkout = Path(__file__).resolve().parent.parent
    folder = checkout / "data" / "benchmarks" if (checkout / "pyproject.toml").is_file() else Path.cwd()
    return folder / f"{slug}.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table and write the record; returns the exit status."""
    parser = argparse.ArgumentParser(prog="softshare bench", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1: the steadiest)")
    parser.add_argument("--rounds", type=int, help="turns of each candidate (default 15)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--model", help="default SWRN 16-4-2 on a CPU, SWRN 28-10-2 on CUDA")
    parser.add_argument("--batch", type=int, help="images a step (default 128)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile; default: on CUDA")
    parser.add_argument("--output", type=Path, help="the record; default data/benchmarks/<hardware>.json of a checkout")
    parser.add_argument("--quick", action="store_true", help="toy sizes, to try every step; no record without --output")
    given = parser.parse_args(argv)
    try:
        device = pick_device(given.device)
        cuda, quick = device.type == "cuda", given.quick
        rounds = (2 if quick else 15) if given.rounds is None else given.rounds
        batch = (16 if quick else 128) if given.batch is None else given.batch
        model = given.model or ("SWRN 16-1-2" if quick else "SWRN 28-10-2" if cuda else "SWRN 16-4-2")
        if not model.startswith("SWRN") or not 2 <= batch <= 50_000 or min(rounds, given.threads) < 1:
            raise ValueError("the model must be an SWRN, a batch 2 to 50,000 images, rounds and threads at least 1")
        with torch.device("meta"):
            models.build(model)
    except (RuntimeError, ValueError) as error:
        parser.error(str(error))
    compile = cuda if given.compile is None else given.compile
    images = 8 * batch if quick else 50_000
    setup = Setup(model, batch, images, device, given.threads, compile, workers=4 if cuda else 2)
    gpu = torch.cuda.get_device_name(device) if cuda else NOT_MEASURED
    machine = {"processor": processor_name(), "cores": os.cpu_count(), "bfloat16 pays on the CPU": bfloat16_pays()}
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    if cuda:
        versions |= {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
    before, flags, started = _load(), (torch.get_num_threads(), torch.backends.cudnn.benchmark), time.perf_counter()

    def progress(text: str) -> None:
        print(f"{time.perf_counter() - started:6.0f} s  {text}", file=sys.stderr, flush=True)

    try:
        sections = measure(setup, rounds, quick, progress)
    finally:
        torch.set_num_threads(flags[0])
        torch.backends.cudnn.benchmark = flags[1]
    record = {"format": FORMAT, "quick": quick, "machine": machine | {"load before": before, "load after": _load()}}
    record |= {"gpu": gpu, "device": str(device), "threads": given.threads, "rounds": rounds, "versions": versions}
    record = _rounded(record | sections)
    record["targets"] = targets(record)
    print(table(record), flush=True)
    output = given.output or (None if quick else default_output(gpu if cuda else processor_name()))
    if output:
        with written_whole(output) as file:
            file.write((json.dumps(record, indent=1) + "\n").encode())
        progress(f"wrote {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
