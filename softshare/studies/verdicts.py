"""Verdicts on the poster's claims: computed from records alone, by rules that stand in data/paper/claims.csv.

The rules were written down before the runs that they judge. ``softshare report`` prints the verdicts, and the pages of the
book read the same ones.

- A **contrast** compares two recipes seed by seed. It is "reproduced" if the interval of the mean difference excludes zero
  in the claim's direction, "contradicted" if it does so in the other, "no difference worth having" if it lies within the
  claim's margin on both sides, otherwise "not resolved". Intervals are Student's, at 95% over all claims of a study
  together (Holm, 1979). A sign-flip test, which assumes no distribution, stands beside it.
- **Not worse** is a contrast that allows for the margin: "reproduced" if the whole interval is above minus the margin,
  "contradicted" if it is below.
- A **value** is a cell of a published table: "reproduced" if the whole 95% interval of our mean lies within the margin
  around it, "contradicted" if the whole interval lies outside. Only runs at the paper's schedule on the published edition
  of the data count.
- A **figure** is something that a run shows or does not show: "reproduced" if all runs show it, "contradicted" if none
  does, otherwise "not resolved".
- The rest is not judged by runs: what follows from a definition names the test that shows it; an argument stays one.

A single pair or run is told, not judged.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..files import bundled_folder
from .intervals import LEVEL, holm_levels, mean_interval, needed_for_width, needed_to_see, p_value, sign_flip
from .measures import MEASURES, SIGNS, sign_of
from .records import Record
from .tables import NOT_RUN, is_planned, of_data, paper_table

REPRODUCED, CONTRADICTED, NOT_RESOLVED = "reproduced", "contradicted", "not resolved"
NO_DIFFERENCE = "no difference worth having"
DEFINITION = "follows from the definition, tested"
ARGUMENT = "an argument, not tested"
INCOMPARABLE = "not comparable"
ONE_RUN = "one run: told, not judged"

KINDS = ("contrast", "not worse", "value", "figure", "definition", "argument")

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
        recipe, against: what is compared with what, by the names of recipes; only contrasts have an `against`.
        measure: one of `MEASURES`; for a figure, one of `SIGNS`.
        better: "higher" or "lower": in which direction the recipe is said to differ.
        margin: in the measure's unit; how large a difference is worth having, or how close a value must be.
        data: the data set's name in records; "" for generated grids.
        published: the published figure, as "table/column", found in data/paper; "" if there is none.
        test: the test that shows what follows from a definition, as "file::name".
        rule: the rule in words.
        seeds: the least seed that counts; lower ones were used in trials before the rule was made.
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
    seeds: int = 0


@dataclass(frozen=True)
class Verdict:
    """What the records say of a claim.

    Attributes:
        claim: the claim.
        verdict: one of the words above, with the profile if that is not "paper".
        n: pairs or runs.
        mean: of the differences, positive in the claim's direction, or of the values; for a figure, the share of runs that
            show it, in %; NaN without runs.
        interval: of the mean; NaN with fewer than two, and for figures.
        level: the interval's confidence after Holm's correction.
        sign_flip: p of the sign-flip test, two-sided; NaN where there is none.
        profile: of the runs that judge; "" without any.
        needed: pairs or runs for a 95% interval that reaches no farther than the margin to each side, at the spread seen
            here; None if the spread is not known.
        note: what else must be said.
        records: those that it was computed from.
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
    records: tuple[Record, ...] = ()


class Sample(NamedTuple):
    """What is judged: values or differences, the profile of their runs, and the runs."""

    values: tuple[float, ...]
    profile: str
    records: tuple[Record, ...]


def read_claims() -> list[Claim]:
    """All claims, from data/paper/claims.csv. Raises ValueError for a row that does not make sense."""
    return parse_claims((bundled_folder("paper") / "claims.csv").read_text(encoding="utf-8"))


def parse_claims(text: str) -> list[Claim]:
    """The claims in the text of a file such as data/paper/claims.csv. Raises ValueError for a row without sense."""
    found: dict[str, Claim] = {}
    for row in csv.DictReader(text.splitlines()):
        numbers = {"margin": float(row["margin"] or 0.0), "seeds": int(row.get("seeds") or 0)}
        claim = Claim(**{**row, **numbers})  # type: ignore[arg-type]
        known = ("", *(SIGNS if claim.kind == "figure" else MEASURES))
        if claim.kind not in KINDS or claim.measure not in known or claim.better not in ("", "higher", "lower"):
            raise ValueError(f"claims.csv: {claim.claim!r} has an unknown kind, measure or direction")
        if claim.claim in found:
            raise ValueError(f"claims.csv: {claim.claim!r} stands there twice")
        found[claim.claim] = claim
    return list(found.values())


def verdicts(records: Sequence[Record], claims: Sequence[Claim] | None = None) -> list[Verdict]:
    """The verdict on every claim, in their order. Records of older versions of a study do not count."""
    claims = read_claims() if claims is None else claims
    found: dict[str, Verdict] = {}
    contrasts: dict[str, list[tuple[Claim, Sample]]] = {}
    for claim in claims:
        judge = _JUDGES.get(claim.kind)
        if judge:
            found[claim.claim] = judge(claim, records)
            continue
        sample = pairs_of(claim, records)
        if len(sample.values) < 2:
            found[claim.claim] = _too_few(claim, sample)
        else:
            contrasts.setdefault(claim.study, []).append((claim, sample))
    for study in contrasts.values():
        levels = holm_levels([p_value([value - _bound(claim) for value in sample.values]) for claim, sample in study])
        for (claim, sample), level in zip(study, levels, strict=True):
            found[claim.claim] = _contrast(claim, sample, level)
    return [found[claim.claim] for claim in claims]


def pairs_of(claim: Claim, records: Sequence[Record]) -> Sample:
    """The differences of a contrast by seed, positive in the claim's direction.

    Both runs of a pair have the same profile, data, precision and revision of the code. The best profile with at least two
    pairs counts, otherwise the best one with any; never two together.
    """
    measure, sign = MEASURES[claim.measure], 1.0 if claim.better == "higher" else -1.0
    best = Sample((), "", ())
    for profile in _PROFILES:
        sides = [
            {_conditions(record): record for record in records if _counts(claim, record, name, profile)}
            for name in (claim.recipe, claim.against)
        ]
        common = sorted(sides[0].keys() & sides[1].keys(), key=str)
        by_seed = {key[0]: key for key in common}  # one pair per seed, however often it was run
        pairs = [(sides[0][key], sides[1][key]) for _, key in sorted(by_seed.items())]
        differences = tuple(sign * (measure(one) - measure(other)) for one, other in pairs)
        sample = Sample(differences, profile, tuple(record for pair in pairs for record in pair))
        if len(pairs) > 1:
            return sample
        best = best if best.values or not pairs else sample
    return best


def _conditions(record: Record) -> tuple[Any, ...]:
    run = record.execution
    return record.seed, record.data.get("fingerprint"), run.get("precision"), run.get("revision"), run.get("dirty")


def _counts(claim: Claim, record: Record, recipe: str, profile: str) -> bool:
    if record.recipe != recipe or record.seed < claim.seeds or not is_planned(record, profile):
        return False
    source = str(record.data.get("source", "")).split(" (")[0]
    return not claim.data or (of_data(record, claim.data) if profile == "paper" else source == claim.data)


def _bound(claim: Claim) -> float:
    """The difference that the interval must exclude."""
    return -claim.margin if claim.kind == "not worse" else 0.0


def _contrast(claim: Claim, sample: Sample, level: float) -> Verdict:
    low, high = mean_interval(sample.values, level)
    mean, bound, margin = float(np.mean(sample.values)), _bound(claim), claim.margin
    if low > bound or high < bound:
        word = REPRODUCED if low > bound else CONTRADICTED
    elif claim.kind == "contrast" and -margin <= low and high <= margin:
        word = NO_DIFFERENCE
    else:
        word = NOT_RESOLVED
    note = ""
    if claim.kind == "contrast" and word in (REPRODUCED, CONTRADICTED) and abs(mean) < margin:
        note = f"smaller than the {margin:g} points that would be worth having"
    if word == NOT_RESOLVED:
        note = f"n = {len(sample.values)}, half-width {(high - low) / 2:.2f} points"
    return Verdict(
        claim,
        _at(word, sample.profile),
        len(sample.values),
        mean,
        (low, high),
        level,
        sign_flip(sample.values),
        sample.profile,
        needed_for_width(float(np.std(sample.values, ddof=1)), margin),
        note,
        sample.records,
    )


def _at(word: str, profile: str) -> str:
    return word if profile == "paper" else f"{word}, at profile {profile}"


def _too_few(claim: Claim, sample: Sample) -> Verdict:
    if not sample.values:
        return Verdict(claim, NOT_RUN)
    return Verdict(claim, ONE_RUN, 1, sample.values[0], profile=sample.profile, records=sample.records)


def published_value(claim: Claim, recipe: str = "") -> float:
    """The published figure of a claim's recipe, or of another one. Raises ValueError if data/paper does not hold it."""
    table, _, column = claim.published.partition("/")
    name = recipe or claim.recipe
    for row in paper_table(table):
        if row["model"] == name:
            return float(row[column])
    raise ValueError(f"no row {name!r} in data/paper/{table}.csv")


def needed_for_published(claim: Claim, spread: float) -> int | None:
    """Pairs that a contrast would need to see the published difference, at 80% power and 95% confidence.

    `spread` is the standard deviation of single runs, which need not be alike for a seed: that of a difference is the square
    root of 2 times as large. None without published figures.
    """
    if not claim.published or not claim.against:
        return None
    difference = round(published_value(claim) - published_value(claim, claim.against), 6)
    return needed_to_see(difference, math.sqrt(2) * spread)


def _value(claim: Claim, records: Sequence[Record]) -> Verdict:
    runs = [record for record in records if _counts(claim, record, claim.recipe, "paper")]
    exact = {record.seed: record for record in runs if record.data["source"] == claim.data}
    judged = tuple(exact[seed] for seed in sorted(exact)) or tuple(runs)
    sample = Sample(tuple(MEASURES[claim.measure](record) for record in judged), "paper", judged)
    if runs and not exact:
        note = f"run on another edition, {', '.join(sorted({record.data['source'] for record in runs}))}"
        mean = float(np.mean(sample.values))
        return Verdict(claim, INCOMPARABLE, len(runs), mean, profile="paper", note=note, records=judged)
    if len(sample.values) < 2:
        return _too_few(claim, sample)
    (low, high), published, n = mean_interval(sample.values), published_value(claim), len(sample.values)
    inside = low >= published - claim.margin and high <= published + claim.margin
    outside = low > published + claim.margin or high < published - claim.margin
    word = REPRODUCED if inside else CONTRADICTED if outside else NOT_RESOLVED
    note = f"n = {n}, half-width {(high - low) / 2:.2f} points" if word == NOT_RESOLVED else ""
    needed = needed_for_width(float(np.std(sample.values, ddof=1)), claim.margin)
    mean = float(np.mean(sample.values))
    return Verdict(claim, word, n, mean, (low, high), profile="paper", needed=needed, note=note, records=judged)


def _figure(claim: Claim, records: Sequence[Record]) -> Verdict:
    for profile in _PROFILES:
        runs = [record for record in records if _counts(claim, record, claim.recipe, profile)]
        shown = {record.seed: sign_of(claim.measure, record, records) for record in runs}
        known = tuple(sorted((record for record in runs if shown[record.seed] is not None), key=lambda run: run.seed))
        if not known:
            continue
        n, yes = len(known), sum(bool(shown[record.seed]) for record in known)
        note = f"seen in {yes} of {n} run{'s' * (n > 1)}"
        word = ONE_RUN if n == 1 else _at(REPRODUCED if yes == n else NOT_RESOLVED if yes else CONTRADICTED, profile)
        return Verdict(claim, word, n, 100.0 * yes / n, profile=profile, note=note, records=known)
    return Verdict(claim, NOT_RUN)


_JUDGES: dict[str, Callable[[Claim, Sequence[Record]], Verdict]] = {
    "definition": lambda claim, _: Verdict(claim, DEFINITION, note=claim.test),
    "argument": lambda claim, _: Verdict(claim, ARGUMENT),
    "value": _value,
    "figure": _figure,
}
"""How claims are judged that do not depend on the other claims of their study."""


def as_rows(found: Sequence[Verdict], wording: bool = False) -> list[dict[str, str]]:
    """Verdicts as rows of text, for `softshare.studies.tables`; with the poster's wording, or the claim's name."""
    rows = []
    for verdict in found:
        claim = verdict.claim
        row = {"claim": claim.says if wording else claim.claim, "verdict": verdict.verdict, "n": str(verdict.n or "")}
        row |= {"mean": "", "interval": "", "sign-flip p": "", "n needed": "", "note": verdict.note}
        signed = "+" if claim.against else ""
        if not math.isnan(verdict.mean):
            row["mean"] = f"{verdict.mean:.0f}%" if claim.kind == "figure" else f"{verdict.mean:{signed}.2f}"
        if not math.isnan(verdict.interval[0]):
            low, high = verdict.interval
            row["interval"] = f"{low:{signed}.2f} to {high:{signed}.2f} ({verdict.level:.1%})".replace(".0%", "%")
        if not math.isnan(verdict.sign_flip):
            row["sign-flip p"] = f"{verdict.sign_flip:.2g}"
        if verdict.needed:
            row["n needed"] = f"{verdict.needed:,}"
        rows.append(row)
    return rows
