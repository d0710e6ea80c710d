"""Several processes with one device each, by PyTorch's own means: ``torchrun`` starts and, after a fault, restarts them.

With one process, every function here returns at once.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .devices import NoSuchDevice


class Disagreement(RuntimeError):
    """Processes that train together were given, or have found, different things."""


def rank() -> int:
    """The number of this process among those that torchrun started, from 0; 0 writes and reports for all.

    Raises ValueError if the environment announces several processes but not how they find each other.
    """
    if _running():
        return dist.get_rank()
    return _number("RANK", 0) if _started_together() else 0


def world_size() -> int:
    """How many processes train together; 1 without torchrun."""
    return dist.get_world_size() if _running() else 1


def _running() -> bool:
    return dist.is_available() and dist.is_initialized()


def _number(variable: str, default: int) -> int:
    """An environment variable that holds a whole number; empty means unset. Raises ValueError for anything else."""
    text = os.environ.get(variable, "").strip()
    if text and not text.isdecimal():
        raise ValueError(
            f"the environment variable {variable} must be a whole number, as torchrun sets it, got {text!r}; unset it "
            "or start the processes with torchrun"
        )
    return int(text) if text else default


def _started_together() -> bool:
    """Whether torchrun, or a launcher that sets the same variables, started this process as one of several.

    RANK alone, as in an array job, means nothing. Several processes that cannot find each other are an error: each of them
    would train alone and overwrite the others' files.
    """
    if _number("WORLD_SIZE", 1) < 2:
        alone = os.environ.get("RANK", "").strip()
        if alone and not alone.isdecimal():
            _warn_once(f"ignored: RANK is {alone!r}, not a number as torchrun sets it")
        return False
    variables = ("RANK", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in variables if not os.environ.get(name, "").strip()]:
        raise ValueError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, so this is one of several processes, but they cannot find each "
            f"other without {' and '.join(missing)}; start them with torchrun, or unset WORLD_SIZE to train in one process"
        )
    _number("MASTER_PORT", 0)
    if _number("RANK", 0) >= _number("WORLD_SIZE", 1):
        raise ValueError(f"RANK {os.environ['RANK']} must be below WORLD_SIZE {os.environ['WORLD_SIZE']}")
    return True


@functools.cache
def _warn_once(text: str) -> None:
    warnings.warn(text, stacklevel=4)


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[torch.device]:
    """Join the processes that torchrun started, if it did, for the duration of a ``with`` block; yields this one's device.

    Under torchrun, ``cuda`` becomes the GPU of the process's local rank. Processes communicate by nccl on GPUs, by gloo on
    CPUs. A group that already exists is used and left alone. Raises NoSuchDevice for a local rank beyond the number of
    GPUs, ValueError for an environment that contradicts itself.
    """
    together = _running() or _started_together()
    if together and device.type == "cuda":
        if not _running() and not os.environ.get("LOCAL_RANK", "").strip():
            raise ValueError(
                "LOCAL_RANK is not set, so this process does not know which GPU is its own; start it by torchrun"
            )
        local, gpus = _number("LOCAL_RANK", 0), torch.cuda.device_count()
        if local >= gpus:
            raise NoSuchDevice(
                f"process {local} of this machine (LOCAL_RANK) needs a GPU of its own, but there are {gpus}"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    ours = together and not _running()
    if ours:
        _init("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        if ours:
            dist.destroy_process_group()


def _init(backend: str) -> None:
    attempt = _number("TORCHELASTIC_RESTART_COUNT", 0)
    if not attempt or _number("GROUP_WORLD_SIZE", 1) != 1:
        dist.init_process_group(backend)
        return
    # After a restart PyTorch may hand the new processes the store of the old ones, with addresses where nobody listens any
    # more (pytorch/pytorch issue 135712), so keys get a prefix. On several machines the counts differ; there,
    # TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment of torchrun helps.
    store, number, processes = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(f"attempt {attempt}", store)
    dist.init_process_group(backend, store=store, rank=number, world_size=processes)


def wrapped(model: nn.Module, device: torch.device) -> nn.Module:
    """The model in DistributedDataParallel, which averages gradients; the model itself with one process."""
    if world_size() == 1:
        return model
    # Buffers are synchronised at the end of each epoch, so they need not be sent at every step.
    parallel = nn.parallel.DistributedDataParallel
    newer = "forward_sync_buffers" in inspect.signature(parallel.__init__).parameters  # PyTorch's newer name for it
    silent: dict[str, Any] = {"forward_sync_buffers" if newer else "broadcast_buffers": False}
    return parallel(model, device_ids=[device.index] if device.type == "cuda" else None, **silent)


def own_part(indices: Tensor) -> tuple[Tensor, float]:
    """This process's examples of a global batch, and the weight of their mean loss in the mean over processes.

    With the weight, the average over processes is the mean over the global batch, whatever its size. A process that would
    have no example takes one with weight 0, since all must take part in every step.
    """
    if world_size() == 1:
        return indices, 1.0
    part = indices[rank() :: world_size()]
    if not len(part):
        return indices[:1], 0.0
    return part, len(part) * world_size() / len(indices)


def average_(values: Tensor) -> Tensor:
    """Replace values by their mean over processes, in place."""
    if world_size() > 1:
        dist.all_reduce(values)
        values /= world_size()
    return values


def agree(what: str, *numbers: int) -> None:
    """Raise Disagreement, a RuntimeError, in all processes unless all of them pass the same numbers."""
    if world_size() > 1:
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        values = torch.tensor([*numbers, *(-number for number in numbers)], device=device)
        dist.all_reduce(values, dist.ReduceOp.MAX)
        largest, smallest = values[: len(numbers)], -values[len(numbers) :]
        if not torch.equal(largest, smallest):
            raise Disagreement(
                f"the processes that train together do not agree on {what}: {numbers} in process {rank()}, from "
                f"{smallest.tolist()} to {largest.tolist()} over all. Do all of them see the same folder of checkpoints "
                "and run on the same kind of machine?"
            )


def all_of(own: bool) -> bool:
    """Whether something holds in every process."""
    if world_size() == 1:
        return own
    answer = torch.tensor(int(own), device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(answer, dist.ReduceOp.MIN)
    return bool(answer)


def gathered(own: Any) -> list[Any]:
    """What each process passes, by rank; the same list in all of them."""
    if world_size() == 1:
        return [own]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, own)
    return found


def agree_on_buffers(model: nn.Module) -> None:
    """Give every process the buffers (BatchNorm statistics) of process 0."""
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def barrier() -> None:
    """Wait until all processes have reached this point."""
    if world_size() > 1:
        dist.barrier()
