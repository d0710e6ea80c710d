"""The poster's tables next to the results in records. Reads files, never trains."""

from __future__ import annotations

import csv
import html
import statistics
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..files import bundled_folder
from ..similarity import beyond_chance
from ..speed import networks
from ..speed.benchmark import interval, load_benchmark
from . import folding
from .recipes import RECIPES, make_plan, study_of
from .records import Record

TABLES = ("cifar", "imagenet", "search")

NOT_RUN = "not run"
NOT_SEEN = "never"


def paper_table(name: str) -> list[dict[str, str]]:
    """The rows of a published table, from data/paper/<name>.csv: "cifar", "imagenet" or "search".

    An installed package contains its own copy of the files. Raises ValueError for an unknown table.
    """
    if name not in TABLES:
        raise ValueError(f"unknown table {name!r}; known: {', '.join(TABLES)}")
    path = bundled_folder("paper") / f"{name}.csv"
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


def benchmarks() -> list[dict[str, Any]]:
    """The records of `softshare bench` in data/benchmarks, by file name; a bad one is left out with a warning."""
    found = []
    for path in sorted(bundled_folder("benchmarks").glob("*.json")):
        if path.match(networks.PATTERN):
            continue  # timings of networks, see `softshare.speed.networks.network_timings`
        try:
            found.append(load_benchmark(path))
        except (ValueError, OSError) as error:
            warnings.warn(f"left out: {error}", stacklevel=2)
    return found


def speeds(record: Mapping[str, Any]) -> list[dict[str, str]]:
    """The ratios of a benchmark's record as rows of text: median over rounds, range, and a 95% interval of the median."""
    rows, seconds = [], record["steps"]["seconds"]
    for name, (median, least, most) in (record["ratios"] | record["generator"]["ratios"]).items():
        low, middle, high = (f"{float(f'{value:.3g}'):g}" for value in (least, median, most))  # 1360, not 1.36e+03
        row = {"ratio": name, "median": middle, "range": f"{low} to {high}", "interval": ""}
        above, _, below = name.partition(" / ")
        if above in seconds and below in seconds:
            row["interval"] = " to ".join(f"{value:.3g}" for value in interval(seconds, above, below))
        rows.append(row)
    return rows


def measured(records: Sequence[Record], recipe: str, metric: str, data: str, digits: int = 2) -> str:
    """The content of one cell, from records: mean, spread, runs, profile and data edition; "not run" without a record.

    Only records of profile "paper", of the recipe's current version, fill a cell of the paper's schedule; shorter runs are
    never shown in their place. Different editions of a data set are kept apart.
    """
    runs = {
        (record.data["source"], record.identity.hash): float(record.metrics[metric])
        for record in records
        if record.recipe == recipe
        and is_planned(record, "paper")
        and of_data(record, data)
        and metric in record.metrics
    }
    sources = sorted({source for source, _ in runs})
    if len(sources) > 1:
        parts = ([record for record in records if record.data.get("source") == source] for source in sources)
        return "; ".join(measured(part, recipe, metric, data, digits) for part in parts)
    if not runs:
        return NOT_RUN
    values = list(runs.values())
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread} ({len(values)} run{'s' * (len(values) > 1)}, paper, {sources[0]})"


WHOLE = {"CIFAR-10": (50_000, 10_000), "CIFAR-100": (50_000, 10_000), "ImageNet": (1_281_167, 50_000)}
"""The numbers of training and test images in the published data sets."""


def of_data(record: Record, data: str) -> bool:
    """Whether a record is for a data set in any edition ("CIFAR-10 (JPEG)") and, for images, for all of it."""
    sizes = record.config.get("sizes", {})
    whole = WHOLE.get(data) in (None, (sizes.get("train"), sizes.get("test")))
    return whole and record.data.get("source", "").split(" (")[0] == data


def is_planned(record: Record, profile: str) -> bool:
    """Whether a record is for the current version of its recipe in that profile."""
    if record.profile != profile or record.recipe not in RECIPES:
        return False
    plan = make_plan(record.recipe, profile, record.seed)
    return record.identity == study_of(plan).identity(plan, record.identity.fingerprint)


COLUMNS = {
    "cifar": (
        ("C-10", "cifar10_error", "error", "CIFAR-10"),
        ("C-100", "cifar100_error", "error", "CIFAR-100"),
    ),
    "imagenet": (("top-1", "top1_error", "top1_error", "ImageNet"), ("top-5", "top5_error", "top5_error", "ImageNet")),
    "search": (("C-10", "cifar10_error", "error", "CIFAR-10"),),
}
"""For each table: the column's title, its name in the CSV file, the metric in records, and the data set."""

NOT_PLANNED = "not planned"


def paper_beside_ours(name: str, records: Sequence[Record]) -> list[dict[str, str]]:
    """A published table with a column "..., measured here" after each figure, filled only from records.

    Raises ValueError for an unknown table.
    """
    rows = []
    for row in paper_table(name):
        cells = {"model": row["model"], "parameters (millions)": row["parameters_millions"]}
        cells |= {"GPU days, poster": row["gpu_days"]} if "gpu_days" in row else {}
        for title, column, metric, data in COLUMNS[name]:
            cells[f"{title}, poster"] = row[column]
            cells[f"{title}, measured here"] = measured(records, row["model"], metric, data)
        rows.append(cells)
    return rows


def others_at_the_papers_schedule(records: Sequence[Record]) -> list[dict[str, str]]:
    """Our CIFAR recipes without a row in a published table: the controls, and the network of the similarity figures."""
    published = {row["model"] for name in TABLES for row in paper_table(name)}
    rows = []
    for name, recipe in RECIPES.items():
        if recipe.study == "cifar" and name not in published:
            cells = {"model": name, "what for": recipe.shows}
            for title, _, metric, data in COLUMNS["cifar"]:
                run = data.lower().replace("-", "") in recipe.data
                cells[f"{title}, measured here"] = measured(records, name, metric, data) if run else NOT_PLANNED
            rows.append(cells)
    return rows


def paths_at_the_papers_schedule(records: Sequence[Record]) -> list[dict[str, str]]:
    """The share of grids that each network solves at the end of each phase of the curriculum, and the rectangle rule's."""
    paths = (recipe for recipe in RECIPES.values() if recipe.study == "paths")
    names = [recipe.name for recipe in paths if not recipe.reading and not recipe.shuffled]
    phases = {f"phase {number}": number for number in range(1, 6)}
    data = "shortest paths, generated"
    rows = [
        {"network": name}
        | {phase: measured(records, name, f"phase{number}_exact", data, 3) for phase, number in phases.items()}
        for name in names
    ]
    rule = {"network": "rectangle rule"}
    for phase, number in phases.items():
        found = {measured([record], record.recipe, f"rule{number}_exact", data, 3) for record in records} - {NOT_RUN}
        rule[phase] = sorted(found)[0].split(" ")[0] if found else NOT_RUN
    return [*rows, rule]


def structure(
    records: Sequence[Record], recipe: str = "SWRN 40-8-8", threshold: float = 0.8
) -> dict[str, list[dict[str, str]]]:
    """How similar layers have become in each run of a network in any profile but fast, one row per stage.

    The largest similarity of a pair and the chessboard are shown beside chance, see `softshare.similarity.beyond_chance`,
    and the plan at a threshold next to the first epoch after which some pair reaches it; the last row counts all stages
    together. The keys describe the runs. Snapshots that are missing or do not belong to their record are left out with a
    warning.
    """
    found: dict[str, list[dict[str, str]]] = {}
    for record in records:
        if record.recipe != recipe or record.profile == "fast" or not record.snapshots:
            continue
        try:
            recorder = record.similarity()
        except (ValueError, OSError) as error:
            warnings.warn(f"left out: {error}", stacklevel=2)
            continue
        rows = []
        start, end = (
            {name: torch.from_numpy(found[place]) for name, found in recorder.coefficients.items()} for place in (0, -1)
        )
        for group in folding.plan_from_snapshots(record, threshold).groups:
            stage, _, plan = str(group).partition(": ")
            largest = recorder.largest()[group.name]
            one = group.name
            reached = next(
                (step for step, value in zip(recorder.steps, largest, strict=True) if value >= threshold), None
            )
            rows.append(
                {
                    "stage": stage,
                    **_beside_chance({one: end[one]}, {one: start[one]}),
                    f"first at {threshold:g} (epoch)": NOT_SEEN if reached is None else f"{reached:.2g}",
                    f"plan at {threshold:g}": plan,
                }
            )
        rows.append(dict.fromkeys(rows[0], "") | {"stage": "all", **_beside_chance(end, start)})
        epochs, test_error = record.config["schedule"]["epochs"], record.metrics["error"]
        found[
            f"{record.network}, profile {record.profile} ({epochs} epochs), seed {record.seed}, {record.data['source']}: "
            f"test error {test_error:.2f}%"
        ] = rows
    return found


def _beside_chance(end: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> dict[str, str]:
    found = beyond_chance(end, start)
    names = {"largest": "largest similarity", "chessboard": "chessboard"}
    return {
        title: f"{found[name].observed:.2f} (by chance up to {found[name].chance:.2f}, p {found[name].p:.2g})"
        for name, title in names.items()
    }


def as_text(rows: Sequence[Mapping[str, str]], caption: str) -> str:
    """Rows of text as a table for a terminal; keys are the header."""
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}
    lines = [{name: name for name in widths}, {name: "-" * width for name, width in widths.items()}, *rows]
    return "\n".join(
        [caption, *("  ".join(row[name].ljust(width) for name, width in widths.items()).rstrip() for row in lines)]
    )


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
    """An HTML box for numbers that a notebook computed; it works in the book, in JupyterLab and on Colab.

    Args:
        text: plain text; paragraphs are separated by empty lines.
    """
    paragraphs = "".join(f"<p>{html.escape(' '.join(part.split()))}</p>" for part in text.strip().split("\n\n"))
    head = f'<p class="admonition-title"><strong>{html.escape(title)}</strong></p>'
    return f'<div class="admonition tip measured">{head}{paragraphs}</div>'
