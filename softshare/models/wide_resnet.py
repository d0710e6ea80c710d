"""Wide ResNets (Zagoruyko and Komodakis, 2016) and their softly shared form, SWRN."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..arguments import count
from ..sharing import share_groups
from .blocks import RecurrentBlock, logits, mean_over_pixels, scaled

torch.fx.wrap("mean_over_pixels")  # by its name in this file, too


class Block(RecurrentBlock):
    """Pre-activation residual block: norm, ReLU, 3x3 convolution, norm, ReLU, dropout, 3x3 convolution, plus a shortcut.

    (N, C_in, H, W) to (N, C_out, H / stride, W / stride). Where the number of channels changes, the shortcut is a 1x1
    convolution of the first activation; otherwise it is the input itself.
    """

    layer_names = ("conv1", "conv2")
    norm_names = ("norm1", "norm2")

    def __init__(self, in_channels: int, out_channels: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.shortcut: nn.Module | None = None
        if in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def step(self, x: Tensor, norms: Sequence[nn.Module], scales: Sequence[Tensor | float]) -> Tensor:
        h = F.relu(norms[0](x))
        residual = x if self.shortcut is None else self.shortcut(h)
        h = scaled(self.conv1(h), scales[0])
        h = self.dropout(F.relu(norms[1](h)))
        return residual + scaled(self.conv2(h), scales[1])


class WideResNet(nn.Module):
    """WRN: a 3x3 stem of 16 channels, three stages of n blocks, norm, ReLU, mean over pixels, linear classifier.

    (N, 3, H, W) images to (N, num_classes) logits. Made by `wrn` and `swrn`.
    """

    stage1: nn.Sequential
    stage2: nn.Sequential
    stage3: nn.Sequential

    def __init__(self, depth: int, width: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        channels = [16, 16 * width, 32 * width, 64 * width]
        self.stem = nn.Conv2d(3, channels[0], 3, padding=1, bias=False)
        for stage in (1, 2, 3):
            first = Block(channels[stage - 1], channels[stage], 1 if stage == 1 else 2, dropout)
            others = [Block(channels[stage], channels[stage], 1, dropout) for _ in range(blocks - 1)]
            self.add_module(f"stage{stage}", nn.Sequential(first, *others))
        self.norm = nn.BatchNorm2d(channels[3])
        self.classifier = nn.Linear(channels[3], num_classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)  # as in the authors' code, the classifier included
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)  # (N, 16, H, W)
        x = self.stage1(x)  # (N, 16 w, H, W)
        x = self.stage2(x)  # (N, 32 w, H/2, W/2)
        x = self.stage3(x)  # (N, 64 w, H/4, W/4)
        x = mean_over_pixels(F.relu(self.norm(x)))  # (N, 64 w)
        return logits(x, self.classifier)


def wrn(depth: int, width: int, num_classes: int = 10, dropout: float = 0.0) -> WideResNet:
    """Wide ResNet WRN depth-width, (N, 3, H, W) to (N, num_classes).

    Convolutions have no bias and shortcuts no BatchNorm; dropout acts between the two convolutions of a block.

    Raises:
        ValueError: a depth other than 6n + 4 with n >= 1 (10, 16, 22, 28, ...), a width or number of classes below 1,
            or a dropout outside [0, 1).
        TypeError: sizes that are not whole numbers.
    """
    _check(depth, width, num_classes, dropout)
    return WideResNet(depth, width, num_classes, dropout)


def swrn(
    depth: int, width: int, templates: int | None = None, num_classes: int = 10, dropout: float = 0.0
) -> WideResNet:
    """Shared Wide ResNet SWRN depth-width-templates: a `wrn` with one bank of templates per stage.

    The two convolutions of every block except the first in each stage draw their weights from the stage's bank, named
    "stage1" to "stage3", so L = (depth - 4) / 3 - 2 layers share k templates. Initialised as in the authors' code
    (kaiming_normal_ templates, orthogonal coefficients), without the rescaling that `share_` does.

    Args:
        templates: k, of which at most L are used; None: one template per layer, "SWRN depth-width" on the poster.

    Raises:
        ValueError: as `wrn`, or a depth too small to share (n >= 2 blocks per stage are needed), or templates below 1.
        TypeError: sizes that are not whole numbers.
    """
    _check(depth, width, num_classes, dropout)
    if depth < 16:
        raise ValueError(f"SWRN depth must be at least 16 (two blocks per stage) for layers to share, got {depth}")
    layers = (depth - 4) // 3 - 2
    templates = layers if templates is None else count("templates", templates)
    model = WideResNet(depth, width, num_classes, dropout)

    def stage_of(name: str, layer: nn.Module) -> str | None:
        stage, *place = name.split(".")
        return stage if stage.startswith("stage") and place[0] != "0" else None

    share_groups(model, templates, stage_of, "orthogonal", keep_scale=False)
    return model


def _check(depth: int, width: int, num_classes: int, dropout: float) -> None:
    count("depth", depth)
    count("width", width)
    count("num_classes", num_classes)
    if depth < 10 or (depth - 4) % 6:
        raise ValueError(f"WRN depth must be 6n + 4 (10, 16, 22, 28, 40, ...; SWRN from 16), got {depth}")
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)):
        raise TypeError(f"dropout must be a number, got {dropout!r} ({type(dropout).__name__})")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")
