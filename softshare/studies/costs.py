"""How long a run will take: from its network's multiply-adds and an assumed or measured speed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..models import activations, build, convolutions, multiply_adds
from ..sharing import banks
from ..speed.benchmark import load_benchmark
from .folding import THRESHOLDS
from .recipes import study_of
from .running import SNAPSHOTS
from .study import Plan

CPU_SPEED, GPU_SPEED = 55e9, 8e12
"""Multiply-adds per second in training, for estimates. CPU: measured, one thread of a 2023 Xeon in float32 (WRN 16-4 at 47
images/s). GPU: assumed, a quarter of a T4's nominal speed in float16; not measured."""

LAUNCH_SECONDS = 3e-4
"""What a convolution and what follows it need per training step, however small they are, if Python launches each kernel.
CPU: measured (0.36 ms, one thread of an EPYC, recipe DARTS in profile fast); GPU: assumed, not measured."""

CAPTURED_SECONDS = 1e-4
"""The same in a captured step, see `softshare.training.graphed`: assumed. The kernels of a grid network with 22 convolutions
took about 1 ms on an H100; the rest is for evaluation."""


CPU_PROCESS_BYTES, GPU_PROCESS_BYTES, DATA_BYTES, WORKER_BYTES = 0.8e9, 4e9, 0.6e9, 0.4e9
"""Main memory of a process on the CPU and on a GPU, of a set of 60,000 images, and of a process that decodes images. On
the CPU, estimates were compared with measured peaks, see the tests; the others are assumed."""


class Speed(NamedTuple):
    """A measured speed.

    Attributes:
        rate: multiply-adds per second in training.
        captured: whether that was in captured steps.
    """

    rate: float
    captured: bool = False


def expected_seconds(plan: Plan, gpu: bool, speed: Speed | None = None) -> float:
    """An estimate of a run's time, from its network's multiply-adds (three times those of a forward pass).

    Args:
        speed: if measured; default: `CPU_SPEED` or `GPU_SPEED`, and steps that are not captured, as on a T4, whose float16
            does not allow it.
    """
    examples, epochs = study_of(plan).examples(plan), plan.settings.epochs
    forward = multiply_adds(plan.network, plan.sizes["side"], **plan.options)
    seconds = 3 * forward * examples * epochs / _rate(gpu, speed)
    steps = examples / plan.settings.batch_size * epochs
    launch = CAPTURED_SECONDS if speed is not None and speed.captured else LAUNCH_SECONDS
    return max(seconds, launch * convolutions(plan.network, **plan.options) * steps)


def duration(seconds: float) -> str:
    """Seconds in the unit that suits them: "9 s", "12 min", "3.5 h", "40 days"."""
    if seconds < 90:
        return f"{max(1, round(seconds)) if seconds else 0} s"
    if seconds < 5400:
        return f"{round(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:,.0f} days"


def _rate(gpu: bool, speed: Speed | None) -> float:
    return speed.rate if speed else GPU_SPEED if gpu else CPU_SPEED


def fold_seconds(plan: Plan, gpu: bool, speed: Speed | None = None) -> float:
    """Expected seconds to fold its network at `folding.THRESHOLDS` and to test every fold twice."""
    forward = multiply_adds(plan.network, plan.sizes["side"], **plan.options)
    tested = 2 * (1 + len(THRESHOLDS)) * (plan.sizes.get("test") or 10_000)
    return tested * forward / _rate(gpu, speed)


def checkpoint_bytes(plan: Plan) -> int:
    """The size of the last checkpoint: weights and one tensor of their size for SGD, two for Adam, BatchNorm's statistics,
    and all snapshots of coefficients, in float32."""
    with torch.device("meta"):
        model = build(plan.network, **plan.options)
    weights = sum(parameter.numel() for parameter in model.parameters())
    buffers = sum(buffer.numel() for buffer in model.buffers())
    snapshots = 1 + plan.settings.epochs + (SNAPSHOTS - 1) * plan.recipe.dense_epochs
    coefficients = sum(bank.coefficients.numel() for bank in banks(model).values())
    return 4 * (weights * (3 if plan.settings.optimizer == "adam" else 2) + buffers + snapshots * coefficients)


def memory_bytes(plan: Plan, gpu: bool) -> float:
    """An upper estimate of the main memory that one process of a run needs, from its network's activations and parameters.

    On a GPU, batches and weights are in its own memory. Where images are streamed, eight workers decode two batches each.
    """
    side, batch = plan.sizes["side"], plan.settings.batch_size
    streamed = 8 * (WORKER_BYTES + 2 * batch * 3 * side**2) if plan.recipe.study == "imagenet" else 0
    if gpu:
        return GPU_PROCESS_BYTES + DATA_BYTES + streamed
    kept = 4 * batch * activations(plan.network, side, **plan.options)
    return CPU_PROCESS_BYTES + DATA_BYTES + streamed + 1.5 * kept + 4 * checkpoint_bytes(plan)


def measured_speed(path: Path, quick: bool = False) -> Speed | None:
    """The speed in training, from the record of a benchmark; None if there is none, or a quick one that is not asked for."""
    try:
        record: Mapping[str, Any] = load_benchmark(path)
        steps, forward = record["steps"], record["ceiling"]["multiply-adds an image"]
        rate = 3 * float(forward) * steps["batch"] / statistics.median(steps["seconds"]["ours"])
        return None if record["quick"] and not quick else Speed(rate, steps.get("captured") is True)
    except (OSError, ValueError, KeyError):
        return None
