"""How long a run will take: from its network's multiply-adds and a speed, assumed or measured."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..models import convolutions, multiply_adds, parameters
from ..speed.benchmark import load_benchmark
from .recipes import study_of
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


def expected_seconds(plan: Plan, gpu: bool, speed: float | None = None) -> float:
    """An estimate of a run's time, from its network's multiply-adds (three times those of a forward pass).

    Args:
        speed: multiply-adds per second, if measured; default: `CPU_SPEED` or `GPU_SPEED`, and steps that are not captured,
            as on a T4, whose float16 does not allow it.
    """
    examples, epochs = study_of(plan).examples(plan), plan.settings.epochs
    forward = multiply_adds(plan.network, plan.sizes["side"], **plan.options)
    seconds = 3 * forward * examples * epochs / (speed or (GPU_SPEED if gpu else CPU_SPEED))
    steps = examples / plan.settings.batch_size * epochs
    launch = CAPTURED_SECONDS if gpu and speed is not None else LAUNCH_SECONDS
    return max(seconds, launch * convolutions(plan.network, **plan.options) * steps)


def fold_seconds(plan: Plan, gpu: bool, speed: float | None = None) -> float:
    """The same for folding its network at `folding.THRESHOLDS` and testing every fold twice."""
    forward = multiply_adds(plan.network, plan.sizes["side"], **plan.options)
    tested = 2 * 18 * (plan.sizes.get("test") or 10_000)
    return tested * forward / (speed or (GPU_SPEED if gpu else CPU_SPEED))


def checkpoint_bytes(plan: Plan) -> int:
    """The size of a checkpoint: weights and one tensor of their size for SGD, two for Adam, in float32."""
    return 4 * parameters(plan.network, **plan.options) * (3 if plan.settings.optimizer == "adam" else 2)


def measured_speed(path: Path) -> float | None:
    """Multiply-adds per second in training, from the record of a benchmark; None if it contains none."""
    try:
        record: Mapping[str, Any] = load_benchmark(path)
        steps, forward = record["steps"], record["ceiling"]["multiply-adds an image"]
        return 3 * float(forward) * steps["batch"] / statistics.median(steps["seconds"]["ours"])
    except (OSError, ValueError, KeyError):
        return None
