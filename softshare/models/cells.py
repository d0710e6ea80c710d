"""The cells that architecture search found: one small interpreter, with the cells as data in ``cells.json``.

A cell is a list of blocks. A block adds the results of two operations, each on an earlier state: 0 is the output of the
cell before the previous one, 1 the output of the previous cell, and 2, 3, ... are the blocks in order. ``"sep3(1)"`` is a
separable 3x3 convolution of state 1. In a reduction cell, operations on states 0 and 1 have stride 2. What the sources do
differently around their cells is a `Convention`; `softshare.models.searched` stacks cells to networks.
"""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_OPERATION = re.compile(r"([a-z]+\d?)\((\d)\)")


class Cell(NamedTuple):
    """One kind of cell.

    Attributes:
        blocks: pairs of operations, each an operation's name and the number of the state that it reads.
        output: numbers of the states that are concatenated.
    """

    blocks: tuple[tuple[tuple[str, int], tuple[str, int]], ...]
    output: tuple[int, ...]

    @property
    def states(self) -> int:
        """Number of states, the two inputs included."""
        return 2 + len(self.blocks)


class Genotype(NamedTuple):
    """What a search found: two cells, and where they were read."""

    normal: Cell
    reduction: Cell
    source: str
    commit: str


@functools.cache
def genotypes() -> dict[str, Genotype]:
    """All cells of ``cells.json`` by name, such as "DARTS" and, for other readings of a source, "DARTS V1".

    Raises ValueError for an entry that is not a cell.
    """
    path = Path(__file__).with_name("cells.json")
    found = {}
    for name, entry in json.loads(path.read_text(encoding="utf-8")).items():
        normal, reduction = (read_cell(entry[kind], f"{name}, {kind}") for kind in ("normal", "reduction"))
        found[name] = Genotype(normal, reduction, entry["source"], entry["commit"])
    return found


def read_cell(entry: Any, name: str = "cell") -> Cell:
    """A cell from JSON: {"blocks": [["sep3(0)", "id(1)"], ...], "output": [2, ...]}.

    Raises ValueError, with the cell's name, for an unknown operation or a state that does not exist yet.
    """
    blocks = []
    for number, texts in enumerate(entry["blocks"], start=2):
        block = []
        for text in texts:
            match = _OPERATION.fullmatch(text)
            if match is None or match[1] not in OPERATIONS:
                raise ValueError(f"{name}: unknown operation {text!r}; known: {', '.join(OPERATIONS)}, as in 'sep3(1)'")
            if int(match[2]) >= number:
                raise ValueError(f"{name}: {text!r} in block {number} reads a state that does not exist yet")
            block.append((match[1], int(match[2])))
        if len(block) != 2:
            raise ValueError(f"{name}: block {number} has {len(block)} operations, expected 2")
        blocks.append((block[0], block[1]))
    output = tuple(entry["output"])
    if not output or not set(output) <= set(range(2 + len(blocks))):
        raise ValueError(f"{name}: output {list(output)} must list states from 0 to {1 + len(blocks)}")
    return Cell(tuple(blocks), output)


@dataclass(frozen=True)
class Convention:
    """What a source does around its cells.

    Attributes:
        inputs: how the two inputs of a cell get F channels. "if needed": input 1 always by ReLU, 1x1 convolution, BatchNorm;
            input 0 only where its size or width differs. "always": both. "twice": as "if needed", and input 1 once more.
        raw_start: whether the first cell reads the stem itself as input 0, with its 3F channels.
        same: whether strided windows are placed as TensorFlow's "SAME" places them, padded less at the top and left.
        norm_after_pool: whether a BatchNorm follows each pooling.
        relu_at_end: whether a ReLU comes before the mean over pixels.
        bias: whether the classifier has one.
        auxiliary_at: where the auxiliary head is: after the cell "before", "at" or "after" the second reduction.
        auxiliary_mean: whether the head's last convolution keeps the size, and a mean over pixels follows; else it
        reads all. drop_by_depth: whether the probability of dropping a path grows with the cell's number.
        drops_strided_identity: whether an identity at stride 2, which computes something, may be dropped.
        init: how convolutions start: normal with variance 2 / "fan_out" or 2 / "fan_in", or PyTorch's "default".
    """

    inputs: str
    raw_start: bool
    same: bool
    norm_after_pool: bool
    relu_at_end: bool
    bias: bool
    auxiliary_at: str
    auxiliary_mean: bool
    drop_by_depth: bool
    drops_strided_identity: bool
    init: str


_NASNET = Convention("if needed", True, True, False, True, True, "before", False, True, False, "fan_out")
_DARTS = Convention("always", False, False, False, False, True, "at", False, False, True, "default")
CONVENTIONS = {
    "NASNet-A": _NASNET,
    "AmoebaNet-B": replace(_NASNET, drop_by_depth=False),
    "DARTS": _DARTS,
    "SNAS": replace(_DARTS, norm_after_pool=True),
    "ENAS": Convention("twice", False, True, False, True, False, "after", True, True, False, "fan_in"),
}
"""By family; sources: tensorflow/models@research/slim/nets/nasnet (NASNet-A), tensorflow/tpu@models/official/amoeba_net
(AmoebaNet-B), quark0/darts@cnn (DARTS), SNAS-Series/SNAS-Series@SNAS (SNAS), melodyguan/enas@src/cifar10 (ENAS).

:meta hide-value:
"""


def convolution(
    before: int, after: int, kernel: int = 1, stride: int = 1, groups: int = 1, dilation: int = 1, same: bool = False
) -> nn.Module:
    """A convolution without bias that keeps the size, or halves an even one."""
    reach = dilation * (kernel - 1)
    if not same or stride == 1:
        return nn.Conv2d(before, after, kernel, stride, reach // 2, dilation, groups, bias=False)
    left = (reach - 1) // 2
    unpadded = nn.Conv2d(before, after, kernel, stride, 0, dilation, groups, bias=False)
    return nn.Sequential(nn.ZeroPad2d((left, reach - 1 - left) * 2), unpadded) if reach else unpadded


def _projection(before: int, after: int, stride: int = 1) -> nn.Sequential:
    """ReLU, 1x1 convolution, BatchNorm."""
    return nn.Sequential(nn.ReLU(), convolution(before, after, 1, stride), nn.BatchNorm2d(after))


class Separable(nn.Sequential):
    """ReLU, depthwise convolution, pointwise convolution, BatchNorm; `halves` times, the stride in the first."""

    def __init__(
        self, before: int, after: int, kernel: int, stride: int, dilation: int, halves: int, same: bool
    ) -> None:
        steps: list[nn.Module] = []
        for half in range(halves):
            depthwise = convolution(before, before, kernel, stride if half == 0 else 1, before, dilation, same)
            steps += [nn.ReLU(), depthwise, convolution(before, after), nn.BatchNorm2d(after)]
            before = after
        super().__init__(*steps)


class FactorizedReduction(nn.Module):
    """Halves an image: two 1x1 convolutions, of the even and of the odd pixels, concatenated; BatchNorm.

    (N, C, H, W) to (N, channels, H / 2, W / 2) for even H and W.
    """

    def __init__(self, before: int, channels: int, relu: bool) -> None:
        super().__init__()
        self.relu = relu
        self.even = convolution(before, channels // 2)
        self.odd = convolution(before, channels - channels // 2)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x) if self.relu else x
        halves = self.even(x[:, :, ::2, ::2]), self.odd(x[:, :, 1::2, 1::2])
        return self.norm(torch.cat(halves, dim=1))  # type: ignore[no-any-return]


def _pool(kind: str, before: int, after: int, stride: int, convention: Convention) -> nn.Module:
    kernel = int(kind[-1])
    # At stride 2, windows that reach over the right edge are what TensorFlow's "SAME" makes of an even size.
    over_the_edge = convention.same and stride == 2
    padding = 0 if over_the_edge or kernel == 2 else kernel // 2
    pool: nn.Module = nn.MaxPool2d(kernel, stride, padding, ceil_mode=over_the_edge)
    if kind.startswith("avg"):
        pool = nn.AvgPool2d(kernel, stride, padding, ceil_mode=over_the_edge, count_include_pad=False)
    if kernel == 2 and stride == 1:
        pool = nn.Sequential(nn.ReplicationPad2d((0, 1, 0, 1)), pool)  # a repeated edge does not change a maximum
    if before != after:
        return nn.Sequential(pool, convolution(before, after), nn.BatchNorm2d(after))
    return nn.Sequential(pool, nn.BatchNorm2d(after)) if convention.norm_after_pool else pool


def _bottleneck(before: int, after: int, stride: int, same: bool) -> nn.Sequential:
    inner = max(1, after // 4)
    middle = [nn.ReLU(), convolution(inner, inner, 3, stride, same=same), nn.BatchNorm2d(inner)]
    return nn.Sequential(*_projection(before, inner), *middle, *_projection(inner, after))


def _identity(before: int, after: int, stride: int, convention: Convention) -> nn.Module:
    if stride == 2 and convention.inputs != "if needed":
        return FactorizedReduction(before, after, relu=convention.inputs == "always")
    return nn.Identity() if (before, stride) == (after, 1) else _projection(before, after, stride)


OPERATIONS = ("sep3", "sep5", "sep7", "dil3", "dil5", "dilsep5", "conv1", "conv3", "avg3", "max2", "max3", "id")
"""sepK: twice ReLU, depthwise KxK, pointwise, BatchNorm; dilK: once, with dilation 2; dilsepK: twice, with dilation 2;
conv1: ReLU, 1x1, BatchNorm; conv3: 3x3 between 1x1 convolutions to a quarter of the channels and back; avgK, maxK:
pooling; id: identity.
"""


def make_operation(name: str, before: int, after: int, stride: int, convention: Convention) -> nn.Module:
    """An operation of `OPERATIONS`, (N, before, H, W) to (N, after, H / stride, W / stride).

    Raises ValueError for an unknown name.
    """
    if name not in OPERATIONS:
        raise ValueError(f"unknown operation {name!r}; known: {', '.join(OPERATIONS)}")
    kernel = int(name[-1]) if name[-1].isdigit() else 1
    if name.startswith(("sep", "dil")):
        dilation, halves = 2 if name.startswith("dil") else 1, 2 if "sep" in name else 1
        return Separable(before, after, kernel, stride, dilation, halves, convention.same)
    if name.startswith(("avg", "max")):
        return _pool(name, before, after, stride, convention)
    if name == "conv1":
        return _projection(before, after, stride)
    if name == "conv3":
        return _bottleneck(before, after, stride, convention.same)
    return _identity(before, after, stride, convention)


class CellModule(nn.Module):
    """A cell at work: (N, C0, H0, W0) and (N, C1, H, W) to (N, len(output) * channels, H / stride, W / stride).

    Args:
        cell: what it computes.
        before: channels of input 0 and of input 1.
        channels: of each state.
        reduces: whether operations on the inputs have stride 2.
        larger: whether input 0 is twice as large as input 1, since the previous cell was a reduction.
        raw: whether input 0 is taken as it is, with its own channels.
    """

    def __init__(
        self,
        cell: Cell,
        before: tuple[int, int],
        channels: int,
        reduces: bool,
        larger: bool,
        raw: bool,
        convention: Convention,
    ) -> None:
        super().__init__()
        self.cell, self.out_channels = cell, len(cell.output) * channels
        self.input0 = self._first_input(before[0], channels, larger, raw, convention)
        self.input1: nn.Module = _projection(before[1], channels)
        if convention.inputs == "twice":
            again = _projection(channels, channels)
            self.input1 = again if before[1] == channels else nn.Sequential(self.input1, again)
        widths = [before[0] if raw else channels, *[channels] * (1 + len(cell.blocks))]
        self.operations = nn.ModuleList(
            make_operation(name, widths[state], channels, 2 if reduces and state < 2 else 1, convention)
            for block in cell.blocks
            for name, state in block
        )
        may_drop = convention.drops_strided_identity and reduces
        self.kept = [name == "id" and not (may_drop and state < 2) for block in cell.blocks for name, state in block]
        self.raw_output: nn.Module | None = None
        if raw and 0 in cell.output and widths[0] != channels:
            self.raw_output = nn.Sequential(convolution(widths[0], channels), nn.BatchNorm2d(channels))
        self.drop: DropPath | None = None

    @staticmethod
    def _first_input(before: int, channels: int, larger: bool, raw: bool, convention: Convention) -> nn.Module:
        if raw:
            return nn.Identity()
        if larger:
            return FactorizedReduction(before, channels, relu=True)
        return _projection(before, channels) if convention.inputs == "always" or before != channels else nn.Identity()

    def forward(self, before_previous: Tensor, previous: Tensor) -> Tensor:
        states = [self.input0(before_previous), self.input1(previous)]
        for number, block in enumerate(self.cell.blocks):
            results = []
            for place, (_, state) in enumerate(block, start=2 * number):
                result = self.operations[place](states[state])
                results.append(result if self.drop is None or self.kept[place] else self.drop(result))
            states.append(results[0] + results[1])
        if self.raw_output is not None:
            states[0] = self.raw_output(states[0])
        return torch.cat([states[state] for state in self.cell.output], dim=1)


class DropPath(nn.Module):
    """In training, zeroes whole results of operations, one draw per example, and divides what is kept by its probability.

    Attributes:
        progress: buffer, a scalar from 0 to 1: the probability of dropping is `probability` times it.
    """

    progress: Tensor

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability
        self.register_buffer("progress", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keep = 1.0 - self.probability * self.progress
        mask = (torch.rand(x.shape[0], 1, 1, 1, device=x.device) < keep).to(x.dtype)
        return x * mask / keep.to(x.dtype)

    def extra_repr(self) -> str:
        return f"probability={self.probability:g}"
