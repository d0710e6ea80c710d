"""One training loop for every task: precision, schedule, progress, checkpoints, and several devices under torchrun."""

from __future__ import annotations

import hashlib
import json
import math
import numbers
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import distributed
from .arguments import count
from .checkpoints import (
    ForeignCheckpoint,
    load_optimizer_tensors,
    newest_checkpoint,
    optimizer_tensors,
    prune_checkpoints,
    write_checkpoint,
)
from .processor import bfloat16_pays
from .progress import Progress
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
        batch_size: examples a step, over all devices; the last, smaller batch of an epoch is kept.
        optimizer: "sgd" (Nesterov momentum 0.9) or "adam".
        rate: learning rate at the start.
        milestones: fractions of `epochs` after which the rate is multiplied by `factor`.
        factor: see `milestones`.
        weight_decay: on everything but coefficients, see `decay_groups`.
        penalty: lambda of the recurrence penalty that is added to the loss.
        precision: "float32", "bfloat16", "float16" or "auto": bfloat16 where the device has units for it, else float16 on
            CUDA (with a gradient scaler) and float32 on a CPU.
        channels_last: whether to keep activations and weights in channels_last memory format.
        compile: whether to run the model through torch.compile, which takes a minute or two before the first step; None: on
            CUDA, for runs of at least 1,000 steps. Where it fails, a warning says so and training goes on without it.
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
    compile: bool | None = None
    evaluate_every: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "evaluate_every"):
            object.__setattr__(self, name, count(name, getattr(self, name)))
        if self.precision not in PRECISIONS:
            raise ValueError(f"unknown precision {self.precision!r}; known: {', '.join(PRECISIONS)}")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"unknown optimizer {self.optimizer!r}; known: {', '.join(OPTIMIZERS)}")
        for name in ("rate", "factor", "penalty", "weight_decay"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, numbers.Real):
                raise TypeError(f"{name} must be a number, got {value!r}")
            object.__setattr__(self, name, float(value))  # numpy's numbers are no JSON
            if not math.isfinite(value) or value < 0 or (value == 0 and name in ("rate", "factor")):
                least = "above 0" if name in ("rate", "factor") else "at least 0"
                raise ValueError(f"{name} must be finite and {least}, got {value}")
        if isinstance(self.milestones, str) or not all(isinstance(each, numbers.Real) for each in self.milestones):
            raise TypeError(f"milestones must be fractions of the epochs, such as (0.3, 0.6), got {self.milestones!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, numbers.Integral):
            raise TypeError(f"seed must be a whole number, got {self.seed!r}")
        object.__setattr__(self, "seed", int(self.seed))
        object.__setattr__(self, "milestones", tuple(float(each) for each in self.milestones))


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """The given device, or CUDA where there is one, else the CPU.

    Raises RuntimeError for CUDA where there is none, ValueError for a device that nobody knows.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"unknown device {device!r}; known: cpu, cuda, cuda:0, ...") from error
    if device.type == "meta":
        raise ValueError("the meta device holds no values, so nothing can be computed there; use cpu or cuda")
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
    weight: float = 1.0,
) -> Tensor:
    """One step of the optimizer on one batch; returns the loss, penalty included, detached and still on the device.

    `weight` multiplies the task's loss, see `softshare.distributed.own_part`.
    """
    with autocast(inputs.device, dtype):
        outputs = model(inputs)
    loss = task.loss(outputs.float(), targets)
    if weight != 1.0:
        loss = loss * weight
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
    checkpoints: str | Path | None = None,
    checkpoint_seconds: float = 120.0,
) -> list[dict[str, float]]:
    """Train a model in place.

    With `checkpoints`, a run that was killed goes on where its newest checkpoint left it, and in one process on a CPU ends
    with the same weights, bit for bit, as one that never was. (Among several processes dropout goes on with other random
    numbers.) Under ``torchrun`` every process calls this with the same arguments: a
    batch is divided among them, gradients are averaged by DistributedDataParallel, process 0 writes and speaks for all.

    Args:
        model: moved to the device, and left there in eval mode.
        task: `softshare.tasks.Classification`, `ShortestPaths`, or another `Task`.
        settings: see `Settings`.
        callbacks: functions called as ``callback(model, epoch)`` before the first epoch (with 0) and after each, or
            `SimilarityRecorder` instances. What one knows travels in checkpoints if it has, as the recorder does,
            ``state_dict()`` and ``load_state_dict(state)`` for a dict of tensors.
        device: default: CUDA where there is one.
        title: what the progress display calls the run.
        progress: whether to show epoch, loss, metrics, examples per second and time left: as a bar on a terminal, as plain
            lines elsewhere.
        checkpoints: a folder for this run's checkpoints, which the newest two are kept in; None: none are written.
        checkpoint_seconds: the least time between two; 0: after every step. The end is always kept.

    Returns:
        One dict an epoch: epoch (from 1), rate, loss (mean over the epoch's examples, penalty included), seconds,
        examples_per_second, and where the epoch was evaluated the task's metrics as "held_out_...".

    Raises:
        FloatingPointError: the loss became NaN or infinite; the message names step, rate and last good checkpoint.
        ForeignCheckpoint: a ValueError; the folder holds only checkpoints of other runs.
        RuntimeError: CUDA was asked for where there is none.
    """
    if not isinstance(model, nn.Module) or not isinstance(settings, Settings):
        raise TypeError(
            f"fit takes a torch.nn.Module and Settings, got {type(model).__name__}, {type(settings).__name__}"
        )
    if not checkpoint_seconds >= 0:
        raise ValueError(f"checkpoint_seconds must be at least 0, got {checkpoint_seconds}")
    with distributed.process_group(pick_device(device)) as place:
        folder = None if checkpoints is None else Path(checkpoints).expanduser()
        run = _Run(model, task.to(place), settings, callbacks, place, folder, checkpoint_seconds)
        run.display = Progress(title, settings.epochs, task.size, progress and distributed.rank() == 0)
        try:
            return run.train()
        finally:
            run.display.close()


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


class _Run:
    """One call of `fit`: everything that a checkpoint holds, and how it changes."""

    display: Progress

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        settings: Settings,
        callbacks: Sequence[Callback | SimilarityRecorder],
        device: torch.device,
        folder: Path | None,
        pause: float,
    ) -> None:
        self.model, self.task, self.settings, self.device = model, task, settings, device
        self.callbacks, self.folder, self.pause = list(callbacks), folder, pause
        self.dtype = pick_precision(settings.precision, device)
        self.steps = math.ceil(task.size / settings.batch_size)  # of an epoch
        # Shapes never change, so the fastest kernels are looked for.
        torch.backends.cudnn.benchmark = device.type == "cuda"
        model.to(device=device)
        if settings.channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = make_optimizer(model, settings)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype is torch.float16)
        self.order = torch.Generator().manual_seed(settings.seed)
        torch.manual_seed(settings.seed + 1_000_003 * distributed.rank())
        shapes = [f"{name} {tuple(value.shape)}" for name, value in model.state_dict().items()]
        self.identity = {
            "model": _digest(str(model), *shapes),  # a model's text has what its weights have not, such as dropout
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "examples": task.size,
            "data": _digest(task.identity()),
            "callbacks": [type(callback).__name__ for callback in callbacks if hasattr(callback, "state_dict")],
            **json.loads(json.dumps(asdict(settings))),
        }
        self.epoch, self.step = 1, 0  # the epoch that goes on, and its steps done
        self.losses = torch.zeros(self.steps, device=device)  # of its steps
        self.checked = 0  # steps whose losses are known to be finite, and are averaged over processes
        self.seconds = 0.0  # spent on it
        self.history: list[dict[str, float]] = []
        self.last_good: Path | None = None
        self.saved = time.perf_counter()

    @property
    def total_steps(self) -> int:
        return (self.epoch - 1) * self.steps + self.step

    def train(self) -> list[dict[str, float]]:
        settings, model = self.settings, self.model
        resumed = self._resume()
        distributed.agree("the epoch and step to go on at", self.epoch, self.step)
        if not resumed:
            self._call(0)
        elif self.epoch > settings.epochs:
            self.display.say(f"finished already: {self.last_good}")
        module: nn.Module | None = None
        # How often the losses are looked at: that makes the device wait, and processes wait for one another.
        every = 50 if self.device.type == "cuda" else 10 if distributed.world_size() > 1 else 1
        while self.epoch <= settings.epochs:
            started = time.perf_counter()
            task = self.task.at(self.epoch)
            rate = learning_rate(settings, self.epoch - 1)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.order_before = self.order.get_state()
            order = torch.randperm(task.size, generator=self.order).to(self.device).split(settings.batch_size)
            parts, weights = zip(*(distributed.own_part(indices) for indices in order[self.step :]), strict=True)
            model.train()
            batches = task.batches(parts, settings.seed, self.epoch)
            for (inputs, targets), weight in zip(batches, weights, strict=True):
                if settings.channels_last and inputs.dim() == 4:
                    inputs = inputs.contiguous(memory_format=torch.channels_last)
                if module is None:
                    module = self._module(inputs, targets)
                loss = train_step(
                    module, task, inputs, targets, self.optimizer, self.scaler, self.dtype, settings.penalty, weight
                )
                self.losses[self.step] = loss
                self.step += 1
                self.display.add(len(order[self.step - 1]))
                for callback in self.callbacks:
                    if isinstance(callback, SimilarityRecorder) and callback.due(self.epoch, self.step, self.steps):
                        callback.record(model, self.epoch - 1 + self.step / self.steps)
                if self.step % every == 0 and self.step < self.steps:
                    self._check(rate)
                    if self.folder and time.perf_counter() - self.saved >= self.pause:
                        self._save(self.seconds + time.perf_counter() - started)
            self._check(rate)
            self.seconds += time.perf_counter() - started
            self._end_epoch(task, rate)
            if self.folder and (self.epoch > settings.epochs or time.perf_counter() - self.saved >= self.pause):
                self._save(0.0)
        model.eval()
        return self.history

    def _end_epoch(self, task: Task, rate: float) -> None:
        settings, epoch = self.settings, self.epoch
        sizes = torch.full((self.steps,), float(settings.batch_size), dtype=torch.float64)
        sizes[-1] = task.size - settings.batch_size * (self.steps - 1)
        row = {
            "epoch": float(epoch),
            "rate": rate,
            "loss": float((self.losses.cpu().double() * sizes).sum() / task.size),
            "seconds": self.seconds,
            "examples_per_second": task.size / self.seconds,
        }
        distributed.agree_on_buffers(self.model)
        if epoch % settings.evaluate_every == 0 or epoch == settings.epochs:
            metrics = evaluate(self.model, task, settings.precision)
            row |= {f"held_out_{name}": value for name, value in metrics.items()}
        self.history.append(row)
        self._call(epoch)
        self.display.epoch(row)
        self.epoch, self.step, self.checked, self.seconds = epoch + 1, 0, 0, 0.0
        self.order_before = self.order.get_state()

    def _module(self, inputs: Tensor, targets: Tensor) -> nn.Module:
        """What is called in a step: the model, compiled and distributed where that is wanted and works."""
        module = distributed.wrapped(self.model, self.device)
        wanted = self.settings.compile
        if wanted is None:
            wanted = self.device.type == "cuda" and self.steps * self.settings.epochs >= 1000
        return try_compiled(module, self.task, inputs, targets, self.dtype) if wanted else module

    def _call(self, epoch: int) -> None:
        for callback in self.callbacks:
            (callback.record if isinstance(callback, SimilarityRecorder) else callback)(self.model, epoch)

    def _check(self, rate: float) -> None:
        """Average the latest losses over processes and stop if one is not finite."""
        latest = distributed.average_(self.losses[self.checked : self.step])
        values = latest.tolist()
        for place, value in enumerate(values, start=self.checked + 1):
            if not math.isfinite(value):
                kept = "no checkpoint was kept" if self.folder is None else "no checkpoint was written yet"
                if self.last_good is not None:
                    kept = f"the last good checkpoint is {self.last_good}"
                raise FloatingPointError(
                    f"the loss became {value} at step {place} of {self.steps} in epoch {self.epoch} of "
                    f"{self.settings.epochs} at rate {rate:g} in {str(self.dtype).removeprefix('torch.')}; {kept}. Lower "
                    'the rate, or try precision="float32"'
                )
        self.checked = self.step
        if values:
            self.display.look(self.epoch, values[-1])

    def _save(self, seconds: float) -> None:
        self.saved = time.perf_counter()
        if distributed.rank() > 0 or not all(bool(p.isfinite().all()) for p in self.model.parameters()):
            return  # the weights left the finite numbers: the next loss will tell
        assert self.folder is not None
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"optimizer.{name}": value for name, value in optimizer_tensors(self.optimizer).items()}
        tensors |= {"order": self.order_before, "losses": self.losses, "random.cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(self.device)
        for number, callback in enumerate(self.callbacks):
            if hasattr(callback, "state_dict"):
                tensors |= {f"callback.{number}.{name}": value for name, value in callback.state_dict().items()}
        facts = {
            "epoch": self.epoch,
            "step": self.step,
            "seconds": seconds,
            "history": self.history,
            "scaler": self.scaler.state_dict(),
        }
        try:
            self.last_good = write_checkpoint(self.folder, self.total_steps, self.identity, tensors, facts)
        except OSError as error:
            kept = f"the last one is {self.last_good}" if self.last_good else "there is none yet"
            warnings.warn(f"no checkpoint could be written ({error}); {kept}; training goes on", stacklevel=2)
            return
        prune_checkpoints(self.folder, self.total_steps, self.identity)

    def _resume(self) -> bool:
        """Take up the newest checkpoint, if there is one."""
        found = newest_checkpoint(self.folder, self.identity) if self.folder else None
        if found is None:
            return False
        path, tensors, facts = found
        try:
            self._restore(tensors, facts)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ForeignCheckpoint(f"{path} does not hold what this run needs: {error}") from error
        self.last_good = path
        self.display.begin_at((self.epoch - 1) * self.task.size + self.step * self.settings.batch_size)
        self.display.say(f"going on at epoch {self.epoch}, step {self.step + 1}, from {path}")
        return True

    def _restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

        self.model.load_state_dict(part("model."))
        load_optimizer_tensors(self.optimizer, part("optimizer."))
        self.scaler.load_state_dict(facts["scaler"]) if facts["scaler"] else None
        self.order.set_state(tensors["order"])
        self.losses.copy_(tensors["losses"])
        for number, callback in enumerate(self.callbacks):
            if hasattr(callback, "load_state_dict"):
                callback.load_state_dict(part(f"callback.{number}."))
        self.epoch, self.step, self.seconds = facts["epoch"], facts["step"], facts["seconds"]
        self.checked, self.history = self.step, facts["history"]
        if not 0 <= self.step < self.steps or len(self.history) != self.epoch - 1:
            raise ValueError(f"epoch {self.epoch}, step {self.step}, {len(self.history)} epochs of history")
        if distributed.rank() == 0:
            torch.set_rng_state(tensors["random.cpu"])
            if self.device.type == "cuda" and "random.cuda" in tensors:
                torch.cuda.set_rng_state(tensors["random.cuda"], self.device)
        else:  # only process 0's state is kept; the others' dropout goes on with numbers of its own
            torch.manual_seed(self.settings.seed + 1_000_003 * distributed.rank() + self.total_steps)


def try_compiled(module: nn.Module, task: Task, inputs: Tensor, targets: Tensor, dtype: torch.dtype) -> nn.Module:
    """``torch.compile(module)``, tried on one batch, forward and backward; with a warning the module itself if it fails.

    Leaves gradients empty, and statistics and random numbers as they were.
    """
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    cuda = [inputs.device] if inputs.device.type == "cuda" else []
    compiled: nn.Module = module
    with torch.random.fork_rng(devices=cuda):
        try:
            compiled = torch.compile(module, dynamic=False)  # type: ignore[assignment]
            with autocast(inputs.device, dtype):
                outputs = compiled(inputs)
            task.loss(outputs.float(), targets).backward()
        except Exception as error:  # compilers fail in many ways
            reason = str(error).strip().splitlines() or [""]
            warnings.warn(
                f"torch.compile failed ({type(error).__name__}: {reason[0][:200]}); training goes on without it, slower",
                stacklevel=2,
            )
            compiled = module
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)
    module.zero_grad(set_to_none=True)
    return compiled
