"""The captured step: a whole training step as one CUDA graph; the first capture for a task is checked against eager steps.

Python takes 20 to 30 microseconds per kernel that it launches (H100 machine, torch 2.11), so a small network waits for
Python most of the time. A CUDA graph records the kernels of a step once, and a replay launches them all. It repeats exactly
what was recorded: the same kernels on the same memory. So whatever changes from step to step lives in tensors that stay
where they are: the indices of the batch, the rate, the slot for the loss. Random numbers advance with each replay.
"""

from __future__ import annotations

import contextlib
import enum
import math
import operator
import random
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import distributed
from .settings import Settings
from .step import Stepper
from .tasks import Task

WORTH_CAPTURING = 200
"""Unless asked, steps are captured only in runs of at least this many; capturing takes about as long as twenty steps."""

WORTH_COMPILING = 1000
"""The same threshold for compiling steps that are not captured."""

COMPILING_SECONDS, COMPILED_GAIN = 40.0, 0.15
"""When to compile a captured step unasked. torch.compile took 17 to 34 s (H100 machine, torch 2.11); the share of a captured
step that it saves is assumed, not measured."""

CHECKED = 5
"""Steps that are compared before a capture is trusted."""
_WARM_UP = 3
_ROUNDING = 1e-4
_PLAIN = (bool, int, float, str, enum.Enum)
_OF_A_TASK = ("prepare", "batch", "batches", "loss")

Body = Callable[[], None]
Capture = Callable[[Body, Sequence[Tensor]], Body]
"""What captures a step: given its body and the tensors that it may read and change, returns a replay of it."""


class CaptureFailed(RuntimeError):
    """A step could not be captured, or its replays give different results."""


def cuda_graph(body: Body, fixed: Sequence[Tensor]) -> Body:
    """Capture a step that runs on CUDA. It is first run a few times, so that cuDNN can choose its kernels and memory is
    allocated.

    A capture that breaks off would leave PyTorch's allocator, stream and generator in disorder. So the step runs once more
    before that in a mode in which PyTorch refuses what makes Python wait for the GPU, and what a failure leaves is cleared.
    """
    device = fixed[0].device
    stream, pool, graph = torch.cuda.Stream(device), torch.cuda.graph_pool_handle(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(
        stream
    ):  # restores the current stream, which torch.cuda.graph does not if a capture breaks off
        for _ in range(_WARM_UP):
            body()
        with _no_waiting():
            body()
        try:
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                body()
        except Exception as error:
            with contextlib.suppress(Exception):  # PyTorch before 2.12 leaves its allocator capturing (pytorch#180395)
                torch._C._cuda_endAllocateToPool(device.index or 0, pool)
            generator = torch.cuda.default_generators[device.index or 0]
            generator.graphsafe_set_state(torch.Generator(device).graphsafe_get_state())
            # The first error says why; the end of the broken capture raises another.
            raise (error.__context__ or error) from None
    torch.cuda.current_stream(device).wait_stream(stream)
    return graph.replay


@contextlib.contextmanager
def _no_waiting() -> Iterator[None]:
    """Raise an error where Python would wait for the GPU, as far as PyTorch notices."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the mode itself, which is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


class State:
    """Everything that a step changes: saved now, to be restored in place and compared later.

    Args:
        tensors: by name, where steps read and write them.
        device: the device whose generator the steps use. Those of the CPU, of Python and of numpy are saved as well: a step
            that draws from them cannot be captured, which the comparison shows only if eager runs draw the same.
    """

    def __init__(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        self.tensors, self.device = dict(tensors), device
        self.start, self.random = self.now(), self._random()

    def now(self) -> list[Tensor]:
        """Copies of all tensors."""
        return [tensor.detach().clone() for tensor in self.tensors.values()]

    def _random(self) -> tuple[Any, ...]:
        on_device = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        return on_device, torch.get_rng_state(), random.getstate(), np.random.get_state()

    def restore(self) -> None:
        """Put back what was there at first, random numbers included."""
        with torch.no_grad():
            for tensor, start in zip(self.tensors.values(), self.start, strict=True):
                tensor.copy_(start)
        on_device, on_cpu, of_python, of_numpy = self.random
        if on_device is not None:
            torch.cuda.set_rng_state(on_device, self.device)
        torch.set_rng_state(on_cpu)
        random.setstate(of_python)
        np.random.set_state(of_numpy)

    def difference(self, first: Sequence[Tensor], second: Sequence[Tensor], replayed: Sequence[Tensor]) -> str:
        """Where replayed steps differ from eager ones by more than three times the difference between two eager runs (plus
        rounding); "" if nowhere.

        For each tensor, the distance (Euclidean) must be at most three times that of the eager runs. Where a tensor has few
        entries, that of two runs may be small by chance, so the eager runs' distance over all tensors, relative to what the
        steps changed, counts too. On many machines eager runs are equal to the bit, so a ten-thousandth of what the steps
        changed is allowed in any case. What the steps leave alone must be left alone.
        """
        rows = []
        for name, *values in zip(self.tensors, self.start, first, second, replayed, strict=True):
            start, one, two, other = (value.double() for value in values)
            rows.append((name, *(torch.linalg.vector_norm(each - one).item() for each in (start, two, other))))
        relative = math.hypot(*(noise for *_, noise, _ in rows)) / (
            math.hypot(*(moved for _, moved, *_ in rows)) or 1.0
        )
        for name, moved, noise, off in rows:
            if not off <= 3 * max(noise, relative * moved) + _ROUNDING * moved:
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
        self.memory = [
            tensor.detach() for tensor in self.fixed
        ]  # stays, even if a callback gives a parameter other memory
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

        `batches` are the indices of full batches. State and random numbers are left as they were.

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
            raise CaptureFailed(f"replayed steps do not match eager ones: {difference}")
        return self

    def _checked_run(self, state: State, body: Body, batches: Sequence[Tensor]) -> list[Tensor]:
        state.restore()
        self.next = -1
        started = 0.0
        for number in range(CHECKED):
            self._run(body, batches[number % len(batches)], number % len(self.losses))
            if number in (0, CHECKED - 1):
                self.losses.tolist()  # waits for the device
                started, before = time.perf_counter(), started
        self.seconds = (started - before) / (CHECKED - 1)  # without the first, which is slower
        return state.now()


class Steps:
    """All steps of a training run: replayed where that is possible and has been checked, one by one otherwise.

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
            reason = f"{type(task.at(1)).__name__} does not say which tensors its batches are made from"
        elif not asked and self.left < WORTH_CAPTURING:
            return "the run is too short"
        if asked and reason:
            self._failed(reason)
        return reason

    def _failed(self, reason: str) -> None:
        self.captures, self.captured = False, "failed, so it ran without"
        warnings.warn(f"steps are not captured in a CUDA graph ({reason}); training runs them one by one", stacklevel=2)

    def close(self) -> None:
        """Give back the memory of a captured step, in which its last gradients lie, too."""
        if self.replayed:
            self.replayed = None
            self.stepper.model.zero_grad(set_to_none=True)

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
        late = self.captured is False and self.settings.capture is None and self.left < WORTH_CAPTURING  # a resumed run
        if late or not full:
            return None
        parameters = dict(self.stepper.model.named_parameters()) | dict(self.stepper.model.named_buffers())
        state = parameters | filled(self.stepper.optimizer)
        watched = python_state(self.stepper.model)
        places = [(id(each), each.data_ptr(), each.stride()) for each in (*state.values(), *fixed)]
        made_for = (task, losses, *fixed), (*places, *watched)
        if self.replayed and same(self.replayed[0], made_for):
            return self.replayed[1]
        new = not self.replayed or self.replayed[0][0][0] is not task
        self.replayed = None  # frees its memory before more is taken

        def step_on(indices: Tensor) -> Tensor:
            return self.stepper(*task.batch(indices, self.settings.seed, epoch))

        def captured() -> CapturedStep:
            assert self.stepper.rate is not None
            rest = [*fixed, self.stepper.rate]
            step = CapturedStep(step_on, self.stepper.full, state, rest, losses, self.capture)
            step.prepare(full[:CHECKED], new)
            if python_state(self.stepper.model) != watched:
                raise CaptureFailed("a step changes the model's state in Python, which replays would not")
            return step

        try:
            step = captured()
            if self.settings.compile is None and self.stepper.outcome is False and new:
                if COMPILED_GAIN * step.seconds * self.left > COMPILING_SECONDS:
                    step = self._compiled(step, captured)
        except CaptureFailed as error:
            self._failed(str(error))
            if self.settings.compile is None and self.stepper.outcome is False and self.left >= WORTH_COMPILING:
                self.stepper.wanted, self.stepper.module = True, None  # as if capturing had never been tried
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


def same(first: tuple[Sequence[Any], Sequence[Any]], second: tuple[Sequence[Any], Sequence[Any]]) -> bool:
    """Whether the objects of both pairs are the same ones, and what comes with them is equal."""
    (objects, rest), (others, other_rest) = first, second
    return len(objects) == len(others) and all(map(operator.is_, objects, others)) and rest == other_rest


def tells_what_it_reads(task: Task) -> bool:
    """Whether `prepare` is defined by the same class as `batch`, `batches` and `loss`, or by a more derived one."""
    order = type(task).__mro__
    first = {name: next(place for place, each in enumerate(order) if name in vars(each)) for name in _OF_A_TASK}
    return first["prepare"] <= min(first.values())


def filled(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Make the tensors that SGD with momentum or Adam would make at their first step; returns all of them by name.

    A captured step cannot make them, since each replay would make them again. Starting from zeros leaves the first step
    unchanged.
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
    """The part of a model's state in Python that is watched: if it changes, the step is captured again.

    Numbers, strings, tuples of them, and hooks of all modules, and which tensors are parameters and buffers, trainable or
    frozen. A callback may change any of them from epoch to epoch. Lists and other objects are not watched, and hooks run
    only while a step is captured or checked.
    """
    found: list[Any] = []
    for name, module in model.named_modules():
        plain = [(key, value) for key, value in vars(module).items() if _is_plain(value)]
        kinds = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        found.append((name, type(module), *plain, *(tuple(hooks) for hooks in kinds)))
    found += [(id(parameter), parameter.requires_grad) for parameter in model.parameters()]
    return (*found, *map(id, model.buffers()))


def _is_plain(value: Any) -> bool:
    return all(map(_is_plain, value)) if isinstance(value, tuple) else isinstance(value, _PLAIN)
