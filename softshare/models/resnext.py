"""ResNeXt (Xie, Girshick, Dollár, Tu and He, 2017) for CIFAR: bottleneck blocks whose 3x3 convolutions have many groups."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..arguments import count
from .blocks import logits, mean_over_pixels
from .bottleneck import Bottleneck, initialise_by_outputs

torch.fx.wrap("mean_over_pixels")  # by its name in this file, too


class ResNeXt(nn.Module):
    """A 3x3 stem of 64 channels, norm, ReLU, three stages of n bottlenecks, mean over pixels, linear classifier.

    (N, 3, H, W) images to (N, num_classes) logits. Made by `resnext`.
    """

    stage1: nn.Sequential
    stage2: nn.Sequential
    stage3: nn.Sequential

    def __init__(self, depth: int, cardinality: int, width: int, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(64)
        before = 64
        for stage in (1, 2, 3):
            inner, after, stride = cardinality * width * 2 ** (stage - 1), 128 * 2**stage, 1 if stage == 1 else 2
            first = Bottleneck(before, inner, after, stride, project=True, groups=cardinality)
            others = [
                Bottleneck(after, inner, after, 1, project=False, groups=cardinality)
                for _ in range((depth - 2) // 9 - 1)
            ]
            self.add_module(f"stage{stage}", nn.Sequential(first, *others))
            before = after
        self.classifier = nn.Linear(before, num_classes)
        initialise_by_outputs(self)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(images)))  # (N, 64, H, W)
        x = self.stage1(x)  # (N, 256, H, W)
        x = self.stage2(x)  # (N, 512, H/2, W/2)
        x = self.stage3(x)  # (N, 1024, H/4, W/4)
        return logits(mean_over_pixels(x), self.classifier)  # (N, 1024) to (N, num_classes)


def resnext(depth: int = 29, cardinality: int = 16, width: int = 64, num_classes: int = 10) -> ResNeXt:
    """ResNeXt-depth cardinality x width for CIFAR, (N, 3, H, W) to (N, num_classes).

    Built and initialised as in facebookresearch/ResNeXt@models/resnext.lua, with its blocks of type C in their original
    order: 1x1 reduction, 3x3 convolution of `cardinality` groups, 1x1 expansion, ReLU after the sum; where the number of
    channels changes, the shortcut is a 1x1 convolution and BatchNorm. Each group has `width` channels in the first stage
    and twice as many in each further stage; the stages return 256, 512 and 1,024 channels whatever the width.

    Layers of equal shape can share (`softshare.share_`); ties fold into reused weights, but not into loops, which need all
    layers of a block in one group.

    Raises:
        ValueError: a depth other than 9n + 2 with n >= 1 (11, 20, 29, ...), or a cardinality, width or number of classes
            below 1.
        TypeError: sizes that are not whole numbers.
    """
    depth = count("depth", depth)
    if depth < 11 or (depth - 2) % 9:
        raise ValueError(f"ResNeXt depth must be 9n + 2 (11, 20, 29, 38, ...), got {depth}")
    return ResNeXt(depth, count("cardinality", cardinality), count("width", width), count("num_classes", num_classes))
