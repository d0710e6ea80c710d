"""Folding over thresholds: boxes, loops, texts and errors match the plans."""

from __future__ import annotations

import re
from collections import Counter

import matplotlib.pyplot as plt
import numpy as np
import pytest

from softshare import models, pictures, plan_fold
from softshare.folded import sweep


def test_boxes_loops_and_costs_are_those_of_the_plan(rendered, folding):
    picture, networks, sweeps = folding
    chart = rendered(picture, threshold=0.9, net="SWRN")
    shown = chart.texts
    assert "loop \N{MULTIPLICATION SIGN} 4" in shown
    (group,) = [each for each in plan_fold(networks["SWRN"], 0.9).groups if each.name == "stage2"]
    for place, source in enumerate(group.schedule):
        mark = "\N{MINUS SIGN}" if group.scales[place] < 0 else ""
        assert f"{mark}{source}" in shown
    assert shown.count("\N{MINUS SIGN}4") == sum(scale < 0 for scale in group.scales) > 0
    row = next(row for row in sweeps["SWRN"] if row["threshold"] == 0.9)
    assert f"{row['distinct']} of {row['total']} layers distinct, {row['parameters']:,} parameters" in shown
    minus = "\N{MINUS SIGN}"
    assert f"test error {row['value']:.1f}% (once), {2 * row['value']:.1f}% (twice)" in shown
    # Boxes have the colours of their clusters, a frame is as wide as its loop, and a ring marks each curve's place.
    colours = Counter()
    for each in plan_fold(networks["SWRN"], 0.9).groups:
        found = pictures.cluster_colours(each)
        colours.update(found[source] for source in each.schedule)
    shown_fills = Counter(chart.fills)
    assert {colour: shown_fills[colour] for colour in colours} == colours
    (frame,) = [path for path in chart.paths if path.get("fill-opacity") == "0"]
    (box, *_) = [path for path in chart.paths if path.get("fill") in colours]
    places = [[float(x) for x, _ in re.findall(r"(-?[\d.]+),(-?[\d.]+)", path.get("d"))] for path in (frame, box)]
    widths = [max(each) - min(each) for each in places]
    assert widths[0] / widths[1] == pytest.approx(8 / 0.8, rel=0.1), "a loop of two layers, four times"
    rings = [each for each in chart.paths if each.get("stroke-width") == "2.5"]
    assert len(rings) == 2, "one for each way to measure"
    other = rendered(picture, threshold=0.9, net="tied by hand").texts
    assert not [text for text in other if "loop" in text or minus in text.split(",")[0]]


def test_thresholds_must_be_equally_far_apart(folding):
    _, networks, sweeps = folding
    uneven = {
        name: [row | {"threshold": t} for row, t in zip(rows, (0.5, 0.9, 1.0), strict=True)]
        for name, rows in sweeps.items()
    }
    with pytest.raises(ValueError, match=r"'SWRN', once, has \[0.5, 0.9, 1.0\]"):
        pictures.folds(networks, {"once": uneven})
    with pytest.raises(ValueError, match="every network needs a sweep"):
        pictures.folds(networks, {"once": {"SWRN": sweeps["SWRN"]}})
    with pytest.raises(ValueError, match="every network needs a sweep"):
        pictures.folds(networks, {"once": {"SWRN": sweeps["SWRN"], "another": sweeps["SWRN"]}})
    with pytest.raises(ValueError, match="the same groups"):
        pictures.folds(networks | {"CNN": models.gridnet(4, 4, 2)}, {"once": sweeps | {"CNN": sweeps["SWRN"]}})
    short = {name: rows[1:] for name, rows in sweeps.items()}
    with pytest.raises(ValueError, match=r"'SWRN', twice, has \[0.9, 1.0\]"):
        pictures.folds(networks, {"once": sweeps, "twice": short})


def test_the_live_form_measures_the_folded_network_once(folding):
    _, networks, sweeps = folding
    asked = []

    def error(network):
        asked.append(sum(p.numel() for p in network.parameters()))
        return 1.0

    picture = pictures.folds(networks, {"once": sweeps}, {"once": error})
    open_before = plt.get_fignums()
    threshold, net, _ = picture.live().children
    assert asked[-1] == next(row for row in sweeps["SWRN"] if row["threshold"] == 0.9)["parameters"], "the folded one"
    assert threshold.step < picture.controls["threshold"].step, "a kernel allows values between the stops"
    count = len(asked)
    threshold.value = 0.95  # the same plan
    assert len(asked) == count
    net.value = "tied by hand"
    assert len(asked) == count + 1
    assert picture.live() is picture.live() and plt.get_fignums() == open_before, "no figure is left open"


def test_the_live_form_shows_no_error_that_it_cannot_measure(folding):
    _, networks, sweeps = folding
    silent, told = (pictures.folds(networks, {"once": sweeps}, how) for how in (None, {"once": lambda _: 12.34}))
    plan = plan_fold(networks["SWRN"], 0.9)
    layers = f"{plan.distinct_layers} of {plan.total_layers} layers distinct"
    assert silent.draw(threshold=0.9, net="SWRN").get_suptitle() == layers
    assert told.draw(threshold=0.9, net="SWRN").get_suptitle() == f"{layers}, 12.3% (once)"


def test_the_last_threshold_can_be_reached():
    model = models.swrn(22, 1)
    thresholds = np.linspace(0.6, 1.0, 7).tolist()
    sweeps = {"once": {"SWRN": sweep(model, lambda _: 1.0, thresholds)}}
    control = pictures.folds({"SWRN": model}, sweeps).controls["threshold"]
    stops = control.least + control.step * np.arange(7)
    assert stops[-1] <= control.most and np.allclose(stops, thresholds, atol=control.step / 4)
