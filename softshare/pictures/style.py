"""How the book's pictures look: their matplotlib style, and what each colour stands for.

A model has the same colour in every picture; the colours are those of Okabe and Ito (2008), which colour-blind readers can
tell apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import to_hex, to_rgb

from ..folding import GroupPlan

STYLE_SHEET = Path(__file__).with_name("softshare.mplstyle")
"""The matplotlib style sheet that `use_style` applies.

:meta hide-value:
"""

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

CYCLE: tuple[str, ...] = tuple(
    matplotlib.rc_params_from_file(STYLE_SHEET, use_default_template=False)["axes.prop_cycle"].by_key()["color"]
)
"""The style sheet's colours, for whatever is not a model: lines without a name, and layers that share a weight."""

QUERY, OBSTACLE, RIGHT, WRONG, MISSED = "#0072B2", "#595959", "#E69F00", "#CC79A7", "#B36B00"
"""Pixels of the shortest-path task: the given ones, and an answer's right, wrong and missing ones."""


def use_style() -> None:
    """Apply the book's style sheet, `softshare.mplstyle`, and let notebooks show sharp (retina) pictures."""
    plt.style.use(STYLE_SHEET)
    try:
        from matplotlib_inline.backend_inline import set_matplotlib_formats
    except ImportError:  # no notebook here
        return
    set_matplotlib_formats("retina")


def cluster_colours(group: GroupPlan) -> dict[int, str]:
    """The colour of each distinct layer of a plan, #RRGGBB by its number (from 1): grey for layers that stay alone."""
    shared = [cluster[0] for cluster in group.clusters if len(cluster) > 1]
    choice: Sequence[str] = CYCLE[:-1]  # without black, the colour of frames
    if len(shared) > len(choice):  # harder to tell apart, but still different
        choice = [to_hex(colour) for colour in matplotlib.colormaps["turbo"](np.linspace(0.05, 0.95, len(shared)))]
    colours = dict(zip(shared, choice, strict=False))
    return {source: colours.get(source, "#DDDDDD") for source in group.schedule}


def ink(fill: str) -> str:
    """Black or white, whichever reads better on a colour (by the contrast ratio of WCAG 2.2).

    The colour may have any form that matplotlib understands; anything else raises ValueError.
    """
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(fill)]
    luminance = float(np.dot((0.2126, 0.7152, 0.0722), linear))
    return "white" if 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.05 else "black"
