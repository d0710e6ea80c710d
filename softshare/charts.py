"""The four pictures of the book that move: mixing templates, similarities over training, folding, and search.

Each function returns a `softshare.moving.Moving`: an Altair chart for pages, the same as live widgets for kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from torch import Tensor, nn

from . import plotting
from .folding import fold, plan_fold
from .moving import Choice, Moving, Slider
from .sharing import banks
from .shortest_path import generate, steps_from
from .similarity import SimilarityRecorder, layer_similarity

_BLUES = ("#FFFFFF", "#DEEBF7", "#9ECAE1", "#4292C6", "#08519C", "#08306B")
_RED_TO_BLUE = ("#67001F", "#D6604D", "#FDDBC7", "#F7F7F7", "#D1E5F0", "#4393C3", "#053061")


def _square(
    rows: Any, value: str, title: str, side: int, domain: Sequence[float], colours: Sequence[str], shape: float = 1.0
) -> Any:
    """One rectangle for each row of data, at its x and y, coloured by an expression; `shape` is height / width."""
    import altair as alt

    return (
        alt.Chart(rows, width=side, height=round(side * shape), title=title)
        .transform_calculate(value=value)
        .mark_rect()
        .encode(
            x=alt.X("x:O", axis=None),
            y=alt.Y("y:O", axis=None),
            color=alt.Color(
                "value:Q",
                scale=alt.Scale(range=list(colours), domain=list(domain), clamp=True, interpolate="rgb"),
                legend=None,
            ),
        )
    )


def _sentence(expression: str, rows: Any = None, width: int = 340, size: int = 13) -> Any:
    """One line of text that an expression makes, from one row of data."""
    import altair as alt

    data = alt.Data(values=[{}]) if rows is None else rows
    return (
        alt.Chart(data, width=width, height=size + 7)
        .transform_calculate(text=expression)
        .mark_text(align="left", baseline="middle", fontSize=size)
        .encode(text="text:N", x=alt.value(0))
    )


def mixing(templates: Tensor, start: Sequence[Sequence[float]] | None = None) -> Moving:
    """Two layers mix k templates (k, H, W) by sliders; beside their filters stands how alike the layers are.

    `start` holds the coefficients of both layers at the beginning, (2, k), from -1 to 1. Raises ValueError for other shapes
    or values, and for templates that are not finite.
    """
    import altair as alt

    if templates.dim() != 3 or not templates.numel() or not bool(templates.isfinite().all()):
        raise ValueError(f"templates must be (k, H, W), finite and not empty, got {tuple(templates.shape)}")
    k, high, wide = templates.shape
    if start is None:
        start = [[*row, *[0.0] * k][:k] for row in ((1.0, 0.6), (0.8, -0.8))]
    if [len(row) for row in start] != [k, k] or not all(-1 <= value <= 1 for row in start for value in row):
        raise ValueError(f"start must hold 2 rows of {k} coefficients from -1 to 1, got {start}")
    values = templates.detach().float().cpu().numpy()  # (k, H, W)
    values = (values / (np.abs(values).max() or 1.0)).round(4)  # from -1 to 1
    pixels = [
        {"x": x, "y": y} | {f"t{j + 1}": float(values[j, y, x]) for j in range(k)}
        for y in range(values.shape[1])
        for x in range(values.shape[2])
    ]
    rows = alt.Data(values=pixels)
    layers = ("a", "b")
    controls: dict[str, Slider | Choice] = {
        f"{layer}{j + 1}": Slider(f"{layer.upper()}: template {j + 1}", -1.0, 1.0, 0.1, start[number][j])
        for j in range(k)
        for number, layer in enumerate(layers)
    }
    names = {layer: [f"{layer}{j + 1}" for j in range(k)] for layer in layers}
    shown = [
        _square(rows, f"datum.t{j + 1}", f"template {j + 1}", 100, (-1, 1), _RED_TO_BLUE, high / wide) for j in range(k)
    ]
    mixed = [
        _square(
            rows, " + ".join(f"{name} * datum.t{j + 1}" for j, name in enumerate(names[layer])),
            f"layer {layer.upper()}", 150, (-1.5, 1.5), _RED_TO_BLUE, high / wide,
        )
        for layer in layers
    ]  # fmt: skip
    dot = " + ".join(f"{one} * {other}" for one, other in zip(names["a"], names["b"], strict=True))
    squares = {layer: " + ".join(f"{name} * {name}" for name in names[layer]) for layer in layers}
    length = f"sqrt(({squares['a']}) * ({squares['b']}))"
    alike = f"'similarity of the layers, |cos(A, B)| = ' + format({length} > 0 ? abs({dot}) / {length} : 0, '.2f')"
    chart = alt.vconcat(alt.hconcat(*shown, spacing=14), alt.hconcat(*mixed, spacing=20), _sentence(alike), spacing=12)

    def draw(**given: float) -> Figure:
        coefficients = torch.tensor([[given[name] for name in names[layer]] for layer in layers])  # (2, k)
        figure, axes = plt.subplots(1, k + 2, figsize=(1.6 * (k + 2), 2.2))
        filters = torch.einsum("lk,khw->lhw", coefficients, torch.from_numpy(values))
        titles = [f"template {j + 1}" for j in range(k)] + ["layer A", "layer B"]
        for one, picture, title in zip(axes, [*values, *filters.numpy()], titles, strict=True):
            scale = 1.5 if title.startswith("layer") else 1.0
            one.imshow(picture, cmap="RdBu", vmin=-scale, vmax=scale)
            one.set(title=title, xticks=[], yticks=[])
        figure.suptitle(f"|cos(A, B)| = {float(layer_similarity(coefficients)[0, 1]):.2f}", fontsize=11)
        return figure

    return Moving(
        controls, chart.resolve_scale(color="independent"), draw,
        f"{k} templates, and the filters that two layers, A and B, mix from them with {k} coefficients each; below, the "
        "similarity of the two rows of coefficients. Sliders set the coefficients.",
    )  # fmt: skip


def evolution(runs: Mapping[str, SimilarityRecorder], unit: str = "epoch") -> Moving:
    """Similarity matrices over training, one column a group: at the start above, at the chosen moment below.

    `runs` maps a name to what was recorded; all must hold the same groups at the same steps, equally far apart.
    """
    import altair as alt

    if not runs:
        raise ValueError("no runs were given")
    first = next(iter(runs.values()))
    steps = np.asarray(first.steps)
    gaps = np.diff(steps)
    for name, run in runs.items():
        if not np.array_equal(run.steps, steps) or not len(gaps) or not np.allclose(gaps, gaps[0]):
            raise ValueError(
                f"snapshots must be two or more, at the same steps, equally far apart; {name!r} has {run.steps}"
            )
    matrices = {name: run.matrices() for name, run in runs.items()}  # run -> group -> (snapshots, L, L)
    layers = {name: {group: found[group].shape[1] for group in found} for name, found in matrices.items()}
    if len({str(each) for each in layers.values()}) > 1 or not first.coefficients:
        raise ValueError(f"runs must have the same groups with as many layers, got {layers}")
    groups = list(first.coefficients)
    at = f"round((step - {steps[0]:g}) / {gaps[0]:g})"

    def column(group: str) -> Any:
        cells = [
            {"run": name, "x": i + 1, "y": j + 1, "s": found[group][:, j, i].astype(float).round(3).tolist()}
            for name, found in matrices.items()
            for i in range(found[group].shape[1])
            for j in range(found[group].shape[1])
        ]
        rows = alt.Data(values=cells)
        pairs = {name: _largest(found[group]).round(3).tolist() for name, found in matrices.items()}
        largest = alt.Data(values=[{"run": name, "s": values} for name, values in pairs.items()])
        said = _sentence(f"'largest pair: ' + format(datum.s[{at}], '.2f')", largest, 110, 12).transform_filter(
            "datum.run == run"
        )
        start = _square(rows, "datum.s[0]", f"{group}, start", 110, (0, 1), _BLUES).transform_filter("datum.run == run")
        now = _square(rows, f"datum.s[{at}]", f"{group}, now", 110, (0, 1), _BLUES).transform_filter("datum.run == run")
        return alt.vconcat(start, now, said, spacing=10)

    controls: dict[str, Slider | Choice] = {
        "step": Slider(unit, float(steps[0]), float(steps[-1]), float(gaps[0]), float(steps[-1])),
        "run": Choice("network", tuple(runs)),
    }

    def draw(step: float, run: str) -> Figure:
        moment = round((step - steps[0]) / gaps[0])
        rows = {
            "at the start": {group: matrices[run][group][0] for group in groups},
            f"{unit} {steps[moment]:g}": {group: matrices[run][group][moment] for group in groups},
        }
        return plotting.similarity_rows(rows, 2.3)

    return Moving(
        controls, alt.hconcat(*(column(group) for group in groups), spacing=16), draw,
        f"Layer similarity matrices of {', '.join(groups)}: at the start of training above, at the chosen {unit} below. "
        f"Controls choose the {unit} and the network.",
    )  # fmt: skip


def _largest(matrices: np.ndarray) -> np.ndarray:
    """The largest similarity between two different layers, (snapshots, L, L) to (snapshots,)."""
    pairs = ~np.eye(matrices.shape[-1], dtype=bool)
    return np.asarray(matrices[:, pairs].max(axis=1, initial=0.0))


def folds(
    networks: Mapping[str, nn.Module],
    sweeps: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]],
    evaluate: Mapping[str, Callable[[nn.Module], float]] | None = None,
) -> Moving:
    """Layers merge as the threshold falls: boxes of one colour use one weight, frames are loops; below, the error.

    Args:
        networks: by name.
        sweeps: for each way to measure the error (in percent) a name, and what `softshare.folding.sweep` returned for each
            network; all at the same thresholds, equally far apart.
        evaluate: how the live version measures the error of a folded network, by the same names.

    Raises:
        ValueError: a network without its sweeps, networks of different groups, or thresholds that do not agree.
    """
    import altair as alt

    given = {way: list(found) for way, found in sweeps.items()}
    if not networks or not given or not all(set(networks) <= set(names) for names in given.values()):
        raise ValueError(f"every network needs a sweep of each kind, got networks {list(networks)} and sweeps {given}")
    sizes = {
        name: {group: len(bank.coefficients) for group, bank in banks(net).items()} for name, net in networks.items()
    }
    if len({str(each) for each in sizes.values()}) > 1:
        raise ValueError(f"networks must have the same groups with as many layers, got {sizes}")
    first = next(iter(sweeps.values()))
    thresholds = sorted(row["threshold"] for row in next(iter(first.values())))
    gap = (thresholds[-1] - thresholds[0]) / max(1, len(thresholds) - 1)
    for way, found in sweeps.items():
        for name in networks:
            mine = sorted(row["threshold"] for row in found[name])
            if mine != thresholds or gap == 0 or not np.allclose(np.diff(mine), gap):
                raise ValueError(
                    f"thresholds must be the same everywhere, equally far apart; {name!r}, {way}, has {mine}"
                )
    boxes: list[dict[str, Any]] = []
    frames: list[dict[str, Any]] = []
    totals: list[dict[str, Any]] = []
    errors: list[dict[str, Any]] = []
    for name, network in networks.items():
        for row in first[name]:
            where = {"net": name, "t": row["threshold"]}
            plan = plan_fold(network, row["threshold"])
            for line, group in enumerate(plan.groups):
                fills = plotting.cluster_colours(group)
                # `y` is where a row of boxes begins, counted in boxes from above.
                y = 2.0 * line
                for place, source in enumerate(group.schedule):
                    mark = "\N{MINUS SIGN}" if group.scales[place] < 0 else ""
                    boxes.append(
                        where
                        | {
                            "x": place,
                            "y": y,
                            "c": fills[source],
                            "s": f"{mark}{source}",
                            "w": plotting.ink(fills[source]),
                        }
                    )
                for loop in group.loops:
                    end = loop.start - 1 + loop.length * loop.repeats
                    frames.append(
                        where
                        | {"x": loop.start - 1, "e": end, "y": y, "s": f"loop \N{MULTIPLICATION SIGN} {loop.repeats}"}
                    )
            ways = {
                way: next(each["value"] for each in found[name] if each["threshold"] == row["threshold"])
                for way, found in sweeps.items()
            }
            errors += [where | {"way": way, "error": round(value, 3)} for way, value in ways.items()]
            kept = f"{row['distinct']} of {row['total']} layers distinct, {row['parameters']:,} parameters"
            cost = ", ".join(f"{value:.1f}% ({way})" for way, value in ways.items())
            totals.append(where | {"kept": kept, "cost": f"test error {cost}"})
    plan = plan_fold(next(iter(networks.values())), thresholds[-1])
    longest = max(len(group.layers) for group in plan.groups)
    side = min(34, 350 // longest)
    here = f"datum.net == net && abs(datum.t - threshold) < {gap / 4:g}"
    size = {"width": side * longest, "height": int(side * 2.0 * len(plan.groups))}
    across = alt.Scale(domain=[0, longest], nice=False)
    down = alt.Scale(domain=[2.0 * len(plan.groups) - 0.9, -0.9], nice=False)

    def layer(rows: list[dict[str, Any]], x: str, y: str) -> Any:
        chart = alt.Chart(alt.Data(values=rows), **size).transform_filter(here)
        # Calculated places, since a box is drawn between two corners.
        return chart.transform_calculate(x1=x, y1=y).encode(
            x=alt.X("x1:Q", scale=across, axis=None), y=alt.Y("y1:Q", scale=down, axis=None)
        )

    names = alt.Chart(
        alt.Data(values=[{"s": group.name, "y1": 2.0 * n - 0.45} for n, group in enumerate(plan.groups)]), **size
    )
    pictures = alt.layer(
        names.mark_text(align="left", fontSize=12).encode(
            x=alt.value(4), y=alt.Y("y1:Q", scale=down, axis=None), text="s:N"
        ),
        layer(boxes, "datum.x + 0.1", "datum.y + 0.02")
        .transform_calculate(x2="datum.x + 0.9", y2="datum.y + 0.82")
        .mark_rect(cornerRadius=4, stroke="black", strokeWidth=0.7)
        .encode(x2="x2:Q", y2="y2:Q", color=alt.Color("c:N", scale=None)),
        layer(boxes, "datum.x + 0.5", "datum.y + 0.42")
        .mark_text(fontSize=12)
        .encode(text="s:N", color=alt.Color("w:N", scale=None)),
        layer(frames, "datum.x + 0.02", "datum.y - 0.08")
        .transform_calculate(x2="datum.e - 0.02", y2="datum.y + 0.92")
        .mark_rect(fillOpacity=0, cornerRadius=5, stroke="black", strokeDash=[5, 3])
        .encode(x2="x2:Q", y2="y2:Q"),
        layer(frames, "(datum.x + datum.e) / 2", "datum.y - 0.45").mark_text(fontSize=12).encode(text="s:N"),
    )
    shades = {name: plotting.COLOURS.get(name, spare) for name, spare in zip(networks, plotting._CYCLE, strict=False)}
    dashes = [[1, 0], [5, 3], [2, 2]][: len(sweeps)]
    lines = alt.Chart(alt.Data(values=errors), width=250, height=140).encode(
        x=alt.X("t:Q", title="threshold", scale=alt.Scale(domain=[thresholds[0], thresholds[-1]], nice=False, reverse=True)),
        y=alt.Y("error:Q", title="test error (%)"),
        color=alt.Color(
            "net:N", title=None, legend=alt.Legend(orient="bottom", direction="vertical"),
            scale=alt.Scale(domain=list(networks), range=list(shades.values())),
        ),
        strokeDash=alt.StrokeDash(
            "way:N", title=None, legend=alt.Legend(orient="bottom", direction="vertical"),
            scale=alt.Scale(domain=list(sweeps), range=dashes),
        ),
    )  # fmt: skip
    curve = alt.layer(
        lines.mark_line(strokeWidth=2),
        lines.transform_filter(here).mark_point(size=120, strokeWidth=2.5, filled=False, strokeDash=[1, 0]),
    )
    rows = alt.Data(values=totals)
    told, cost = (_sentence(f"datum.{key}", rows, 350, 12).transform_filter(here) for key in ("kept", "cost"))
    controls: dict[str, Slider | Choice] = {
        "threshold": Slider(
            "threshold",
            thresholds[0],
            thresholds[-1],
            math.floor(gap * 1e6 + 1e-3) / 1e6,  # rounded down, so that the last one is reached
            min(thresholds, key=lambda t: abs(t - 0.9)),
            fine=gap / 5 if evaluate else None,
        ),
        "net": Choice("network", tuple(networks)),
    }

    known: dict[tuple[str, Any], dict[str, float]] = {}  # what was measured once is not measured again

    def draw(threshold: float, net: str) -> Figure:
        plan = plan_fold(networks[net], threshold)
        figure = plotting.plan(plan)
        if evaluate and (net, plan.groups) not in known:
            folded = fold(networks[net], plan)
            known[net, plan.groups] = {way: measure(folded) for way, measure in evaluate.items()}
        cost = "".join(f", {value:.1f}% ({way})" for way, value in known.get((net, plan.groups), {}).items())
        figure.suptitle(f"{plan.distinct_layers} of {plan.total_layers} layers distinct{cost}", fontsize=10)
        return figure

    return Moving(
        controls, alt.vconcat(pictures, told, cost, curve, spacing=8), draw,
        "The layers of each stage as boxes in the order of execution. Boxes of one colour use one weight, grey boxes keep "
        "their own, dashed frames are loops. Below, the test error against the threshold. Controls choose the threshold and "
        "the network.",
    )  # fmt: skip


def search(
    networks: Mapping[str, nn.Module], size: int, box: int, obstacle_probability: float, seed: int = 0, grids: int = 6
) -> Moving:
    """Breadth-first search from one query, step by step, beside a network's answer as its layers pass.

    The guess after n layers is what the network's last convolution makes of the features of layer n.

    Args:
        networks: made by `softshare.models.gridnet`, all of one depth, in evaluation mode.
        size, box, obstacle_probability, seed: as for `softshare.shortest_path.generate`.
        grids: how many a reader can choose among.
    """
    import altair as alt

    depths = {name: len(network.layers) for name, network in networks.items()}  # type: ignore[arg-type]
    if len(set(depths.values())) != 1 or any(network.training for network in networks.values()):
        raise ValueError(f"networks must be in evaluation mode and all of one depth, got layers: {depths}")
    drawn = generate(grids, size, box, obstacle_probability, seed)
    steps = steps_from(drawn.inputs)  # (n, H, W), -1 where the search does not come
    guesses = {name: _guesses(network, drawn.inputs) for name, network in networks.items()}  # (n, layers + 1, H, W)
    depth = next(iter(guesses.values())).shape[1] - 1
    pixels: list[dict[str, Any]] = []
    for n in range(grids):
        for y in range(size):
            for x in range(size):
                pixel: dict[str, Any] = {"n": f"grid {n + 1}", "x": x, "y": y, "d": int(steps[n, y, x])}
                # 1 a query, 2 an obstacle
                pixel["k"] = int(drawn.inputs[n, 0, y, x]) + 2 * int(drawn.inputs[n, 1, y, x])
                pixel["t"] = int(drawn.targets[n, y, x])
                if pixel["k"] != 2:
                    pixel["p"] = {name: guess[n, :, y, x].astype(int).tolist() for name, guess in guesses.items()}
                pixels.append(pixel)
    rows = alt.Data(values=pixels)
    side = 12 * max(1, 170 // 12) if size <= 14 else 176

    def panel(colour: str, title: str) -> Any:
        squares = (
            alt.Chart(rows, width=side, height=side, title=title)
            .transform_filter("datum.n == grid")
            .transform_calculate(c=colour)
        )
        place = {"x": alt.X("x:O", axis=None), "y": alt.Y("y:O", axis=None)}
        dots = squares.transform_filter("datum.t == 1 && datum.k == 0").mark_circle(
            size=max(4, 400 // size), color="black", opacity=1
        )
        return alt.layer(
            squares.mark_rect(stroke="#CCCCCC", strokeWidth=0.4).encode(**place, color=alt.Color("c:N", scale=None)),
            dots.encode(**place),
        )

    guess = "datum.p[net][layer]"
    searched = (
        f"datum.k == 2 ? '{_OBSTACLE}' : datum.k == 1 ? '{_QUERY}' : datum.d < 0 || datum.d > step ? '#FFFFFF' : "
        f"datum.d == step ? '{_FRONTIER}' : '{_REACHED}'"
    )
    answered = (
        f"datum.k == 2 ? '{_OBSTACLE}' : datum.k == 1 ? '{_QUERY}' : {guess} == 0 ? '#FFFFFF' : "
        f"datum.t ? '{_RIGHT}' : '{_WRONG}'"
    )
    chosen = alt.Chart(rows, width=340, height=20).transform_filter("datum.n == grid && datum.k != 2")
    counted = (
        chosen.transform_calculate(
            r="datum.d >= 0 && datum.d <= step ? 1 : 0", w=f"({guess} == 1) == (datum.t == 1) ? 0 : 1"
        )
        .transform_aggregate(reached="sum(r)", wrong="sum(w)")
        .transform_calculate(
            text="'search: ' + datum.reached + (datum.reached == 1 ? ' pixel' : ' pixels') + ' reached; "
            "network: ' + datum.wrong + (datum.wrong == 1 ? ' pixel wrong' : ' pixels wrong')"
        )
        .mark_text(align="left", baseline="middle", fontSize=13)
        .encode(text="text:N", x=alt.value(0))
    )
    controls: dict[str, Slider | Choice] = {
        "step": Slider("steps of the search", 0, int(steps.max()), 1, min(4, int(steps.max()))),
        "layer": Slider("layers passed", 0, depth, 1, depth),
        "grid": Choice("grid", tuple(f"grid {n + 1}" for n in range(grids))),
        "net": Choice("network", tuple(networks)),
    }
    both = alt.hconcat(panel(searched, "breadth-first search"), panel(answered, "the network's guess"), spacing=16)

    def draw(step: int, layer: int, grid: str, net: str) -> Figure:
        n = int(grid.removeprefix("grid ")) - 1
        truth, reach, marks = drawn.targets[n].numpy(), steps[n].numpy(), guesses[net][n, layer]
        queries, obstacles = drawn.inputs[n].numpy()
        searched = {_REACHED: (reach >= 0) & (reach < step), _FRONTIER: reach == step}
        answered = {_RIGHT: marks & truth, _WRONG: marks & ~truth}
        figure, axes = plt.subplots(1, 2, figsize=(6.6, 3.5))
        for one, shades, title in zip(
            axes, (searched, answered), (f"search, {step} steps", f"{net}, {layer} layers"), strict=True
        ):
            picture = np.ones((size, size, 3))
            for colour, where in (shades | {_QUERY: queries, _OBSTACLE: obstacles}).items():
                picture[where] = to_rgb(colour)
            one.imshow(picture, interpolation="nearest")
            row, column = np.nonzero(truth & ~queries)
            one.scatter(column, row, s=300 / size, color="black")
            one.set(title=title, xticks=[], yticks=[])
            one.spines[:].set_visible(True)
        return figure

    return Moving(
        controls, alt.vconcat(both, counted, spacing=8), draw,
        "One grid twice. Left, breadth-first search from one query: pixels reached so far, and the newest ones. Right, the "
        "pixels that a network would mark after some of its layers, right ones and wrong ones. Dots are the true answer. "
        "Controls choose the step of the search, the layer, the grid and the network.",
    )  # fmt: skip


_OBSTACLE, _QUERY, _REACHED, _FRONTIER, _RIGHT, _WRONG = (
    "#595959",
    "#0072B2",
    "#CFE8F7",
    "#56B4E9",
    "#E69F00",
    "#CC79A7",
)


@torch.inference_mode()
def _guesses(network: nn.Module, inputs: Tensor) -> np.ndarray:
    """Whether the last convolution marks a pixel by the features after 0, 1, ... layers, (n, layers + 1, H, W) bool."""
    place = next(network.parameters())
    x = network.stem(inputs.to(place))  # type: ignore[operator]
    found = [network.head(x)]  # type: ignore[operator]
    for layer in network.layers:  # type: ignore[union-attr]
        x = layer(x)
        found.append(network.head(x))  # type: ignore[operator]
    return np.asarray((torch.cat(found, dim=1) > 0).cpu().numpy())
