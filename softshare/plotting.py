"""The book's pictures. A model has the same colour in all of them; the colours are those of Okabe and Ito (2008)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from torch import Tensor

from .folding import FoldPlan, GroupPlan

COLOURS = {
    "WRN": "#0072B2",
    "SWRN": "#D55E00",
    "CNN": "#0072B2",
    "SCNN": "#D55E00",
    "SCNN with penalty": "#009E73",
    "SWRN with penalty": "#009E73",
    "tied by hand": "#CC79A7",
    "frozen, SGD": "#56B4E9",
    "frozen, Adam": "#E69F00",
    "rectangle rule": "#000000",
    "initialisation": "#7F7F7F",
}
"""The colour of each kind of model."""

# Whatever is not a model: lines without a name, and layers of one weight. The models' own colours come last.
_CYCLE = ("#56B4E9", "#E69F00", "#CC79A7", "#F0E442", "#009E73", "#0072B2", "#D55E00", "#000000")


def use_style() -> None:
    """Set matplotlib up for the book: sizes, colours, sharp pictures on white that stay readable on a dark page."""
    plt.rcParams.update(
        {
            "figure.dpi": 96,
            "savefig.dpi": 160,
            "savefig.facecolor": "white",
            "figure.facecolor": "white",
            "figure.constrained_layout.use": True,
            "font.size": 11,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.prop_cycle": plt.cycler(color=_CYCLE),
            "axes.grid": False,
            "lines.linewidth": 2.0,
            "legend.frameon": False,
        }
    )
    try:  # sharp inline pictures, where there is a notebook
        from matplotlib_inline.backend_inline import set_matplotlib_formats
    except ImportError:
        return
    set_matplotlib_formats("retina")


def similarity_matrix(
    matrix: Tensor | np.ndarray, axes: Axes | None = None, title: str = "", numbers: bool = True
) -> Axes:
    """Draw a layer similarity matrix (L, L), from 0 (white) to 1 (dark), with its values if there is room."""
    axes = axes or plt.subplots(figsize=(3.4, 3.4))[1]
    values = matrix.detach().float().cpu().numpy() if isinstance(matrix, Tensor) else np.asarray(matrix)
    layers = len(values)
    axes.imshow(values, vmin=0.0, vmax=1.0, cmap="Blues")
    ticks = range(layers) if layers <= 12 else range(0, layers, 5)
    axes.set_xticks(list(ticks), [str(tick + 1) for tick in ticks])
    axes.set_yticks(list(ticks), [str(tick + 1) for tick in ticks])
    axes.set(xlabel="layer", ylabel="layer", title=title)
    if numbers and layers <= 10:
        for row in range(layers):
            for column in range(layers):
                value = values[row, column]
                axes.text(
                    column, row, f"{value:.2f}".removeprefix("0"), ha="center", va="center", fontsize=7,
                    color="white" if value > 0.6 else "black",
                )  # fmt: skip
    return axes


def similarity_rows(rows: Mapping[str, Mapping[str, Tensor | np.ndarray]], width: float = 2.6) -> Figure:
    """One row of matrices a model or moment, one column a group: ``{"at the start": {"stage1": (L, L), ...}, ...}``."""
    groups = list(next(iter(rows.values())))
    size = (width * len(groups) + 0.6, width * len(rows) + 0.3)
    figure, grid = plt.subplots(len(rows), len(groups), figsize=size, squeeze=False)
    for line, (label, matrices) in zip(grid, rows.items(), strict=True):
        for axes, group in zip(line, groups, strict=True):
            similarity_matrix(matrices[group], axes, title=group if axes in grid[0] else "")
            axes.set(xlabel="", ylabel="")
        line[0].set_ylabel(f"{label}\n\nlayer")
    for axes in grid[-1]:
        axes.set_xlabel("layer")
    return figure


def plan(plan: FoldPlan, height: float = 1.25) -> Figure:
    """Draw what a fold does: a row a group, a box a layer; boxes of one colour use one weight, frames mark loops."""
    longest = max(len(group.layers) for group in plan.groups)
    size = (max(6.0, 0.75 * longest + 1.4), height * len(plan.groups))
    figure, rows = plt.subplots(len(plan.groups), 1, figsize=size, squeeze=False)
    for axes, group in zip(rows[:, 0], plan.groups, strict=True):
        _plan_row(axes, group, longest)
    return figure


def cluster_colours(group: GroupPlan) -> dict[int, str]:
    """The colour of each distinct layer of a plan by its number: one a cluster, grey for layers that stay alone."""
    shared = [cluster[0] for cluster in group.clusters if len(cluster) > 1]
    choice: Sequence[str] = _CYCLE[:-1]
    if len(shared) > len(choice):  # told apart less well, but told apart
        choice = tuple(to_hex(plt.get_cmap("turbo")(place)) for place in np.linspace(0.05, 0.95, len(shared)))
    colours = dict(zip(shared, choice, strict=False))
    return {source: colours.get(source, "#DDDDDD") for source in group.schedule}


def ink(fill: str) -> str:
    """Black or white, whichever reads better on a colour given as #RRGGBB (WCAG 2.2, relative luminance)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in _rgb(fill)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "white" if 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.05 else "black"


def _plan_row(axes: Axes, group: GroupPlan, longest: int) -> None:
    colours = cluster_colours(group)
    for place, source in enumerate(group.schedule):
        fill = colours[source]
        axes.add_patch(FancyBboxPatch((place + 0.18, 0.2), 0.64, 0.6, "round,pad=0.02", fc=fill, ec="black", lw=0.8))
        sign = "-" if group.scales[place] < 0 else ""
        axes.text(place + 0.5, 0.5, f"{sign}{source}", ha="center", va="center", color=ink(fill))
        if place + 1 < len(group.schedule):
            axes.add_patch(FancyArrowPatch((place + 0.82, 0.5), (place + 1.18, 0.5), arrowstyle="->", mutation_scale=9))
    for loop in group.loops:
        start, length = loop.start - 1, loop.length * loop.repeats
        box = FancyBboxPatch(
            (start + 0.08, 0.06), length - 0.16, 0.88, "round,pad=0.02", fc="none", ec="black", ls="--"
        )
        axes.add_patch(box)
        axes.text(start + length / 2, 1.02, f"loop x {loop.repeats}", ha="center", va="bottom", fontsize=9)
    axes.set(xlim=(-0.1, longest + 0.1), ylim=(0, 1.4), aspect="equal")
    axes.set_title(str(group), loc="left", fontsize=10, family="monospace")
    axes.axis("off")


def curves(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    xlabel: str,
    ylabel: str,
    axes: Axes | None = None,
    dashed: Sequence[str] = ("rectangle rule", "initialisation"),
) -> Axes:
    """Draw lines by name, ``{"SWRN": (x, y), ...}``, with a legend where it hides least."""
    axes = axes or plt.subplots(figsize=(6.0, 3.4))[1]
    for name, (x, y) in series.items():
        style: dict[str, Any] = {"ls": "--", "lw": 1.4} if name in dashed else {}
        axes.plot(x, y, color=COLOURS.get(name), label=name, **style)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.legend(loc="best")
    return axes


def cost_by_templates(record: Mapping[str, Any], axes: Axes | None = None) -> Axes:
    """Draw what a training step costs with k templates, in times of the plain network's, from a record of `benchmark`.

    The line is the median over rounds, the band reaches from the least to the most.
    """
    axes = axes or plt.subplots(figsize=(6.0, 3.4))[1]
    costs = record["cost by templates"]
    rows = sorted((int(k), *ratios) for k, ratios in costs["ratios"].items())
    k, median, least, most = zip(*rows, strict=True)
    axes.axhline(1.0, color=COLOURS["WRN"], ls="--", lw=1.4, label=costs["plain"])
    axes.fill_between(k, least, most, color=COLOURS["SWRN"], alpha=0.2, lw=0)
    axes.plot(k, median, "o-", color=COLOURS["SWRN"], label=costs["model"])
    axes.set(xlabel="templates k", ylabel="step time / plain WRN", xticks=k)
    axes.legend(loc="best")
    return axes


def filters(weight: Tensor, axes: Axes | None = None, count: int = 16, title: str = "") -> Axes:
    """Draw the first input channel's filters of a convolution's weight (O, I, h, w) as one strip, each scaled alike."""
    axes = axes or plt.subplots(figsize=(6.0, 0.8))[1]
    values = weight.detach().float().cpu().numpy()[:count, 0]  # (count, h, w)
    strip = np.concatenate([np.pad(value, 1, constant_values=np.nan) for value in values], axis=1)
    limit = float(np.nanmax(np.abs(strip))) or 1.0
    axes.imshow(strip, cmap="RdBu", vmin=-limit, vmax=limit)
    axes.set_title(title, loc="left", fontsize=10)
    axes.axis("off")
    return axes


def grid(
    inputs: Tensor, answer: Tensor | None = None, axes: Axes | None = None, title: str = "", truth: Tensor | None = None
) -> Axes:
    """Draw one grid of the shortest-path task: inputs (2, H, W), and an answer (H, W) bool.

    Queries are blue, obstacles dark grey, the answer orange. With `truth` given, missed pixels are hatched orange outlines
    and wrong ones purple.
    """
    axes = axes or plt.subplots(figsize=(3.2, 3.2))[1]
    queries, obstacles = inputs[0].bool().cpu().numpy(), inputs[1].bool().cpu().numpy()
    picture = np.ones((*queries.shape, 3))
    picture[obstacles] = (0.35, 0.35, 0.35)
    if answer is not None:
        marked = answer.bool().cpu().numpy()
        picture[marked] = _rgb("#E69F00")
        if truth is not None:
            right = truth.bool().cpu().numpy()
            picture[marked & ~right] = _rgb("#CC79A7")
            for row, column in np.argwhere(right & ~marked):
                axes.add_patch(
                    plt.Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, ec="#B36B00", lw=1.0, hatch="///")
                )
    picture[queries] = _rgb("#0072B2")
    axes.imshow(picture, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(True)  # the frame is the edge of the grid
    axes.set_title(title, fontsize=10)
    return axes


def _rgb(colour: str) -> tuple[float, ...]:
    return tuple(int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5))
