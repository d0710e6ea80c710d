"""Chapter 3's interactive picture of folding: which layers merge, which become loops, and what that costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import nn

from ..folded import fold
from ..folding import FoldPlan, GroupPlan, exploring, plan_fold
from ..sharing import banks
from . import plots
from .charts import data, sentence
from .moving import Choice, Moving, Slider
from .style import COLOURS, CYCLE, cluster_colours, ink

Sweeps = Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]
"""The rows of `softshare.folded.sweep`, by way of measuring and name of the network."""

_LINE = 2.0  # distance from one group to the next, in boxes


def folds(
    networks: Mapping[str, nn.Module],
    sweeps: Sweeps,
    evaluate: Mapping[str, Callable[[nn.Module], float]] | None = None,
) -> Moving:
    """Layers merge as the threshold falls: boxes of one colour share a weight, frames are loops; the error is below.

    Args:
        networks: by name; all with the same groups.
        sweeps: for each way of measuring the error (in percent), under a name such as "statistics kept", what
            `softshare.folded.sweep` returned for each network; all at the same, equally spaced thresholds.
        evaluate: how the live figure measures the error of a folded network (in percent), by the same names; without
            these functions it shows no error.

    Raises:
        ValueError: a network without its sweeps, networks of different groups, or thresholds that do not agree.
    """
    _check_groups(networks, sweeps)
    thresholds = _common_thresholds(networks, sweeps)
    with exploring():
        plans = {
            (name, row["threshold"]): plan_fold(networks[name], row["threshold"])
            for name in networks
            for row in next(iter(sweeps.values()))[name]
        }
    picture = _Folds(networks, sweeps, evaluate or {}, thresholds, plans)
    return Moving(
        picture.controls(), picture.chart(), picture.draw,
        "The layers of each stage as boxes in the order of execution. Boxes of one colour share a weight, grey boxes keep "
        "their own, dashed frames are loops. Below, the test error against the threshold. Controls choose the threshold and "
        "the network.",
    )  # fmt: skip


def _check_groups(networks: Mapping[str, nn.Module], sweeps: Sweeps) -> None:
    given = {way: list(found) for way, found in sweeps.items()}
    if not networks or not given or not all(set(networks) <= set(names) for names in given.values()):
        raise ValueError(f"every network needs a sweep of each kind, got networks {list(networks)} and sweeps {given}")
    sizes = {
        name: {group: len(bank.coefficients) for group, bank in banks(net).items()} for name, net in networks.items()
    }
    if len({str(each) for each in sizes.values()}) > 1:
        raise ValueError(f"networks must have the same groups with equal numbers of layers, got {sizes}")


def _common_thresholds(networks: Mapping[str, nn.Module], sweeps: Sweeps) -> list[float]:
    """The thresholds of all sweeps, ascending. Raises ValueError unless they agree and are equally far apart."""
    first = next(iter(sweeps.values()))
    thresholds = sorted(row["threshold"] for row in next(iter(first.values())))
    gap = _gap(thresholds)
    for way, found in sweeps.items():
        for name in networks:
            mine = sorted(row["threshold"] for row in found[name])
            if mine != thresholds or gap == 0 or not np.allclose(np.diff(mine), gap):
                raise ValueError(
                    f"thresholds must be the same everywhere and equally far apart; {name!r}, {way}, has {mine}"
                )
    return thresholds


def _gap(thresholds: Sequence[float]) -> float:
    return (thresholds[-1] - thresholds[0]) / max(1, len(thresholds) - 1)


@dataclass(frozen=True)
class _Folds:
    networks: Mapping[str, nn.Module]
    sweeps: Sweeps
    evaluate: Mapping[str, Callable[[nn.Module], float]]
    thresholds: list[float]  # ascending
    plans: Mapping[tuple[str, float], FoldPlan]  # by network and threshold
    # What the live figure has measured, by network and plan: no plan is measured twice.
    measured: dict[tuple[str, tuple[GroupPlan, ...]], dict[str, float]] = field(default_factory=dict)

    @property
    def groups(self) -> tuple[GroupPlan, ...]:
        """The groups of any plan: all plans have the same groups with equal numbers of layers."""
        return next(iter(self.plans.values())).groups

    def controls(self) -> dict[str, Slider | Choice]:
        least, most, gap = self.thresholds[0], self.thresholds[-1], _gap(self.thresholds)
        step = math.floor(gap * 1e6 + 1e-3) / 1e6  # rounded down, so that the slider reaches the last threshold
        start = min(self.thresholds, key=lambda t: abs(t - 0.9))
        return {
            "threshold": Slider("threshold", least, most, step, start, fine=gap / 5 if self.evaluate else None),
            "net": Choice("network", tuple(self.networks)),
        }

    # The chart, whose expressions know the controls as threshold and net ------------------------------------------------

    @property
    def here(self) -> str:
        """Whether a row belongs to the chosen network and threshold, as an expression."""
        return f"datum.net == net && abs(datum.t - threshold) < {_gap(self.thresholds) / 4:g}"

    def chart(self) -> Any:
        """The plan in boxes, what it keeps and costs in words, and the error of all plans as curves."""
        import altair as alt

        totals = data(self._totals())
        words = (sentence(f"datum.{key}", totals, 350, 12).transform_filter(self.here) for key in ("kept", "cost"))
        return alt.vconcat(self._boxes_and_frames(), *words, self._curves(), spacing=8)

    def _boxes(self) -> list[dict[str, Any]]:
        """A row for each layer of each plan: its place x, its line of boxes at y, its colours c and w (ink), its label s."""
        rows = []
        for (net, threshold), plan in self.plans.items():
            for line, group in enumerate(plan.groups):
                fills = cluster_colours(group)
                for place, source in enumerate(group.schedule):
                    sign = "\N{MINUS SIGN}" if group.scales[place] < 0 else ""
                    fill = fills[source]
                    box = {"x": place, "y": _LINE * line, "c": fill, "s": f"{sign}{source}", "w": ink(fill)}
                    rows.append({"net": net, "t": threshold, **box})
        return rows

    def _frames(self) -> list[dict[str, Any]]:
        """A row for each loop of each plan: it spans the boxes from x to before e on the line at y, with label s."""
        rows = []
        for (net, threshold), plan in self.plans.items():
            for line, group in enumerate(plan.groups):
                for loop in group.loops:
                    start = loop.start - 1
                    frame = {"x": start, "e": start + loop.length * loop.repeats, "y": _LINE * line}
                    label = {"s": f"loop \N{MULTIPLICATION SIGN} {loop.repeats}"}
                    rows.append({"net": net, "t": threshold, **frame, **label})
        return rows

    def _values(self, net: str, threshold: float) -> dict[str, float]:
        """The error of one plan, in percent, by way of measuring."""
        return {
            way: next(row["value"] for row in found[net] if row["threshold"] == threshold)
            for way, found in self.sweeps.items()
        }

    def _errors(self) -> list[dict[str, Any]]:
        """A row for each plan and each way of measuring its error."""
        return [
            {"net": net, "t": threshold, "way": way, "error": round(value, 3)}
            for net, threshold in self.plans
            for way, value in self._values(net, threshold).items()
        ]

    def _totals(self) -> list[dict[str, Any]]:
        """A row for each plan: what it keeps and what it costs, in words."""
        rows = []
        for net in self.networks:
            for row in next(iter(self.sweeps.values()))[net]:
                kept = f"{row['distinct']} of {row['total']} layers distinct, {row['parameters']:,} parameters"
                cost = f"test error {_listed(self._values(net, row['threshold']))}"
                rows.append({"net": net, "t": row["threshold"], "kept": kept, "cost": cost})
        return rows

    def _boxes_and_frames(self) -> Any:
        """The chosen plan: a line of boxes per group, with loops framed."""
        import altair as alt

        longest, high = max(len(group.layers) for group in self.groups), _LINE * len(self.groups)
        side = min(34, 350 // longest)  # of a box, in pixels
        size = {"width": side * longest, "height": int(side * high)}
        x_scale = alt.Scale(domain=[0, longest], nice=False)
        y_scale = alt.Scale(domain=[high - 0.9, -0.9], nice=False)
        y_axis = alt.Y("y1:Q", scale=y_scale, axis=None)

        def placed(rows: Any, x: str, y: str) -> Any:
            """The chosen plan's rows at calculated places, since a box is drawn between two corners."""
            chart = alt.Chart(rows, **size).transform_filter(self.here).transform_calculate(x1=x, y1=y)
            return chart.encode(x=alt.X("x1:Q", scale=x_scale, axis=None), y=y_axis)

        names = data({"s": group.name, "y1": _LINE * line - 0.45} for line, group in enumerate(self.groups))
        boxes, frames = data(self._boxes()), data(self._frames())
        return alt.layer(
            alt.Chart(names, **size)
            .mark_text(align="left", fontSize=12)
            .encode(x=alt.value(4), y=y_axis, text="s:N"),
            placed(boxes, "datum.x + 0.1", "datum.y + 0.02")
            .transform_calculate(x2="datum.x + 0.9", y2="datum.y + 0.82")
            .mark_rect(cornerRadius=4, stroke="black", strokeWidth=0.7)
            .encode(x2="x2:Q", y2="y2:Q", color=alt.Color("c:N", scale=None)),
            placed(boxes, "datum.x + 0.5", "datum.y + 0.42")
            .mark_text(fontSize=12)
            .encode(text="s:N", color=alt.Color("w:N", scale=None)),
            placed(frames, "datum.x + 0.02", "datum.y - 0.08")
            .transform_calculate(x2="datum.e - 0.02", y2="datum.y + 0.92")
            .mark_rect(fillOpacity=0, cornerRadius=5, stroke="black", strokeDash=[5, 3])
            .encode(x2="x2:Q", y2="y2:Q"),
            placed(frames, "(datum.x + datum.e) / 2", "datum.y - 0.45").mark_text(fontSize=12).encode(text="s:N"),
        )  # fmt: skip

    def _curves(self) -> Any:
        """The error against the threshold, a line per network and way of measuring, with rings at the chosen plan."""
        import altair as alt

        shades = [COLOURS.get(name, spare) for name, spare in zip(self.networks, CYCLE, strict=False)]
        dashes = [[1, 0], [5, 3], [2, 2]][: len(self.sweeps)]
        ends = [self.thresholds[0], self.thresholds[-1]]
        legend = alt.Legend(orient="bottom", direction="vertical")
        lines = alt.Chart(data(self._errors()), width=250, height=140).encode(
            x=alt.X("t:Q", title="threshold", scale=alt.Scale(domain=ends, nice=False, reverse=True)),
            y=alt.Y("error:Q", title="test error (%)"),
            color=alt.Color(
                "net:N", title=None, legend=legend, scale=alt.Scale(domain=list(self.networks), range=shades)
            ),
            strokeDash=alt.StrokeDash(
                "way:N", title=None, legend=legend, scale=alt.Scale(domain=list(self.sweeps), range=dashes)
            ),
        )
        rings = lines.transform_filter(self.here).mark_point(size=120, strokeWidth=2.5, filled=False, strokeDash=[1, 0])
        return alt.layer(lines.mark_line(strokeWidth=2), rings)

    # The live figure ----------------------------------------------------------------------------------------------------

    def draw(self, threshold: float, net: str) -> Figure:
        """The same picture with matplotlib, at any threshold, with its error measured on the spot."""
        with exploring():
            plan = plan_fold(self.networks[net], threshold)
        figure = plots.plan(plan)
        if self.evaluate and (net, plan.groups) not in self.measured:
            folded = fold(self.networks[net], plan)
            self.measured[net, plan.groups] = {way: measure(folded) for way, measure in self.evaluate.items()}
        told = [f"{plan.distinct_layers} of {plan.total_layers} layers distinct"]
        if self.evaluate:
            told.append(_listed(self.measured[net, plan.groups]))
        figure.suptitle(", ".join(told), fontsize=10)
        return figure


def _listed(errors: Mapping[str, float]) -> str:
    """Errors in percent, in words."""
    return ", ".join(f"{value:.1f}% ({way})" for way, value in errors.items())
