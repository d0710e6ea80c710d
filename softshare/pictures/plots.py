"""Static plots: similarity matrices, folding plans, curves, filters, and grids of the shortest-path task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from torch import Tensor

from ..folding import FoldPlan, GroupPlan
from .style import COLOURS, MISSED, OBSTACLE, QUERY, RIGHT, WRONG, cluster_colours, ink


def similarity_matrix(
    matrix: Tensor | np.ndarray, axes: Axes | None = None, title: str = "", numbers: bool = True
) -> Axes:
    """Draw a layer similarity matrix (L, L), from 0 (white) to 1 (dark blue).

    With `numbers`, the values of up to 10 layers are written into the cells. Draws on a new figure unless `axes` are
    given, and returns the axes.
    """
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
    """Draw similarity matrices, one row per model or moment and one column per group.

    Args:
        rows: the matrices (L, L) by row and group, ``{"at the start": {"stage1": matrix, ...}, ...}``.
        width: width of a matrix in inches.

    Raises:
        KeyError: a row that lacks a group of the first row.
    """
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
    """Draw what a fold does: one row per group, one box per layer.

    Boxes of the same colour use the same weight, grey boxes keep their own, dashed frames mark loops. Each number
    names the layer whose weight is used, with a minus sign if it is negated. `height` is the height of a row in inches.
    """
    longest = max(len(group.layers) for group in plan.groups)
    size = (max(6.0, 0.75 * longest + 1.4), height * len(plan.groups))
    figure, rows = plt.subplots(len(plan.groups), 1, figsize=size, squeeze=False)
    for axes, group in zip(rows[:, 0], plan.groups, strict=True):
        _plan_row(axes, group, longest)
    return figure


def _plan_row(axes: Axes, group: GroupPlan, longest: int) -> None:
    """Draw one group of a plan, on axes as wide as the `longest` group needs."""
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
    """Draw named lines, with a legend where it hides least.

    Args:
        series: ``{"SWRN": (x, y), ...}``; a name in `COLOURS` gets its colour from there.
        xlabel, ylabel: axis labels, with units.
        axes: the axes to draw on; None: those of a new figure.
        dashed: the names whose lines are dashed and thinner.

    Raises:
        ValueError: x and y of different lengths.
    """
    axes = axes or plt.subplots(figsize=(6.0, 3.4))[1]
    for name, (x, y) in series.items():
        style: dict[str, Any] = {"ls": "--", "lw": 1.4} if name in dashed else {}
        axes.plot(x, y, color=COLOURS.get(name), label=name, **style)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.legend(loc="best")
    return axes


def cost_by_templates(record: Mapping[str, Any], axes: Axes | None = None) -> Axes:
    """Draw how long a training step takes with k templates, as a multiple of the plain network's.

    The line is the median over rounds; the band reaches from the smallest ratio to the largest.

    Args:
        record: the record of a benchmark; its "cost by templates" holds the names of the "plain" network and of the
            "model", and the "ratios" by k: (median, smallest, largest).
        axes: the axes to draw on; None: those of a new figure.

    Raises:
        KeyError: a record without these costs.
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
    """Draw filters of a convolution side by side, all on the same scale: red is negative, blue positive.

    Shows the first input channel of the weight (O, I, h, w) for the first `count` output channels.
    """
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

    Queries are blue, obstacles dark grey, the answer is orange. If `truth` (H, W) is given, wrong pixels of the answer
    are purple, and missing ones are hatched outlines in dark orange.
    """
    axes = axes or plt.subplots(figsize=(3.2, 3.2))[1]
    queries, obstacles = inputs[0].bool().cpu().numpy(), inputs[1].bool().cpu().numpy()
    picture = np.ones((*queries.shape, 3))
    picture[obstacles] = to_rgb(OBSTACLE)
    if answer is not None:
        marked = answer.bool().cpu().numpy()
        picture[marked] = to_rgb(RIGHT)
        if truth is not None:
            right = truth.bool().cpu().numpy()
            picture[marked & ~right] = to_rgb(WRONG)
            for row, column in np.argwhere(right & ~marked):
                axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, ec=MISSED, lw=1.0, hatch="///"))
    picture[queries] = to_rgb(QUERY)
    axes.imshow(picture, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(True)  # the frame is the edge of the grid
    axes.set_title(title, fontsize=10)
    return axes
