"""Mixing templates: the filters and the similarity match the sliders."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import softshare
from softshare import pictures


@pytest.mark.parametrize(
    "moved",
    [
        {},
        {"a1": 0.3, "a2": -0.9, "b3": 1.0},
        {"b1": -1.0, "b2": -0.6},
        {"a1": 0.0, "a2": 0.0, "a3": 0.0},  # a row of zeros resembles nothing
    ],
)
def test_the_similarity_below_the_filters_matches_the_sliders(rendered, moved):
    picture = pictures.mixing(torch.randn(3, 4, 4))
    rows = {name: control.start for name, control in picture.controls.items()} | moved
    both = torch.tensor([[rows[f"{layer}{j}"] for j in (1, 2, 3)] for layer in "ab"])
    (shown,) = rendered(picture, **moved).find_text(r"= ([\d.]+)$")
    assert float(shown) == pytest.approx(float(softshare.layer_similarity(both)[0, 1]), abs=0.006)


def test_a_filter_is_the_mixture_of_its_templates(rendered):
    shapes = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])  # one lights the left pixel, one the right
    picture = pictures.mixing(shapes, start=((1, 0), (0, 1)))

    def pixels(**moved):  # of template 1, template 2, layer A, layer B, each (left, right)
        shown = rendered(picture, **moved).shades
        assert len(shown) == 8
        return [tuple(shown[i : i + 2]) for i in range(0, 8, 2)]

    first, second, a, b = pixels()
    assert a[0] == b[1] != a[1] == b[0], "A shows the first template, B the second"
    assert pixels(a1=0, a2=1)[2] == b, "the second template alone"
    assert pixels(a1=0, a2=0)[2] == (a[1], a[1]), "nothing"
    assert pixels()[:2] == pixels(a1=-1)[:2], "sliders do not move the templates"


def test_the_live_figure_mixes_as_the_chart_does():
    templates = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    figure = pictures.mixing(templates).draw(a1=1, b1=0, a2=0.5, b2=-1)  # integers work, too
    shown = [np.asarray(axes.get_images()[0].get_array()) for axes in figure.axes]
    np.testing.assert_allclose(np.stack(shown), [[[1, 0]], [[0, 1]], [[1, 0.5]], [[0, -1]]])
    assert [axes.get_title() for axes in figure.axes] == ["template 1", "template 2", "layer A", "layer B"]
    assert figure.get_suptitle() == "|cos(A, B)| = 0.45"


def test_any_number_of_templates_of_any_scale_and_shape(rendered):
    for k in (1, 2, 5):
        tiny = pictures.mixing(1e-4 * torch.randn(k, 3, 6))
        assert len(tiny.controls) == 2 * k
        shown = rendered(tiny).shades
        assert len(set(shown[:18])) > 9, "small numbers keep their differences"
    with pytest.raises(ValueError, match=r"\(k, H, W\), finite and not empty, got \(2, 3\)"):
        pictures.mixing(torch.ones(2, 3))
    with pytest.raises(ValueError, match="finite"):
        pictures.mixing(torch.tensor([[[float("nan")]]]))
    for start in (((1, 0),), ((1, 0), (0,)), ((3, 0), (0, 1))):
        with pytest.raises(ValueError, match="2 rows of 2 coefficients from -1 to 1"):
            pictures.mixing(torch.randn(2, 3, 3), start=start)
