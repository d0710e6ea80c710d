"""The still plots draw what they are given."""

from __future__ import annotations

import numpy as np
import torch
from matplotlib.colors import to_rgb

import softshare
from softshare import models, pictures, shortest_path


def test_a_matrix_is_drawn_from_zero_to_one_with_its_values():
    matrix = torch.tensor([[1.0, 0.25], [0.25, 1.0]])
    axes = pictures.similarity_matrix(matrix, title="stage1")
    picture = axes.get_images()[0]
    np.testing.assert_array_equal(picture.get_array(), matrix)
    assert picture.get_clim() == (0.0, 1.0) and {text.get_text() for text in axes.texts} == {"1.00", ".25"}
    assert axes.get_xlabel() == axes.get_ylabel() == "layer"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2"]


def test_a_plan_shows_a_box_per_layer_its_source_and_its_loops():
    model = models.swrn(40, 1, 8)
    plan = softshare.tie(model, {"stage2": [(3, 5, 7, 9), (4, 6, 8, 10)]})
    figure = pictures.plan(plan)
    assert [axes.get_title(loc="left") for axes in figure.axes] == str(plan).split("\n")
    texts = [text.get_text().removeprefix("-") for text in figure.axes[1].texts if text.get_text()]
    assert [text for text in texts if text.isdigit()] == ["1", "2", *["3", "4"] * 4] and "loop x 4" in texts


def test_a_grid_shows_answers_queries_and_mistakes():
    grids = shortest_path.generate(1, size=12, box=7, seed=3)
    inputs, truth = grids.inputs[0], grids.targets[0]
    guess = truth.clone()
    path = (truth & ~inputs[0]).nonzero()
    free = (~truth & ~inputs[1]).nonzero()[0]
    guess[tuple(free)] = True
    if len(path):
        guess[tuple(path[0])] = False
    axes = pictures.grid(inputs, guess, truth=truth)
    picture = np.asarray(axes.get_images()[0].get_array())
    query = inputs[0].nonzero()[0]
    np.testing.assert_allclose(picture[tuple(query)], to_rgb("#0072B2"))
    np.testing.assert_allclose(picture[tuple(free)], to_rgb("#CC79A7"))
    assert len(axes.patches) == min(1, len(path))


def test_rows_curves_and_filters_draw():
    pictures.use_style()
    matrices = {"stage1": torch.eye(3), "stage2": torch.eye(4)}
    assert len(pictures.similarity_rows({"start": matrices, "end": matrices}).axes) == 4
    axes = pictures.curves({"SWRN": ([1, 2], [3, 4]), "rectangle rule": ([1, 2], [1, 1])}, "epoch", "F1")
    assert [line.get_color() for line in axes.lines] == [pictures.COLOURS["SWRN"], pictures.COLOURS["rectangle rule"]]
    assert axes.get_xlabel() == "epoch" and len(axes.get_legend().get_texts()) == 2
    assert pictures.filters(torch.randn(8, 3, 3, 3), title="templates").get_images()
