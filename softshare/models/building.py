"""Networks by name: the one place where a name becomes a module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ..arguments import count
from .bottleneck import resnet200, swrn50, wrn50
from .densenet import densenet, densenet264
from .grid import gridnet
from .looped import LoopedGridNet
from .names import CELL_WIDTHS, GRID_LAYERS, Network
from .resnext import resnext
from .searched import cell_network
from .wide_resnet import swrn, wrn


def _wide(network: Network, num_classes: int) -> nn.Module:
    depth, width = network.depth or 0, network.width
    if network.imagenet:
        return swrn50(width, network.templates, num_classes) if network.shared else wrn50(width, num_classes)
    dropout = 0.3 if network.dropout else 0.0
    if network.shared:
        return swrn(depth, width, network.templates, num_classes, dropout)
    return wrn(depth, width, num_classes, dropout)


def _grid(network: Network, num_classes: int, **options: Any) -> nn.Module:
    layers = network.depth or GRID_LAYERS
    if "tied" in options:
        if network.shared:
            raise ValueError(f"{network} shares softly; a layer tied to all others is an option of CNN")
        return LoopedGridNet(layers, network.width, **options)
    return gridnet(layers, network.width, (network.templates or layers) if network.shared else None, **options)


def _resnext(network: Network, num_classes: int) -> nn.Module:
    return resnext(network.depth or 0, network.cardinality or 0, network.width, num_classes)


def _dense(network: Network, num_classes: int) -> nn.Module:
    if network.imagenet:
        return densenet264(network.width, num_classes)
    return densenet(network.depth or 0, network.width, num_classes, network.compressed)


def _residual(network: Network, num_classes: int) -> nn.Module:
    if network.depth != 200:
        raise ValueError(f"of this family there is a model only for ResNet-200, got {str(network)!r}")
    return resnet200(network.width, num_classes)


def _searched(network: Network, num_classes: int, **options: Any) -> nn.Module:
    return cell_network(network.family, network.width, num_classes, **options)


FAMILIES: dict[str, Callable[..., nn.Module]] = {
    "CNN": _grid,
    "WRN": _wide,
    "ResNeXt": _resnext,
    "DenseNet": _dense,
    "ResNet": _residual,
} | dict.fromkeys(CELL_WIDTHS, _searched)
"""The function that builds the networks of each family from a parsed name and a number of classes.

:meta hide-value:
"""


def build(name: str | Network, num_classes: int | None = None, **options: Any) -> nn.Module:
    """Build a network by its name on the poster.

    ``"SWRN 28-10-2"`` is depth 28, widening factor 10, 2 templates per group; ``"SWRN 28-10"`` has one template per layer;
    ``*`` stands for dropout 0.3. Depth 50 is the bottleneck network for ImageNet, which has no dropout (`wrn50`, `swrn50`).
    ``"CNN"``, ``"SCNN"`` (one template per layer), ``"SCNN-k"`` and ``"SCNN 100 layers"`` are the networks of the
    shortest-path task, with 20 layers unless the name says otherwise; they have no classes. The networks that the poster
    compares with are ``"ResNeXt-29 16x64"``, ``"DenseNet 100-24"``, ``"DenseNet 190-40"``, ``"DenseNet-264"``,
    ``"ResNet-200"``, and those of architecture search, ``"NASNet-A"``, ``"AmoebaNet-B"``, ``"DARTS"``, ``"SNAS"``,
    ``"ENAS"``, with a size such as ``"NASNet-A 27.6M"`` where there are several. Works under ``torch.device("meta")``,
    so that parameters can be counted without allocating memory.

    Args:
        name: see above; `softshare.models.names` parses it. A `Network` is used as it is.
        num_classes: by default 1,000 for ImageNet networks, else 10.
        options: for networks of architecture search: other readings of their sources (``cell="DARTS V1"``,
            ``repeats=5``), an auxiliary head, drop-path, dropout, see `softshare.models.cell_network`; for those of the
            shortest-path task, see `softshare.models.gridnet` and, with ``tied=...``, `softshare.models.looped`.

    Raises:
        ValueError: an unknown name (the message lists the known forms), or numbers that the network's own function rejects.
        TypeError: a name that is neither a string nor a `Network`, or options for a network that has none.
    """
    network = name if isinstance(name, Network) else Network.parse(name)
    if num_classes is None:
        num_classes = 1000 if network.imagenet else 10
    count("num_classes", num_classes)
    if network.family not in FAMILIES:
        raise ValueError(f"no model of family {network.family!r} is known; known: {', '.join(FAMILIES)}")
    if options and network.family not in (*CELL_WIDTHS, "CNN"):
        raise TypeError(f"{network} has no options, got {', '.join(options)}")
    return FAMILIES[network.family](network, num_classes, **options)
