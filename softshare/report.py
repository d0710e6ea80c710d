"""The poster's tables beside what records hold. Reads files, never trains."""

from __future__ import annotations

import csv
import html
import statistics
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path

from .experiments import Record

TABLES = ("cifar", "imagenet", "search")

NOT_RUN = "not run"


def paper_table(name: str) -> list[dict[str, str]]:
    """The rows of a published table as they stand in data/paper/<name>.csv: "cifar", "imagenet" or "search".

    An installed package brings its own copy of the files. Raises ValueError for an unknown table.
    """
    if name not in TABLES:
        raise ValueError(f"unknown table {name!r}; known: {', '.join(TABLES)}")
    checkout = Path(__file__).resolve().parent.parent / "data" / "paper" / f"{name}.csv"
    packaged = resources.files(__package__) / "paper" / f"{name}.csv"
    text = (checkout if checkout.is_file() else packaged).read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


def measured(records: Sequence[Record], recipe: str, metric: str, data: str) -> str:
    """What records say of one cell: mean, spread, runs, profile and data edition; "not run" without a record.

    Only records of profile "paper" fill a cell of the paper's schedule; shorter ones are never shown in their place.
    """
    runs = [
        record
        for record in records
        if record.recipe == recipe
        and record.profile == "paper"
        and record.data.get("source", "").split(" (")[0] == data
        and metric in record.metrics
    ]
    if not runs:
        return NOT_RUN
    values = [float(record.metrics[metric]) for record in runs]
    sources = ", ".join(sorted({record.data["source"] for record in runs}))
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread} ({len(values)} run{'s' * (len(values) > 1)}, paper, {sources})"


def as_html(rows: Sequence[Mapping[str, str]], caption: str) -> str:
    """Rows of text as an HTML table with a caption; keys are the header."""
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in rows[0])
    body = "".join(
        "<tr>"
        + "".join(
            f'<th scope="row">{html.escape(value)}</th>' if place == 0 else f"<td>{html.escape(value)}</td>"
            for place, value in enumerate(row.values())
        )
        + "</tr>\n"
        for row in rows
    )
    return (
        f'<table class="docutils">\n<caption>{html.escape(caption)}</caption>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>"
    )


def finding(text: str, title: str = "What we measured") -> str:
    """A box of HTML for numbers that a notebook computed; reads well in the book, in JupyterLab and on Colab.

    Args:
        text: plain text; paragraphs are separated by empty lines.
    """
    paragraphs = "".join(f"<p>{html.escape(' '.join(part.split()))}</p>" for part in text.strip().split("\n\n"))
    head = f'<p class="admonition-title"><strong>{html.escape(title)}</strong></p>'
    return f'<div class="admonition tip">{head}{paragraphs}</div>'
