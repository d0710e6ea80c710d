"""Which device trains, and in which precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .processor import bfloat16_pays


class NoSuchDevice(RuntimeError):
    """The requested device does not exist on this machine, or this build of PyTorch cannot use it."""


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """The given device; by default CUDA if available, else the CPU.

    Raises NoSuchDevice, a RuntimeError, for a GPU that is not there, ValueError for an unknown device.
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
        raise NoSuchDevice(
            f"device {str(device)!r} was requested, but PyTorch {torch.__version__} finds no CUDA GPU on this machine"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise NoSuchDevice(
            f"device {str(device)!r} was requested, but this machine has {torch.cuda.device_count()} GPU(s)"
        )
    return device


def pick_precision(precision: str, device: torch.device, parameters: torch.dtype = torch.float32) -> torch.dtype:
    """The dtype to compute in, for a value of `Settings.precision`, a device, and the dtype of the model's parameters.

    A model with float64 parameters computes in float64, whatever the setting. Raises ValueError for parameters in half
    precision, since autocast and small steps of the optimizer need them in float32.
    """
    if parameters is torch.float64:
        return parameters
    if parameters is not torch.float32:
        raise ValueError(
            f"the model's parameters are {precision_name(parameters)}; training keeps them in float32 (or float64) and "
            'computes in half precision by autocast: call model.float() and choose Settings(precision="...")'
        )
    if precision != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[precision]
    if device.type == "cuda":
        # Turing, such as Colab's T4 (7.5), emulates bfloat16 slowly; Ampere (8.0) is the first with units for it.
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    return torch.bfloat16 if bfloat16_pays() else torch.float32


def precision_name(dtype: torch.dtype) -> str:
    """The name of a dtype as it appears in settings and records: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Mixed precision with `dtype`; none for float32 and float64."""
    half = dtype in (torch.bfloat16, torch.float16)
    return torch.autocast(device.type, dtype=dtype if half else None, enabled=half)


def outputs_of(model: nn.Module, inputs: Tensor, dtype: torch.dtype) -> Tensor:
    """A model's outputs, computed in `dtype` and returned in float32, or in float64 if that is the dtype.

    Raises TypeError for outputs that are not one tensor.
    """
    if dtype is torch.float64 and inputs.is_floating_point():
        inputs = inputs.double()
    with autocast(inputs.device, dtype):
        outputs = model(inputs)
    if not isinstance(outputs, Tensor):
        raise TypeError(
            f"the model's outputs must be one tensor, as the task's loss expects, got {type(outputs).__name__}; wrap "
            "the model in a module whose forward returns that tensor"
        )
    return outputs.to(torch.promote_types(outputs.dtype, torch.float32))


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's first parameter or buffer; the CPU for a model without any."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def parameter_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of a model's floating-point parameters, float32 without any. Raises ValueError if they differ."""
    found = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    if len(found) > 1:
        names = ", ".join(sorted(map(precision_name, found)))
        raise ValueError(f"the model's parameters are of several dtypes, {names}; call model.float()")
    return found.pop() if found else torch.float32


@contextmanager
def standard_defaults() -> Iterator[None]:
    """Use PyTorch's own defaults (float32, CPU, gradients), whatever the calling program has set; restored after.

    For everything that is recorded: the same recipe must mean the same everywhere. Also works as a decorator.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"), torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def convolution_kernels(device: torch.device, tf32: bool) -> Iterator[None]:
    """On CUDA, search for the fastest kernels, since shapes never change, with TF32 or without; restored after."""
    if device.type != "cuda":
        yield
        return
    try:
        flags = torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=tf32)  # type: ignore[no-untyped-call]
        flags.__enter__()
    except RuntimeError as error:  # PyTorch refuses to mix its old and its new switches
        raise ValueError(
            "TF32 was set through torch.backends.fp32_precision or a related switch, which cannot be combined with this "
            f'one; reset it to "none" and use Settings(tf32=...) ({error})'
        ) from error
    try:
        yield
    finally:
        flags.__exit__(None, None, None)
