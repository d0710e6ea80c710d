"""DenseNets (Huang, Liu, van der Maaten and Weinberger, 2017) for CIFAR and ImageNet, plain and compressed (DenseNet-BC)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..arguments import count
from .blocks import RecurrentBlock, logits, mean_over_pixels
from .bottleneck import initialise_by_outputs

torch.fx.wrap("mean_over_pixels")  # by its name in this file, too

BLOCKS_OF_264 = (6, 12, 64, 48)
"""Layers in each dense block of DenseNet-264."""


class DenseLayer(nn.Module):
    """Norm, ReLU and a 3x3 convolution to `growth` channels, which are appended to the input.

    (N, C, H, W) to (N, C + growth, H, W). With `bottleneck`, norm, ReLU and a 1x1 convolution to 4 * growth channels come
    first.
    """

    def __init__(self, channels: int, growth: int, bottleneck: bool) -> None:
        super().__init__()
        self.reduction: nn.Module | None = None
        if bottleneck:
            convolution = nn.Conv2d(channels, 4 * growth, 1, bias=False)
            self.reduction = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(), convolution)
            channels = 4 * growth
        self.norm = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = x if self.reduction is None else self.reduction(x)
        return torch.cat([x, self.conv(F.relu(self.norm(h)))], dim=1)


class Transition(nn.Module):
    """Norm, ReLU, 1x1 convolution and 2x2 average pooling between dense blocks: (N, C_in, H, W) to (N, C_out, H/2, W/2)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(in_channels)
        self.conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv(F.relu(self.norm(x))), 2)


class DenseNet(nn.Module):
    """A stem, stages of `DenseLayer`, norm, ReLU, mean over pixels, linear classifier.

    (N, 3, H, W) images to (N, num_classes) logits. Each stage, "stage1" and so on, is a dense block; from the second on it
    starts with a `Transition`. If `compressed`, layers have bottlenecks and transitions halve the number of channels.
    Made by `densenet` and `densenet264`.
    """

    __prepare_scriptable__ = RecurrentBlock.__prepare_scriptable__  # reports that the network cannot be scripted

    def __init__(
        self, stem: nn.Module, channels: int, blocks: Sequence[int], growth: int, compressed: bool, num_classes: int
    ) -> None:
        super().__init__()
        self.stem = stem
        self.stages = [f"stage{number}" for number in range(1, len(blocks) + 1)]
        for name, layers in zip(self.stages, blocks, strict=True):
            stage = nn.Sequential()
            if name != "stage1":
                before, channels = channels, channels // 2 if compressed else channels
                stage.append(Transition(before, channels))
            for _ in range(layers):
                stage.append(DenseLayer(channels, growth, compressed))
                channels += growth
            self.add_module(name, stage)
        self.norm = nn.BatchNorm2d(channels)
        self.classifier = nn.Linear(channels, num_classes)
        initialise_by_outputs(self)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        for name in self.stages:
            x = self.get_submodule(name)(x)
        return logits(mean_over_pixels(F.relu(self.norm(x))), self.classifier)


def densenet(depth: int, growth: int, num_classes: int = 10, compressed: bool = False) -> DenseNet:
    """DenseNet depth-growth for CIFAR, or DenseNet-BC if `compressed`; (N, 3, H, W) to (N, num_classes).

    Built and initialised as in liuzhuang13/DenseNet@models/densenet.lua and DenseConnectLayer.lua: a 3x3 stem and three
    dense blocks of (depth - 4) / 3 layers. If compressed, there are half as many layers, each with two convolutions, and
    transitions halve the number of channels. The stem has 16 channels, or 2 * growth if compressed, as the paper states;
    the code always takes 2 * growth, with which DenseNet 100-24 would have 28.1 M parameters, not the published 27.2 M.

    In a DenseNet-BC, all 3x3 convolutions have one shape and can share templates (`softshare.share_`). In a plain DenseNet,
    no two layers have the same shape, so there is nothing to share.

    Raises:
        ValueError: a depth other than 3n + 4 (7, 10, 13, ...) or, if compressed, 6n + 4 (10, 16, 22, ...), or a growth rate
            or number of classes below 1.
        TypeError: sizes that are not whole numbers.
    """
    depth, growth = count("depth", depth), count("growth", growth)
    step = 6 if compressed else 3
    if depth < step + 4 or (depth - 4) % step:
        name = "DenseNet-BC" if compressed else "DenseNet"
        raise ValueError(f"{name} depth must be {step}n + 4 ({step + 4}, {2 * step + 4}, ..., 100, ...), got {depth}")
    channels = 2 * growth if compressed else 16
    stem = nn.Conv2d(3, channels, 3, padding=1, bias=False)
    return DenseNet(stem, channels, [(depth - 4) // step] * 3, growth, compressed, count("num_classes", num_classes))


def densenet264(growth: int = 32, num_classes: int = 1000) -> DenseNet:
    """DenseNet-264 for ImageNet, (N, 3, H, W) to (N, num_classes).

    A DenseNet-BC with dense blocks of 6, 12, 64 and 48 layers after a 7x7 stem of 2 * growth channels and max pooling, each
    halving the image; sources as in `densenet`. The sizes of the blocks, which that code leaves open, are those that public
    implementations take from Table 1 of arXiv:1608.06993. With growth rate 32 and 1,000 classes it has 33.3 M parameters.

    Raises:
        ValueError: a growth rate or number of classes below 1.
        TypeError: sizes that are not whole numbers.
    """
    growth = count("growth", growth)
    channels = 2 * growth
    stem = nn.Sequential(
        nn.Conv2d(3, channels, 7, 2, padding=3, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, padding=1),
    )
    return DenseNet(stem, channels, BLOCKS_OF_264, growth, True, count("num_classes", num_classes))
