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
- A **figure** is something that a run shows or does not show: "reproduced" if all runs show it, "contradicted" if none of
  at least three does, otherwise "not resolved". What is said of a part of the training needs the paper's schedule.
- The rest is not judged by runs: what follows from a definition names the test that shows it; an argument stays one.

A single pair or run is told, not judged. Runs that diverged, or whose revision is unknown or has uncommitted changes, do not
count; nor do values without any spread resolve anything.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..files import bundled_folder
from .intervals import LEVEL, holm_levels, mean_interval, needed_to_see, p_value, sign_flip
from .measures import EARLY, MEASURES, SIGNS, sign_of
from .records import Record
from .tables import NOT_RUN, is_planned, of_data, paper_table

REPRODUCED, CONTRADICTED, NOT_RESOLVED = "reproduced", "contradicted", "not resolved"
NO_DIFFERENCE = "no difference worth having"
DEFINITION = "follows from the definition, tested"
ARGUMENT = "an argument, not tested"
INCOMPARABLE = "not comparable"
ONE_RUN = "one run: told, not judged"

KINDS = ("contrast", "not worse", "value", "figure", "definition", "argument")

_CONTRASTS = ("contrast", "not worse")
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
        needed: of a contrast: pairs with which a true difference as large as the margin would be found four times out of
            five, at the spread and level seen here; None if the spread is not known.
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
    """The claims in the text of a file such as data/paper/claims.csv. Raises ValueError for a row that makes no sense."""
    found: dict[str, Claim] = {}
    for row in csv.DictReader(text.splitlines()):
        numbers = {"margin": float(row["margin"] or 0.0), "seeds": int(row.get("seeds") or 0)}
        claim = Claim(**{**row, **numbers})  # type: ignore[arg-type]
        known = ("", *(SIGNS if claim.kind == "figure" else MEASURES))
        if claim.kind not in KINDS or claim.measure not in known or claim.better not in ("", "higher", "lower"):
            raise ValueError(f"claims.csv: {claim.claim!r} has an unknown kind, measure or direction")
        if claim.kind in _CONTRASTS and not (claim.measure and claim.better and claim.recipe and claim.against):
            raise ValueError(f"claims.csv: the contrast {claim.claim!r} lacks a recipe, a measure or a direction")
        if claim.claim in found:
            raise ValueError(f"claims.csv: {claim.claim!r} stands there twice")
        found[claim.claim] = claim
    return list(found.values())


def verdicts(records: Sequence[Record], claims: Sequence[Claim] | None = None) -> list[Verdict]:
    """The verdict on every claim, in their order. Records of older versions of a study do not count."""
    claims = read_claims() if claims is None else claims
    found = {claim.claim: _JUDGES[claim.kind](claim, records) for claim in claims if claim.kind in _JUDGES}
    contrasts: dict[str, list[tuple[Claim, Sample]]] = {}
    for claim in claims:
        if claim.kind in _CONTRASTS:
            contrasts.setdefault(claim.study, []).append((claim, pairs_of(claim, records)))
    for study in contrasts.values():
        # Those that were not run count, so that no verdict depends on which other runs there are.
        levels = holm_levels([_p_value(claim, sample) for claim, sample in study])
        for (claim, sample), level in zip(study, levels, strict=True):
            found[claim.claim] = _contrast(claim, sample, level) if len(sample.values) > 1 else _too_few(claim, sample)
    return [found[claim.claim] for claim in claims]


def paired(
    records: Sequence[Record], recipe: str, against: str, profile: str, claim: Claim
) -> list[tuple[Record, Record]]:
    """Pairs of runs of two recipes by seed, that have the same data, precision and revision of the code.

    Of several editions of the data, the one with the most pairs counts; of several pairs with one seed, the earliest. The
    data and the least seed are those of `claim`.
    """
    sides = [
        {_conditions(record): record for record in records if _counts(claim, record, name, profile)}
        for name in (recipe, against)
    ]
    both = [(sides[0][key], sides[1][key]) for key in sides[0].keys() & sides[1].keys()]
    both.sort(key=lambda pair: str(pair[0].execution.get("date", "")))
    editions: dict[str, dict[int, tuple[Record, Record]]] = {}
    for pair in both:
        editions.setdefault(_edition(pair[0]), {}).setdefault(pair[0].seed, pair)
    best = max(sorted(editions.items()), key=lambda item: len(item[1]), default=("", {}))[1]
    return [best[seed] for seed in sorted(best)]


def pairs_of(claim: Claim, records: Sequence[Record]) -> Sample:
    """The differences of a contrast by seed, positive in the claim's direction, see `paired`.

    The best profile with at least two pairs counts, otherwise the best one with any; never two together.
    """
    sign, best = 1.0 if claim.better == "higher" else -1.0, Sample((), "", ())
    for profile in _PROFILES:
        pairs = paired(records, claim.recipe, claim.against, profile, claim)
        differences = tuple(
            sign * (MEASURES[claim.measure](one) - MEASURES[claim.measure](other)) for one, other in pairs
        )
        sample = Sample(differences, profile, tuple(record for pair in pairs for record in pair))
        if len(pairs) > 1:
            return sample
        best = best if best.values or not pairs else sample
    return best


def _conditions(record: Record) -> tuple[Any, ...]:
    run = record.execution
    return record.seed, record.data.get("fingerprint"), run.get("precision"), run.get("revision")


def _edition(record: Record) -> str:
    return str(record.data.get("source", ""))


def _counts(claim: Claim, record: Record, recipe: str, profile: str) -> bool:
    """Whether a run is one of a claim's."""
    if record.recipe != recipe or record.seed < claim.seeds or not is_planned(record, profile):
        return False
    if not record.execution.get("revision") or record.execution.get("dirty"):
        return False
    if claim.measure in MEASURES and _value_of(claim.measure, record) is None:
        return False
    source = _edition(record).split(" (")[0]
    return not claim.data or (of_data(record, claim.data) if profile == "paper" else source == claim.data)


def _value_of(measure: str, record: Record) -> float | None:
    """What a run measured; None if it diverged or did not measure it."""
    try:
        value = MEASURES[measure](record)
    except (KeyError, ValueError, OSError):
        return None
    return value if math.isfinite(value) else None


def _bound(claim: Claim) -> float:
    """The difference that the interval must exclude."""
    return -claim.margin if claim.kind == "not worse" else 0.0


def _p_value(claim: Claim, sample: Sample) -> float:
    if len(sample.values) < 2 or np.std(sample.values) == 0.0:
        return 1.0
    return p_value([value - _bound(claim) for value in sample.values])


def _contrast(claim: Claim, sample: Sample, level: float) -> Verdict:
    low, high = mean_interval(sample.values, level)
    mean, spread = float(np.mean(sample.values)), float(np.std(sample.values, ddof=1))
    n, bound, margin = len(sample.values), _bound(claim), claim.margin
    if spread == 0.0:
        word = NOT_RESOLVED
    elif low > bound or high < bound:
        word = REPRODUCED if low > bound else CONTRADICTED
    elif claim.kind == "contrast" and -margin <= low and high <= margin:
        word = NO_DIFFERENCE
    else:
        word = NOT_RESOLVED
    notes = []
    if claim.kind == "contrast" and word in (REPRODUCED, CONTRADICTED) and abs(mean) < margin:
        notes.append(f"smaller than the {margin:g} points that would be worth having")
    if word == NOT_RESOLVED:
        notes.append(f"n = {n}, half-width {(high - low) / 2:.2f} points" + ", no spread to judge by" * (spread == 0.0))
    if claim.data and _edition(sample.records[0]) != claim.data:
        notes.append(f"run on {_edition(sample.records[0])}")
    return Verdict(
        claim,
        _at(word, sample.profile),
        n,
        mean,
        (low, high),
        level,
        sign_flip([value - bound for value in sample.values]),
        sample.profile,
        needed_to_see(margin, spread, level=level) if spread else None,
        "; ".join(notes),
        sample.records,
    )


def _at(word: str, profile: str) -> str:
    return word if profile == "paper" else f"{word}, at profile {profile}"


def _too_few(claim: Claim, sample: Sample) -> Verdict:
    if not sample.values:
        return Verdict(claim, NOT_RUN)
    word = _at(ONE_RUN, sample.profile)
    return Verdict(claim, word, 1, sample.values[0], profile=sample.profile, records=sample.records)


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
    exact = {record.seed: record for record in runs if _edition(record) == claim.data}
    judged = tuple(exact[seed] for seed in sorted(exact)) or tuple(runs)
    sample = Sample(tuple(MEASURES[claim.measure](record) for record in judged), "paper", judged)
    if runs and not exact:
        note = f"run on another edition, {', '.join(sorted(set(map(_edition, runs))))}"
        mean = float(np.mean(sample.values))
        return Verdict(claim, INCOMPARABLE, len(runs), mean, profile="paper", note=note, records=judged)
    if len(sample.values) < 2:
        return _too_few(claim, sample)
    (low, high), published, n = mean_interval(sample.values), published_value(claim), len(sample.values)
    inside = low >= published - claim.margin and high <= published + claim.margin
    outside = low > published + claim.margin or high < published - claim.margin
    word = REPRODUCED if inside else CONTRADICTED if outside else NOT_RESOLVED
    word = word if high > low else NOT_RESOLVED  # no spread to judge by
    note = f"n = {n}, half-width {(high - low) / 2:.2f} points" if word == NOT_RESOLVED else ""
    return Verdict(
        claim, word, n, float(np.mean(sample.values)), (low, high), profile="paper", note=note, records=judged
    )


def _figure(claim: Claim, records: Sequence[Record]) -> Verdict:
    told = Verdict(claim, NOT_RUN)
    for profile in _PROFILES[: 1 if claim.measure in EARLY else None]:
        runs = [record for record in records if _counts(claim, record, claim.recipe, profile)]
        runs.sort(key=lambda record: _edition(record) == claim.data)  # the published edition last, so that it counts
        by_seed = {record.seed: record for record in runs}
        shown = {seed: sign_of(claim.measure, record, records) for seed, record in by_seed.items()}
        known = tuple(by_seed[seed] for seed in sorted(by_seed) if shown[seed] is not None)
        n, yes = len(known), sum(bool(shown[record.seed]) for record in known)
        word = ONE_RUN if n == 1 else REPRODUCED if yes == n else CONTRADICTED if not yes and n > 2 else NOT_RESOLVED
        note = f"seen in {yes} of {n} run{'s' * (n > 1)}" + _shuffled(claim, records, profile)
        verdict = Verdict(
            claim, _at(word, profile), n, 100.0 * yes / max(1, n), profile=profile, note=note, records=known
        )
        if n > 1:
            return verdict
        told = verdict if n and told.verdict == NOT_RUN else told
    return told


def _shuffled(claim: Claim, records: Sequence[Record], profile: str) -> str:
    """What the same network shows where nothing can be learned, if that was run."""
    name = f"{claim.recipe} shuffled"
    signs = [
        sign_of(claim.measure, record, records)
        for record in records
        if record.recipe == name and is_planned(record, profile)
    ]
    known = [sign for sign in signs if sign is not None]
    return f"; with shuffled labels in {sum(known)} of {len(known)}" if known else ""


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
        row |= {"mean": "", "interval": "", "sign-flip p": "", "n to see the margin": "", "note": verdict.note}
        signed = "+" if claim.against else ""
        if not math.isnan(verdict.mean):
            row["mean"] = f"{verdict.mean:.0f}%" if claim.kind == "figure" else f"{verdict.mean:{signed}.2f}"
        if not math.isnan(verdict.interval[0]):
            low, high = verdict.interval
            row["interval"] = f"{low:{signed}.2f} to {high:{signed}.2f} ({verdict.level:.1%})".replace(".0%", "%")
        if not math.isnan(verdict.sign_flip):
            row["sign-flip p"] = f"{verdict.sign_flip:.2g}"
        if verdict.needed:
            row["n to see the margin"] = f"{verdict.needed:,}"
        rows.append(row)
    return rows
