"""Verdicts on the poster's claims: computed from records alone, by rules that stand in data/paper/claims.csv.

The rules were written down before the runs that they judge. ``softshare report`` prints the verdicts, and the pages of the
book read the same ones.

- A **contrast** compares two recipes seed by seed. It is "reproduced" if the interval of the mean difference excludes zero
  in the claim's direction, "contradicted" if it does so in the other, "no difference worth having" if it lies within the
  claim's margin on both sides, otherwise "not resolved". Intervals are Student's, at 95% over all claims of a study
  together (Holm, 1979). A sign-flip test, which assumes no distribution, stands beside it.
- **Not worse** is a contrast that allows for the margin: "reproduced" if the whole interval is above minus the margin.
- A **value** is a cell of a published table: "reproduced" if the whole 95% interval of our mean lies within the margin
  around it, "contradicted" if the whole interval lies outside.
- The rest is not judged by runs: what follows from a definition names the test that shows it; an argument stays one.

Letters: n pairs or runs.
"""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..files import bundled_folder
from .records import Record
from .tables import NOT_RUN, is_planned, of_data, paper_table

REPRODUCED, CONTRADICTED, NOT_RESOLVED = "reproduced", "contradicted", "not resolved"
NO_DIFFERENCE = "no difference worth having"
DEFINITION = "follows from the definition, tested"
ARGUMENT = "an argument, not tested"
INCOMPARABLE = "not comparable"
ONE_RUN = "one run: told, not judged"

KINDS = ("contrast", "not worse", "value", "figure", "definition", "argument")
LEVEL = 0.95

_PROFILES = ("paper", "short")
"""The profiles that can judge, the best first; values need the first."""


@dataclass(frozen=True)
class Claim:
    """A row of data/paper/claims.csv.

    Attributes:
        claim: its name.
        says: the poster's wording.
        place: where it stands on the poster.
        kind: one of `KINDS`.
        study: claims of one study are judged together.
        recipe, against: what is compared with what, by the names of recipes; a value has no `against`.
        measure: one of `MEASURES`.
        better: "higher" or "lower": in which direction the recipe is said to differ.
        margin: in the measure's unit; how large a difference is worth having, or how close a value must be.
        data: the data set's name in records; "" for generated grids.
        published: the published figure of a value, as "table/column", found in data/paper.
        test: the test that shows what follows from a definition, as "file::name".
        rule: the rule in words.
    """

    claim: str
    says: str
    place: str
    kind: str
    study: str
    recipe: str = ""
    against: str = ""
    measure: str = ""
    better: str = ""
    margin: float = 0.0
    data: str = ""
    published: str = ""
    test: str = ""
    rule: str = ""


@dataclass(frozen=True)
class Verdict:
    """What the records say of a claim.

    Attributes:
        claim: the claim.
        verdict: one of the words above, with the profile if that is not "paper".
        n: pairs or runs.
        mean: of the differences, positive in the claim's direction, or of the values; NaN without runs.
        interval: of the mean; NaN with fewer than two.
        level: the interval's confidence after Holm's correction.
        sign_flip: p of the sign-flip test, two-sided; NaN where there is none.
        profile: of the runs that judge; "" without any.
        needed: pairs or runs that an interval as wide as the margin, or as the published difference, would need at the
            spread seen here; None if the spread is not known.
        note: what else must be said.
    """

    claim: Claim
    verdict: str
    n: int = 0
    mean: float = math.nan
    interval: tuple[float, float] = (math.nan, math.nan)
    level: float = LEVEL
    sign_flip: float = math.nan
    profile: str = ""
    needed: int | None = None
    note: str = ""


def read_claims() -> list[Claim]:
    """All claims, from data/paper/claims.csv. Raises ValueError for a row that does not make sense."""
    text = (bundled_folder("paper") / "claims.csv").read_text(encoding="utf-8")
    found = []
    for row in csv.DictReader(text.splitlines()):
        claim = Claim(**{**row, "margin": float(row["margin"] or 0.0)})  # type: ignore[arg-type]
        if (
            claim.kind not in KINDS
            or claim.measure not in ("", *MEASURES)
            or claim.better not in ("", "higher", "lower")
        ):
            raise ValueError(f"claims.csv: {claim.claim!r} has an unknown kind, measure or direction")
        found.append(claim)
    return found


# ---------------------------------------------------------------------------------------------------------------- measures


def _epochs(record: Record, phase: int, part: slice) -> float:
    """The mean exact rate with re-estimated statistics over some epochs of a phase (from 1), in %."""
    rows = [row for row in record.history if row["phase"] == phase][part]
    return 100.0 * float(np.mean([row["reestimated_exact"] for row in rows]))


def _phases(record: Record) -> int:
    return int(max(row["phase"] for row in record.history))


def adaptation(record: Record) -> float:
    """The mean exact rate over the first ten epochs of the second and later phases, in %."""
    return float(np.mean([_epochs(record, phase, slice(0, 10)) for phase in range(2, _phases(record) + 1)]))


def accuracy(record: Record) -> float:
    """The mean exact rate over the last five epochs of the last phase, in %."""
    return _epochs(record, _phases(record), slice(-5, None))


def extrapolation(record: Record) -> float:
    """The exact rate on the grids of the next phase before training on them, mean over the ends of phases, in %."""
    return 100.0 * float(np.mean([record.metrics[f"before{phase}_exact"] for phase in range(2, _phases(record) + 1)]))


def _metric(name: str) -> Callable[[Record], float]:
    return lambda record: float(record.metrics[name])


MEASURES: dict[str, Callable[[Record], float]] = {
    "adaptation": adaptation,
    "accuracy": accuracy,
    "extrapolation": extrapolation,
    **{name: _metric(name) for name in ("error", "top1_error", "top5_error")},
}
"""What claims are judged by: a function from a record to a number in %."""


# -------------------------------------------------------------------------------------------------------------- statistics


def mean_interval(values: Sequence[float], level: float = LEVEL) -> tuple[float, float]:
    """Student's interval of the mean of n >= 2 values."""
    from scipy import stats

    array = np.asarray(values, dtype=float)
    half = stats.t.ppf((1 + level) / 2, len(array) - 1) * array.std(ddof=1) / math.sqrt(len(array))
    return float(array.mean() - half), float(array.mean() + half)


def p_value(values: Sequence[float]) -> float:
    """p of Student's two-sided test that the mean of n >= 2 values is 0."""
    from scipy import stats

    array = np.asarray(values, dtype=float)
    if array.std(ddof=1) == 0.0:
        return 0.0 if array.mean() else 1.0
    return float(stats.ttest_1samp(array, 0.0).pvalue)


def sign_flip(values: Sequence[float]) -> float:
    """p of the exact two-sided sign-flip test: how often random signs make a sum at least as large; for up to 20 values.

    With n pairs it is at least 2 / 2^n: below five pairs it cannot be small.
    """
    array = np.asarray(values, dtype=float)
    if len(array) > 20:
        return math.nan
    signs = np.array(list(itertools.product((-1.0, 1.0), repeat=len(array))))
    sums = np.abs(signs @ array)
    return float(np.mean(sums >= abs(array.sum()) * (1 - 1e-12)))


def holm_levels(p_values: Sequence[float], level: float = LEVEL) -> list[float]:
    """The confidence of each claim's interval such that "excludes zero" is Holm's step-down test.

    Of m claims the one with the smallest p is tested at (1 - level) / m, the next at (1 - level) / (m - 1), and so on, until
    one fails; those after it are tested at the level at which that one failed.
    """
    order, m = np.argsort(p_values, kind="stable"), len(p_values)
    found, failed = [0.0] * m, 0.0
    for rank, place in enumerate(order):
        allowed = failed or (1 - level) / (m - rank)
        found[place] = 1 - allowed
        if not failed and p_values[place] > allowed:
            failed = allowed
    return found


def needed_for(spread: float, width: float, level: float = LEVEL) -> int | None:
    """The smallest n for which the half-width of the interval of a mean is at most `width`; None for a width of 0."""
    from scipy import stats

    if not width > 0 or not math.isfinite(spread):
        return None

    def enough(n: int) -> bool:
        return bool(stats.t.ppf((1 + level) / 2, n - 1) * spread / math.sqrt(n) <= width)

    high = 2
    while not enough(high):
        high *= 2
    low = max(2, high // 2)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    return low


# ---------------------------------------------------------------------------------------------------------------- verdicts


def verdicts(records: Sequence[Record], claims: Sequence[Claim] | None = None) -> list[Verdict]:
    """The verdict on every claim, in their order. Records of older versions of a study do not count."""
    claims = read_claims() if claims is None else claims
    found = {claim.claim: _judged(claim, records) for claim in claims}
    for study in {claim.study for claim in claims}:
        names = [claim.claim for claim in claims if claim.study == study and isinstance(found[claim.claim], list)]
        samples = [found[name] for name in names]
        levels = holm_levels([p_value([pair[0] for pair in sample]) for sample in samples])  # type: ignore[union-attr]
        for name, sample, level in zip(names, samples, levels, strict=True):
            claim = next(claim for claim in claims if claim.claim == name)
            found[name] = _contrast(claim, sample, level)  # type: ignore[arg-type]
    return [found[claim.claim] for claim in claims]  # type: ignore[misc]


def _judged(claim: Claim, records: Sequence[Record]) -> Verdict | list[tuple[float, str]]:
    """The verdict on a claim that is judged alone; for a contrast with pairs, (difference, profile) of each."""
    if claim.kind == "definition":
        return Verdict(claim, DEFINITION, note=claim.test)
    if claim.kind == "argument":
        return Verdict(claim, ARGUMENT)
    if claim.kind == "value":
        return _value(claim, records)
    pairs = pairs_of(claim, records)
    if len(pairs) < 2:
        return _too_few(claim, [pair[0] for pair in pairs], pairs[0][1] if pairs else "")
    return pairs


def _too_few(claim: Claim, values: Sequence[float], profile: str) -> Verdict:
    if not values:
        return Verdict(claim, NOT_RUN)
    return Verdict(claim, ONE_RUN, 1, values[0], profile=profile)


def pairs_of(claim: Claim, records: Sequence[Record]) -> list[tuple[float, str]]:
    """The differences of a contrast by seed, positive in the claim's direction, with the profile of its runs.

    Both runs of a pair have the same profile, data, precision and revision of the code. The best profile with at least two
    pairs counts, otherwise the best one with any; never two together.
    """
    measure, sign = MEASURES[claim.measure], 1.0 if claim.better == "higher" else -1.0
    best: list[tuple[float, str]] = []
    for profile in _PROFILES:
        sides = [
            {_conditions(record): measure(record) for record in records if _counts(record, name, profile, claim.data)}
            for name in (claim.recipe, claim.against)
        ]
        common = sorted(sides[0].keys() & sides[1].keys(), key=str)
        seeds = {key[0]: key for key in common}  # one pair per seed, however often it was run
        found = [(sign * (sides[0][key] - sides[1][key]), profile) for _, key in sorted(seeds.items())]
        if len(found) > 1:
            return found
        best = best or found
    return best


def _conditions(record: Record) -> tuple[Any, ...]:
    run = record.execution
    return record.seed, record.data.get("fingerprint"), run.get("precision"), run.get("revision"), run.get("dirty")


def _counts(record: Record, recipe: str, profile: str, data: str) -> bool:
    whole = not data or (of_data(record, data) if profile == "paper" else _source(record) == data)
    return record.recipe == recipe and is_planned(record, profile) and whole


def _source(record: Record) -> str:
    return str(record.data.get("source", "")).split(" (")[0]


def _contrast(claim: Claim, pairs: Sequence[tuple[float, str]], level: float) -> Verdict:
    values, profile = [difference for difference, _ in pairs], pairs[0][1]
    low, high = mean_interval(values, level)
    mean, margin = float(np.mean(values)), claim.margin
    if claim.kind == "not worse":
        word = REPRODUCED if low > -margin else CONTRADICTED if high < -margin else NOT_RESOLVED
    elif low > 0 or high < 0:
        word = REPRODUCED if low > 0 else CONTRADICTED
    else:
        word = NO_DIFFERENCE if -margin <= low and high <= margin else NOT_RESOLVED
    note = ""
    if claim.kind == "contrast" and word in (REPRODUCED, CONTRADICTED) and abs(mean) < margin:
        note = f"the difference is smaller than the {margin:g} points that would be worth having"
    if word == NOT_RESOLVED:
        note = f"n = {len(values)}, half-width {(high - low) / 2:.2f} points"
    return Verdict(
        claim,
        word if profile == "paper" else f"{word}, at profile {profile}",
        len(values),
        mean,
        (low, high),
        level,
        sign_flip(values),
        profile,
        needed_for(float(np.std(values, ddof=1)), margin),
        note,
    )


def published_value(claim: Claim) -> float:
    """The published figure of a value. Raises ValueError if data/paper does not hold it."""
    table, _, column = claim.published.partition("/")
    for row in paper_table(table):
        if row["model"] == claim.recipe:
            return float(row[column])
    raise ValueError(f"no row {claim.recipe!r} in data/paper/{table}.csv")


def _value(claim: Claim, records: Sequence[Record]) -> Verdict:
    measure = MEASURES[claim.measure]
    runs = [record for record in records if _counts(record, claim.recipe, "paper", claim.data)]
    exact = {record.seed: measure(record) for record in runs if record.data["source"] == claim.data}
    if not exact and runs:
        editions = ", ".join(sorted({record.data["source"] for record in runs}))
        values = [measure(record) for record in runs]
        note = f"run on another edition, {editions}"
        return Verdict(claim, INCOMPARABLE, len(values), float(np.mean(values)), profile="paper", note=note)
    values = [exact[seed] for seed in sorted(exact)]
    if len(values) < 2:
        return _too_few(claim, values, "paper" if values else "")
    (low, high), published = mean_interval(values), published_value(claim)
    inside = abs(low - published) <= claim.margin and abs(high - published) <= claim.margin
    outside = low > published + claim.margin or high < published - claim.margin
    word = REPRODUCED if inside else CONTRADICTED if outside else NOT_RESOLVED
    needed = needed_for(float(np.std(values, ddof=1)), claim.margin)
    return Verdict(claim, word, len(values), float(np.mean(values)), (low, high), profile="paper", needed=needed)
