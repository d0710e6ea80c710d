"""Pictures in both forms: a chart on a page, and widgets where a kernel runs."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from softshare import pictures
from softshare.pictures import Choice, Moving, Slider
from softshare.pictures.moving import WIDGET


def test_widgets_redraw_when_they_are_moved(runs, folding):
    for picture in (pictures.mixing(torch.randn(3, 5, 5)), pictures.evolution(runs), folding.picture):
        *inputs, image = picture.live().children
        assert [one.description for one in inputs] == [control.label for control in picture.controls.values()]
        for widget, control in zip(inputs, picture.controls.values(), strict=True):
            before = bytes(image.value)
            assert before.startswith(b"\x89PNG")
            if isinstance(control, Choice):
                assert list(widget.options) == list(control.options)
                start, widget.value = widget.value, control.options[-1]
            else:
                assert (widget.min, widget.max, widget.value) == (control.least, control.most, control.start)
                start, widget.value = widget.value, control.least
            assert bytes(image.value) != before, control
            widget.value = start
            assert bytes(image.value) == before, "back where it was"


def test_a_cell_shows_widgets_if_available_and_always_a_chart(monkeypatch):
    picture = pictures.mixing(torch.randn(2, 3, 3), start=((1, 0), (0, 1)))
    bundle = picture._repr_mimebundle_()
    assert set(bundle) == {"text/plain", "text/html", WIDGET}
    json.dumps(bundle)
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    assert set(picture._repr_mimebundle_()) == {"text/plain", "text/html"}


def test_invalid_controls_are_refused():
    for wrong in ((1, 0, 1, 0), (0, 1, 0, 0), (0, 1, 1, 2)):
        with pytest.raises(ValueError, match="a slider needs"):
            Slider("x", *wrong)
    with pytest.raises(ValueError, match="'x' has no options"):
        Choice("x", ())


def test_vega_comes_before_what_is_built_on_it():
    page = pictures.mixing(torch.randn(2, 3, 3)).to_html()
    places = [page.index(f"/{name}@") for name in ("vega", "vega-lite", "vega-embed")]
    assert places == sorted(places)


def test_the_chart_cannot_break_out_of_its_page():
    made = pictures.mixing(torch.randn(2, 3, 3), start=((1, 0), (0, 1)))
    hostile = Moving({}, made.chart, made.draw, 'An "</script><script>alert(1)</script>" & more')
    page = hostile.to_html()
    assert page.count("<script") == page.count("</script>") == 1
    assert 'aria-label="An &quot;&lt;/script&gt;' in page
