"""What the interactive charts have in common: a picture of squares, a sentence that follows the controls, colour ramps.

Altair is imported where it is used, since the static plots must work without it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import altair as alt

BLUES = ("#FFFFFF", "#DEEBF7", "#9ECAE1", "#4292C6", "#08519C", "#08306B")
"""From 0 to 1, for similarities."""

RED_TO_BLUE = ("#67001F", "#D6604D", "#FDDBC7", "#F7F7F7", "#D1E5F0", "#4393C3", "#053061")
"""From negative to positive, for weights."""


def data(rows: Iterable[Mapping[str, Any]]) -> alt.Data:
    """Rows of named values, as the data of a chart."""
    import altair as alt

    return alt.Data(values=list(rows))


def squares(
    rows: alt.Data,
    value: str,
    title: str,
    side: int,
    domain: Sequence[float],
    colours: Sequence[str],
    shape: float = 1.0,
) -> alt.Chart:
    """One rectangle for each row of data, at its x and y, coloured by an expression.

    Args:
        rows: with "x" and "y", counted from the left and from the top, and whatever `value` uses.
        value: a Vega expression of the row (``datum``) and of the controls.
        title: shown above the picture.
        side: width of the picture in screen pixels.
        domain: the smallest and the largest value; values beyond them get their colours.
        colours: the ramp between them.
        shape: height / width of the picture.
    """
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


def sentence(expression: str, rows: alt.Data | None = None, width: int = 340, size: int = 13) -> alt.Chart:
    """One line of text, made by a Vega expression from one row of data (none: from the controls alone).

    `width` and the font's `size` are in screen pixels.
    """
    import altair as alt

    chart = alt.Chart(data([{}]) if rows is None else rows, width=width, height=size + 7)
    return written(chart, expression, size)


def written(chart: alt.Chart, expression: str, size: int = 13) -> alt.Chart:
    """A chart that shows its rows, after the transforms so far, as text: for a sentence about many rows."""
    import altair as alt

    return (
        chart.transform_calculate(text=expression)
        .mark_text(align="left", baseline="middle", fontSize=size)
        .encode(text="text:N", x=alt.value(0))
    )
