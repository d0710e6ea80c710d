"""A small task on which real training takes seconds, networks for it, and a stand-in for CUDA graphs."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from softshare import images
from softshare.training import Classification, graphed


@pytest.fixture(scope="session")
def digits():
    """200 images to train on and 100 to evaluate on, of 8 x 8 pixels."""
    train, test = (images.load("digits", split).shrunk(4) for split in ("train", "test"))
    return train.split(200)[0], test.split(100)[0]


@pytest.fixture
def task(digits):
    return Classification(*digits, images.Augmentation(*digits[0].statistics(), flip=False, pad=1))


@pytest.fixture(scope="session")
def small_net():
    """A function that makes the same small network each time, with four convolutions that can be shared."""

    def make() -> nn.Sequential:
        torch.manual_seed(0)
        convolutions = [nn.Conv2d(8, 8, 3, padding=1) for _ in range(4)]
        return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *convolutions, nn.Flatten(), nn.Linear(8 * 64, 10))

    return make


class HostRead(RuntimeError):
    """What a CUDA graph does not allow: Python, or the processor, reads a number from the device."""


class Tape(TorchDispatchMode):
    """Stands in for a CUDA graph on a CPU: it records the operations of a step and repeats exactly those.

    As with a graph, a replay takes nothing from Python: numbers are those of the recording, tensors are the same memory.
    While it records, host reads are errors, and so is reading memory that neither is fixed nor was made by an earlier
    operation of the step, since it might be freed or replaced before a replay. Streams and memory pools it knows nothing of.
    """

    HOST_READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2")

    def __init__(self, fixed):
        super().__init__()
        self.fixed = list(fixed)
        self.known = {place_of(tensor) for tensor in self.fixed}
        self.made, self.operations = set(), []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function._schema.name.removeprefix("aten::")
        if name in self.HOST_READS:
            raise HostRead(f"the step reads from the device by {name}")
        for tensor in tensors_in((args, kwargs)):
            if place_of(tensor) not in self.known | self.made:
                raise HostRead(f"{name} reads memory {tuple(tensor.shape)} that is not fixed")
        out = function(*args, **kwargs)
        self.made |= {place_of(tensor) for tensor in tensors_in(out)} - self.known
        self.operations.append((function, args, kwargs, out))
        return out

    def replay(self):
        """Do all operations again, on the fixed memory and on new memory for what they make."""
        new = {}

        def now(value):
            if not isinstance(value, torch.Tensor) or place_of(value) in self.known:
                return value
            like = torch.empty(0, dtype=value.dtype)
            return like.set_(new[place_of(value)], value.storage_offset(), value.shape, value.stride())

        with torch.no_grad():
            for function, args, kwargs, recorded in self.operations:
                out = function(*tree_map(now, args), **tree_map(now, kwargs))
                for before, after in zip(tensors_in(recorded), tensors_in(out), strict=True):
                    if place_of(before) in self.made:
                        new.setdefault(place_of(before), after.untyped_storage())


class NoHostReads(TorchFunctionMode):
    """Refuses what no dispatcher sees on a CPU: copies to the host are the tensors themselves there."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in ("tolist", "numpy", "cpu", "item", "__bool__", "__float__", "__int__"):
            raise HostRead(f"the step reads from the device by {function.__name__}")
        return function(*args, **(kwargs or {}))


def place_of(tensor):
    return tensor.untyped_storage()._cdata


def tensors_in(values):
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


@pytest.fixture
def tapes(monkeypatch):
    """Has steps captured on the CPU by `Tape`; yields the tapes."""
    made = []

    def capture(body, fixed):
        tape = Tape(fixed)
        with NoHostReads(), tape:
            body()
        made.append(tape)
        return tape.replay

    monkeypatch.setattr(graphed.Steps, "capture", staticmethod(capture))
    return made
