"""Chapter 3's interactive picture of training: similarity matrices at the start and at a chosen moment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ..training.recorder import SimilarityRecorder, largest_pair
from .charts import BLUES, data, sentence, squares
from .moving import Choice, Moving, Slider
from .plots import similarity_rows


def evolution(runs: Mapping[str, SimilarityRecorder], unit: str = "epoch") -> Moving:
    """Similarity matrices over training, one column per group: at the start above, at the chosen moment below.

    Args:
        runs: the recordings, by name of the run; all with the same groups, and with two or more snapshots at the same,
            equally spaced steps.
        unit: the unit in which the recorders count their steps.

    Raises:
        ValueError: no runs, or runs that differ in their steps or groups.
    """
    steps = _common_steps(runs)
    matrices = {name: run.matrices() for name, run in runs.items()}
    layers = {name: {group: found[group].shape[1] for group in found} for name, found in matrices.items()}
    groups = list(next(iter(matrices.values())))
    if len({str(each) for each in layers.values()}) > 1 or not groups:
        raise ValueError(f"runs must have the same groups with equal numbers of layers, got {layers}")
    picture = _Evolution(steps, matrices, groups, unit)
    return Moving(
        picture.controls(), picture.chart(), picture.draw,
        f"Layer similarity matrices of {', '.join(groups)}: at the start of training above, at the chosen {unit} below. "
        f"Controls choose the {unit} and the network.",
    )  # fmt: skip


def _common_steps(runs: Mapping[str, SimilarityRecorder]) -> np.ndarray:
    """The steps of all runs, (snapshots,). Raises ValueError unless they agree and are equally far apart."""
    if not runs:
        raise ValueError("no runs were given")
    steps = np.asarray(next(iter(runs.values())).steps)
    gaps = np.diff(steps)
    for name, run in runs.items():
        if not np.array_equal(run.steps, steps) or not len(gaps) or not np.allclose(gaps, gaps[0]):
            raise ValueError(
                f"there must be two or more snapshots, at the same steps, equally far apart; {name!r} has {run.steps}"
            )
    return steps


@dataclass(frozen=True)
class _Evolution:
    steps: np.ndarray  # (snapshots,)
    matrices: Mapping[str, Mapping[str, np.ndarray]]  # run -> group -> (snapshots, L, L)
    groups: list[str]
    unit: str

    @property
    def gap(self) -> float:
        """Steps from one snapshot to the next."""
        return float(self.steps[1] - self.steps[0])

    def controls(self) -> dict[str, Slider | Choice]:
        first, last = float(self.steps[0]), float(self.steps[-1])
        return {
            "step": Slider(self.unit, first, last, self.gap, last),
            "run": Choice("network", tuple(self.matrices)),
        }

    def chart(self) -> Any:
        import altair as alt

        return alt.hconcat(*(self._column(group) for group in self.groups), spacing=16)

    def _column(self, group: str) -> Any:
        """One group: its matrix at the start, its matrix now, and the largest similarity in it."""
        import altair as alt

        found = {name: matrices[group] for name, matrices in self.matrices.items()}  # run -> (snapshots, L, L)
        cells = data(
            {"run": name, "x": i + 1, "y": j + 1, "s": similarity[:, j, i].astype(float).round(3).tolist()}
            for name, similarity in found.items()
            for i in range(similarity.shape[1])
            for j in range(similarity.shape[1])
        )
        pairs = data(
            {"run": name, "s": largest_pair(similarity).round(3).tolist()} for name, similarity in found.items()
        )
        now = f"datum.s[round((step - {self.steps[0]:g}) / {self.gap:g})]"
        parts = (
            squares(cells, "datum.s[0]", f"{group}, start", 110, (0, 1), BLUES),
            squares(cells, now, f"{group}, now", 110, (0, 1), BLUES),
            sentence(f"'largest pair: ' + format({now}, '.2f')", pairs, 110, 12),
        )
        return alt.vconcat(*(part.transform_filter("datum.run == run") for part in parts), spacing=10)

    def draw(self, step: float, run: str) -> Figure:
        """The same picture with matplotlib, at one moment of one run."""
        moment = round((step - self.steps[0]) / self.gap)
        rows = {
            "at the start": {group: self.matrices[run][group][0] for group in self.groups},
            f"{self.unit} {self.steps[moment]:g}": {group: self.matrices[run][group][moment] for group in self.groups},
        }
        return similarity_rows(rows, 2.3)
