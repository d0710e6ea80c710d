"""How long a run will take: from its network's multiply-adds and a speed, assumed or measured."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..models import convolutions, multiply_adds
from ..speed.benchmark import load_benchmark
from .recipes import study_of
from .study import Plan

CPU_SPEED, GPU_SPEED = 55e9, 8e12
"""Multiply-adds per second in training, for estimates. CPU: measured, one thread of a 2023 Xeon in float32 (WRN 16-4 at 47
images/s). GPU: assumed, a quarter of a T4's nominal speed in float16; not measured."""

LAUNCH_SECONDS = 3e-4
"""What a convolution and what follows it need per training step, however small they are. CPU: measured (0.36 ms, one
thread of an EPYC, recipe DARTS in profile fast); GPU: assumed, not measured."""


def expected_seconds(plan: Plan, gpu: bool, speed: float | None = None) -> float:
    """An estimate of a run's time, from its network's multiply-adds (three times those of a forward pass).

    Args:
        speed: multiply-adds per second; default: `CPU_SPEED` or `GPU_SPEED`.
    """
    examples, epochs = study_of(plan).examples(plan), plan.settings.epochs
    forward = multiply_adds(plan.network, plan.sizes["side"], **plan.options)
    seconds = 3 * forward * examples * epochs / (speed or (GPU_SPEED if gpu else CPU_SPEED))
    steps = examples / plan.settings.batch_size * epochs
    return max(seconds, LAUNCH_SECONDS * convolutions(plan.network, **plan.options) * steps)


def measured_speed(path: Path) -> float | None:
    """Multiply-adds per second in training, from the record of a benchmark; None if it contains none."""
    try:
        record: Mapping[str, Any] = load_benchmark(path)
        steps, forward = record["steps"], record["ceiling"]["multiply-adds an image"]
        return 3 * float(forward) * steps["batch"] / statistics.median(steps["seconds"]["ours"])
    except (OSError, ValueError, KeyError):
        return None
