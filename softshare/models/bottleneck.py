"""The wide bottleneck ResNet for ImageNet, WRN 50-2, and its softly shared form, SWRN 50-2."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..arguments import count
from ..sharing import share_groups
from .blocks import RecurrentBlock, logits, mean_over_pixels, scaled

torch.fx.wrap("mean_over_pixels")  # by its name in this file, too

BLOCKS = (3, 4, 6, 3)
"""Blocks in each stage of a network of 50 layers."""


class Bottleneck(RecurrentBlock):
    """1x1 reduction, 3x3 convolution, 1x1 expansion, each followed by BatchNorm, plus a shortcut; ReLU after the sum.

    (N, C_in, H, W) to (N, C_out, H / stride, W / stride); the stride is that of the 3x3 convolution. With `project`,
    the shortcut is a 1x1 convolution and BatchNorm, otherwise the input itself.
    """

    layer_names = ("conv1", "conv2", "conv3")
    norm_names = ("norm1", "norm2", "norm3")

    def __init__(self, in_channels: int, inner: int, out_channels: int, stride: int, project: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, inner, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, out_channels, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module | None = None
        if project:
            convolution = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(out_channels))

    def step(self, x: Tensor, norms: Sequence[nn.Module], scales: Sequence[Tensor | float]) -> Tensor:
        h = F.relu(norms[0](scaled(self.conv1(x), scales[0])))
        h = F.relu(norms[1](scaled(self.conv2(h), scales[1])))
        h = norms[2](scaled(self.conv3(h), scales[2]))
        return F.relu(h + (x if self.shortcut is None else self.shortcut(x)))


class BottleneckResNet(nn.Module):
    """A 7x7 stem of 64 channels and max pooling, each halving the image; four stages; pixel mean; linear classifier.

    (N, 3, H, W) images to (N, num_classes) logits. Made by `wrn50` and `swrn50`.
    """

    stage1: nn.Sequential
    stage2: nn.Sequential
    stage3: nn.Sequential
    stage4: nn.Sequential

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 7, 2, padding=3, bias=False)
        self.norm = nn.BatchNorm2d(64)
        before = 64
        for stage, blocks in enumerate(BLOCKS, start=1):
            base = 32 * 2**stage  # the inner channels of ResNet-50
            first = Bottleneck(before, base * width, 4 * base, 1 if stage == 1 else 2, project=True)
            others = [Bottleneck(4 * base, base * width, 4 * base, 1, project=False) for _ in range(blocks - 1)]
            self.add_module(f"stage{stage}", nn.Sequential(first, *others))
            before = 4 * base
        self.classifier = nn.Linear(before, num_classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)  # as in `WideResNet`, and as templates start
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(images)))  # (N, 64, H/2, W/2)
        x = F.max_pool2d(x, 3, 2, padding=1)  # (N, 64, H/4, W/4)
        x = self.stage1(x)  # (N, 256, H/4, W/4)
        x = self.stage2(x)  # (N, 512, H/8, W/8)
        x = self.stage3(x)  # (N, 1024, H/16, W/16)
        x = self.stage4(x)  # (N, 2048, H/32, W/32)
        return logits(mean_over_pixels(x), self.classifier)  # (N, 2048) to (N, num_classes)


def wrn50(width: int = 2, num_classes: int = 1000) -> BottleneckResNet:
    """WRN 50-width (Zagoruyko and Komodakis, 2016, their ImageNet network), (N, 3, H, W) to (N, num_classes).

    ResNet-50 (He et al., 2016) with the stride on the 3x3 convolutions and `width` times as many inner channels in each
    bottleneck. With `width` 2 and 1,000 classes it has 68.9 M parameters.

    Raises:
        ValueError: a width or number of classes below 1.
        TypeError: sizes that are not whole numbers.
    """
    return BottleneckResNet(count("width", width), count("num_classes", num_classes))


def swrn50(width: int = 2, templates: int | None = None, num_classes: int = 1000) -> BottleneckResNet:
    """SWRN 50-width: a `wrn50` whose layers of the same shape share a bank of templates within each stage.

    In each stage, the 1x1 reductions, the 3x3 convolutions and the 1x1 expansions of all blocks except the first draw
    from one bank each, "stage1.conv1" to "stage4.conv3", for 2, 3, 5 and 2 layers. One group per shape and stage is
    remembered from the paper, not confirmed. That the first block shares nothing is our reading, by analogy with the
    authors' CIFAR networks: its reduction has a different shape, and its 3x3 convolution has a stride. Initialised like
    `softshare.models.swrn`. Ties fold into reused weights, but not into loops, which need all layers of a block in one
    group.

    Args:
        templates: k, of which each group uses at most as many as it has layers; None: one template per layer.

    Raises:
        ValueError: as `wrn50`, or templates below 1.
        TypeError: sizes that are not whole numbers.
    """
    templates = max(BLOCKS) if templates is None else count("templates", templates)
    model = wrn50(width, num_classes)

    def shape_of(name: str, layer: nn.Module) -> str | None:
        stage, *place = name.split(".")
        return f"{stage}.{place[1]}" if stage.startswith("stage") and place[0] != "0" else None

    share_groups(model, templates, shape_of, "orthogonal", keep_scale=False)
    return model
