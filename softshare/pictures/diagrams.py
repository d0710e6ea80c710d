"""Box diagrams of what networks are built from: the cells that architecture search found, and blocks made by hand.

A cell is drawn from left to right. Its blocks are arranged in columns: a block's column is one further than those of all
states that it reads. A state that is read further to the right runs there in a lane of its own, so that no line crosses
a box.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch, PathPatch, Polygon
from matplotlib.path import Path

from ..models.cells import Cell
from .style import CYCLE, ink

NEUTRAL = "#E0E0E0"
KINDS = {
    "sep": CYCLE[0],
    "conv": CYCLE[1],
    "avg": CYCLE[2],
    "max": CYCLE[3],
    "dil": CYCLE[5],
    "id": NEUTRAL,
    "norm": NEUTRAL,
    "ReLU": NEUTRAL,
}
"""The colour of a box by how its text begins: separable, ordinary and dilated convolutions, pooling, no operation."""

# Lengths in inches. Of all boxes but those of blocks made by hand, which are taller:
_BOX, _TALL, _RADIUS = 0.27, 0.46, 0.09  # height of a box, radius of a sum
_WIDTH, _TO_SUM, _GAP = 0.86, 0.26, 0.62  # of an operation; from there to the far side of its sum; between columns
_BLOCK, _LANE, _INPUT = 0.8, 0.26, 0.85  # heights that items of a column take, with the space around them
_SNAP = 0.07  # how far a lane may leave its place to be straight
_STEP, _FORK, _BAR = 0.26, 0.2, 0.24  # a short line; where a shortcut begins; width of the bar that concatenates
_TITLE, _MARGIN = 0.3, 0.03
_LINE, _LIGHT = "#555555", "#999999"  # lines from inputs, and from blocks


class _Item(NamedTuple):
    """Something in a column: an input or a block, or the lane of a state that is read further to the right."""

    state: int
    lane: bool

    @property
    def height(self) -> float:
        return _LANE if self.lane else _BLOCK if self.state > 1 else _INPUT


class _Layout:
    """Where everything in a cell is, in inches.

    Attributes:
        columns: the items of each column from top to bottom; the first column is that of the inputs.
        heights: y of the centre of each item, by column and state.
    """

    def __init__(self, cell: Cell) -> None:
        self.cell = cell
        level = [0, 0]
        for block in cell.blocks:
            level.append(1 + max(level[state] for _, state in block))
        self.last = max(level)
        reach = list(level)  # the column before the last one that reads a state
        for number, block in enumerate(cell.blocks, start=2):
            for _, state in block:
                reach[state] = max(reach[state], level[number] - 1)
        for state in cell.output:
            reach[state] = self.last
        self.columns = [
            [
                _Item(state, level[state] < place)
                for state in range(cell.states)
                if level[state] <= place <= reach[state]
            ]
            for place in range(self.last + 1)
        ]
        self.columns[0] = [_Item(0, False), _Item(1, False)]
        self.place()
        self._untangle()

    def place(self) -> None:
        """Stack the items of each column around y = 0."""
        self.heights: list[dict[int, float]] = []
        before: dict[int, float] = {}
        for column in self.columns:
            y, heights = sum(item.height for item in column) / 2, {}
            for item in column:
                heights[item.state] = y - item.height / 2
                if item.lane and abs(before[item.state] - heights[item.state]) < _SNAP:
                    heights[item.state] = before[item.state]  # straight on
                y -= item.height
            self.heights.append(heights)
            before = heights

    def operations(self, place: int, number: int) -> list[tuple[str, int, float]]:
        """A block's operations from top to bottom: name, state that it reads, y; the upper one reads the upper state."""
        before, y = self.heights[place - 1], self.heights[place][number]
        upper, lower = sorted(self.cell.blocks[number - 2], key=lambda operation: -before[operation[1]])
        offset = _BOX / 2 + 0.035
        return [(*upper, y + offset), (*lower, y - offset)]

    def lines(self, place: int) -> list[tuple[float, float, int, bool]]:
        """What runs from column place - 1 to column `place`: y before and after, the state, whether it ends at a box."""
        before, found = self.heights[place - 1], []
        if place > self.last:
            return [(before[state], before[state], state, False) for state in self.cell.output]
        for item in self.columns[place]:
            if item.lane:
                found.append((before[item.state], self.heights[place][item.state], item.state, False))
            else:
                found += [(before[s], y, s, True) for _, s, y in self.operations(place, item.state)]
        return found

    def _cost(self) -> float:
        """Crossings of lines first, then how far they climb or fall."""
        cost = 0.0
        for place in range(1, self.last + 1):
            lines = self.lines(place)
            cost += sum(abs(y1 - y0) for y0, y1, *_ in lines)
            cost += 100.0 * sum((a[0] - b[0]) * (a[1] - b[1]) < 0 for a, b in itertools.combinations(lines, 2))
        return cost

    def _untangle(self) -> None:
        """Exchange items within their columns as long as that improves the drawing."""
        best, improved = self._cost(), True
        while improved:
            improved = False
            for column in self.columns:
                for i, j in itertools.combinations(range(len(column)), 2):
                    column[i], column[j] = column[j], column[i]
                    self.place()
                    if (cost := self._cost()) < best - 1e-9:
                        best, improved = cost, True
                    else:
                        column[i], column[j] = column[j], column[i]
            self.place()

    @property
    def size(self) -> tuple[float, float]:
        """Width and height."""
        height = max(sum(item.height for item in column) for column in self.columns)
        return self.left(self.last + 1) - _GAP + 2 * _STEP + _BAR + _WIDTH, max(height, 1.3)

    def left(self, place: int) -> float:
        """x where a column's boxes begin."""
        return 0.0 if place == 0 else _WIDTH + _GAP + (place - 1) * (_WIDTH + _TO_SUM + _GAP)


def cell(cell: Cell, title: str = "", axes: Axes | None = None) -> Axes:
    """Draw a cell from left to right: its two inputs, the blocks, and the states that are concatenated to its output.

    A block is two boxes, one for each operation, whose results are added. "cell k-2" and "cell k-1" are inputs 0 and 1, the
    results of the two cells before; dark lines come from them, light ones from blocks. The names of operations are those
    of `softshare.models.cells.OPERATIONS`, written out. In a reduction cell, operations on the inputs have stride 2.

    Args:
        axes: the axes to draw on, whose scale is set so that the drawing fits; None: those of a new figure.
    """
    layout = _Layout(cell)
    axes, scale = _framed(axes, *layout.size, title)
    for place in range(1, layout.last + 2):
        for y0, y1, state, arrow in layout.lines(place):
            start = layout.left(place) - _GAP
            end = layout.left(place) if place <= layout.last else start + _STEP
            _line(axes, (start, y0), (end, y1), _shade(state), arrow)
    for place, column in enumerate(layout.columns):
        for item in column:
            corner = (layout.left(place), layout.heights[place][item.state])
            if item.lane:
                _line(axes, corner, (corner[0] + _WIDTH + _TO_SUM, corner[1]), _shade(item.state))
            elif place == 0:
                _box(axes, corner, _WIDTH, f"cell k\N{MINUS SIGN}{2 - item.state}", "white", scale)
            else:
                _draw_block(axes, layout, place, item.state, scale)
    x = layout.left(layout.last + 1) - _GAP + _STEP
    ends = [layout.heights[layout.last][state] for state in cell.output]
    top, bottom = max(*ends, 0.5) + 0.1, min(*ends, -0.5) - 0.1
    _box(axes, (x, (top + bottom) / 2), _BAR, "concatenate", "white", scale, top - bottom)
    x, y = x + _BAR, (top + bottom) / 2
    _line(axes, (x, y), (x + _STEP, y), arrow=True)
    _box(axes, (x + _STEP, y), _WIDTH, "cell k", "white", scale)
    return axes


def _draw_block(axes: Axes, layout: _Layout, place: int, number: int, scale: float) -> None:
    """Two operations and their sum."""
    x, centre = layout.left(place), layout.heights[place][number]
    middle = x + _WIDTH + _TO_SUM - _RADIUS
    for name, _, y in layout.operations(place, number):
        _box(axes, (x, y), _WIDTH, operation_text(name), _colour(name), scale)
        _line(axes, (x + _WIDTH, y), (middle, centre), _shade(number))
    _sum(axes, (middle, centre), scale)


def _shade(state: int) -> str:
    return _LINE if state < 2 else _LIGHT


def operation_text(name: str) -> str:
    """An operation of `softshare.models.cells.OPERATIONS` as a reader knows it: "sep 3x3" for "sep3", with a real cross."""
    if name == "id":
        return "identity"
    kind, size = name[:-1], name[-1]
    return f"{'dil sep' if kind == 'dilsep' else kind} {size}\N{MULTIPLICATION SIGN}{size}"


def cells(cells: Mapping[str, Cell], width: float = 7.5) -> Figure:
    """Draw cells on one scale, each below its title: side by side if they fit into `width` inches, else in a column."""
    sizes = [_Layout(each).size for each in cells.values()]
    beside = sum(size[0] for size in sizes) + 0.4 * (len(sizes) - 1) <= width
    heights = [size[1] + _TITLE + 0.1 for size in sizes]
    across = sum(size[0] for size in sizes) + 0.4 * (len(sizes) - 1) if beside else max(size[0] for size in sizes)
    down = max(heights) if beside else sum(heights)
    figure = plt.figure(layout="none", figsize=(across, down))
    x, y = 0.0, down
    for (title, each), size, height in zip(cells.items(), sizes, heights, strict=True):
        place = (x, (down - size[1] - _TITLE) / 2 if beside else y - height)
        axes = figure.add_axes((place[0] / across, place[1] / down, size[0] / across, size[1] / down))
        cell(each, title, axes)
        x, y = x + beside * (size[0] + 0.4), y - height
    return figure


def block(
    steps: Sequence[str],
    shortcut: str = "",
    join: str = "+",
    after: str = "",
    title: str = "",
    axes: Axes | None = None,
) -> Axes:
    """Draw a block made by hand from left to right: its steps in a row, and a shortcut around them.

    Args:
        steps: the texts of the boxes, in order; how a text begins decides its colour, see `KINDS`.
        shortcut: the text of a box on the shortcut; "": the input itself takes it.
        join: how the two meet: "+", or any word, such as "concatenate".
        after: the text of a box after that; "": there is none.
        axes: the axes to draw on, whose scale is set so that the drawing fits; None: those of a new figure.
    """
    lengths = [_length(text) for text in (*steps, *([after] if after else []))]
    joint = 2 * _RADIUS if join == "+" else _BAR
    width = _FORK + sum(lengths) + joint + _STEP * (len(lengths) + 2)
    axes, scale = _framed(axes, width, 1.5, title)
    x, low, high = _FORK, -0.35, 0.45
    _line(axes, (0.0, low), (x, low))
    for text, length in zip(steps, lengths, strict=False):
        _line(axes, (x, low), (x + _STEP, low), arrow=True)
        _box(axes, (x + _STEP, low), length, text, _colour(text), scale, _TALL)
        x += _STEP + length
    _line(axes, (x, low), (x + _STEP, low), arrow=True)
    x += _STEP
    _join(axes, (x, low, high), join, scale)
    if shortcut:
        middle = (x - _length(shortcut)) / 2
        _box(axes, (middle, high), _length(shortcut), shortcut, _colour(shortcut), scale, _TALL)
    x += joint
    if after:
        _line(axes, (x, low), (x + _STEP, low), arrow=True)
        _box(axes, (x + _STEP, low), lengths[-1], after, _colour(after), scale, _TALL)
        x += _STEP + lengths[-1]
    _line(axes, (x, low), (x + _STEP, low), arrow=True)
    return axes


def _join(axes: Axes, at: tuple[float, float, float], join: str, scale: float) -> None:
    """The shortcut around a block's steps, and where it meets their result: at x, from `low` to `high`."""
    x, low, high = at
    if join == "+":
        end = x + _RADIUS
        _line(axes, (end, high), (end, low + _RADIUS), arrow=True)
        _sum(axes, (end, low), scale)
    else:
        end = x
        _box(axes, (x, (low + high) / 2), _BAR, join, "white", scale, high - low + 0.5)
    _line(axes, (_FORK, low), (_FORK, high))
    _line(axes, (_FORK, high), (end, high), arrow=join != "+")


def _framed(axes: Axes | None, width: float, height: float, title: str) -> tuple[Axes, float]:
    """Axes (new ones if None) with room for a drawing of that size in inches, and how much it is scaled to fit."""
    if axes is None:
        figure = plt.figure(layout="none", figsize=(width, height + _TITLE * bool(title)))
        axes = figure.add_axes((0.0, 0.0, 1.0, height / figure.get_figheight()))
    axes.set(xlim=(-_MARGIN, width + _MARGIN), ylim=(-height / 2, height / 2), aspect="equal")
    axes.set_title(title, fontsize=10)
    axes.axis("off")
    room, dpi = axes.get_window_extent(), axes.figure.dpi
    return axes, min(room.width / (width + 2 * _MARGIN), room.height / height) / dpi


def _colour(text: str) -> str:
    return next((colour for kind, colour in KINDS.items() if text.startswith(kind)), "white")


def _length(text: str) -> float:
    """The width of a box for a text, in inches."""
    return 0.075 * max(map(len, text.split("\n"))) + 0.14


def _box(
    axes: Axes, left: tuple[float, float], width: float, text: str, fill: str, scale: float, height: float = _BOX
) -> None:
    """A box with a text, given the middle of its left side; a narrow one has its text upright."""
    x, y = left
    pad = 0.03
    size = (width - 2 * pad, height - 2 * pad)
    axes.add_patch(
        FancyBboxPatch((x + pad, y - height / 2 + pad), *size, f"round,pad={pad}", fc=fill, ec="black", lw=0.8 * scale)
    )
    upright = width <= _BAR
    axes.text(
        x + width / 2, y, text, ha="center", va="center" if upright else "center_baseline", color=ink(fill),
        fontsize=8 * scale, rotation=90 if upright else 0, linespacing=1.1,
    )  # fmt: skip


def _sum(axes: Axes, centre: tuple[float, float], scale: float) -> None:
    axes.add_patch(Circle(centre, _RADIUS, fc="white", ec="black", lw=0.8 * scale, zorder=2))
    axes.text(*centre, "+", ha="center", va="center_baseline", fontsize=8 * scale)


def _line(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = _LINE, arrow: bool = False
) -> None:
    """A line that starts and ends horizontally, or a vertical one; behind boxes."""
    (x0, y0), (x1, y1) = start, end
    middle = (x0 + x1) / 2
    if abs(y1 - y0) < 1e-9 or abs(x1 - x0) < 1e-9:
        path = Path([start, end])
    else:
        path = Path([start, (middle, y0), (middle, y1), end], [Path.MOVETO, *[Path.CURVE4] * 3])
    axes.add_patch(PathPatch(path, fc="none", ec=colour, lw=1.0, zorder=0.9, capstyle="round"))
    if arrow:
        along, across = np.sign(x1 - x0), np.sign(y1 - y0)
        vertical = abs(x1 - x0) < 1e-9
        tip = 0.07
        corners = [(x1 - tip / 2, y1 - across * tip), (x1 + tip / 2, y1 - across * tip)] if vertical else [
            (x1 - along * tip, y1 - tip / 2), (x1 - along * tip, y1 + tip / 2)
        ]  # fmt: skip
        axes.add_patch(Polygon([end, *corners], fc=colour, ec="none", zorder=0.95))
