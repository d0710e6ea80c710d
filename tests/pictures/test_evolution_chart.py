"""Similarity over training: each cell, at each moment, of each run."""

from __future__ import annotations

import re

import numpy as np
import pytest

from softshare import models, pictures
from softshare.training import SimilarityRecorder
from softshare.training.recorder import largest_pair


@pytest.mark.parametrize("step", [0, 2, 3])
@pytest.mark.parametrize("run", ["SWRN", "SWRN with penalty"])
def test_the_matrices_of_the_chosen_moment_are_shown_beside_their_start(rendered, runs, step, run):
    picture = rendered(pictures.evolution(runs), step=step, run=run)
    largest = [float(text.split(": ")[1]) for text in picture.texts if text.startswith("largest pair")]
    matrices = runs[run].matrices()
    off = ~np.eye(4, dtype=bool)
    assert largest == pytest.approx([matrix[step][off].max() for matrix in matrices.values()], abs=0.006)
    shown = picture.shades
    assert len(shown) == 3 * 2 * 16
    starts = [shown[32 * group : 32 * group + 16] for group in range(3)]
    nows = [shown[32 * group + 16 : 32 * group + 32] for group in range(3)]
    assert (starts == nows) == (step == 0)


def test_each_cell_has_the_shade_of_its_similarity(rendered):
    """In a matrix that is not symmetric, so that rows and columns cannot be confused."""
    recorder = SimilarityRecorder()
    model = models.swrn(22, 1)
    for step in (0, 1):
        recorder.record(model, step)
    shades = np.array([[1.0, 0.1, 0.2, 0.3], [0.4, 1.0, 0.5, 0.6], [0.7, 0.8, 1.0, 0.9], [0.15, 0.25, 0.35, 1.0]])
    recorder.matrices = lambda: {group: np.stack([np.eye(4), shades]) for group in recorder.coefficients}
    picture = pictures.evolution({"SWRN": recorder})
    cells = []
    for path in rendered(picture, step=1).paths:
        if path.get("fill", "").startswith("rgb("):
            x, y = map(float, re.match(r"M([\d.]+),([\d.]+)", path.get("d")).groups())
            cells.append((x, y, sum(map(int, re.findall(r"\d+", path.get("fill"))))))
    one = cells[16:32]  # the first group, at its end
    columns, rows = (sorted({round(cell[axis]) for cell in one}) for axis in (0, 1))
    darkness = np.zeros((4, 4))
    for x, y, light in one:
        darkness[rows.index(round(y)), columns.index(round(x))] = -light
    off = ~np.eye(4, dtype=bool)
    assert np.array_equal(darkness[off].argsort(), shades[off].argsort()), "the darker the more similar, cell by cell"
    live = picture.draw(step=1, run="SWRN")
    assert np.array_equal(live.axes[3].get_images()[0].get_array(), shades)


def test_a_single_layer_resembles_no_other():
    assert largest_pair(np.ones((2, 1, 1))).tolist() == [0.0, 0.0]


def test_snapshots_that_do_not_match_are_refused(runs):
    other = SimilarityRecorder()
    for step in (0, 1, 5):
        other.record(models.swrn(22, 1), step)
    with pytest.raises(ValueError, match=r"equally far apart; 'other' has \[0, 1, 5\]"):
        pictures.evolution({"other": other})
    with pytest.raises(ValueError, match="'other' has"):
        pictures.evolution(runs | {"other": other})
    with pytest.raises(ValueError, match="no runs"):
        pictures.evolution({})
    deeper = SimilarityRecorder()
    for step in range(4):
        deeper.record(models.swrn(28, 1), step)
    with pytest.raises(ValueError, match="the same groups with equal numbers of layers"):
        pictures.evolution(runs | {"deeper": deeper})
