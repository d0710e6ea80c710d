"""Which device trains, and in which precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from .processor import bfloat16_pays


class NoSuchDevice(RuntimeError):
    """A device was asked for that this machine, or this build of PyTorch, has not."""


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """The given device, or CUDA where there is one, else the CPU.

    Raises NoSuchDevice, a RuntimeError, for CUDA where there is none, ValueError for a device that nobody knows.
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


def precision_name(dtype: torch.dtype) -> str:
    """The name of a dtype as settings and records have it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Mixed precision with `dtype`, or none for float32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not torch.float32)


@contextmanager
def convolution_kernels(device: torch.device, tf32: bool) -> Iterator[None]:
    """On CUDA, look for the fastest kernels (shapes never change in a training), with TF32 or without; restored after."""
    if device.type != "cuda":
        yield
        return
    try:
        flags = torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=tf32)  # type: ignore[no-untyped-call]
        flags.__enter__()
    except RuntimeError as error:  # PyTorch refuses to mix its old and its new switches
        raise ValueError(
            "TF32 was set by torch.backends.fp32_precision or one of its kin, which cannot be told from here; reset it to "
            f'"none" and use Settings(tf32=...) ({error})'
        ) from error
    try:
        yield
    finally:
        flags.__exit__(None, None, None)
