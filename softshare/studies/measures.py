"""What claims are judged by: numbers and signs that are read off a record.

A measure is a number in %, compared between runs. A sign is something that a run shows or does not show.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ..similarity import Beyond, beyond_chance, layer_similarity, off_diagonal
from .folding import plan_from_snapshots
from .records import Record

CHANCE = 0.05
"""Structure counts if chance gives as much with at most this probability."""

FOLD = 0.8
"""The similarity at which the poster's network is remembered to have been folded; not confirmed."""


def _epochs(record: Record, phase: int, part: slice) -> float:
    """The mean exact rate with re-estimated statistics over some epochs of a phase (from 1), in %."""
    rows = [row for row in record.history if row["phase"] == phase][part]
    return 100.0 * float(np.mean([row["reestimated_exact"] for row in rows]))


def phases_of(record: Record) -> int:
    """The number of phases of a curriculum's record."""
    return int(max(row["phase"] for row in record.history))


def adaptation(record: Record) -> float:
    """The mean exact rate over the first ten epochs of the second and later phases, in %."""
    return float(np.mean([_epochs(record, phase, slice(0, 10)) for phase in range(2, phases_of(record) + 1)]))


def accuracy(record: Record) -> float:
    """The mean exact rate over the last five epochs of the last phase, in %."""
    return _epochs(record, phases_of(record), slice(-5, None))


def extrapolation(record: Record) -> float:
    """The exact rate on the next phase's grids before training on them, mean over all phases but the last, in %."""
    rates = [record.metrics[f"before{phase}_exact"] for phase in range(2, phases_of(record) + 1)]
    return 100.0 * float(np.mean(rates))


def similarity(record: Record) -> float:
    """The mean similarity of two layers of a group at the end of training, mean over groups, in %."""
    last = coefficients_at(record)
    means = off_diagonal({name: layer_similarity(rows) for name, rows in last.items()})
    return 100.0 * float(np.mean(list(means.values())))


def _metric(name: str) -> Callable[[Record], float]:
    return lambda record: float(record.metrics[name])


MEASURES: dict[str, Callable[[Record], float]] = {
    "adaptation": adaptation,
    "accuracy": accuracy,
    "extrapolation": extrapolation,
    "similarity": similarity,
    **{name: _metric(name) for name in ("error", "top1_error", "top5_error")},
}
"""Functions from a record to a number in %."""


def coefficients_at(record: Record, part: float = 1.0) -> dict[str, Tensor]:
    """The coefficients (L, k) of each group after a part of the training, from the last snapshot up to then."""
    snapshots = record.similarity()
    limit = part * len(record.history) + 1e-9
    place = max(number for number, step in enumerate(snapshots.steps) if step <= limit)
    return {name: torch.from_numpy(found[place]) for name, found in snapshots.coefficients.items()}


def structure_at(record: Record, part: float = 1.0) -> dict[str, Beyond]:
    """The statistics of `softshare.similarity.beyond_chance` after a part of the training, given where it started."""
    return beyond_chance(coefficients_at(record, part), coefficients_at(record, 0.0))


def _structure(record: Record, part: float) -> bool:
    """Whether one of the three statistics is beyond chance, three chances allowed for."""
    return min(test.p for test in structure_at(record, part).values()) <= CHANCE / 3


def _pair(record: Record, part: float) -> bool:
    """Whether some pair of layers could be folded, and is more alike than chance makes the most similar pair."""
    largest = structure_at(record, part)["largest"]
    return largest.observed >= FOLD and largest.p <= CHANCE


def _loops(record: Record) -> bool:
    return _pair(record, 1.0) and any(group.loops for group in plan_from_snapshots(record, FOLD).groups)


def _half(record: Record, folds: Sequence[Record]) -> bool | None:
    for found in folds:
        if found.identity.chosen["of"] == record.identity.hash and f"distinct_at_{FOLD:g}" in found.metrics:
            few = 2 * found.metrics[f"distinct_at_{FOLD:g}"] <= found.metrics["layers"]
            cheap = found.metrics[f"reestimated_change_at_{FOLD:g}"] <= 0.3
            return bool(few and cheap and _pair(record, 1.0))
    return None  # not folded yet


SIGNS: dict[str, Callable[[Record, Sequence[Record]], bool | None]] = {
    "structure": lambda record, folds: _structure(record, 1.0),
    "structure by 3%": lambda record, folds: _structure(record, 0.03),
    "a pair by 2%": lambda record, folds: _pair(record, 0.02),
    "loops": lambda record, folds: _loops(record),
    "half as many layers": _half,
}
"""Functions from a record and the records of all folds of its recipe to whether the run shows it; None: not known."""


EARLY = ("structure by 3%", "a pair by 2%")
"""Signs that speak of a part of the paper's schedule: in a shorter one that part would be less than an epoch."""


def sign_of(name: str, record: Record, records: Sequence[Record]) -> bool | None:
    """Whether a run shows a sign; None if its record does not tell."""
    folds = [found for found in records if found.recipe == f"fold of {record.recipe}"]
    try:
        return SIGNS[name](record, folds)
    except (ValueError, OSError):  # no snapshots
        return None


def raw_f1_wins(records: Sequence[Record], recipe: str, against: str) -> dict[tuple[str, int], bool]:
    """By profile and seed: is the first network ahead in every phase from the second on, in raw F1, mean over the phase?

    This is what a reader of two curves of raw F1, one run each, would see.
    """
    found: dict[str, dict[tuple[str, int], list[float]]] = {recipe: {}, against: {}}
    for record in records:
        if record.recipe in found:
            means = [
                float(np.mean([row["held_out_f1"] for row in record.history if row["phase"] == phase]))
                for phase in range(2, phases_of(record) + 1)
            ]
            found[record.recipe][record.profile, record.seed] = means
    both = sorted(found[recipe].keys() & found[against].keys())
    return {key: all(a > b for a, b in zip(found[recipe][key], found[against][key], strict=True)) for key in both}
