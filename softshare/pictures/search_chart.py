"""Chapter 4's interactive picture: breadth-first search step by step, next to a network's answer layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from ..models.grid import GridNet
from ..shortest_path import Grids, generate, steps_from
from .charts import data, written
from .moving import Choice, Moving, Slider
from .style import OBSTACLE, QUERY, RIGHT, WRONG

_REACHED, _FRONTIER = "#CFE8F7", "#56B4E9"


def search(
    networks: Mapping[str, GridNet], size: int, box: int, obstacle_probability: float, seed: int = 0, grids: int = 6
) -> Moving:
    """Breadth-first search from one query, step by step, next to a network's answer, layer by layer.

    The answer after n layers is that of `GridNet.answers_by_layer`.

    Args:
        networks: by name, made by `softshare.models.gridnet`, all of the same depth and in evaluation mode.
        size, box, obstacle_probability, seed: as for `softshare.shortest_path.generate`.
        grids: the number of grids that a reader can choose from.

    Raises:
        ValueError: networks in training mode or of different depths, or arguments that `generate` rejects.
    """
    depths = {name: len(network.layers) for name, network in networks.items()}
    if len(set(depths.values())) != 1 or any(network.training for network in networks.values()):
        raise ValueError(f"networks must be in evaluation mode and all of one depth, got layers: {depths}")
    drawn = generate(grids, size, box, obstacle_probability, seed)
    answers = {name: network.answers_by_layer(drawn.inputs).cpu().numpy() for name, network in networks.items()}
    picture = _Search(drawn, steps_from(drawn.inputs).numpy(), answers)
    return Moving(
        picture.controls(), picture.chart(), picture.draw,
        "One grid twice. Left, breadth-first search from one query: pixels reached so far, and the newest ones. Right, the "
        "pixels that a network would mark after some of its layers, right or wrong. Dots are the true answer. "
        "Controls choose the step of the search, the layer, the grid and the network.",
    )  # fmt: skip


@dataclass(frozen=True)
class _Search:
    """n grids, the search on them, and what each network answers."""

    grids: Grids
    steps: np.ndarray  # (n, H, W), -1 where the search does not reach
    answers: Mapping[str, np.ndarray]  # (n, layers + 1, H, W) bool

    @property
    def names(self) -> tuple[str, ...]:
        """The name of each grid in the menu."""
        return tuple(f"grid {n + 1}" for n in range(len(self.steps)))

    def controls(self) -> dict[str, Slider | Choice]:
        last, depth = int(self.steps.max()), next(iter(self.answers.values())).shape[1] - 1
        return {
            "step": Slider("steps of the search", 0, last, 1, min(4, last)),
            "layer": Slider("layers passed", 0, depth, 1, depth),
            "grid": Choice("grid", self.names),
            "net": Choice("network", tuple(self.answers)),
        }

    # The chart, whose expressions know the controls as step, layer, grid and net ----------------------------------------

    def chart(self) -> Any:
        """Search and answer side by side, and below them a sentence that counts their pixels."""
        import altair as alt

        pixels = data(self._pixels())
        given = f"datum.k == 2 ? '{OBSTACLE}' : datum.k == 1 ? '{QUERY}' : "
        answer = "datum.p[net][layer]"
        searched = "datum.d < 0 || datum.d > step ? '#FFFFFF' : " + f"datum.d == step ? '{_FRONTIER}' : '{_REACHED}'"
        answered = f"{answer} == 0 ? '#FFFFFF' : datum.t ? '{RIGHT}' : '{WRONG}'"
        both = (
            self._panel(pixels, given + searched, "breadth-first search"),
            self._panel(pixels, given + answered, "the network's guess"),
        )
        return alt.vconcat(alt.hconcat(*both, spacing=16), self._counted(pixels, answer), spacing=8)

    def _pixels(self) -> Iterator[dict[str, Any]]:
        """A row for each pixel of each grid n.

        Its place x and y, steps d of the search, kind k (1 a query, 2 an obstacle), truth t, and, unless it is an
        obstacle, the answers p by network and layer.
        """
        inputs, targets = self.grids.inputs.numpy(), self.grids.targets.numpy()
        queries, obstacles = inputs[:, 0], inputs[:, 1]
        for n, y, x in np.ndindex(*self.steps.shape):
            pixel: dict[str, Any] = {"n": self.names[n], "x": x, "y": y, "d": int(self.steps[n, y, x])}
            pixel["k"] = int(queries[n, y, x]) + 2 * int(obstacles[n, y, x])
            pixel["t"] = int(targets[n, y, x])
            if not obstacles[n, y, x]:
                pixel["p"] = {name: found[n, :, y, x].astype(int).tolist() for name, found in self.answers.items()}
            yield pixel

    def _panel(self, pixels: Any, colour: str, title: str) -> Any:
        """The chosen grid, its pixels coloured by an expression, with dots where the true answer is."""
        import altair as alt

        size = self.steps.shape[-1]
        side = 12 * (170 // 12) if size <= 14 else 176
        chosen = (
            alt.Chart(pixels, width=side, height=side, title=title)
            .transform_filter("datum.n == grid")
            .transform_calculate(c=colour)
        )
        place = {"x": alt.X("x:O", axis=None), "y": alt.Y("y:O", axis=None)}
        dots = chosen.transform_filter("datum.t == 1 && datum.k == 0").mark_circle(
            size=max(4, 400 // size), color="black", opacity=1
        )
        return alt.layer(
            chosen.mark_rect(stroke="#CCCCCC", strokeWidth=0.4).encode(**place, color=alt.Color("c:N", scale=None)),
            dots.encode(**place),
        )

    def _counted(self, pixels: Any, answer: str) -> Any:
        """How many free pixels the search has reached, and how many the network gets wrong."""
        import altair as alt

        counts = (
            alt.Chart(pixels, width=340, height=20)
            .transform_filter("datum.n == grid && datum.k != 2")
            .transform_calculate(
                r="datum.d >= 0 && datum.d <= step ? 1 : 0", w=f"({answer} == 1) == (datum.t == 1) ? 0 : 1"
            )
            .transform_aggregate(reached="sum(r)", wrong="sum(w)")
        )
        return written(
            counts,
            "'search: ' + datum.reached + (datum.reached == 1 ? ' pixel' : ' pixels') + ' reached; "
            "network: ' + datum.wrong + (datum.wrong == 1 ? ' pixel wrong' : ' pixels wrong')",
        )

    # The live figure ----------------------------------------------------------------------------------------------------

    def draw(self, step: int, layer: int, grid: str, net: str) -> Figure:
        """The same picture with matplotlib."""
        n = self.names.index(grid)
        steps, truth, marked = self.steps[n], self.grids.targets[n].numpy(), self.answers[net][n, layer]
        figure, (left, right) = plt.subplots(1, 2, figsize=(6.6, 3.5))
        self._draw_panel(left, n, {_REACHED: (steps >= 0) & (steps < step), _FRONTIER: steps == step})
        self._draw_panel(right, n, {RIGHT: marked & truth, WRONG: marked & ~truth})
        left.set_title(f"search, {step} steps")
        right.set_title(f"{net}, {layer} layers")
        return figure

    def _draw_panel(self, axes: Axes, n: int, colours: Mapping[str, np.ndarray]) -> None:
        """One grid, with the pixels (H, W) bool that have each colour, and dots where the true answer is."""
        queries, obstacles = self.grids.inputs[n].numpy()
        picture = np.ones((*queries.shape, 3))
        for colour, where in {**colours, QUERY: queries, OBSTACLE: obstacles}.items():
            picture[where] = to_rgb(colour)
        axes.imshow(picture, interpolation="nearest")
        row, column = np.nonzero(self.grids.targets[n].numpy() & ~queries)
        axes.scatter(column, row, s=300 / len(queries), color="black")
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(True)
