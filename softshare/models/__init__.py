"""The networks of the poster, by function (`wrn`, `swrn`, `gridnet`) or by the poster's names (`build`)."""

from __future__ import annotations

import re

from torch import nn

from ..arguments import count
from .bottleneck import swrn50, wrn50
from .grid import gridnet
from .wide_resnet import swrn, wrn

__all__ = ["build", "gridnet", "swrn", "swrn50", "wrn", "wrn50"]

KNOWN = (
    '"WRN L-w", "SWRN L-w" (one template a layer), "SWRN L-w-k", each also with * for dropout 0.3 (say "WRN 28-10", '
    '"SWRN 28-10-2*"); "WRN 50-2", "SWRN 50-2", "SWRN 50-2-k" for ImageNet; '
    '"CNN", "SCNN", "SCNN-k" for the shortest-path task'
)


def build(name: str, num_classes: int | None = None) -> nn.Module:
    """Build a network by the name that the poster gives it.

    ``"SWRN 28-10-2"`` is depth 28, widening factor 10, 2 templates a group; ``"SWRN 28-10"`` has one template a layer;
    ``*`` stands for dropout 0.3. Depth 50 is the bottleneck network for ImageNet, which has none (`wrn50`, `swrn50`).
    ``"CNN"``, ``"SCNN"`` (one template a layer, 20) and ``"SCNN-k"`` are the 20-layer networks of the shortest-path task,
    which have no classes. Works under ``torch.device("meta")``, so that parameters can be counted without memory.

    Args:
        name: see above.
        num_classes: default: 1,000 at depth 50, else 10.

    Raises:
        ValueError: an unknown name (the message lists the known forms), or numbers that `wrn` or `swrn` refuse.
        TypeError: a name that is not a string.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a string such as 'SWRN 28-10-2', got {type(name).__name__}")
    if num_classes is not None:
        count("num_classes", num_classes)
    if match := re.fullmatch(r"(S?)WRN[ -]50-(\d+)(?:-(\d+))?(\*?)", name.strip()):
        shared, width, templates, star = match.groups()
        if star:
            raise ValueError(f"the networks of depth 50 have no dropout, so no * either, got {name!r}")
        classes = 1000 if num_classes is None else num_classes
        if shared:
            return swrn50(int(width), None if templates is None else int(templates), classes)
        if templates is None:
            return wrn50(int(width), classes)
    num_classes = 10 if num_classes is None else num_classes
    if match := re.fullmatch(r"WRN[ -](\d+)-(\d+)(\*?)", name.strip()):
        depth, width, star = match.groups()
        return wrn(int(depth), int(width), num_classes, 0.3 if star else 0.0)
    if match := re.fullmatch(r"SWRN[ -](\d+)-(\d+)(?:-(\d+))?(\*?)", name.strip()):
        depth, width, templates, star = match.groups()
        k = None if templates is None else int(templates)
        return swrn(int(depth), int(width), k, num_classes, 0.3 if star else 0.0)
    if match := re.fullmatch(r"(S?)CNN(?:[ -](\d+))?", name.strip()):
        shared, templates = match.groups()
        if shared:
            return gridnet(templates=20 if templates is None else int(templates))
        if templates is None:
            return gridnet()
    raise ValueError(f"unknown model {name!r}; known: {KNOWN}")
