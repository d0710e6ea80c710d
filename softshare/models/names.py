"""The names of networks on the poster: the one place where they are parsed and written."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

GRID_LAYERS, GRID_WIDTH = 20, 32
"""Layers and channels of the network of the shortest-path task, unless its name gives others."""

CELL_WIDTHS = {
    "NASNet-A": {"3.3M": 32, "27.6M": 96},
    "AmoebaNet-B": {"2.8M": 36, "13.7M": 80, "34.9M": 128},
    "DARTS": {"3.4M": 36},
    "SNAS": {"2.8M": 36},
    "ENAS": {"4.6M": 36},
}
"""Channels of each searched network by its size on the poster; a name without a size means the first."""

OTHERS: dict[str, int] = {}
"""Networks that are not on the poster, by family, with their width unless a name gives another."""

KNOWN = (
    '"WRN L-w", "SWRN L-w" (one template per layer), "SWRN L-w-k", each also with * for dropout 0.3 (such as "WRN 28-10", '
    '"SWRN 28-10-2*"); "WRN 50-2", "SWRN 50-2", "SWRN 50-2-k" for ImageNet; '
    '"CNN", "SCNN", "SCNN-k", "SCNN 100 layers" for the shortest-path task; "ResNeXt-29 16x64", "DenseNet 100-24", '
    '"DenseNet-BC 190-40", "DenseNet-264", "ResNet-200"; "NASNet-A", "NASNet-A 27.6M", "AmoebaNet-B", "AmoebaNet-B 13.7M", '
    '"AmoebaNet-B 34.9M", "DARTS", "SNAS", "ENAS"; "width N" after a name without a width makes a narrower version'
)

_NARROW = {"WRN": 1, "CNN": 12, "ResNeXt": 4, "DenseNet": 4, "ResNet": 8} | dict.fromkeys(CELL_WIDTHS, 4)
_UNNAMED_WIDTHS = {"CNN": GRID_WIDTH, "DenseNet": 32, "ResNet": 64}  # where a name gives none
_COMPRESSED = (190, 264)  # depths of DenseNets with bottlenecks and compression, although their names do not say so


@dataclass(frozen=True)
class Network:
    """What a name says about a network; ``str`` gives the name back in the poster's spelling.

    Attributes:
        family: "WRN", "CNN", "ResNeXt", "DenseNet", "ResNet", or a searched network such as "DARTS".
        depth: number of layers; None for the searched networks.
        width: widening factor (WRN), channels (CNN, searched), width of a group (ResNeXt), growth rate (DenseNet), or
            channels of the first stage (ResNet).
        shared: whether layers draw their weights from templates.
        templates: k, the number of templates per group; None: one per layer, even if the name gives that as a number.
        dropout: whether there is dropout of 0.3 (the star on the poster).
        cardinality: groups of a ResNeXt's convolutions.
        compressed: whether a DenseNet has bottlenecks and compression (DenseNet-BC).
    """

    family: str
    depth: int | None
    width: int
    shared: bool = False
    templates: int | None = None
    dropout: bool = False
    cardinality: int | None = None
    compressed: bool = False

    @classmethod
    def parse(cls, name: str) -> Network:
        """Parse a name; its spacing does not matter.

        Raises:
            ValueError: an unknown name (the message lists the known forms), or one that contradicts itself.
            TypeError: not a string.
        """
        if not isinstance(name, str):
            raise TypeError(f"name must be a string such as 'SWRN 28-10-2', got {type(name).__name__}")
        text = " ".join(name.replace("*", " * ").split())
        for pattern, read in _FORMS:
            if match := re.fullmatch(pattern, text):
                network = read(match)
                if 0 in (network.width, network.depth, network.templates, network.cardinality):
                    raise ValueError(f"the numbers in a name must be at least 1, got {name!r}")
                return network
        raise ValueError(f"unknown model {name!r}; known: {KNOWN}")

    @property
    def plain(self) -> Network:
        """The same network without sharing: "WRN 28-10*" for "SWRN 28-10-2*"."""
        return replace(self, shared=False, templates=None)

    @property
    def twin(self) -> Network | None:
        """The plain network of nearly equal parameters: as wide, but with only as many layers as there are templates.

        "WRN 16-10" for "SWRN 28-10-2", which has two sharing layers in each stage where the latter has two templates. The
        plain network itself if each layer has its own template; None for other families, odd numbers of templates and
        ImageNet networks.
        """
        if self.family != "WRN" or not self.shared or self.imagenet:
            return None
        if self.templates is None:
            return self.plain
        return None if self.templates % 2 else replace(self.plain, depth=3 * self.templates + 10)

    def narrowed(self, width: int | None = None) -> Network:
        """The same network, at most `width` wide; by default as narrow as in profile fast."""
        return replace(self, width=min(self.width, _NARROW.get(self.family, self.width) if width is None else width))

    @property
    def grids(self) -> bool:
        """Whether it takes grids of the shortest-path task, (N, 2, H, W), rather than images."""
        return self.family == "CNN"

    @property
    def imagenet(self) -> bool:
        """Whether it is one of the networks for images of 224 pixels and 1,000 classes."""
        return self.family == "ResNet" or (self.family, self.depth) in (("WRN", 50), ("DenseNet", 264))

    def __str__(self) -> str:
        shared, k = "S" * self.shared, "" if self.templates is None else f"-{self.templates}"
        if self.family == "WRN":
            return f"{shared}WRN {self.depth}-{self.width}{k}{'*' * self.dropout}"
        if self.family == "ResNeXt":
            return f"ResNeXt-{self.depth} {self.cardinality}x{self.width}"
        if self.family == "DenseNet" and not self.imagenet:
            marked = "-BC" * (self.compressed and self.depth not in _COMPRESSED)
            return f"DenseNet{marked} {self.depth}-{self.width}"
        if self.family in CELL_WIDTHS:
            sizes = {width: size for size, width in CELL_WIDTHS[self.family].items()}
            smallest = next(iter(sizes))
            told = "" if self.width == smallest else f" {sizes.get(self.width, f'width {self.width}')}"
            return self.family + told
        if self.family == "CNN":
            name = f"{shared}CNN{k}" + f" {self.depth} layers" * (self.depth != GRID_LAYERS)
        else:
            name = self.family if self.depth is None else f"{self.family}-{self.depth}"
        return name + f" width {self.width}" * (self.width != (_UNNAMED_WIDTHS | OTHERS)[self.family])


def _wide(match: re.Match[str]) -> Network:
    shared, depth, width, templates, star = match.groups()
    if templates and not shared:
        raise ValueError(f"a plain network has no templates, got {match[0]!r}; did you mean 'S{match[0]}'?")
    if star and depth == "50":
        raise ValueError(f"networks of depth 50 have no dropout, so their names have no *, got {match[0]!r}")
    k = int(templates) if templates else None
    if k and depth != "50" and k >= (int(depth) - 4) // 3 - 2 > 0:
        k = None  # one per sharing layer, however it is written
    return Network("WRN", int(depth), int(width), bool(shared), k, bool(star))


def _grid(match: re.Match[str]) -> Network:
    shared, templates, layers, width = match.groups()
    depth = int(layers or GRID_LAYERS)
    if templates and not shared:
        raise ValueError(f"a plain network has no templates, got {match[0]!r}; did you mean 'S{match[0]}'?")
    if templates and int(templates) > depth:
        raise ValueError(
            f"{match[0]!r} asks for {templates} templates for {depth} layers, more than one per layer; "
            f"a network of {templates} layers is 'SCNN {templates} layers'"
        )
    k = int(templates) if templates and int(templates) < depth else None
    return Network("CNN", depth, int(width or GRID_WIDTH), bool(shared), k)


def _dense(match: re.Match[str]) -> Network:
    marked, depth, growth = match.groups()
    compressed = bool(marked) or int(depth) in _COMPRESSED
    return Network("DenseNet", int(depth), int(growth), compressed=compressed)


def _cells(match: re.Match[str]) -> Network:
    family, size, width = match.groups()
    sizes = CELL_WIDTHS[family]
    if size and width:
        raise ValueError(f"a name may give a size or a width, not both, got {match[0]!r}")
    if size and size not in sizes:
        raise ValueError(f"unknown size {size!r} of {family}; known: {', '.join(sizes)}")
    return Network(family, None, int(width) if width else sizes[size] if size else next(iter(sizes.values())))


_FORMS: tuple[tuple[str, Callable[[re.Match[str]], Network]], ...] = (
    (r"(S?)WRN[ -](\d+)-(\d+)(?:-(\d+))?( \*)?", _wide),
    (r"(S?)CNN(?:[ -](\d+)(?! layers))?(?: (\d+) layers)?(?: width (\d+))?", _grid),
    (r"ResNeXt[ -](\d+) (\d+) ?x ?(\d+)", lambda m: Network("ResNeXt", int(m[1]), int(m[3]), cardinality=int(m[2]))),
    (r"DenseNet(-BC)?[ -](\d+)-(\d+)", _dense),
    (r"DenseNet[ -]264(?: width (\d+))?", lambda m: Network("DenseNet", 264, int(m[1] or 32), compressed=True)),
    (r"ResNet[ -](\d+)(?: width (\d+))?", lambda m: Network("ResNet", int(m[1]), int(m[2] or 64))),
    (rf"({'|'.join(CELL_WIDTHS)})(?: ([\d.]+M))?(?: width (\d+))?", _cells),
    (rf"({'|'.join(OTHERS) or '(?!)'})(?: width (\d+))?", lambda m: Network(m[1], None, int(m[2] or OTHERS[m[1]]))),
)
