"""Names beside points cover nothing, whatever the points."""

from __future__ import annotations

import itertools

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import same_color

from softshare import pictures
from softshare.studies import tables


def published(table, x):
    return {row["model"]: (float(row[x]), float(row["cifar10_error"])) for row in tables.paper_table(table)}


def crowd(n):
    places = np.random.default_rng(0).uniform((1, 1), (40, 2), (n, 2))
    return {f"network {i}": tuple(place) for i, place in enumerate(places)}


POINTS = {
    "cifar": published("cifar", "parameters_millions"),
    "search": published("search", "parameters_millions"),
    "days": published("search", "gpu_days"),
    "crowd": crowd(20),
    "cluster": {f"near {i}": (10.0 + i, 2.0 + 0.1 * (i % 2)) for i in range(8)}
    | {"low": (1.0, 0.0), "high": (60.0, 4.0)},
    "one": {"alone": (3.0, 4.0)},
}


@pytest.mark.parametrize("log", [True, False])
@pytest.mark.parametrize("kind", POINTS)
def test_names_cover_no_point_no_line_and_no_other_name(kind, log):
    pictures.use_style()
    axes = pictures.labelled_points(POINTS[kind], "x", "y", log=log)
    axes.figure.canvas.draw()
    named = [text for text in axes.texts if text.get_text()]
    assert sorted(text.get_text() for text in named) == sorted(POINTS[kind])
    boxes = [text.get_window_extent() for text in named]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    centres = [axes.transData.transform(point) for point in POINTS[kind].values()]
    assert not any(box.x0 - 2 < x < box.x1 + 2 and box.y0 - 2 < y < box.y1 + 2 for box in boxes for x, y in centres)
    frame = axes.get_window_extent()
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1 for box in boxes)
    for line in (text.arrow_patch for text in axes.texts if text.arrow_patch):
        (x0, y0), (x1, y1) = line.get_path().vertices[[0, -1]]
        path = np.linspace(line.get_transform().transform((x0, y0)), line.get_transform().transform((x1, y1)), 30)[2:-2]
        assert not any(box.x0 < x < box.x1 and box.y0 < y < box.y1 for box in boxes for x, y in path)


def test_each_name_is_near_its_point_or_has_a_line_to_it():
    axes = pictures.labelled_points(POINTS["cluster"], "x", "y")
    axes.figure.canvas.draw()
    led = {tuple(text.xy) for text in axes.texts if text.arrow_patch}
    assert 0 < len(led) < len(POINTS["cluster"])
    for text in axes.texts:
        if text.get_text():
            assert tuple(text.xy) == POINTS["cluster"][text.get_text()]
            assert (np.hypot(*text.get_position()) > 15.5) == (tuple(text.xy) in led)


def test_points_have_their_colours_and_axes_their_labels():
    axes = pictures.labelled_points({"SWRN": (1.0, 2.0), "other": (2.0, 3.0)}, "x (m)", "y (s)", {"SWRN": "#D55E00"})
    assert [line.get_color() for line in axes.lines] == ["#D55E00", "#000000"]
    assert axes.get_xlabel() == "x (m)" and axes.get_ylabel() == "y (s)" and axes.get_xscale() == "log"
    assert all(same_color(text.get_color(), "black") for text in axes.texts)
    given = plt.subplots()[1]
    assert pictures.labelled_points({"a": (-1.0, 2.0)}, "x", "y", axes=given, log=False) is given


def test_ticks_are_written_as_numbers():
    axes = pictures.labelled_points(POINTS["cifar"], "x", "y")
    axes.figure.canvas.draw()
    low, high = axes.get_xlim()
    shown = [t.get_text() for t in axes.get_xticklabels() if low <= t.get_position()[0] <= high]
    assert shown == ["20", "50", "100"]
    assert not any(t.get_text() for t in axes.get_xticklabels(minor=True))
    axes = pictures.labelled_points(POINTS["days"], "x", "y")
    axes.figure.canvas.draw()
    assert "1,000" in [t.get_text() for t in axes.get_xticklabels()]


@pytest.mark.parametrize("points", [{}, {"a": (0.0, 1.0)}, {"a": (1.0, 1.0), "b": (-2.0, 1.0)}])
def test_points_that_have_no_place_are_refused(points):
    with pytest.raises(ValueError, match="needs points"):
        pictures.labelled_points(points, "x", "y")
