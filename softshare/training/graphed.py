"""The captured step: a whole training step as one CUDA graph, trusted only after a check against eager steps.

Python takes 20 to 30 microseconds per kernel that it launches (H100 machine, torch 2.11), so a small network waits for
Python most of the time. A CUDA graph records the kernels of a step once, and a replay launches them all. It repeats exactly
what was recorded: the same kernels on the same memory. So whatever changes from step to step lives in tensors that stay
where they are: the indices of the batch, the rate, the slot for the loss. Random numbers advance with each replay.
"""

from __future__ import annotations

import contextlib
import math
import operator
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import distributed
from .settings import Settings
from .step import Stepper
from .tasks import Task

WORTH_CAPTURING = 200
"""Steps of a run from which on capturing, which takes about as long as twenty steps, is worth it unasked."""

WORTH_COMPILING = 1000
"""The same for compiling steps that are not captured."""

COMPILING_SECONDS, COMPILED_GAIN = 40.0, 0.15
"""When to compile a captured step unasked. torch.compile took 17 to 34 s (H100 machine, torch 2.11); the share of a captured
step that it saves is assumed, not measured."""

CHECKED = 5
"""Steps that are compared before a capture is trusted."""
_WARM_UP = 3
_ROUNDING = 1e-4
_OF_A_TASK = ("prepare", "batch", "batches", "loss")

Body = Callable[[], None]
Capture = Callable[[Body, Sequence[Tensor]], Body]
"""What captures a step: given its body and the tensors that it may read and change, returns a replay of it."""


class CaptureFailed(RuntimeError):
    """A step could not be captured, or its replays compute something else."""


def cuda_graph(body: Body, fixed: Sequence[Tensor]) -> Body:
    """Capture a step that runs on CUDA. It is run a few times first: cuDNN searches for its kernels, memory is allocated."""
    device = fixed[0].device
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP):
            body()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            body()
    except Exception:
        # A capture that breaks off leaves the generator as if it were still being captured; so it gets a new state.
        generator = torch.cuda.default_generators[device.index or 0]
        generator.graphsafe_set_state(torch.Generator(device).graphsafe_get_state())
        raise
    return graph.replay


class State:
    """Everything that a step changes: kept as it is now, put back in place, and compared.

    Args:
        tensors: by name, where steps read and write them.
        device: whose random numbers steps draw.
    """

    def __init__(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        self.tensors, self.device = dict(tensors), device
        self.start, self.random = self.now(), self._random()

    def now(self) -> list[Tensor]:
        """Copies of all tensors."""
        return [tensor.detach().clone() for tensor in self.tensors.values()]

    def _random(self) -> Tensor:
        return torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else torch.get_rng_state()

    def restore(self) -> None:
        """Put back what was there at first, random numbers included."""
        with torch.no_grad():
            for tensor, start in zip(self.tensors.values(), self.start, strict=True):
                tensor.copy_(start)
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(self.random, self.device)
        else:
            torch.set_rng_state(self.random)

    def difference(self, first: Sequence[Tensor], second: Sequence[Tensor], replayed: Sequence[Tensor]) -> str:
        """Where replayed steps differ from eager ones by more than three times what two eager runs differ; "" if nowhere.

        For each tensor, the distance (Euclidean) must be at most three times that of the eager runs, plus a ten-thousandth
        of what the steps changed, since on many machines eager runs are equal to the bit.
        """
        rows = zip(self.tensors, self.start, first, second, replayed, strict=True)
        for name, *values in rows:
            start, one, two, other = (value.double() for value in values)
            moved, noise, off = (torch.linalg.vector_norm(each - one).item() for each in (start, two, other))
            if not off <= 3 * noise + _ROUNDING * moved:
                return f"{name} is off by {off:.3g}, two eager runs by {noise:.3g}, of a change of {moved:.3g}"
        return ""


class CapturedStep:
    """A training step that is captured once and then replayed.

    Args:
        step: one step on the examples with the given indices, (N,) int64; returns the loss. Its Python code runs only while
            the step is captured or checked.
        size: N.
        state: what steps change, by name: parameters, buffers, the optimizer's tensors.
        fixed: what else they read: data, rate.
        losses: (steps of an epoch,), a slot for the loss of each.
        capture: `cuda_graph`, or a stand-in for it.

    Attributes:
        seconds: of one replay, known after a check.
    """

    def __init__(
        self,
        step: Callable[[Tensor], Tensor],
        size: int,
        state: Mapping[str, Tensor],
        fixed: Sequence[Tensor],
        losses: Tensor,
        capture: Capture,
    ) -> None:
        self.step, self.losses, self.capture = step, losses, capture
        self.indices = torch.zeros(size, dtype=torch.int64, device=losses.device)
        self.place = torch.zeros(1, dtype=torch.int64, device=losses.device)  # the slot of the next loss
        self.next = -1  # the same, as far as Python knows; -1: unknown
        self.state = {**state, "losses": losses, "place of the next loss": self.place}
        self.fixed = [self.indices, *self.state.values(), *fixed]
        self.seconds = 0.0

    def __call__(self, indices: Tensor, place: int) -> None:
        """Replay the step on a batch; its loss goes to slot number `place`."""
        self._run(self.replay, indices, place)

    def _body(self) -> None:
        loss = self.step(self.indices)
        self.losses.index_copy_(0, self.place, loss.to(self.losses.dtype).view(1))
        self.place.add_(1).remainder_(len(self.losses))

    def _run(self, body: Body, indices: Tensor, place: int) -> None:
        if place != self.next:
            self.place.fill_(place)
        self.indices.copy_(indices)
        body()
        self.next = (place + 1) % len(self.losses)

    def prepare(self, batches: Sequence[Tensor], check: bool) -> CapturedStep:
        """Capture the step and, with `check`, compare `CHECKED` steps with two eager runs from the same state; returns self.

        `batches` are the indices of full batches. State and random numbers are left as they were before.

        Raises CaptureFailed, a RuntimeError, with the reason.
        """
        state = State(self.state, self.losses.device)
        try:
            runs = [self._checked_run(state, self._body, batches) for _ in range(2 * check)]
            self.indices.copy_(batches[0])
            self.replay = self.capture(self._body, self.fixed)
            if check:
                runs.append(self._checked_run(state, self.replay, batches))
        except Exception as error:  # of many kinds, depending on what cannot be captured
            reason = str(error).strip().splitlines() or [""]
            raise CaptureFailed(f"{type(error).__name__}: {reason[0][:200]}") from error
        finally:
            state.restore()
            self.next = -1
        if check and (difference := state.difference(*runs)):
            raise CaptureFailed(f"replayed steps compute something else than eager ones: {difference}")
        return self

    def _checked_run(self, state: State, body: Body, batches: Sequence[Tensor]) -> list[Tensor]:
        state.restore()
        self.next = -1
        started = time.perf_counter()
        for number in range(CHECKED):
            self._run(body, batches[number % len(batches)], number % len(self.losses))
        self.losses.tolist()  # waits for the device
        self.seconds = (time.perf_counter() - started) / CHECKED
        return state.now()


class Steps:
    """All steps of a training run: replayed where that is possible and has been checked, one by one elsewhere.

    Attributes:
        stepper: makes single steps.
        captured: whether steps are captured, for a record: False (not wanted), True, or a text if it failed.
        left: steps of the run still to do.
    """

    capture: Capture = staticmethod(cuda_graph)

    def __init__(
        self, model: nn.Module, task: Task, settings: Settings, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.settings, self.device = settings, device
        self.left = math.ceil(task.size / settings.batch_size) * settings.epochs
        self.captured: bool | str = False
        self.captures = settings.capture is not False and not self._reason_against(task, dtype)
        self.stepper = Stepper(model, task, settings, device, dtype, self.captures)
        if settings.compile is None and not self.captures:
            self.stepper.wanted = device.type == "cuda" and self.left >= WORTH_COMPILING
        self.replayed: tuple[Any, CapturedStep] | None = None  # what it was captured for, and the captured step

    def _reason_against(self, task: Task, dtype: torch.dtype) -> str:
        """Why steps cannot be captured, or need not be; "" if they should be. Warns if that was asked for."""
        asked = self.settings.capture is True
        reason = ""
        if self.device.type != "cuda" and self.capture is cuda_graph:
            reason = "they do not run on CUDA"
        elif distributed.world_size() > 1:
            reason = "several processes train together"
        elif dtype is torch.float16:
            reason = "the gradient scaler of float16 reads numbers from the GPU"
        elif not tells_what_it_reads(task.at(1)):
            reason = f"{type(task.at(1)).__name__} does not tell which tensors its batches are made from"
        elif not asked and self.left < WORTH_CAPTURING:
            return "the run is too short"
        if asked and reason:
            self._failed(reason)
        return reason

    def _failed(self, reason: str) -> None:
        self.captures, self.captured = False, "failed, so it ran without"
        warnings.warn(f"steps are not captured in a CUDA graph ({reason}); training runs them one by one", stacklevel=2)

    def epoch(
        self, task: Task, parts: Sequence[Tensor], weights: Sequence[float], epoch: int, losses: Tensor
    ) -> Iterator[None]:
        """Do the remaining steps of an epoch; yields after each.

        Args:
            task: the epoch's.
            parts, weights: indices and weight of each batch of this process, see `distributed.own_part`.
            epoch: from 1.
            losses: (steps of an epoch,); the last ones receive the losses of these steps.
        """
        seed, first = self.settings.seed, len(losses) - len(parts)
        fixed = task.prepare(seed, epoch)
        replayed = self._for(task, fixed, parts, epoch, losses) if self.captures and fixed is not None else None
        full = self.stepper.full if replayed else -1
        single = (indices for indices in parts if len(indices) != full)
        batches = task.batches(list(single), seed, epoch)
        for place, (indices, weight) in enumerate(zip(parts, weights, strict=True), first):
            if replayed and len(indices) == full:
                replayed(indices, place)
            else:
                losses[place] = self.stepper(*next(batches), weight)
            self.left -= 1
            yield

    def _for(
        self, task: Task, fixed: Sequence[Tensor], parts: Sequence[Tensor], epoch: int, losses: Tensor
    ) -> CapturedStep | None:
        """The captured step for an epoch, captured again if anything that the last capture took from Python has changed."""
        full = [indices for indices in parts if len(indices) == self.stepper.full]
        if not full:
            return None
        parameters = dict(self.stepper.model.named_parameters()) | dict(self.stepper.model.named_buffers())
        state = parameters | filled(self.stepper.optimizer)
        made_for = (task, losses, *fixed), (*map(id, state.values()), *python_state(self.stepper.model))
        if self.replayed:
            (objects, rest), step = self.replayed
            if (
                len(objects) == len(made_for[0])
                and all(map(operator.is_, objects, made_for[0]))
                and rest == made_for[1]
            ):
                return step
        new = not self.replayed or self.replayed[0][0][0] is not task
        self.replayed = None  # frees its memory

        def step_on(indices: Tensor) -> Tensor:
            return self.stepper(*task.batch(indices, self.settings.seed, epoch))

        def captured() -> CapturedStep:
            assert self.stepper.rate is not None
            rest = [*fixed, self.stepper.rate]
            step = CapturedStep(step_on, self.stepper.full, state, rest, losses, self.capture)
            return step.prepare(full[:CHECKED], new)

        try:
            step = captured()
            if self.settings.compile is None and self.stepper.outcome is False and new:
                if COMPILED_GAIN * step.seconds * self.left > COMPILING_SECONDS:
                    step = self._compiled(step, captured)
        except CaptureFailed as error:
            self._failed(str(error))
            return None
        self.captured, self.replayed = True, (made_for, step)
        return step

    def _compiled(self, step: CapturedStep, captured: Callable[[], CapturedStep]) -> CapturedStep:
        """Capture the compiled step, unless it fails, or proves slower."""
        plain, self.stepper.wanted, self.stepper.module = self.stepper.module, True, None
        with contextlib.suppress(CaptureFailed):
            found = captured()
            if self.stepper.outcome is not True or found.seconds < step.seconds:
                return found
        self.stepper.module, self.stepper.wanted, self.stepper.outcome = plain, False, "no gain, so it ran without"
        return captured()


def tells_what_it_reads(task: Task) -> bool:
    """Whether the class that prepares a task's epochs is also the last to say how batches and losses are made."""
    order = type(task).__mro__
    first = {name: next(place for place, each in enumerate(order) if name in vars(each)) for name in _OF_A_TASK}
    return first["prepare"] <= min(first.values())


def filled(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Make the tensors that SGD with momentum or Adam would make at their first step; returns all of them by name.

    A captured step cannot make them, since each replay would make them again. From zeros the first step is the same.
    """
    adam = isinstance(optimizer, torch.optim.Adam)
    found: dict[str, Tensor] = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, parameter in enumerate(parameters):
        if not parameter.requires_grad:
            continue
        state = optimizer.state[parameter]
        for name in ("exp_avg", "exp_avg_sq") if adam else ("momentum_buffer",):
            if state.get(name) is None:
                state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        if adam and "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        found |= {f"{name} {number} of the optimizer": value for name, value in state.items() if value is not None}
    return found


def python_state(model: nn.Module) -> tuple[Any, ...]:
    """What a capture of a model's step has taken from Python: if it has changed, the step must be captured again.

    Numbers, texts and hooks of all modules, and which tensors are parameters and buffers, learning or frozen. A callback may
    change any of them from epoch to epoch.
    """
    found: list[Any] = []
    for name, module in model.named_modules():
        plain = [(key, value) for key, value in vars(module).items() if isinstance(value, (bool, int, float, str))]
        hooks = (*module._forward_hooks, *module._forward_pre_hooks, *module._backward_hooks)
        found.append((name, type(module), *plain, hooks))
    found += [(id(parameter), parameter.requires_grad) for parameter in model.parameters()]
    return (*found, *map(id, model.buffers()))
