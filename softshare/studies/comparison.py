"""The poster's networks side by side: parameters, multiply-adds, seconds per step; shared networks beside their twins."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Any, NamedTuple

from ..models import Network, multiply_adds, parameters
from ..training.settings import Schedule
from .sources import SOURCES
from .tables import COLUMNS, paper_table

NOT_MEASURED = "not measured"
SHARED = ("SWRN 28-6-2", "SWRN 28-10-4", "SWRN 28-10-2", "SWRN 28-14-2", "SWRN 28-18-2", "SWRN 40-8-8")
"""Shared networks with fewer templates than layers: those of the poster, and SWRN 28-10-4."""


class Reading(NamedTuple):
    """One way to read what a source says about a network.

    Attributes:
        network: its name.
        text: the reading in words.
        options: of `softshare.models.build`; those of the reading that we use are empty.
    """

    network: str
    text: str
    options: Mapping[str, Any]


READINGS = (
    Reading("NASNet-A 27.6M", "six normal cells in a row, the reduction cell of the paper's figure", {}),
    Reading("NASNet-A 27.6M", "six, the reduction cell of the released code", {"cell": "NASNet-A"}),
    Reading("NASNet-A 27.6M", "seven, the reduction cell of the released code", {"cell": "NASNet-A", "repeats": 7}),
    Reading("DARTS", "the cell released in August 2018", {}),
    Reading("DARTS", "the cell released in June 2018", {"cell": "DARTS V1"}),
    Reading("ENAS", "six normal cells in a row", {}),
    Reading("ENAS", "five, as in the released script", {"repeats": 5}),
)
"""Where a source can be read in several ways: first the reading that we use, then the others.

:meta hide-value:
"""


def network_of(model: str) -> Network:
    """The network of a row of the poster, without what changes no count: dropout and cutout.

    Raises ValueError for an unknown name.
    """
    return replace(Network.parse(model.removesuffix(" cutout")), dropout=False)


@functools.cache
def counts(network: Network) -> tuple[int, int]:
    """Parameters and multiply-adds of a network; each is counted once per process, since that takes up to two seconds."""
    return parameters(network), multiply_adds(network)


def seconds_in(record: Mapping[str, Any], network: Network) -> float | None:
    """The median seconds of a network's training step in a record of `softshare bench --networks`; None without it."""
    for group in record["groups"].values():
        if str(network) in group["seconds"]:
            return median(group["seconds"][str(network)])
    return None


def side_by_side(table: str, timings: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The rows of a published table with what each network costs, counted and measured.

    Args:
        table: "cifar", "imagenet" or "search".
        timings: records from `softshare.speed.networks.network_timings`; each fills a column.

    Raises ValueError for an unknown table.
    """
    rows = []
    for row in paper_table(table):
        network = network_of(row["model"])
        cells = {"network": row["model"], "parameters, poster (millions)": row["parameters_millions"]}
        cells |= _costs(network, timings)
        cells |= {f"{title} error, poster (%)": row[column] for title, column, *_ in COLUMNS[table]}
        cells |= {"GPU days, poster": row["gpu_days"]} if "gpu_days" in row else {}
        rows.append(cells)
    return rows


def beside_twins(timings: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Each network of `SHARED` between the plain network of its size and its twin of equal parameters.

    Shares are of the plain network's parameters and multiply-adds, in percent; `timings` as in `side_by_side`.
    """
    rows = []
    for name in SHARED:
        network = Network.parse(name)
        plain, twin = network.plain, network.twin
        assert twin is not None, name
        for each, kind in ((plain, "plain"), (network, "shared"), (twin, "twin")):
            cells = {"network": str(each), "what it is": kind} | _costs(each, timings)
            shares = (100 * part / whole for part, whole in zip(counts(each), counts(plain), strict=True))
            cells |= {
                f"{what}, share (%)": f"{share:.0f}"
                for what, share in zip(("parameters", "multiply-adds"), shares, strict=True)
            }
            rows.append(cells)
    return rows


def readings() -> list[dict[str, str]]:
    """`READINGS` with their parameters, beside the poster's."""
    published = {row["model"]: row["parameters_millions"] for row in paper_table("search")}
    return [
        {
            "network": reading.network,
            "reading": reading.text,
            "parameters (millions)": f"{parameters(reading.network, **reading.options) / 1e6:.2f}",
            "parameters, poster (millions)": published[reading.network],
            "used": "no" if reading.options else "yes",
        }
        for reading in READINGS
    ]


def schedules() -> list[dict[str, str]]:
    """How each compared network is trained in profile "paper", after its own source, and what the source does not say."""
    rows = []
    for name, source in SOURCES.items():
        chosen = Schedule(**source.schedule)
        falls = (
            "cosine" if chosen.annealing == "cosine" else f"/ {1 / chosen.factor:g} at {_percents(chosen.milestones)}"
        )
        cycles = f", restarts after {chosen.cycle}, {chosen.cycle * (1 + chosen.growth)}, ..." if chosen.cycle else ""
        extras = [f"gradient norm at most {chosen.clip:g}"] if chosen.clip else []
        extras += (
            [f"drop-path {source.options['drop_path']:g}", "auxiliary head"] if "drop_path" in source.options else []
        )
        extras += [f"dropout {source.options['dropout']:g}"] if "dropout" in source.options else []
        rows.append(
            {
                "network": name,
                "epochs": str(chosen.epochs),
                "batch": str(chosen.batch_size),
                "rate": f"{chosen.rate:g}, {falls}{cycles}",
                "weight decay": f"{chosen.weight_decay:g}",
                "with": ", ".join(extras) or "-",
                "source": source.note,
            }
        )
    return rows


def _percents(fractions: Sequence[float]) -> str:
    return " and ".join(f"{100 * fraction:.0f}%" for fraction in fractions)


def _costs(network: Network, timings: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    weights, work = counts(network)
    cells = {"parameters (millions)": f"{weights / 1e6:.2f}", "multiply-adds (billions)": f"{work / 1e9:.2f}"}
    for record in timings:
        seconds = seconds_in(record, network)
        title = f"seconds per step, {record['versions']['hardware']}"
        cells[title] = NOT_MEASURED if seconds is None else f"{seconds:.3g}"
    return cells if timings else cells | {"seconds per step": NOT_MEASURED}
