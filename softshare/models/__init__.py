"""The networks of the poster, by function (`wrn`, `swrn`, `gridnet`) or by the poster's names (`build`)."""

from __future__ import annotations

import re

from torch import nn

from ..arguments import count
from .grid import gridnet
from .wide_resnet import swrn, wrn

__all__ = ["build", "gridnet", "swrn", "wrn"]

KNOWN = (
    '"WRN L-w", "SWRN L-w" (one template a layer), "SWRN L-w-k", each also with * for dropout 0.3 (say "WRN 28-10", '
    '"SWRN 28-10-2*"); "CNN", "SCNN", "SCNN-k" for the shortest-path task'
)


def build(name: str, num_classes: int = 10) -> nn.Module:
    """Build a network by the name that the poster gives it.

    ``"SWRN 28-10-2"`` is depth 28, widening factor 10, 2 templates a group; ``"SWRN 28-10"`` has one template a layer;
    ``*`` stands for dropout 0.3. ``"CNN"``, ``"SCNN"`` (one template a layer, 20) and ``"SCNN-k"`` are the 20-layer
    networks of the shortest-path task, which have no classes. Works under ``torch.device("meta")``, so that parameters
    can be counted without memory.

    Raises:
        ValueError: an unknown name (the message lists the known forms), or numbers that `wrn` or `swrn` refuse.
        TypeError: a name that is not a string.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a string such as 'SWRN 28-10-2', got {type(name).__name__}")
    count("num_classes", num_classes)
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
