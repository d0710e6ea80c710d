"""A scatter plot whose points carry their names, placed so that no name covers a point or another name."""

from __future__ import annotations

import math
from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.text import Annotation
from matplotlib.ticker import LogLocator, NullFormatter
from matplotlib.transforms import Bbox

from .style import COLOURS

_MARKER = 6.0  # diameter of a point, in typographic points
_DISTANCES = (3.0, 9.0, 16.0, 24.0, 34.0, 46.0, 60.0)  # between a point's edge and its name
_LEADER = "#999999"
_ANGLES = (0, 180, 90, 270, 45, 315, 135, 225, *(angle for angle in range(15, 360, 15) if angle % 45))
"""In degrees, in order of preference."""


def labelled_points(
    points: Mapping[str, tuple[float, float]],
    xlabel: str,
    ylabel: str,
    colours: Mapping[str, str] | None = None,
    axes: Axes | None = None,
    log: bool = True,
) -> Axes:
    """Draw points with their names beside them; a thin line leads to a name that had to move away from its point.

    Names find their places on the axes as they are now, so draw everything else first.

    Args:
        points: x and y by name.
        xlabel, ylabel: axis labels, with units.
        colours: of points, by name; others are black.
        axes: the axes to draw on; None: those of a new figure.
        log: whether x is on a logarithmic scale.

    Raises:
        ValueError: no points, or an x of 0 or below on a logarithmic scale.
    """
    if not points or (log and min(x for x, _ in points.values()) <= 0):
        raise ValueError(f"needs points, on a logarithmic scale with x above 0, got {dict(points)}")
    axes = axes or plt.subplots(figsize=(7.0, 4.2))[1]
    for name, (x, y) in points.items():
        axes.plot(x, y, "o", ms=_MARKER, color=(colours or {}).get(name, COLOURS["rectangle rule"]))
    axes.set(xlabel=xlabel, ylabel=ylabel, xscale="log" if log else "linear")
    axes.margins(0.12, 0.1)
    if log:
        within = axes.get_xlim()[1] / axes.get_xlim()[0] < 100
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if within else (1,)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    axes.figure.canvas.figure.draw_without_rendering()  # so that the axes have their final size
    pixels = axes.figure.dpi / 72
    taken = []
    for point in points.values():
        x, y = axes.transData.transform(point)
        reach = pixels * (_MARKER / 2 + 1)
        taken.append(Bbox([[x - reach, y - reach], [x + reach, y + reach]]))
    for name in sorted(points, key=lambda name: -_neighbours(axes, points, name)):
        taken += _place(axes, name, points[name], taken)
    return axes


def _neighbours(axes: Axes, points: Mapping[str, tuple[float, float]], name: str) -> int:
    """How many points are within an inch."""
    x, y = axes.transData.transform(points[name])
    places = [axes.transData.transform(each) for each in points.values()]
    return sum(math.hypot(a - x, b - y) < axes.figure.dpi for a, b in places)


def _place(axes: Axes, name: str, point: tuple[float, float], taken: list[Bbox]) -> list[Bbox]:
    """Write a name where it covers least of what is taken and stays inside the axes; returns what it takes, in pixels."""
    inside, best = axes.get_window_extent(), (math.inf, 0.0, 0)
    note = axes.annotate(name, point, (0, 0), textcoords="offset points", fontsize=9)
    for distance in _DISTANCES:
        for preference, angle in enumerate(_ANGLES):
            _move(note, distance, angle)
            boxes = _boxes(axes, note)
            outside = boxes[0].width * boxes[0].height - _common(boxes[0], inside)
            cost = outside + sum(_common(box, each) for box in boxes for each in taken)
            best = min(best, (cost, distance, preference))
        if best[0] <= 0:
            break
    _, distance, preference = best
    _move(note, distance, _ANGLES[preference])
    boxes = _boxes(axes, note)
    if len(boxes) > 1:
        axes.annotate(
            "", point, note.get_position(), textcoords="offset points", zorder=0.9,
            arrowprops={"arrowstyle": "-", "color": _LEADER, "lw": 0.7, "shrinkA": 1.5, "shrinkB": _MARKER / 2},
        )  # fmt: skip
    return boxes


def _boxes(axes: Axes, note: Annotation) -> list[Bbox]:
    """What a name takes, in pixels: its own box, then small ones along the line that leads to it if it is far away."""
    found = [note.get_window_extent().padded(1.0)]
    offset, pixels = np.array(note.get_position()), axes.figure.dpi / 72
    length = float(np.hypot(*offset))
    if length > _DISTANCES[1] + _MARKER:
        start = axes.transData.transform(note.xy)
        for along in np.arange(_MARKER, length, 2.0):
            x, y = start + pixels * offset * along / length
            found.append(Bbox([[x - 1, y - 1], [x + 1, y + 1]]))
    return found


def _move(note: Annotation, distance: float, angle: int) -> None:
    across, up = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    reach = distance + _MARKER / 2
    note.set_position((reach * across, reach * up))
    note.set_horizontalalignment("center" if abs(across) < 0.5 else "left" if across > 0 else "right")
    note.set_verticalalignment("center" if abs(up) < 0.5 else "bottom" if up > 0 else "top")


def _common(one: Bbox, other: Bbox) -> float:
    """The area that two boxes have in common."""
    both = Bbox.intersection(one, other)
    return 0.0 if both is None else float(both.width * both.height)
