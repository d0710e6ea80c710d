"""The convolutional networks of the shortest-path task: CNN, and SCNN whose layers share templates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..arguments import count
from ..bank import TemplateBank
from ..sharing import banks, share_groups
from .blocks import RecurrentBlock, scaled


class GridBlock(RecurrentBlock):
    """3x3 convolution, BatchNorm, ReLU, and a skip around them: (N, C, H, W) to the same shape.

    Without `skip` there is none; with `gain`, the layer learns a number by which the convolution's output is multiplied.
    """

    layer_names = ("conv",)
    norm_names = ("norm",)

    def __init__(self, channels: int, skip: bool = True, gain: bool = False) -> None:
        super().__init__()
        self.skip = skip
        self.gain = nn.Parameter(torch.ones(())) if gain else None
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        nn.init.kaiming_normal_(self.conv.weight)

    def step(self, x: Tensor, norms: Sequence[nn.Module], scales: Sequence[Tensor | float]) -> Tensor:
        y = scaled(self.conv(x), scales[0])
        y = F.relu(norms[0](y if self.gain is None else y * self.gain))
        return x + y if self.skip else y


class GridNet(nn.Module):
    """A 1x1 convolution from 2 channels, a stack of `GridBlock`, a 1x1 convolution to one logit per pixel.

    (N, 2, H, W) grids (queries, obstacles; bool or floating) of any size to (N, H, W) logits. Made by `gridnet`.
    """

    def __init__(self, layers: int, width: int, skip: bool = True, gain: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, width, 1)
        self.layers = nn.Sequential(*(GridBlock(width, skip, gain) for _ in range(layers)))
        self.head = nn.Conv2d(width, 1, 1)

    def forward(self, grids: Tensor) -> Tensor:
        x = self.stem(grids.to(self.stem.weight.dtype))  # (N, width, H, W)
        x = self.layers(x)
        return self.head(x).squeeze(1)  # type: ignore[no-any-return]

    @torch.no_grad()
    def answers_by_layer(self, grids: Tensor) -> Tensor:
        """What the network would answer if it stopped after 0, 1, ... layers: its head applied to the features so far.

        (N, 2, H, W) to (N, layers + 1, H, W) bool, on the network's device. Raises ValueError for inputs of another shape,
        and in training mode, where BatchNorm would learn from them.
        """
        if grids.dim() != 4 or grids.shape[1] != 2:
            raise ValueError(f"inputs must be (N, 2, H, W), got {tuple(grids.shape)}")
        if self.training:
            raise ValueError("the network must be in evaluation mode: call network.eval() first")
        x = self.stem(grids.to(self.stem.weight))  # (N, width, H, W)
        logits = [self.head(x)]
        for layer in self.layers:
            x = layer(x)
            logits.append(self.head(x))  # (N, 1, H, W)
        return torch.cat(logits, dim=1) > 0


class UnitBank(TemplateBank):
    """A bank that mixes with coefficients scaled to length 1, so that only their direction matters.

    `unit_coefficients` makes the parameters what they act as, which folding takes for granted.
    """

    def product(self, coefficients: Tensor) -> Tensor:
        return super().product(F.normalize(coefficients, dim=-1))


def unit_coefficients(model: nn.Module) -> None:
    """Scale each row of the coefficients of each `UnitBank` to length 1, in place; no weight changes."""
    with torch.no_grad():
        for bank in banks(model).values():
            if isinstance(bank, UnitBank):
                bank.coefficients.copy_(F.normalize(bank.coefficients, dim=1))


def gridnet(
    layers: int = 20,
    width: int = 32,
    templates: int | None = None,
    *,
    skip: bool = True,
    gain: bool = False,
    unit: bool = False,
) -> GridNet:
    """The network of the shortest-path task, (N, 2, H, W) to (N, H, W) logits.

    Layers, width and the skip around each layer are remembered from the paper, not confirmed by the poster. The options are
    other readings of it, and controls.

    Args:
        layers: number of 3x3 layers.
        width: number of channels.
        templates: k of the one bank, "layers", that all 3x3 layers share (SCNN); None: plain weights (CNN).
        skip: whether there is a skip around each layer.
        gain: whether each layer learns a number by which its convolution's output is multiplied.
        unit: whether layers mix with coefficients of length 1 (`UnitBank`); plain weights stay as they are.

    Raises:
        ValueError: a number below 1, or templates with a single layer.
        TypeError: sizes that are not whole numbers.
    """
    count("layers", layers)
    count("width", width)
    if templates is not None:
        count("templates", templates)
        if layers < 2:
            raise ValueError("sharing templates needs at least 2 layers, got 1")
    model = GridNet(layers, width, skip, gain)
    if templates is not None:

        def key(name: str, layer: nn.Module) -> str | None:
            return "layers" if name.startswith("layers.") else None

        share_groups(model, templates, key, "orthogonal", keep_scale=False)
    for bank in banks(model).values() if unit else ():
        bank.__class__ = UnitBank
    unit_coefficients(model)
    return model
