"""How to train: the schedule, which decides the outcome, and the execution, which decides the speed."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from ..arguments import count

PRECISIONS = ("auto", "float32", "bfloat16", "float16")
OPTIMIZERS = ("sgd", "adam")
ANNEALINGS = ("steps", "cosine")

ADDED_LATER: dict[str, Any] = {"annealing": "steps", "least_rate": 0.0, "growth": 1, "nesterov": True, "clip": 0.0}
"""Fields of the schedule that came after the first records, with the values that those had without them."""


@dataclass(frozen=True)
class Schedule:
    """What decides the outcome of a training run. The defaults are those of the authors' released code for CIFAR.

    Attributes:
        epochs: passes over the training examples; 200 in the authors' code, no default here.
        batch_size: examples per step, over all devices; the last, smaller batch of an epoch is kept.
        optimizer: "sgd" (momentum 0.9) or "adam".
        rate: learning rate at the start.
        milestones: fractions of `epochs`, or of `cycle`, after which the rate is multiplied by `factor`.
        factor: see `milestones`.
        cycle: number of epochs after which the schedule of rates restarts, as in each phase of a curriculum; 0: never.
        weight_decay: on everything but coefficients, see `softshare.decay_groups`.
        penalty: lambda of the recurrence penalty that is added to the loss.
        evaluate_every: epochs between evaluations; the last epoch is always evaluated.
        seed: of the order of examples, augmentation and dropout. The model's own initialisation is the caller's.
        annealing: "steps" (see `milestones`), or "cosine": from `rate` to `least_rate` by half a cosine over the epochs
            or the cycle, one rate per epoch.
        least_rate: where a cosine ends.
        growth: each cycle is that many times as long as the one before (Loshchilov and Hutter, 2017).
        nesterov: whether momentum is Nesterov's.
        clip: largest norm of the gradient of all parameters together, to which longer ones are scaled; 0: none.
    """

    epochs: int
    batch_size: int = 128
    optimizer: str = "sgd"
    rate: float = 0.1
    milestones: Sequence[float] = (0.3, 0.6, 0.8)
    factor: float = 0.2
    cycle: int = 0
    weight_decay: float = 5e-4
    penalty: float = 0.0
    evaluate_every: int = 1
    seed: int = 0
    annealing: str = "steps"
    least_rate: float = 0.0
    growth: int = 1
    nesterov: bool = True
    clip: float = 0.0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "evaluate_every", "growth", "cycle"):
            value = getattr(self, name)
            never = name == "cycle" and value == 0 and isinstance(value, int) and not isinstance(value, bool)
            object.__setattr__(self, name, 0 if never else count(name, value))
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"unknown optimizer {self.optimizer!r}; known: {', '.join(OPTIMIZERS)}")
        if self.annealing not in ANNEALINGS:
            raise ValueError(f"unknown annealing {self.annealing!r}; known: {', '.join(ANNEALINGS)}")
        if not isinstance(self.nesterov, bool):
            raise TypeError(f"nesterov must be True or False, got {self.nesterov!r}")
        for name in ("rate", "factor", "penalty", "weight_decay", "least_rate", "clip"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, numbers.Real):
                raise TypeError(f"{name} must be a number, got {value!r}")
            object.__setattr__(self, name, float(value))  # numpy's numbers are not JSON
            if not math.isfinite(value) or value < 0 or (value == 0 and name in ("rate", "factor")):
                least = "above 0" if name in ("rate", "factor") else "at least 0"
                raise ValueError(f"{name} must be finite and {least}, got {value}")
        listed = not isinstance(self.milestones, (str, set)) and hasattr(self.milestones, "__iter__")
        if not listed or not all(isinstance(each, numbers.Real) for each in self.milestones):
            raise TypeError(f"milestones must be fractions of the epochs, such as (0.3, 0.6), got {self.milestones!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, numbers.Integral):
            raise TypeError(f"seed must be a whole number, got {self.seed!r}")
        if not -(2**62) <= self.seed < 2**62:
            raise ValueError(f"seed must be from -2**62 to 2**62 - 1, got {self.seed}")
        object.__setattr__(self, "seed", int(self.seed))
        object.__setattr__(self, "milestones", tuple(float(each) for each in self.milestones))

    def schedule(self) -> dict[str, Any]:
        """The fields of the schedule alone, as JSON."""
        chosen = {field.name: getattr(self, field.name) for field in fields(Schedule)}
        return chosen | {"milestones": list(self.milestones)}

    def rate_of(self, epoch: int) -> float:
        """The learning rate of an epoch (from 0): steps or a cosine, restarted after each `cycle`."""
        length, place = self.cycle or self.epochs, epoch
        while self.cycle and place >= length:
            place, length = place - length, length * self.growth
        if self.annealing == "cosine":
            return self.least_rate + (self.rate - self.least_rate) * (1 + math.cos(math.pi * place / length)) / 2
        passed = sum(place >= max(1, round(fraction * length)) for fraction in self.milestones)
        return self.rate * self.factor**passed


@dataclass(frozen=True)
class Settings(Schedule):
    """How to train: a `Schedule`, and the execution, which only changes speed and rounding.

    Attributes:
        precision: "float32", "bfloat16", "float16" or "auto": bfloat16 if the device has units for it, else float16 on
            CUDA (with a gradient scaler) and float32 on a CPU. A model with float64 parameters computes in float64.
        tf32: whether convolutions in float32 on CUDA may round their inputs to TF32, as PyTorch does by default.
        channels_last: whether to keep activations and weights in channels_last memory format.
        capture: whether to capture whole training steps in a CUDA graph, which takes about twenty steps; None: on CUDA, for
            runs of at least 200 steps, if one process trains, without float16's gradient scaler, on a task that allows it
            (see `softshare.training.tasks.Task.prepare`). Replays are first compared with steps that are not captured. If
            they differ, or capturing fails, a warning says why and training continues without it.
        compile: whether to compile the model with torch.compile, which takes about half a minute (17 to 34 s on a machine
            with an H100); None: on CUDA, for captured steps if the measured time of a step and an assumed gain of 15% say
            that it saves more than it takes, for others in runs of at least 1,000 steps. If it fails, a warning reports it
            and training continues without it.
    """

    precision: str = "auto"
    tf32: bool = True
    channels_last: bool = True
    capture: bool | None = None
    compile: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.precision not in PRECISIONS:
            raise ValueError(f"unknown precision {self.precision!r}; known: {', '.join(PRECISIONS)}")
