"""One training step: forward, loss, penalty, backward, optimizer; and how it is compiled."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..sharing import decay_groups, mixed_once
from ..similarity import recurrence_penalty
from . import distributed
from .devices import outputs_of
from .settings import Schedule, Settings
from .tasks import Task


def make_optimizer(model: nn.Module, schedule: Schedule, rate: Tensor | None = None) -> torch.optim.Optimizer:
    """SGD with momentum or Adam, with no weight decay on coefficients.

    With `rate`, a scalar tensor on the model's device from which the rate is read, steps are fused and can be captured in a
    CUDA graph.
    """
    groups = decay_groups(model, schedule.weight_decay)
    how: dict[str, Any] = {} if rate is None else {"fused": True}
    given: Any = schedule.rate if rate is None else rate
    if schedule.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=given, momentum=0.9, nesterov=schedule.nesterov, **how)
    optimizer = torch.optim.Adam(groups, lr=given, capturable=rate is not None and rate.is_cuda, **how)
    # A captured step is compared with steps that are not captured; PyTorch would warn about those.
    optimizer._warned_capturable_if_run_uncaptured = True  # type: ignore[attr-defined]
    return optimizer


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
    clip: float = 0.0,
) -> Tensor:
    """One step of the optimizer on one batch; returns the loss, penalty included, detached and still on the device.

    `weight` multiplies the task's loss, see `softshare.training.distributed.own_part`; `clip` is that of a `Schedule`.
    Raises TypeError for a model whose outputs are not one tensor.
    """
    with mixed_once(model):
        loss = task.loss(outputs_of(model, inputs, dtype), targets)
        if weight != 1.0:
            loss = loss * weight
        if penalty:
            loss = loss + penalty * recurrence_penalty(model)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
    if clip:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    scaler.step(optimizer)
    scaler.update()
    return loss.detach()


class Stepper:
    """Single steps of one training run: the model as it is called, its optimizer, its gradient scaler.

    With `capturable`, `softshare.training.graphed` may capture its steps in a CUDA graph.

    Attributes:
        wanted: whether the model should be compiled by torch.compile at the next step, if `module` is None.
        module: the model as it is called, compiled or not; None before the first step.
        outcome: whether it was compiled, for a record: False (not wanted), True, or a text if it failed. All processes
            decide together, at the first step.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        settings: Settings,
        device: torch.device,
        dtype: torch.dtype,
        capturable: bool = False,
    ) -> None:
        self.model, self.task, self.device, self.dtype = model, task, device, dtype
        self.penalty, self.clip, self.channels_last = settings.penalty, settings.clip, settings.channels_last
        self.full = min(task.size, settings.batch_size)  # examples of a full batch, over all processes
        # A tensor, since a captured step repeats what it read from memory, not what it got from Python.
        self.rate = torch.tensor(settings.rate, device=device, dtype=torch.float32) if capturable else None
        self.optimizer = make_optimizer(model, settings, self.rate)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
        self.wanted = bool(settings.compile)
        self.outcome: bool | str = False
        self.module: nn.Module | None = None

    def set_rate(self, rate: float) -> None:
        """Use this learning rate from now on."""
        if self.rate is not None:
            self.rate.fill_(rate)
        for group in self.optimizer.param_groups:
            group["lr"] = rate if self.rate is None else self.rate

    def __call__(self, inputs: Tensor, targets: Tensor, weight: float = 1.0) -> Tensor:
        """`train_step` on a batch."""
        if self.module is None:
            self.module = self._called()
        inputs = self._laid_out(inputs)
        return train_step(
            self.module,
            self.task,
            inputs,
            targets,
            self.optimizer,
            self.scaler,
            self.dtype,
            self.penalty,
            weight,
            self.clip,
        )

    def _laid_out(self, inputs: Tensor) -> Tensor:
        if self.channels_last and inputs.dim() == 4:
            return inputs.contiguous(memory_format=torch.channels_last)
        return inputs

    def _called(self) -> nn.Module:
        module = self.model
        if self.wanted:
            # A full batch, even if the run resumes right before the last, smaller batch of an epoch.
            indices, _ = distributed.own_part(torch.arange(self.full, device=self.device))
            inputs, targets = self.task.batch(indices, 0, 1)
            inputs = self._laid_out(inputs)
            compiled = try_compiled(self.model, self.task, inputs, targets, self.dtype)
            # Before any gradient is exchanged: a process that failed on its own would leave the others waiting for it.
            worked = distributed.all_of(compiled is not self.model)
            self.outcome = worked or "failed, so it ran without"
            if worked:
                module = FullBatchesCompiled(self.model, compiled, inputs.shape)
            elif compiled is not self.model:
                warnings.warn("torch.compile failed in another process, so no process uses it", stacklevel=2)
        return distributed.wrapped(module, self.device)


class FullBatchesCompiled(nn.Module):
    """A model that runs compiled on inputs of one shape and uncompiled on others, such as an epoch's last, smaller batch.

    Otherwise the compiler would start again for each new shape, minutes into the training, where no trial catches an error.
    """

    def __init__(self, model: nn.Module, compiled: nn.Module, shape: torch.Size) -> None:
        super().__init__()
        self.model, self.shape = model, shape
        self.runs: tuple[Any] = (compiled,)  # in a tuple, so that its parameters are not registered twice

    def forward(self, inputs: Tensor) -> Tensor:
        run = self.runs[0] if inputs.shape == self.shape else self.model
        return run(inputs)  # type: ignore[no-any-return]


def try_compiled(model: nn.Module, task: Task, inputs: Tensor, targets: Tensor, dtype: torch.dtype) -> nn.Module:
    """``torch.compile(model)``, tried on one batch, forward and backward; if that fails, the model itself, with a warning.

    Leaves gradients empty, and statistics and random numbers as they were. After an error in CUDA itself nothing works any
    more, so that error is raised.
    """
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    cuda = [inputs.device] if inputs.device.type == "cuda" else []
    compiled: nn.Module = model
    with torch.random.fork_rng(devices=cuda):
        try:
            compiled = torch.compile(model, dynamic=False)  # type: ignore[assignment]
            with mixed_once(model):
                task.loss(outputs_of(compiled, inputs, dtype), targets).backward()
        except Exception as error:  # compilers fail in many ways
            if isinstance(error, getattr(torch, "AcceleratorError", ())) or "CUDA error" in str(error):
                raise
            reason = str(error).strip().splitlines() or [""]
            warnings.warn(
                f"torch.compile failed ({type(error).__name__}: {reason[0][:200]}); training continues without it, "
                "more slowly",
                stacklevel=2,
            )
            compiled = model
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)
    model.zero_grad(set_to_none=True)
    return compiled
