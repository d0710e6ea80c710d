"""The pictures that move: what their charts say, rendered by Vega itself, and what their widgets draw."""

from __future__ import annotations

import json
import os
import re
import sys
from collections import Counter
from xml.etree import ElementTree

import matplotlib.pyplot as plt
import networkx
import numpy as np
import pytest
import torch

import softshare
from softshare import charts, folding, models, plotting
from softshare.moving import WIDGET, Choice, Moving, Slider
from softshare.shortest_path import generate, steps_from
from softshare.similarity import SimilarityRecorder

if not os.environ.get("CI"):  # there it must not be missing
    pytest.importorskip("vl_convert")
import vl_convert  # noqa: E402


def svg(moving: Moving, **values: float | str) -> ElementTree.Element:
    """The chart as a reader sees it who has moved the controls to `values`."""
    spec = moving.spec()
    for parameter in spec["params"]:
        parameter["value"] = values.pop(parameter["name"], parameter["value"])
    assert not values, f"no such controls: {values}"
    return ElementTree.fromstring(vl_convert.vegalite_to_svg(spec))


def texts(picture: ElementTree.Element) -> list[str]:
    return [each.text or "" for each in picture.iter("{http://www.w3.org/2000/svg}text")]


def said(moving: Moving, pattern: str, **values: float | str) -> tuple[str, ...]:
    """The groups of `pattern` in the one text of the chart that matches it."""
    found = [match for text in texts(svg(moving, **values)) if (match := re.search(pattern, text))]
    assert len(found) == 1, (pattern, texts(svg(moving, **values)))
    return found[0].groups()


def fills(picture: ElementTree.Element) -> list[str]:
    return [each.get("fill", "") for each in picture.iter("{http://www.w3.org/2000/svg}path")]


# Mixing --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "moved",
    [
        {},
        {"a1": 0.3, "a2": -0.9, "b3": 1.0},
        {"b1": -1.0, "b2": -0.6},
        {"a1": 0.0, "a2": 0.0, "a3": 0.0},  # a row of zeros resembles nothing
    ],
)
def test_the_similarity_below_the_filters_is_that_of_the_sliders(moved):
    picture = charts.mixing(torch.randn(3, 4, 4))
    rows = {name: control.start for name, control in picture.controls.items()} | moved
    both = torch.tensor([[rows[f"{layer}{j}"] for j in (1, 2, 3)] for layer in "ab"])
    (shown,) = said(picture, r"= ([\d.]+)$", **moved)
    assert float(shown) == pytest.approx(float(softshare.layer_similarity(both)[0, 1]), abs=0.006)


def test_a_filter_is_the_mixture_of_its_templates():
    shapes = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])  # one lights the left pixel, one the right
    picture = charts.mixing(shapes, start=((1, 0), (0, 1)))

    def pixels(**moved):  # of template 1, template 2, layer A, layer B, each (left, right)
        shown = [fill for fill in fills(svg(picture, **moved)) if fill.startswith("rgb(")]
        assert len(shown) == 8
        return [tuple(shown[i : i + 2]) for i in range(0, 8, 2)]

    first, second, a, b = pixels()
    assert a[0] == b[1] != a[1] == b[0], "A shows the first template, B the second"
    assert pixels(a1=0, a2=1)[2] == b, "the second template alone"
    assert pixels(a1=0, a2=0)[2] == (a[1], a[1]), "nothing"
    assert pixels()[:2] == pixels(a1=-1)[:2], "sliders do not move the templates"


def test_any_number_of_templates_of_any_scale_and_shape():
    for k in (1, 2, 5):
        tiny = charts.mixing(1e-4 * torch.randn(k, 3, 6))
        assert len(tiny.controls) == 2 * k
        shown = [fill for fill in fills(svg(tiny)) if fill.startswith("rgb(")]
        assert len(set(shown[:18])) > 9, "small numbers keep their differences"
    with pytest.raises(ValueError, match=r"\(k, H, W\), finite and not empty, got \(2, 3\)"):
        charts.mixing(torch.ones(2, 3))
    with pytest.raises(ValueError, match="finite"):
        charts.mixing(torch.tensor([[[float("nan")]]]))
    for start in (((1, 0),), ((1, 0), (0,)), ((3, 0), (0, 1))):
        with pytest.raises(ValueError, match="2 rows of 2 coefficients from -1 to 1"):
            charts.mixing(torch.randn(2, 3, 3), start=start)


# Evolution -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs():
    torch.manual_seed(0)
    found = {}
    for name in ("SWRN with penalty", "SWRN"):
        model, recorder = models.swrn(22, 1), SimilarityRecorder()
        for step in range(4):
            recorder.record(model, step)
            with torch.no_grad():
                for bank in softshare.banks(model).values():
                    bank.coefficients.add_(0.5 * torch.randn_like(bank.coefficients))
        found[name] = recorder
    return found


@pytest.mark.parametrize("step", [0, 2, 3])
@pytest.mark.parametrize("run", ["SWRN", "SWRN with penalty"])
def test_the_matrices_of_the_chosen_moment_are_shown_beside_their_start(runs, step, run):
    picture = svg(charts.evolution(runs), step=step, run=run)
    largest = [float(text.split(": ")[1]) for text in texts(picture) if text.startswith("largest pair")]
    matrices = runs[run].matrices()
    off = ~np.eye(4, dtype=bool)
    assert largest == pytest.approx([matrix[step][off].max() for matrix in matrices.values()], abs=0.006)
    shown = [fill for fill in fills(picture) if fill.startswith("rgb(")]
    assert len(shown) == 3 * 2 * 16
    starts = [shown[32 * group : 32 * group + 16] for group in range(3)]
    nows = [shown[32 * group + 16 : 32 * group + 32] for group in range(3)]
    assert (starts == nows) == (step == 0)


def test_each_cell_has_the_shade_of_its_similarity():
    """In a matrix that is not symmetric, so that rows and columns cannot be taken for each other."""
    recorder = SimilarityRecorder()
    model = models.swrn(22, 1)
    for step in (0, 1):
        recorder.record(model, step)
    shades = np.array([[1.0, 0.1, 0.2, 0.3], [0.4, 1.0, 0.5, 0.6], [0.7, 0.8, 1.0, 0.9], [0.15, 0.25, 0.35, 1.0]])
    recorder.matrices = lambda: {group: np.stack([np.eye(4), shades]) for group in recorder.coefficients}
    picture = charts.evolution({"SWRN": recorder})
    cells = []
    for path in svg(picture, step=1).iter("{http://www.w3.org/2000/svg}path"):
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
    plt.close(live)


def test_a_layer_alone_resembles_no_other():
    assert charts._largest(np.ones((2, 1, 1))).tolist() == [0.0, 0.0]


def test_snapshots_that_do_not_match_are_refused(runs):
    other = SimilarityRecorder()
    for step in (0, 1, 5):
        other.record(models.swrn(22, 1), step)
    with pytest.raises(ValueError, match=r"equally far apart; 'other' has \[0, 1, 5\]"):
        charts.evolution({"other": other})
    with pytest.raises(ValueError, match="'other' has"):
        charts.evolution(runs | {"other": other})
    with pytest.raises(ValueError, match="no runs"):
        charts.evolution({})
    deeper = SimilarityRecorder()
    for step in range(4):
        deeper.record(models.swrn(28, 1), step)
    with pytest.raises(ValueError, match="the same groups with as many layers"):
        charts.evolution(runs | {"deeper": deeper})


# Folding -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folding_picture():
    torch.manual_seed(0)
    looped, loose = models.swrn(40, 1, templates=8), models.swrn(40, 1, templates=8)
    with torch.no_grad():
        alpha = softshare.banks(looped)["stage2"].coefficients
        for block in range(2, 5):  # a loop of two layers, the second with its sign turned
            alpha[2 * block], alpha[2 * block + 1] = alpha[2], -alpha[3]
    networks = {"SWRN": looped, "tied by hand": loose}
    calls = []

    def error(network):
        calls.append(network)
        return 0.25 + sum(p.numel() for p in network.parameters()) / 1e5

    sweeps = {name: folding.sweep(network, error, (0.8, 0.9, 1.0)) for name, network in networks.items()}
    assert len(calls) == 5, "each network before, and once for each of the three different plans"
    doubled = {name: [row | {"value": 2 * row["value"]} for row in rows] for name, rows in sweeps.items()}
    return charts.folds(networks, {"once": sweeps, "twice": doubled}, {"once": error}), networks, sweeps


def test_boxes_loops_and_costs_are_those_of_the_plan(folding_picture):
    picture, networks, sweeps = folding_picture
    shown = texts(svg(picture, threshold=0.9, net="SWRN"))
    assert "loop \N{MULTIPLICATION SIGN} 4" in shown
    (group,) = [each for each in folding.plan_fold(networks["SWRN"], 0.9).groups if each.name == "stage2"]
    for place, source in enumerate(group.schedule):
        mark = "\N{MINUS SIGN}" if group.scales[place] < 0 else ""
        assert f"{mark}{source}" in shown
    assert shown.count("\N{MINUS SIGN}4") == sum(scale < 0 for scale in group.scales) > 0
    row = next(row for row in sweeps["SWRN"] if row["threshold"] == 0.9)
    assert f"{row['distinct']} of {row['total']} layers distinct, {row['parameters']:,} parameters" in shown
    minus = "\N{MINUS SIGN}"
    assert f"test error {row['value']:.1f}% (once), {2 * row['value']:.1f}% (twice)" in shown
    # Boxes have the colours of their clusters, a frame is as wide as its loop, and a ring marks each curve's place.
    chart = svg(picture, threshold=0.9, net="SWRN")
    colours = Counter()
    for each in folding.plan_fold(networks["SWRN"], 0.9).groups:
        found = plotting.cluster_colours(each)
        colours.update(found[source] for source in each.schedule)
    shown_fills = Counter(fills(chart))
    assert {colour: shown_fills[colour] for colour in colours} == colours
    (frame,) = [path for path in chart.iter("{http://www.w3.org/2000/svg}path") if path.get("fill-opacity") == "0"]
    (box, *_) = [path for path in chart.iter("{http://www.w3.org/2000/svg}path") if path.get("fill") in colours]
    places = [[float(x) for x, _ in re.findall(r"(-?[\d.]+),(-?[\d.]+)", path.get("d"))] for path in (frame, box)]
    widths = [max(each) - min(each) for each in places]
    assert widths[0] / widths[1] == pytest.approx(8 / 0.8, rel=0.1), "a loop of two layers, four times"
    rings = [each for each in chart.iter("{http://www.w3.org/2000/svg}path") if each.get("stroke-width") == "2.5"]
    assert len(rings) == 2, "one for each way to measure"
    other = texts(svg(picture, threshold=0.9, net="tied by hand"))
    assert not [text for text in other if "loop" in text or minus in text.split(",")[0]]


def test_thresholds_must_be_equally_far_apart(folding_picture):
    _, networks, sweeps = folding_picture
    uneven = {
        name: [row | {"threshold": t} for row, t in zip(rows, (0.5, 0.9, 1.0), strict=True)]
        for name, rows in sweeps.items()
    }
    with pytest.raises(ValueError, match=r"'SWRN', once, has \[0.5, 0.9, 1.0\]"):
        charts.folds(networks, {"once": uneven})
    with pytest.raises(ValueError, match="every network needs a sweep"):
        charts.folds(networks, {"once": {"SWRN": sweeps["SWRN"]}})
    with pytest.raises(ValueError, match="every network needs a sweep"):
        charts.folds(networks, {"once": {"SWRN": sweeps["SWRN"], "another": sweeps["SWRN"]}})
    with pytest.raises(ValueError, match="the same groups"):
        charts.folds(networks | {"CNN": models.gridnet(4, 4, 2)}, {"once": sweeps | {"CNN": sweeps["SWRN"]}})
    short = {name: rows[1:] for name, rows in sweeps.items()}
    with pytest.raises(ValueError, match=r"'SWRN', twice, has \[0.9, 1.0\]"):
        charts.folds(networks, {"once": sweeps, "twice": short})


# Search --------------------------------------------------------------------------------------------------------------


def oracle(inputs):
    """Steps from the first query by networkx, (H, W) with -1 where there is no way."""
    free = ~inputs[1].numpy()
    height, width = free.shape
    graph = networkx.grid_2d_graph(height, width)
    graph.remove_nodes_from([node for node in list(graph) if not free[node]])
    steps = -np.ones(free.shape, dtype=int)
    for node, length in networkx.single_source_shortest_path_length(
        graph, tuple(np.argwhere(inputs[0].numpy())[0])
    ).items():
        steps[node] = length
    return steps


def test_steps_agree_with_networkx():
    grids = generate(40, size=9, box=9, obstacle_probability=0.35, seed=3)
    found = steps_from(grids.inputs)
    for inputs, steps in zip(grids.inputs, found, strict=True):
        assert np.array_equal(steps.numpy(), oracle(inputs))
    assert (found == -1).logical_and(~grids.inputs[:, 1]).any(), "some free pixels are out of reach"
    with pytest.raises(ValueError, match="must mark a query"):
        steps_from(torch.zeros(1, 2, 5, 5))


def test_search_and_guesses_are_counted_as_they_are():
    torch.manual_seed(0)
    networks = {"CNN": models.gridnet(5, 4).eval(), "SCNN": models.gridnet(5, 4, templates=5).eval()}
    picture = charts.search(networks, 8, 7, 0.3, seed=4, grids=3)
    grids = generate(3, 8, 7, 0.3, seed=4)
    for n in range(3):
        steps, free = oracle(grids.inputs[n]), ~grids.inputs[n, 1]
        for step, (name, network) in zip((0, 3), networks.items(), strict=True):
            reached, wrong = said(
                picture, r"search: (\d+) pixels? reached; network: (\d+) pixels? wrong",
                step=step, net=name, grid=f"grid {n + 1}",
            )  # fmt: skip
            assert int(reached) == ((steps >= 0) & (steps <= step)).sum()
            with torch.no_grad():
                guess = network(grids.inputs[n : n + 1])[0] > 0
            assert int(wrong) == int(((guess != grids.targets[n]) & free).sum()), (
                "after all layers: the network's answer"
            )
    assert picture.controls["step"].start <= picture.controls["step"].most
    early = {said(picture, r"network: (\d+)", layer=layer)[0] for layer in range(6)}
    assert len(early) > 1, "the layers differ"


def test_every_pixel_of_the_search_has_the_colour_of_what_it_is():
    torch.manual_seed(1)
    network = models.gridnet(4, 6).eval()
    picture = charts.search({"CNN": network}, 9, 7, 0.25, seed=2, grids=2)
    grids = generate(2, 9, 7, 0.25, seed=2)
    with torch.no_grad():
        marks = (network(grids.inputs) > 0).numpy()
    for n in (0, 1):
        steps, truth = oracle(grids.inputs[n]), grids.targets[n].numpy()
        queries, obstacles = grids.inputs[n].numpy()
        free = ~queries & ~obstacles
        chart = svg(picture, step=3, grid=f"grid {n + 1}")
        found = Counter(fill.upper() for fill in fills(chart))
        expected = {
            "#595959": 2 * obstacles.sum(),
            "#0072B2": 2 * queries.sum(),
            "#CFE8F7": (free & (steps >= 0) & (steps < 3)).sum(),
            "#56B4E9": (free & (steps == 3)).sum(),
            "#E69F00": (free & marks[n] & truth).sum(),
            "#CC79A7": (free & marks[n] & ~truth).sum(),
            "BLACK": 2 * (free & truth).sum(),  # the dots
        }
        assert {colour: found[colour] for colour in expected} == expected
        # The live form, pixel by pixel.
        drawn = picture.draw(step=3, layer=4, grid=f"grid {n + 1}", net="CNN")
        left, right = (axes.get_images()[0].get_array() for axes in drawn.axes)
        shades = {name: np.array(plotting._rgb(name)) for name in ("#CFE8F7", "#56B4E9", "#E69F00", "#CC79A7")}
        assert np.array_equal(np.isclose(left, shades["#CFE8F7"]).all(-1), free & (steps >= 0) & (steps < 3))
        assert np.array_equal(np.isclose(left, shades["#56B4E9"]).all(-1), free & (steps == 3))
        assert np.array_equal(np.isclose(right, shades["#E69F00"]).all(-1), free & marks[n] & truth)
        assert np.array_equal(np.isclose(right, shades["#CC79A7"]).all(-1), free & marks[n] & ~truth)
        plt.close(drawn)


def test_networks_are_left_as_they_were_and_refused_in_training_mode():
    network = models.gridnet(5, 4)
    with pytest.raises(ValueError, match="evaluation mode"):
        charts.search({"CNN": network}, 8, 5, 0.2)
    with pytest.raises(ValueError, match=r"one depth, got layers: {'a': 5, 'b': 4}"):
        charts.search({"a": network.eval(), "b": models.gridnet(4, 4).eval()}, 8, 5, 0.2)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    charts.search({"CNN": network}, 8, 5, 0.2, grids=1)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


# Both forms ----------------------------------------------------------------------------------------------------------


def test_widgets_redraw_when_they_are_moved(runs, folding_picture):
    for picture in (charts.mixing(torch.randn(3, 5, 5)), charts.evolution(runs), folding_picture[0]):
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


def test_a_cell_shows_widgets_where_there_are_some_and_always_a_chart(monkeypatch):
    picture = charts.mixing(torch.randn(2, 3, 3), start=((1, 0), (0, 1)))
    bundle = picture._repr_mimebundle_()
    assert set(bundle) == {"text/plain", "text/html", WIDGET}
    json.dumps(bundle)
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    assert set(picture._repr_mimebundle_()) == {"text/plain", "text/html"}


def test_the_live_form_measures_the_folded_network_once(folding_picture):
    _, networks, sweeps = folding_picture
    asked = []

    def error(network):
        asked.append(sum(p.numel() for p in network.parameters()))
        return 1.0

    picture = charts.folds(networks, {"once": sweeps}, {"once": error})
    open_before = plt.get_fignums()
    threshold, net, _ = picture.live().children
    assert asked[-1] == next(row for row in sweeps["SWRN"] if row["threshold"] == 0.9)["parameters"], "the folded one"
    assert threshold.step < picture.controls["threshold"].step, "a kernel goes between the stops"
    count = len(asked)
    threshold.value = 0.95  # the same plan
    assert len(asked) == count
    net.value = "tied by hand"
    assert len(asked) == count + 1
    assert picture.live() is picture.live() and plt.get_fignums() == open_before, "nothing is left open"


def test_the_last_threshold_can_be_reached():
    model = models.swrn(22, 1)
    thresholds = np.linspace(0.6, 1.0, 7).tolist()
    sweeps = {"once": {"SWRN": folding.sweep(model, lambda _: 1.0, thresholds)}}
    control = charts.folds({"SWRN": model}, sweeps).controls["threshold"]
    stops = control.least + control.step * np.arange(7)
    assert stops[-1] <= control.most and np.allclose(stops, thresholds, atol=control.step / 4)


def test_controls_that_cannot_be():
    for wrong in ((1, 0, 1, 0), (0, 1, 0, 0), (0, 1, 1, 2)):
        with pytest.raises(ValueError, match="a slider needs"):
            Slider("x", *wrong)
    with pytest.raises(ValueError, match="'x' has no options"):
        Choice("x", ())


def test_vega_comes_before_what_is_built_on_it():
    page = charts.mixing(torch.randn(2, 3, 3)).to_html()
    places = [page.index(f"/{name}@") for name in ("vega", "vega-lite", "vega-embed")]
    assert places == sorted(places)


def test_the_chart_cannot_break_out_of_its_page():
    made = charts.mixing(torch.randn(2, 3, 3), start=((1, 0), (0, 1)))
    hostile = Moving({}, made.chart, made.draw, 'An "</script><script>alert(1)</script>" & more')
    page = hostile.to_html()
    assert page.count("<script") == page.count("</script>") == 1
    assert 'aria-label="An &quot;&lt;/script&gt;' in page


def test_numbers_on_coloured_boxes_can_be_read():
    def luminance(colour):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in np.array(colour)]
        return float(np.dot([0.2126, 0.7152, 0.0722], linear))

    for fill in plotting._CYCLE:
        light = luminance(plotting._rgb(fill))
        text = 1.0 if plotting.ink(fill) == "white" else 0.0
        assert (max(light, text) + 0.05) / (min(light, text) + 0.05) >= 4.5, fill
