"""What the records of the shortest-path curriculum show: curves over seeds, structure by phase, effects of other readings.

Reads records, never trains. Recipes and measurements: `softshare.studies.paths`; verdicts: `softshare.studies.verdicts`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from .intervals import LEVEL
from .measures import MEASURES, coefficients_at, phases_of, structure_at
from .paths import FOLDED_AT, HALF, LADDER, READINGS, named
from .records import Record
from .tables import is_planned
from .verdicts import paired, read_claims


def runs_of(records: Sequence[Record], recipe: str, profile: str, seeds: int = 10) -> dict[int, Record]:
    """The runs of a recipe's current version in a profile by seed, from seed number `seeds` on: lower ones were trials."""
    found = [record for record in records if record.recipe == recipe and record.seed >= seeds]
    return {record.seed: record for record in found if is_planned(record, profile)}


def pairs_in(records: Sequence[Record], profile: str, readings: Sequence[str] = ()) -> list[tuple[Record, Record]]:
    """Pairs of runs of SCNN and CNN in a reading by seed, by the rules of `softshare.studies.verdicts.paired`."""
    claim = next(claim for claim in read_claims() if claim.claim == "accuracy")
    return paired(records, named("SCNN", readings), named("CNN", readings), profile, claim)


def best_pairs(records: Sequence[Record]) -> tuple[str, list[tuple[Record, Record]]]:
    """The profile that is judged and its pairs of SCNN and CNN: "paper" if it has two, otherwise the one with more."""
    found = {profile: pairs_in(records, profile) for profile in ("paper", "short")}
    return max(found.items(), key=lambda item: (min(len(item[1]), 2), item[0] == "paper"))


def curve(record: Record, key: str) -> np.ndarray:
    """A column of the history, one value per epoch: "reestimated_exact", "held_out_f1", "loss", ..."""
    return np.array([row[key] for row in record.history])


def by_phase(record: Record, name: str, key: str = "exact") -> list[float]:
    """ "phase", "before" or "rule" scores of all phases, and for the last two also of the box beyond the last."""
    phases = range(1, phases_of(record) + 2)
    return [record.metrics[f"{name}{phase}_{key}"] for phase in phases if f"{name}{phase}_{key}" in record.metrics]


def structure_rows(record: Record) -> list[dict[str, str]]:
    """How alike layers are at the end of each phase, beside chance and by weights, and what folds at what cost."""
    rows, phases = [], phases_of(record)
    for phase in range(1, phases + 1):
        found = structure_at(record, phase / phases)
        last = next(row for row in reversed(record.history) if row["phase"] == phase)
        row = {"end of phase": str(phase)}
        for name, test in found.items():
            row[name] = f"{test.observed:.2f} (chance {test.chance:.2f}, p {test.p:.2g})"
        row["weights: mean, largest"] = f"{last['weights_mean']:.2f}, {last['weights_largest']:.2f}"
        row["folds"] = _folds(record, phase, last["reestimated_exact"])
        rows.append(row)
    return rows


def _folds(record: Record, phase: int, before: float) -> str:
    """The highest threshold at which layers fold, and what is left."""
    layers = sum(len(rows) for rows in coefficients_at(record).values())
    for threshold in reversed(FOLDED_AT):
        left = record.metrics[f"fold{phase}_{threshold:g}_layers"]
        if left < layers:
            exact = record.metrics[f"fold{phase}_{threshold:g}_exact"]
            return f"at {threshold:g}: {left:.0f} of {layers} layers, exact {before:.1%} to {exact:.1%}"
    return f"nothing down to {min(FOLDED_AT):g}"


class Effect(NamedTuple):
    """How much a reading changes the difference between two networks.

    Attributes:
        mean: with it minus without it, in percentage points.
        interval: at 95%, from the residuals of a model without interactions.
    """

    mean: float
    interval: tuple[float, float]


def reading_effects(
    records: Sequence[Record], measure: str, seed: int = 10
) -> tuple[dict[tuple[str, ...], float], dict[str, Effect]]:
    """The difference SCNN - CNN in each reading, and each factor's effect on it.

    Returns the differences in percentage points by reading, of those that were run in profile short at that seed, and, if
    all eight were run, the effects, with "mean of all readings" first. Their intervals come from the three residuals of a
    model without interactions, so an interaction of two readings shows as a wider interval.
    """
    differences = {}
    for each in HALF:
        for one, other in pairs_in(records, "short", each):
            if one.seed == seed:
                differences[each] = MEASURES[measure](one) - MEASURES[measure](other)
    if len(differences) < len(HALF):
        return differences, {}
    signs = np.array([[1.0, *(1.0 if name in each else -1.0 for name in READINGS)] for each in HALF])
    values = np.array([differences[each] for each in HALF])
    found = signs.T @ values / len(HALF)  # the columns are orthogonal
    freedom = len(HALF) - signs.shape[1]
    variance = float(((values - signs @ found) ** 2).sum()) / freedom / len(HALF)
    half = stats.t.ppf((1 + LEVEL) / 2, freedom) * np.sqrt(variance)
    # An effect is the difference of two halves: twice its coefficient. The mean is its own.
    sizes = {"mean of all readings": (found[0], half)} | {
        name: (2 * mean, 2 * half) for name, mean in zip(READINGS, found[1:], strict=True)
    }
    return differences, {
        name: Effect(float(mean), (float(mean - width), float(mean + width))) for name, (mean, width) in sizes.items()
    }


def ladder_rows(records: Sequence[Record], profile: str = "short") -> list[dict[str, str]]:
    """From CNN and soft sharing to a network built to search: the three measures, means over seeds, and the seeds."""
    rows = []
    for name in ("CNN", "SCNN", *LADDER):
        runs = list(runs_of(records, name, profile).values())
        row = {"network": name, "runs": str(len(runs) or "not run")}
        for measure in ("adaptation", "accuracy", "extrapolation"):
            row[measure] = f"{np.mean([MEASURES[measure](run) for run in runs]):.1f}" if runs else ""
        rows.append(row)
    return rows


def step_rows(records: Sequence[Record], profile: str = "short") -> list[dict[str, str]]:
    """The exact rate (%) of looped networks after other numbers of steps than trained, by box, mean over seeds."""
    rows = []
    for name in LADDER:
        runs = list(runs_of(records, name, profile).values())
        keys = [key for key in (runs[0].metrics if runs else ()) if key.startswith("steps")]
        for box in dict.fromkeys(key.split("_")[1] for key in keys):
            row = {"network": name, "box": box.removeprefix("box")}
            for key in (key for key in keys if key.split("_")[1] == box):
                steps = key.split("_")[0].removeprefix("steps")
                row[f"{steps} steps"] = f"{100 * np.mean([run.metrics[key] for run in runs]):.1f}"
            rows.append(row)
    return rows


def cost(records: Sequence[Record]) -> Mapping[str, Any]:
    """What runs took: their number, hours in all, and the kinds of hardware."""
    return {
        "runs": len(records),
        "hours": sum(record.execution["seconds"] for record in records) / 3600,
        "hardware": ", ".join(sorted({record.execution["hardware"] for record in records})),
    }
