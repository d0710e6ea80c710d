"""The networks of architecture search on the poster: NASNet-A, AmoebaNet-B, DARTS, SNAS and ENAS.

All five are one skeleton: a 3x3 stem, then N normal cells, a reduction, N normal cells, a reduction, N normal cells, a mean
over pixels, and a linear classifier; their cells are data (`softshare.models.cells`). Some of the poster's figures are met
by no reading of a source, or by one that was chosen for its count; `cell_network` says which.

Letters: F channels of the first cells, doubled by each reduction; N examples of a batch, and normal cells in a row.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..arguments import count
from .blocks import logits, mean_over_pixels
from .cells import CONVENTIONS, CellModule, Convention, DropPath, Genotype, convolution, genotypes

torch.fx.wrap("mean_over_pixels")  # by its name in this file, too

REPEATS = 6
"""Normal cells in a row, in all five networks as the poster counts them."""


def set_progress(model: nn.Module, fraction: float) -> None:
    """Tell the `DropPath` modules of a model how much of its training is done, from 0 to 1. Raises ValueError beyond."""
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"fraction must be from 0 to 1, got {fraction}")
    for module in model.modules():
        if isinstance(module, DropPath):
            module.progress.fill_(fraction)


class AuxiliaryHead(nn.Module):
    """A second classifier on features in the middle, for training alone: (N, C, H, W) to (N, num_classes).

    ReLU, 5x5 average pooling at stride 3, 1x1 convolution to 128 channels, a convolution of the size that is left to
    768, each with BatchNorm and ReLU, linear. `mean` as `Convention.auxiliary_mean`.
    """

    def __init__(self, before: int, side: int, num_classes: int, bias: bool, mean: bool) -> None:
        super().__init__()
        left = (side - 5) // 3 + 1  # pixels after pooling
        if left < 1:
            raise ValueError(f"the auxiliary head needs features of at least 5 x 5 pixels, got {side} x {side}")
        around = (left - 1) // 2, left - 1 - (left - 1) // 2
        padding = [nn.ZeroPad2d(around * 2)] if mean else []
        self.features = nn.Sequential(
            *(nn.ReLU(), nn.AvgPool2d(5, 3), convolution(before, 128), nn.BatchNorm2d(128), nn.ReLU()),
            *(*padding, nn.Conv2d(128, 768, left, bias=False), nn.BatchNorm2d(768), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        )
        self.classifier = nn.Linear(768, num_classes, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return logits(self.features(x), self.classifier)


@torch.fx.wrap  # a single step of a traced network, since it looks at sizes
def halved_twice(images: Tensor) -> Tensor:
    """The images themselves. Raises ValueError if their sides cannot be halved twice."""
    high, wide = images.shape[-2:]
    if high % 4 or wide % 4:
        raise ValueError(f"the sides of images must be divisible by 4, since two cells halve them, got {high} x {wide}")
    return images


class CellNetwork(nn.Module):
    """Stem, cells, mean over pixels, linear classifier.

    (N, 3, H, W) images, sides divisible by 4, to (N, num_classes) logits; with an auxiliary head, in training, to
    (2, N, num_classes): its logits come second. Made by `cell_network`.

    Attributes:
        cells: N normal cells, a reduction, N normal cells, a reduction, N normal cells.
        auxiliary: the second head, or None; it reads the output of cell number `auxiliary_after` (from 0).
    """

    auxiliary: AuxiliaryHead | None

    def __init__(
        self, genotype: Genotype, convention: Convention, channels: int, repeats: int, num_classes: int, dropout: float
    ) -> None:
        super().__init__()
        self.relu_at_end = convention.relu_at_end
        stem = 3 * channels
        self.stem = nn.Sequential(nn.Conv2d(3, stem, 3, padding=1, bias=False), nn.BatchNorm2d(stem))
        self.cells = nn.ModuleList()
        before, larger = (stem, stem), False
        for place in range(3 * repeats + 2):
            reduces = place in (repeats, 2 * repeats + 1)
            channels *= 2 if reduces else 1
            cell, raw = genotype.reduction if reduces else genotype.normal, convention.raw_start and place == 0
            self.cells.append(CellModule(cell, before, channels, reduces, larger, raw, convention))
            before, larger = (before[1], len(cell.output) * channels), reduces
        self.auxiliary_after = 2 * repeats + ("before", "at", "after").index(convention.auxiliary_at)
        self.auxiliary = None
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(before[1], num_classes, bias=convention.bias)

    def forward(self, images: Tensor) -> Tensor:
        before_previous = previous = self.stem(halved_twice(images))  # (N, 3 F, H, W)
        second: Tensor | None = None
        for place, cell in enumerate(self.cells):
            before_previous, previous = previous, cell(before_previous, previous)
            # A single image leaves BatchNorm nothing to normalise in the head, so it trains without.
            if place == self.auxiliary_after and self.auxiliary is not None and self.training and len(images) > 1:
                second = self.auxiliary(previous)
        x = mean_over_pixels(F.relu(previous) if self.relu_at_end else previous)  # (N, classifier's inputs)
        first = logits(self.dropout(x), self.classifier)
        return first if second is None else torch.stack([first, second])


def cell_network(
    family: str,
    width: int,
    num_classes: int = 10,
    *,
    cell: str | None = None,
    repeats: int = REPEATS,
    auxiliary: bool = False,
    drop_path: float = 0.0,
    dropout: float = 0.0,
    side: int = 32,
) -> CellNetwork:
    """A network of searched cells, (N, 3, H, W) to (N, num_classes).

    Parameters in millions, without the auxiliary head, as the poster counts them:

    - NASNet-A (Zoph et al., 2018): width 32 has 3.35. Width 96, the poster's 27.6, has 27.84 with the reduction of the
      paper's figure, which concatenates three states, and 28.21 with that of the released code (``cell="NASNet-A"``), which
      concatenates four. Its paper's name for it, 7 @ 2304, says seven normal cells in a row, which give 32.59 (``repeats=7``
      with the released cell): no reading of the name meets 27.6, and the one used here was chosen by its count.
    - AmoebaNet-B (Real et al., 2019): widths 36, 80, 128 have 2.84, 13.72, 34.87, all three as on the poster.
    - DARTS (Liu et al., 2019): width 36 has 3.35 with the cell released in August 2018. The poster's 3.4 and 2.83% error are
      those of June 2018, whose cell (``cell="DARTS V1"``) has 3.17.
    - SNAS (Xie et al., 2019), moderate constraint: width 36 has 2.85.
    - ENAS (Pham et al., 2018), micro search space: width 36 has 4.59 with six normal cells in a row, chosen by its
      count; the released script has five (``repeats=5``), which give 3.89.

    Args:
        family: a name of `softshare.models.cells.CONVENTIONS`.
        width: F.
        cell: a name of `softshare.models.cells.genotypes`; default: the reading above.
        repeats: normal cells in a row.
        auxiliary: whether to add the source's second head, for training; `softshare.training.Classification` weighs its loss
            by 0.4, as the sources do that state a weight.
        drop_path: probability of dropping an operation's result at the end of training, see `set_progress`. The sources have
            0.4 (NASNet-A, ENAS), growing with depth, and 0.2 (DARTS, SNAS); for AmoebaNet-B on CIFAR-10,
            reimplementations use 0.3. The progress is a buffer: load such weights into a network that was built with
        drop-path, too. dropout: before the classifier; ENAS has 0.2.
        side: of the images in pixels; only the auxiliary head depends on it.

    Raises:
        ValueError: an unknown family or cell, sizes below 1, a side that 4 does not divide or that is too small for the
            auxiliary head, probabilities outside [0, 1).
        TypeError: sizes that are not whole numbers.
    """
    for name, size in (("width", width), ("num_classes", num_classes), ("repeats", repeats), ("side", side)):
        count(name, size)
    for name, probability in (("drop_path", drop_path), ("dropout", dropout)):
        if isinstance(probability, bool) or not isinstance(probability, (int, float)):
            raise TypeError(f"{name} must be a number, got {probability!r}")
        if not 0.0 <= probability < 1.0:
            raise ValueError(f"{name} must be at least 0 and below 1, got {probability}")
    if family not in CONVENTIONS:
        raise ValueError(f"unknown family {family!r}; known: {', '.join(CONVENTIONS)}")
    cell = cell or ("NASNet-A figure" if (family, width) == ("NASNet-A", 96) else family)
    if cell not in genotypes():
        raise ValueError(f"unknown cell {cell!r}; known: {', '.join(genotypes())}")
    if side % 4:
        raise ValueError(f"side must be divisible by 4, since two cells halve it, got {side}")
    convention = CONVENTIONS[family]
    model = CellNetwork(genotypes()[cell], convention, width, repeats, num_classes, dropout)
    if auxiliary:
        at = model.cells[model.auxiliary_after]
        here = side // (2 if convention.auxiliary_at == "before" else 4)
        head = AuxiliaryHead(at.out_channels, here, num_classes, convention.bias, convention.auxiliary_mean)  # type: ignore
        model.auxiliary = head
    if drop_path:
        for number, module in enumerate(model.cells, start=1):
            module.drop = DropPath(drop_path * (number / len(model.cells) if convention.drop_by_depth else 1.0))
    _initialise(model, convention.init)
    return model


def _initialise(model: nn.Module, init: str) -> None:
    if init == "default":
        return
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            size = module.kernel_size[0] * module.kernel_size[1]
            fan = (module.out_channels if init == "fan_out" else module.in_channels) // module.groups * size
            nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan))
        if isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, mode=init)  # type: ignore[arg-type]
            if module.bias is not None:
                nn.init.zeros_(module.bias)
