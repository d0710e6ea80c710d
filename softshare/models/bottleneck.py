"""Networks of bottleneck blocks for ImageNet: WRN 50-2, its softly shared form SWRN 50-2, and ResNet-200."""

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

BLOCKS_OF_200 = (3, 24, 36, 3)
"""Blocks in each stage of a network of 200 layers."""


class Bottleneck(RecurrentBlock):
    """1x1 reduction, 3x3 convolution, 1x1 expansion, each followed by BatchNorm, plus a shortcut; ReLU after the sum.

    (N, C_in, H, W) to (N, C_out, H / stride, W / stride); the stride is that of the 3x3 convolution, which may have
    several groups. With `project`, the shortcut is a 1x1 convolution and BatchNorm, otherwise the input itself.
    """

    layer_names = ("conv1", "conv2", "conv3")
    norm_names = ("norm1", "norm2", "norm3")

    def __init__(
        self, in_channels: int, inner: int, out_channels: int, stride: int, project: bool, groups: int = 1
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, inner, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, padding=1, groups=groups, bias=False)
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


class PreactivationBottleneck(RecurrentBlock):
    """1x1 reduction, 3x3 convolution, 1x1 expansion, each after BatchNorm and ReLU, plus a shortcut; nothing after the sum.

    (N, C_in, H, W) to (N, C_out, H / stride, W / stride); the stride is that of the 3x3 convolution. With `project`, the
    shortcut is a 1x1 convolution of the first activation, otherwise the input itself. With `norm_first` False, the input
    must already be an activation, and the block starts without BatchNorm.
    """

    layer_names = ("conv1", "conv2", "conv3")
    norm_names = ("norm1", "norm2", "norm3")

    def __init__(
        self, in_channels: int, inner: int, out_channels: int, stride: int, project: bool, norm_first: bool = True
    ) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels) if norm_first else nn.Identity()
        self.conv1 = nn.Conv2d(in_channels, inner, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, padding=1, bias=False)
        self.norm3 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, out_channels, 1, bias=False)
        self.shortcut: nn.Module | None = None
        if project:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def step(self, x: Tensor, norms: Sequence[nn.Module], scales: Sequence[Tensor | float]) -> Tensor:
        h = F.relu(norms[0](x))  # of an activation: the activation itself
        residual = x if self.shortcut is None else self.shortcut(h)
        h = F.relu(norms[1](scaled(self.conv1(h), scales[0])))
        h = F.relu(norms[2](scaled(self.conv2(h), scales[1])))
        return residual + scaled(self.conv3(h), scales[2])


class _FourStages(nn.Module):
    """What the networks have in common: a 7x7 stem and max pooling, each halving the image, and four stages.

    `features` maps images (N, 3, H, W) to the last stage's result; the shapes beside it are those of full width.
    """

    stage1: nn.Sequential
    stage2: nn.Sequential
    stage3: nn.Sequential
    stage4: nn.Sequential

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 7, 2, padding=3, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def features(self, images: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(images)))  # (N, 64, H/2, W/2)
        x = F.max_pool2d(x, 3, 2, padding=1)  # (N, 64, H/4, W/4)
        x = self.stage1(x)  # (N, 256, H/4, W/4)
        x = self.stage2(x)  # (N, 512, H/8, W/8)
        x = self.stage3(x)  # (N, 1024, H/16, W/16)
        return self.stage4(x)  # (N, 2048, H/32, W/32)


class BottleneckResNet(_FourStages):
    """A 7x7 stem of 64 channels and max pooling, each halving the image; four stages; pixel mean; linear classifier.

    (N, 3, H, W) images to (N, num_classes) logits. Made by `wrn50` and `swrn50`.
    """

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__(64)
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
        return logits(mean_over_pixels(self.features(images)), self.classifier)  # (N, 2048) to (N, num_classes)


class PreactivationResNet(_FourStages):
    """A 7x7 stem and max pooling, four stages of `PreactivationBottleneck`, norm, ReLU, pixel mean, linear classifier.

    (N, 3, H, W) images to (N, num_classes) logits. The first block starts without BatchNorm and ReLU, since the stem ends
    with them; in the first block of the other stages, the shortcut too starts from the activation. Made by `resnet200`.
    """

    def __init__(self, blocks: Sequence[int], width: int, num_classes: int) -> None:
        super().__init__(width)
        before = width
        for stage, repeats in enumerate(blocks):
            inner, stride = width * 2**stage, 1 if stage == 0 else 2
            first = PreactivationBottleneck(before, inner, 4 * inner, stride, project=True, norm_first=stage > 0)
            before = 4 * inner
            others = [PreactivationBottleneck(before, inner, before, 1, project=False) for _ in range(repeats - 1)]
            self.add_module(f"stage{stage + 1}", nn.Sequential(first, *others))
        self.last_norm = nn.BatchNorm2d(before)
        self.classifier = nn.Linear(before, num_classes)
        initialise_by_outputs(self)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.last_norm(self.features(images)))  # (N, 2048, H/32, W/32)
        return logits(mean_over_pixels(x), self.classifier)  # (N, 2048) to (N, num_classes)


def initialise_by_outputs(model: nn.Module) -> None:
    """Draw the weights of all convolutions with variance 2 / (kernel area * output channels); linear biases start at 0.

    As in facebookarchive/fb.resnet.torch@models/preresnet.lua and the code of ResNeXt and DenseNet, which grew from it. The
    weights of linear layers stay as PyTorch draws them, which is how Torch did.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)


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


def resnet200(width: int = 64, num_classes: int = 1000) -> PreactivationResNet:
    """ResNet-200 (He et al., 2016, "Identity mappings in deep residual networks"), (N, 3, H, W) to (N, num_classes).

    Built and initialised as in facebookarchive/fb.resnet.torch@models/preresnet.lua: stages of 3, 24, 36 and 3 bottlenecks
    with the stride on the 3x3 convolutions, and shortcuts without BatchNorm. The bottlenecks of stage s have
    ``width * 2 ** (s - 1)`` inner channels and return four times as many; the stem has `width`. With `width` 64 and 1,000
    classes it has 64.7 M parameters.

    Layers of equal shape can share (`softshare.share_`); ties fold into reused weights, but not into loops, which need all
    layers of a block in one group.

    Raises:
        ValueError: a width or number of classes below 1.
        TypeError: sizes that are not whole numbers.
    """
    return PreactivationResNet(BLOCKS_OF_200, count("width", width), count("num_classes", num_classes))
