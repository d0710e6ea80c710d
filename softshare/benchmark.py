"""Timings, pair by pair: what a softly shared step and a grid cost beside their alternatives.

Run as ``python -m softshare.benchmark``. Everything that is compared runs in turn, round after round, in one process, so
that a machine's other load meets all alike; what counts is the median over rounds of the ratio within a round.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import models, shortest_path
from .images import ImageSet
from .sharing import SharedLayer, banks
from .tasks import Classification
from .training import Settings, make_optimizer, pick_device, pick_precision, train_step


class LayerwiseMixing(nn.Module):
    """A convolution that mixes its weight on its own, element by element: ``(templates * coefficients).sum(0)``.

    That is how the authors' code does it; it stands here only to be measured against.
    """

    def __init__(self, templates: nn.Parameter, coefficients: Tensor, layer: nn.Conv2d) -> None:
        super().__init__()
        self.templates = templates  # (k, O, I, h, w), the same parameter in all layers of a group
        self.coefficients = nn.Parameter(coefficients.detach().clone().view(-1, 1, 1, 1, 1))
        self.stride, self.padding = layer.stride, layer.padding

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, (self.templates * self.coefficients).sum(0), stride=self.stride, padding=self.padding)


def layerwise(model: nn.Module) -> nn.Module:
    """Replace the shared layers of a model, in place, by `LayerwiseMixing` with the same weights."""
    templates = {
        id(bank): nn.Parameter(bank.shaped(bank.templates.detach()).contiguous().clone())
        for bank in banks(model).values()
    }
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, SharedLayer):
                bank, index = layer.source
                setattr(parent, name, LayerwiseMixing(templates[id(bank)], bank.coefficients[index], layer))  # type: ignore
    return model


def in_turn(candidates: dict[str, Callable[[], Any]], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of each candidate, one call a round, in an order that alternates from round to round."""
    for _ in range(warmup):
        for call in candidates.values():
            call()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(rounds):
        for name in list(candidates)[:: 1 if turn % 2 == 0 else -1]:
            started = time.perf_counter()
            candidates[name]()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def ratio(seconds: dict[str, list[float]], name: str, to: str) -> tuple[float, float, float]:
    """The median, lowest and highest of `name`'s time over `to`'s, round by round."""
    ratios = [a / b for a, b in zip(seconds[name], seconds[to], strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def step_times(
    depth: int = 16, width: int = 4, templates: int = 2, batch: int = 128, rounds: int = 15, device: str | None = None
) -> dict[str, Any]:
    """Training steps of SWRN, of the plain WRN, and of SWRN by the authors' way of mixing (float32, NCHW)."""
    place = pick_device(device)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (batch, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.randint(10, (batch,), generator=generator)
    images = ImageSet(pixels, labels, tuple("0123456789"), "noise", "")
    task = Classification(images, images).to(place)
    inputs, targets = task.batch(torch.arange(batch, device=place), 0, 0)

    def stepper(model: nn.Module, precision: str, channels_last: bool) -> Callable[[], None]:
        model.to(place)
        x = inputs
        if channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            x = inputs.contiguous(memory_format=torch.channels_last)
        settings = Settings(epochs=1, batch_size=batch, rate=1e-3)
        optimizer = make_optimizer(model, settings)
        dtype = pick_precision(precision, place)
        scaler = torch.amp.GradScaler(place.type, enabled=dtype is torch.float16)

        def step() -> None:
            train_step(model, task, x, targets, optimizer, scaler, dtype)
            if place.type == "cuda":
                torch.cuda.synchronize()

        return step

    seconds = in_turn(
        {
            "shared": stepper(models.swrn(depth, width, templates), "auto", True),
            "plain": stepper(models.wrn(depth, width), "auto", True),
            "layerwise": stepper(layerwise(models.swrn(depth, width, templates)), "float32", False),
        },
        rounds,
    )
    return {
        "model": f"SWRN {depth}-{width}-{templates}",
        "batch": batch,
        "device": str(place),
        "precision": str(pick_precision("auto", place)),
        "seconds": seconds,
    }


def grid_times(n: int = 2000, box: int = 9, rounds: int = 7) -> dict[str, Any]:
    """Making n grids with exact answers, beside the answers alone by networkx, grid by grid."""
    import networkx as nx

    grids = shortest_path.generate(50, box=box)

    def by_networkx() -> None:
        for queries, obstacles in grids.inputs.numpy():
            graph = nx.grid_2d_graph(*obstacles.shape)
            graph.remove_nodes_from([(int(row), int(column)) for row, column in np.argwhere(obstacles)])
            start, goal = [(int(row), int(column)) for row, column in np.argwhere(queries)]
            from_start = nx.single_source_shortest_path_length(graph, start)
            from_goal = nx.single_source_shortest_path_length(graph, goal)
            _ = [node for node in from_start if from_start[node] + from_goal[node] == from_start[goal]]

    seconds = in_turn(
        {"generate": lambda: shortest_path.generate(n, box=box), "networkx": by_networkx}, rounds, warmup=1
    )
    seconds = {"generate": [s / n for s in seconds["generate"]], "networkx": [s / 50 for s in seconds["networkx"]]}
    return {"box": box, "grids": n, "seconds": seconds}


def fold_times(rounds: int = 9) -> dict[str, Any]:
    """Inference of SWRN 40-1-8 with layers 3 to 10 of stage 2 tied by hand, folded beside unfolded, 64 images."""
    from .folding import fold, tie

    model = models.swrn(40, 1, 8).eval()
    folded = fold(model, tie(model, {"stage2": [(3, 5, 7, 9), (4, 6, 8, 10)]}))
    x = torch.randn(64, 3, 32, 32)
    with torch.inference_mode():
        seconds = in_turn({"folded": lambda: folded(x), "unfolded": lambda: model(x)}, rounds)
    return {"model": "SWRN 40-1-8", "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1: the steadiest)")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of training steps (default 15)")
    parser.add_argument("--device", help="cpu or cuda; default: cuda where there is one")
    parser.add_argument("--output", type=Path, help="also write the record to this JSON file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    load = os.getloadavg()[0]

    steps = step_times(rounds=arguments.rounds, device=arguments.device)
    grids, folds = grid_times(), fold_times()
    record = {
        "machine": {"processor": _processor(), "cores": os.cpu_count(), "load before": load},
        "gpu": torch.cuda.get_device_name() if steps["device"].startswith("cuda") else None,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "threads": arguments.threads,
        "step": steps,
        "grids": grids,
        "fold": folds,
    }
    where = record["gpu"] or _processor()
    print(f"{where}; {arguments.threads} thread(s), torch {torch.__version__}; load {load:.2f} before the start")
    print(f"{'median of the ratio, round by round':58} {'median':>7} {'least':>7} {'most':>7}")
    for text, times, name, to in (
        (f"step of {steps['model']} / of plain WRN ({steps['precision']})", steps, "shared", "plain"),
        (f"step of {steps['model']} / mixed layer by layer, float32 NCHW", steps, "shared", "layerwise"),
        ("a grid with its answer / its answer by networkx", grids, "generate", "networkx"),
        (f"inference of {folds['model']} folded / unfolded", folds, "folded", "unfolded"),
    ):
        print(f"{text:58} " + " ".join(f"{value:7.3f}" for value in ratio(times["seconds"], name, to)))
    print(f"{steps['model']}: {steps['batch'] / statistics.median(steps['seconds']['shared']):,.0f} images/s")
    print(f"grids of 32 x 32, box {grids['box']}: {1 / statistics.median(grids['seconds']['generate']):,.0f} a second")
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
