"""The training loop: one for every task, with progress, checkpoints, and multiple devices under torchrun."""

from __future__ import annotations

import hashlib
import json
import math
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import without_addresses
from ..files import user_path, writable
from ..precautions import refuse_inference
from . import distributed
from .checkpoints import ForeignCheckpoint, RunFolder, load_optimizer_tensors, optimizer_tensors
from .devices import convolution_kernels, parameter_dtype, pick_device, pick_precision
from .environment import Execution
from .evaluation import evaluate
from .graphed import Steps
from .progress import Progress
from .recorder import SimilarityRecorder
from .settings import ADDED_LATER, Settings
from .tasks import Task

Callback = Callable[[nn.Module, int], None]


class History(list[dict[str, float]]):
    """What `fit` returns: a list of one dict per epoch.

    Attributes:
        execution: how the run was carried out, see `softshare.training.environment.Execution.record`.
    """

    def __init__(self, rows: Sequence[dict[str, float]], execution: dict[str, Any]) -> None:
        super().__init__(rows)
        self.execution = execution


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
) -> History:
    """Train a model in place.

    With `checkpoints`, a run that was killed resumes from its newest checkpoint and, in one process on a CPU, ends with the
    same weights, bit for bit, as an uninterrupted one. (With several processes, dropout resumes with new random numbers.)
    Under ``torchrun`` every process calls this with the same arguments: each batch is divided among them, gradients are
    averaged by DistributedDataParallel, and process 0 writes and reports for all.

    Args:
        model: moved to the device, and left there in eval mode. Its outputs must be one tensor, its parameters all float32,
            or all float64, which is then the precision. Its state dict may hold more than tensors (`get_extra_state`);
            checkpoints keep whatever JSON can hold.
        task: `softshare.training.tasks.Classification`, `ShortestPaths`, or another `Task`.
        settings: see `Settings`.
        callbacks: functions called as ``callback(model, epoch)`` before the first epoch (with 0) and after each, or
            `SimilarityRecorder` instances. A callback's state is kept in checkpoints if, like the recorder, it has
            ``state_dict()`` and ``load_state_dict(state)`` for a dict of tensors.
        device: default: CUDA if available.
        title: the run's name in the progress display.
        progress: whether to show epoch, loss, metrics, examples per second and time left: as a bar on a terminal, as plain
            lines elsewhere.
        checkpoints: a folder for this run's checkpoints, of which the newest two are kept; None: none are written.
        checkpoint_seconds: the least time between two; 0: after every step. The last state is always kept.

    Returns:
        One dict per epoch: epoch (from 1), rate, loss (mean over the epoch's examples, penalty included), seconds,
        examples_per_second, and if the epoch was evaluated, the task's metrics as "held_out_...".

    Raises:
        FloatingPointError: the loss became NaN or infinite; the message names step, rate and last good checkpoint.
        ForeignCheckpoint: a ValueError; the folder holds only checkpoints of other runs.
        OSError: nothing can be written to the folder of checkpoints.
        NoSuchDevice: a RuntimeError; CUDA was requested but is not available.
        TypeError: the model's outputs are not one tensor, or its extra state cannot be kept in checkpoints.
        ValueError: parameters of several dtypes or in half precision, or made under `torch.inference_mode`.
    """
    if not isinstance(model, nn.Module) or not isinstance(task, Task) or not isinstance(settings, Settings):
        raise TypeError(
            "fit takes a torch.nn.Module, a task such as Classification(train, test), and Settings, got "
            f"{type(model).__name__}, {type(task).__name__}, {type(settings).__name__}"
        )
    if odd := [each for each in callbacks if isinstance(each, type) or not (callable(each) or hasattr(each, "record"))]:
        raise TypeError(f"callbacks must be functions or instances such as SimilarityRecorder(), got {odd}")
    if not checkpoint_seconds >= 0:
        raise ValueError(f"checkpoint_seconds must be at least 0, got {checkpoint_seconds}")
    refuse_inference(model)
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        distributed.process_group(pick_device(device)) as place,
        convolution_kernels(place, settings.tf32),
    ):
        folder = None if checkpoints is None else writable(user_path(checkpoints))
        run = _Run(model, task.to(place), settings, callbacks, place, folder, checkpoint_seconds)
        run.display = Progress(title, settings.epochs, task.size, progress and distributed.rank() == 0)
        try:
            return run.train()
        finally:
            run.display.close()
            run.run.close()


def _extra_state(model: nn.Module) -> dict[str, Any]:
    """What a model's state dict holds besides tensors. Raises TypeError for what JSON would not return unchanged."""
    extra = {name: value for name, value in model.state_dict().items() if not isinstance(value, Tensor)}
    for name, value in extra.items():
        try:
            same = bool(json.loads(json.dumps(value)) == value)
        except (TypeError, ValueError):
            same = False
        if not same:
            raise TypeError(
                f"checkpoints keep tensors and JSON, but the model's {name!r} is {type(value).__name__} {value!r:.60}; "
                "have its get_extra_state return a tensor or JSON, or train without checkpoints"
            )
    return extra


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


class _Losses:
    """The losses of an epoch's steps: kept on the device and read from time to time, since reading makes the device wait."""

    def __init__(self, steps: int, device: torch.device) -> None:
        self.values = torch.zeros(steps, device=device, dtype=torch.float32)
        self.checked = 0  # steps whose losses are known to be finite, and are averaged over processes
        # Processes also wait for one another each time.
        self.every = 50 if device.type == "cuda" else 10 if distributed.world_size() > 1 else 1

    def look(self, done: int) -> list[float]:
        """Average the losses since the last call, up to step `done`, over processes; returns them."""
        latest = distributed.average_(self.values[self.checked : done])
        self.checked = done
        return latest.tolist()  # type: ignore[no-any-return]

    def mean(self, sizes: Tensor) -> float:
        """The mean over the epoch's examples, given the size of each step's batch."""
        return float((self.values.cpu().double() * sizes).sum() / sizes.sum())


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
        self.callbacks = list(callbacks)
        parameters = parameter_dtype(model)
        self.dtype = pick_precision(settings.precision, device, parameters)
        distributed.agree("the precision", torch.finfo(self.dtype).bits, int(self.dtype is torch.bfloat16))
        self.steps = math.ceil(task.size / settings.batch_size)  # per epoch
        model.to(device=device)
        if settings.channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.run = Steps(model, task, settings, device, self.dtype)
        self.stepper = self.run.stepper
        self.execution = Execution(device, settings, parameters)
        self.order = torch.Generator("cpu").manual_seed(settings.seed)
        torch.manual_seed(settings.seed + 1_000_003 * distributed.rank())
        self.folder = RunFolder(folder, self._identity(), pause)
        if folder is not None:
            _extra_state(model)  # if it cannot be kept, fail before hours of training
        self.epoch, self.step = 1, 0  # the current epoch, and its steps so far
        self.losses = _Losses(self.steps, device)
        self.seconds = 0.0  # spent on the current epoch
        self.history: list[dict[str, float]] = []

    def _identity(self) -> dict[str, Any]:
        """All that decides the outcome: a run resumes only from a checkpoint with the same identity."""
        shapes = [
            f"{name} {tuple(value.shape) if isinstance(value, Tensor) else ''}"
            for name, value in self.model.state_dict().items()
        ]
        kind = type(self.task)  # one of our own needs no name, its identity tells it
        frozen = [name for name, parameter in self.model.named_parameters() if not parameter.requires_grad]
        return {
            **({"frozen": _digest(*frozen)} if frozen else {}),
            # A model's text shows what its weights do not, such as dropout.
            "model": _digest(without_addresses(str(self.model)), *shapes),
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "examples": self.task.size,
            "data": _digest(*([kind.__qualname__] if kind.__module__ != Task.__module__ else []), self.task.identity()),
            "callbacks": [type(callback).__name__ for callback in self.callbacks if hasattr(callback, "state_dict")],
            **{name: value for name, value in self.settings.schedule().items() if ADDED_LATER.get(name, ...) != value},
        }

    @property
    def total_steps(self) -> int:
        return (self.epoch - 1) * self.steps + self.step

    def train(self) -> History:
        resumed = self._resume()
        self.run.left -= self.total_steps
        distributed.agree("the epoch and step to resume at", self.epoch, self.step)
        if not resumed:
            self._call(0)
        elif self.epoch > self.settings.epochs:
            self.display.say(f"already finished: {self.folder.last_good}")
        while self.epoch <= self.settings.epochs:
            task, rate = self.task.at(self.epoch), self.settings.rate_of(self.epoch - 1)
            self._train_epoch(task, rate)
            self._end_epoch(task, rate)
            if self.folder.due() or (self.folder.folder and self.epoch > self.settings.epochs):
                self._save(0.0)
        self.model.eval()
        return History(self.history, self.execution.record())

    def _train_epoch(self, task: Task, rate: float) -> None:
        started = time.perf_counter()
        self.stepper.set_rate(rate)
        self.model.train()
        for _ in self.run.epoch(task, *self._batches(task), self.epoch, self.losses.values):
            self.step += 1
            self._snapshots()
            self.display.add(min(self.settings.batch_size, task.size - (self.step - 1) * self.settings.batch_size))
            if self.step % self.losses.every == 0 and self.step < self.steps:
                self._check(rate)
                if self.folder.due():
                    self._save(self.seconds + time.perf_counter() - started)
        self._check(rate)
        self.seconds += time.perf_counter() - started

    def _batches(self, task: Task) -> tuple[Sequence[Tensor], Sequence[float]]:
        """The rest of the epoch: for each batch, the indices of this process's part and the weight of its mean loss."""
        self.order_before = self.order.get_state()
        order = torch.randperm(task.size, generator=self.order, device="cpu").to(self.device)
        batches = order.split(self.settings.batch_size)[self.step :]
        parts, weights = zip(*map(distributed.own_part, batches), strict=True)
        return parts, weights

    def _snapshots(self) -> None:
        for callback in self.callbacks:
            if isinstance(callback, SimilarityRecorder) and callback.due(self.epoch, self.step, self.steps):
                callback.record(self.model, self.epoch - 1 + self.step / self.steps)

    def _end_epoch(self, task: Task, rate: float) -> None:
        settings, epoch = self.settings, self.epoch
        self.execution.note(compiled=self.stepper.outcome, captured=self.run.captured)
        sizes = torch.full((self.steps,), float(settings.batch_size), dtype=torch.float64, device="cpu")
        sizes[-1] = task.size - settings.batch_size * (self.steps - 1)
        row = {
            "epoch": float(epoch),
            "rate": rate,
            "loss": self.losses.mean(sizes),
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
        self.epoch, self.step, self.losses.checked, self.seconds = epoch + 1, 0, 0, 0.0
        self.order_before = self.order.get_state()

    def _call(self, epoch: int) -> None:
        for callback in self.callbacks:
            (callback.record if isinstance(callback, SimilarityRecorder) else callback)(self.model, epoch)

    def _check(self, rate: float) -> None:
        """Read the latest losses and stop if one is not finite."""
        first = self.losses.checked + 1
        values = self.losses.look(self.step)
        for place, value in enumerate(values, start=first):
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"the loss became {value} at step {place} of {self.steps} in epoch {self.epoch} of "
                    f"{self.settings.epochs} at rate {rate:g} in {self.execution.now['precision']}; {self.folder.told()}. "
                    'Lower the rate, or try precision="float32"'
                )
        if values:
            self.display.look(self.epoch, values[-1])

    def _save(self, seconds: float) -> None:
        self.folder.touch()
        if distributed.rank() > 0 or not all(bool(p.isfinite().all()) for p in self.model.parameters()):
            return  # the weights are no longer finite: the next loss will show it
        try:
            extra = _extra_state(self.model)
        except TypeError as error:  # it was fine at the start
            warnings.warn(f"no checkpoint could be written ({error}); training continues", stacklevel=2)
            return
        state = self.model.state_dict().items()
        tensors = {f"model.{name}": value for name, value in state if isinstance(value, Tensor)}
        tensors |= {f"optimizer.{name}": value for name, value in optimizer_tensors(self.stepper.optimizer).items()}
        tensors |= {"order": self.order_before, "losses": self.losses.values, "random.cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(self.device)
        for number, callback in enumerate(self.callbacks):
            if hasattr(callback, "state_dict"):
                tensors |= {f"callback.{number}.{name}": value for name, value in callback.state_dict().items()}
        self.execution.note(compiled=self.stepper.outcome, captured=self.run.captured)
        facts = {
            "epoch": self.epoch,
            "step": self.step,
            "seconds": seconds,
            "history": self.history,
            "scaler": self.stepper.scaler.state_dict(),
            "execution": self.execution.states(),
            "extra state": extra,
        }
        self.folder.save(self.total_steps, tensors, facts)

    def _resume(self) -> bool:
        """Resume from the newest checkpoint, if there is one."""
        found = self.folder.newest()
        if found is None:
            return False
        path, tensors, facts = found
        if not self.task.identity():
            warnings.warn(
                f"resuming from {path}: {type(self.task).__name__} has no identity(), so nothing shows whether its "
                "data are the same as before",
                stacklevel=2,
            )
        try:
            self._restore(tensors, facts)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ForeignCheckpoint(f"{path} does not hold what this run needs: {error}") from error
        self.folder.last_good = path
        self.display.begin_at((self.epoch - 1) * self.task.size + self.step * self.settings.batch_size)
        self.display.say(f"resuming at epoch {self.epoch}, step {self.step + 1}, from {path}")
        return True

    def _restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

        self.model.load_state_dict(part("model.") | facts.get("extra state", {}))
        load_optimizer_tensors(self.stepper.optimizer, part("optimizer."))
        if facts["scaler"] and self.stepper.scaler.is_enabled():
            self.stepper.scaler.load_state_dict(facts["scaler"])
        self.order.set_state(tensors["order"])
        self.losses.values.copy_(tensors["losses"])
        for number, callback in enumerate(self.callbacks):
            if hasattr(callback, "load_state_dict"):
                callback.load_state_dict(part(f"callback.{number}."))
        self.epoch, self.step, self.seconds = facts["epoch"], facts["step"], facts["seconds"]
        self.losses.checked, self.history = self.step, facts["history"]
        if not 0 <= self.step < self.steps or len(self.history) != self.epoch - 1:
            raise ValueError(f"epoch {self.epoch}, step {self.step}, {len(self.history)} epochs of history")
        if self.epoch <= self.settings.epochs:
            self.execution.follow(facts["execution"])
        else:
            self.execution.finished(facts["execution"])
        if distributed.rank() == 0:
            torch.set_rng_state(tensors["random.cpu"])
            if self.device.type == "cuda" and "random.cuda" in tensors:
                torch.cuda.set_rng_state(tensors["random.cuda"], self.device)
        else:  # only process 0's state is kept; dropout in the others continues with new numbers
            torch.manual_seed(self.settings.seed + 1_000_003 * distributed.rank() + self.total_steps)
