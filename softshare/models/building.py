"""Networks by name: the one place where a name becomes a module."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ..arguments import count
from .bottleneck import swrn50, wrn50
from .grid import gridnet
from .names import GRID_LAYERS, Network
from .wide_resnet import swrn, wrn


def _wide(network: Network, num_classes: int) -> nn.Module:
    depth, width = network.depth or 0, network.width
    if network.imagenet:
        return swrn50(width, network.templates, num_classes) if network.shared else wrn50(width, num_classes)
    dropout = 0.3 if network.dropout else 0.0
    if network.shared:
        return swrn(depth, width, network.templates, num_classes, dropout)
    return wrn(depth, width, num_classes, dropout)


def _grid(network: Network, num_classes: int) -> nn.Module:
    layers = network.depth or GRID_LAYERS
    return gridnet(layers, network.width, (network.templates or layers) if network.shared else None)


FAMILIES: dict[str, Callable[[Network, int], nn.Module]] = {
    "CNN": _grid,
    "WRN": _wide,
}
"""The function that builds the networks of each family from a parsed name and a number of classes.

:meta hide-value:
"""


def build(name: str | Network, num_classes: int | None = None) -> nn.Module:
    """Build a network by its name on the poster.

    ``"SWRN 28-10-2"`` is depth 28, widening factor 10, 2 templates per group; ``"SWRN 28-10"`` has one template per layer;
    ``*`` stands for dropout 0.3. Depth 50 is the bottleneck network for ImageNet, which has no dropout (`wrn50`, `swrn50`).
    ``"CNN"``, ``"SCNN"`` (one template per layer), ``"SCNN-k"`` and ``"SCNN 100 layers"`` are the networks of the
    shortest-path task, with 20 layers unless the name says otherwise; they have no classes. Works under
    ``torch.device("meta")``, so that parameters can be counted without allocating memory.

    Args:
        name: see above; `softshare.models.names` parses it. A `Network` is used as it is.
        num_classes: by default 1,000 for ImageNet networks, else 10.

    Raises:
        ValueError: an unknown name (the message lists the known forms), a network of the poster for which there is no model
            yet, or numbers that `wrn` or `swrn` reject.
        TypeError: a name that is neither a string nor a `Network`.
    """
    network = name if isinstance(name, Network) else Network.parse(name)
    if num_classes is None:
        num_classes = 1000 if network.imagenet else 10
    count("num_classes", num_classes)
    if network.family in FAMILIES:
        return FAMILIES[network.family](network, num_classes)
    raise ValueError(f"{network} is a network of the poster for which this version has no model yet")
