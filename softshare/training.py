"""One training loop for both tasks: images to classify, grids to solve."""

from __future__ import annotations

import math
import numbers
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .arguments import count
from .processor import bfloat16_pays
from .sharing import decay_groups
from .similarity import SimilarityRecorder, recurrence_penalty
from .tasks import Task

PRECISIONS = ("auto", "float32", "bfloat16", "float16")
OPTIMIZERS = ("sgd", "adam")

Callback = Callable[[nn.Module, int], None]


@dataclass(frozen=True)
class Settings:
    """How to train. The defaults are those of the authors' released code for CIFAR; `epochs`, 200 there, has none.

    Attributes:
        epochs: passes over the training examples.
        batch_size: examples a step; the last, smaller batch of an epoch is kept.
        optimizer: "sgd" (Nesterov momentum 0.9) or "adam".
        rate: learning rate at the start.
        milestones: fractions of `epochs` after which the rate is multiplied by `factor`.
        factor: see `milestones`.
        weight_decay: on everything but coefficients, see `decay_groups`.
        penalty: lambda of the recurrence penalty that is added to the loss.
        precision: "float32", "bfloat16", "float16" or "auto": bfloat16 where the device has units for it, else float16 on
            CUDA (with a gradient scaler) and float32 on a CPU.
        channels_last: whether to keep activations and weights in channels_last memory format.
        compile: whether to run the model through torch.compile.
        evaluate_every: epochs between evaluations; the last epoch is always evaluated.
        seed: of the order of examples, augmentation and dropout. The model's own initialisation is the caller's.
    """

    epochs: int
    batch_size: int = 128
    optimizer: str = "sgd"
    rate: float = 0.1
    milestones: Sequence[float] = (0.3, 0.6, 0.8)
    factor: float = 0.2
    weight_decay: float = 5e-4
    penalty: float = 0.0
    precision: str = "auto"
    channels_last: bool = True
    compile: bool = False
    evaluate_every: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "evaluate_every"):
            count(name, getattr(self, name))
        if self.precision not in PRECISIONS:
            raise ValueError(f"unknown precision {self.precision!r}; known: {', '.join(PRECISIONS)}")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"unknown optimizer {self.optimizer!r}; known: {', '.join(OPTIMIZERS)}")
        for name in ("rate", "factor", "penalty", "weight_decay"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, numbers.Real):
                raise TypeError(f"{name} must be a number, got {value!r}")
            if not math.isfinite(value) or value < 0 or (value == 0 and name in ("rate", "factor")):
                least = "above 0" if name in ("rate", "factor") else "at least 0"
                raise ValueError(f"{name} must be finite and {least}, got {value}")
        if isinstance(self.milestones, str) or not all(isinstance(each, numbers.Real) for each in self.milestones):
            raise TypeError(f"milestones must be fractions of the epochs, such as (0.3, 0.6), got {self.milestones!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, numbers.Integral):
            raise TypeError(f"seed must be a whole number, got {self.seed!r}")


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """The given device, or CUDA where there is one, else the CPU. Raises RuntimeError for CUDA where there is none."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(
            f"device {str(device)!r} was asked for, but PyTorch {torch.__version__} sees no CUDA GPU here"
        )
    return device


def pick_precision(precision: str, device: torch.device) -> torch.dtype:
    """The dtype for autocast that a setting of `Settings.precision` means on a device."""
    if precision != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[precision]
    if device.type == "cuda":
        # Turing, such as Colab's T4 (7.5), emulates bfloat16 slowly; Ampere (8.0) is the first with units for it.
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    return torch.bfloat16 if bfloat16_pays() else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Mixed precision with `dtype`, or none for float32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not torch.float32)


def learning_rate(settings: Settings, epoch: int) -> float:
    """The step schedule: the rate of an epoch (from 0)."""
    passed = sum(epoch >= max(1, round(fraction * settings.epochs)) for fraction in settings.milestones)
    return settings.rate * settings.factor**passed


def make_optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum or Adam, with no weight decay on coefficients."""
    groups = decay_groups(model, settings.weight_decay)
    if settings.optimizer == "adam":
        return torch.optim.Adam(groups, lr=settings.rate)
    return torch.optim.SGD(groups, lr=settings.rate, momentum=0.9, nesterov=True)


def train_step(
    model: nn.Module,
    task: Task,
    inputs: Tensor,
    targets: Tensor,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    dtype: torch.dtype,
    penalty: float = 0.0,
) -> Tensor:
    """One step of the optimizer on one batch; returns the loss, penalty included, detached and still on the device."""
    with autocast(inputs.device, dtype):
        outputs = model(inputs)
    loss = task.loss(outputs.float(), targets)
    if penalty:
        loss = loss + penalty * recurrence_penalty(model)
    optimizer.zero_grad(set_to_none=True)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    return loss.detach()


def evaluate(model: nn.Module, task: Task, precision: str = "float32") -> dict[str, float]:
    """Metrics of the task's held-out examples, in eval mode, on the model's device; every module's mode is restored."""
    device = next(model.parameters()).device
    dtype = pick_precision(precision, device)
    modes = {module: module.training for module in model.modules()}
    model.eval()

    def predict(inputs: Tensor) -> Tensor:
        with autocast(device, dtype):
            return model(inputs).float()  # type: ignore[no-any-return]

    with torch.inference_mode():
        metrics = task.to(device).evaluate(predict)
    for module, mode in modes.items():
        module.training = mode
    return metrics


def fit(
    model: nn.Module,
    task: Task,
    settings: Settings,
    callbacks: Sequence[Callback | SimilarityRecorder] = (),
    device: str | torch.device | None = None,
    title: str = "",
    progress: bool = True,
) -> list[dict[str, float]]:
    """Train a model in place.

    Args:
        model: moved to the device, and left there in eval mode.
        task: `Classification` or `ShortestPaths`, or anything like them.
        settings: see `Settings`.
        callbacks: functions called as ``callback(model, epoch)`` before the first epoch (with 0) and after each, or
            `SimilarityRecorder` instances.
        device: default: CUDA where there is one.
        title: what the progress display calls the run.
        progress: whether to show epoch, loss, metrics, examples per second and time left: as a bar on a terminal, as plain
            lines elsewhere.

    Returns:
        One dict an epoch: epoch (from 1), rate, loss (mean over the epoch's steps, penalty included), seconds,
        examples_per_second, and where the epoch was evaluated the task's metrics as "held_out_...".

    Raises:
        FloatingPointError: the loss became NaN or infinite; the message says when. Checked once an epoch.
    """
    if not isinstance(model, nn.Module) or not isinstance(settings, Settings):
        raise TypeError(
            f"fit takes a torch.nn.Module and Settings, got {type(model).__name__}, {type(settings).__name__}"
        )
    device = pick_device(device)
    dtype = pick_precision(settings.precision, device)
    task = task.to(device)
    model.to(device=device)
    if settings.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = make_optimizer(model, settings)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
    torch.manual_seed(settings.seed)
    order = torch.Generator().manual_seed(settings.seed)
    run: nn.Module = torch.compile(model) if settings.compile else model  # type: ignore[assignment]
    calls = [callback.record if isinstance(callback, SimilarityRecorder) else callback for callback in callbacks]
    for call in calls:
        call(model, 0)
    display = _Display(title, settings.epochs, math.ceil(task.size / settings.batch_size), progress)
    history: list[dict[str, float]] = []
    for epoch in range(1, settings.epochs + 1):
        rate = learning_rate(settings, epoch - 1)
        for group in optimizer.param_groups:
            group["lr"] = rate
        model.train()
        started = time.perf_counter()
        total = torch.zeros((), device=device)
        for indices in _batches(task.size, settings.batch_size, order, device):
            inputs, targets = task.batch(indices, settings.seed, epoch)
            if settings.channels_last:
                inputs = inputs.contiguous(memory_format=torch.channels_last)
            loss = train_step(run, task, inputs, targets, optimizer, scaler, dtype, settings.penalty)
            total += loss * len(indices)
            display.step()
        mean = float(total) / task.size
        if not math.isfinite(mean):
            raise FloatingPointError(
                f"the loss became {mean} in epoch {epoch} of {settings.epochs} at rate {rate:g} in {dtype}; lower the "
                'rate, or try precision="float32"'
            )
        seconds = time.perf_counter() - started
        row = {
            "epoch": float(epoch),
            "rate": rate,
            "loss": mean,
            "seconds": seconds,
            "examples_per_second": task.size / seconds,
        }
        if epoch % settings.evaluate_every == 0 or epoch == settings.epochs:
            metrics = evaluate(model, task, settings.precision)
            row |= {f"held_out_{name}": value for name, value in metrics.items()}
        history.append(row)
        for call in calls:
            call(model, epoch)
        display.epoch(row)
    display.close()
    model.eval()
    return history


def _batches(size: int, batch_size: int, order: torch.Generator, device: torch.device) -> Iterator[Tensor]:
    indices = torch.randperm(size, generator=order).to(device)
    return iter(indices.split(batch_size))


class _Display:
    """A bar on a terminal; elsewhere (a notebook, a log) a plain line an epoch, at most one a second."""

    def __init__(self, title: str, epochs: int, steps: int, shown: bool) -> None:
        self.title, self.epochs, self.shown = title, epochs, shown
        self.started = self.last = time.perf_counter()
        self.bar: Any = None
        if shown and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=epochs * steps, desc=title, unit="step", dynamic_ncols=True)

    def step(self) -> None:
        if self.bar is not None:
            self.bar.update()

    def epoch(self, row: dict[str, float]) -> None:
        now, done = time.perf_counter(), int(row["epoch"])
        names = {"held_out_accuracy": "accuracy", "held_out_f1": "F1", "held_out_exact": "exact"}
        found = [f"{names[name]} {value:.4g}" for name, value in row.items() if name in names]
        text = ", ".join([f"loss {row['loss']:.3f}", *found, f"{row['examples_per_second']:.0f}/s"])
        if self.bar is not None:
            self.bar.set_postfix_str(text)
        elif self.shown and (now - self.last >= 1.0 or done == self.epochs):
            left = (now - self.started) / done * (self.epochs - done)
            print(f"{self.title} epoch {done}/{self.epochs}: {text}, {left:.0f} s left".strip(), flush=True)
            self.last = now

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
