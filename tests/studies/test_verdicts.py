"""Every kind of verdict against a computation of its own; claims against the poster; rules that are older than runs."""

from __future__ import annotations

import csv
import dataclasses
import math
import re
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from softshare.studies import RECIPES, STUDIES, find_records, make_plan, runs_folder, study_of, tables, verdicts
from softshare.studies.records import Record
from softshare.studies.verdicts import Claim

ROOT = Path(__file__).parents[2]


def record(recipe, seed, profile="paper", data="CIFAR-10", revision="a", precision="float32", date="", **metrics):
    """A record that was never written: of the current plan, so that it counts."""
    plan = make_plan(recipe, profile, seed)
    config = {"sizes": {"train": 50_000, "test": 10_000}}
    execution = {"precision": precision, "revision": revision, "dirty": False, "date": date}
    found = {"source": data, "fingerprint": data}
    return Record(study_of(plan).identity(plan, data), config, found, metrics, [], execution, "", Path("none.json"))


def claim(name="c", kind="contrast", against="WRN 28-2 cutout", margin=0.1, better="lower", **changes):
    given = {"recipe": "SWRN 28-2 cutout", "measure": "error", "data": "CIFAR-10", "study": "s"} | changes
    return Claim(name, "", "", kind, against=against, margin=margin, better=better, **given)


def pairs(differences, recipe="SWRN 28-2 cutout", against="WRN 28-2 cutout", **conditions):
    """Records of pairs: how much lower the error of the first is."""
    return [
        record(name, seed, error=4.0 - (difference if name == recipe else 0.0), **conditions)
        for seed, difference in enumerate(differences)
        for name in (recipe, against)
    ]


def judge(records, *claims):
    return verdicts.verdicts(records, claims)


# --------------------------------------------------------------------------------------- every verdict, computed once more


def expected_contrasts(samples, margins, kinds):
    """From p values alone, without an interval except for the margin: the textbook's step-down procedure."""
    shifted = [
        np.array(sample) + (margin if kind == "not worse" else 0)
        for sample, margin, kind in zip(samples, margins, kinds, strict=True)
    ]
    p_values = [stats.ttest_1samp(sample, 0).pvalue for sample in shifted]
    words, level, stopped = {}, 0.0, False
    for rank, place in enumerate(sorted(range(len(samples)), key=lambda place: p_values[place])):
        if not stopped:
            level = 0.05 / (len(samples) - rank)
            stopped = p_values[place] > level
        if p_values[place] <= level:
            words[place] = "reproduced" if np.mean(shifted[place]) > 0 else "contradicted"
            continue
        # Within the margin on both sides: two one-sided tests
        sides = (
            stats.ttest_1samp(samples[place], -margins[place], alternative="greater").pvalue,
            stats.ttest_1samp(samples[place], margins[place], alternative="less").pvalue,
        )
        within = max(sides) <= level / 2 and kinds[place] == "contrast"
        words[place] = "no difference worth having" if within else "not resolved"
    return [words[place] for place in range(len(samples))]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(2, 8), st.sampled_from((-0.6, -0.1, 0.0, 0.05, 0.4)), st.sampled_from((0.02, 0.1, 0.5)),
            st.sampled_from((0.05, 0.2, 1.0)), st.sampled_from(("contrast", "not worse")),
        ),
        min_size=1, max_size=4,
    ),
    st.integers(0, 2**31),
)  # fmt: skip
def test_contrasts_agree_with_scipy(kinds, seed):
    rng = np.random.default_rng(seed)
    against = ["WRN 28-2 cutout", "SWRN 28-2-2 cutout", "SWRN 28-2-1 cutout", "WRN 16-2 cutout"][: len(kinds)]
    claims, samples, records = [], [], {}
    for (n, shift, spread, margin, kind), other in zip(kinds, against, strict=True):
        samples.append([round(float(value), 6) for value in rng.normal(shift, spread, n)])
        claims.append(claim(other, kind, other, margin))
        for each_seed, value in enumerate(samples[-1]):
            records["SWRN 28-2 cutout", each_seed] = record("SWRN 28-2 cutout", each_seed, error=4.0)
            records[other, each_seed] = record(other, each_seed, error=4.0 + value)
    found = judge(list(records.values()), *claims)
    assert [each.verdict for each in found] == expected_contrasts(
        samples, [kind[3] for kind in kinds], [kind[4] for kind in kinds]
    )
    for each, sample in zip(found, samples, strict=True):
        assert each.n == len(sample) and each.mean == pytest.approx(np.mean(sample), abs=1e-9)


def test_each_word_in_a_case_by_hand():
    tight, wide = [0.50, 0.52, 0.48, 0.51], [3.0, -2.0, 1.0]
    small = [0.01, -0.01, 0.02, -0.02, 0.0]
    words = {
        "reproduced": pairs(tight),
        "contradicted": pairs([-value for value in tight]),
        "no difference worth having": pairs(small),
        "not resolved": pairs(wide),
        "one run: told, not judged": pairs([0.5]),
        "not run": [],
    }
    for word, records in words.items():
        (found,) = judge(records, claim())
        assert found.verdict == word
        assert len(found.records) == 2 * found.n
    (found,) = judge(pairs(wide), claim())
    half = stats.t.ppf(0.975, 2) * np.std(wide, ddof=1) / math.sqrt(3)
    assert found.note == f"n = 3, half-width {half:.2f} points" and found.sign_flip == pytest.approx(6 / 8)
    (found,) = judge(pairs([0.05, 0.051, 0.049]), claim())
    assert found.verdict == "reproduced" and "smaller than the 0.1 points" in found.note


def test_a_short_profile_says_so_and_never_mixes():
    found = lambda records: judge(records, claim())[0]  # noqa: E731
    short = pairs([0.5, 0.52, 0.48], profile="short")
    assert found(short).verdict == "reproduced, at profile short" and found(short).profile == "short"
    assert found([*short, *pairs([-0.5])]).n == 3, "a single pair at the paper's schedule does not judge"
    both = found([*short, *pairs([-0.5, -0.52, -0.48])])
    assert (both.verdict, both.profile, both.n) == ("contradicted", "paper", 3)
    for profile in ("fast", "gpu"):
        assert found(pairs([0.5, 0.52, 0.48], profile=profile)).verdict == "not run"


def test_members_of_a_pair_have_one_precision_and_revision():
    good = pairs([0.5, 0.52, 0.48])
    assert judge(good, claim())[0].n == 3
    for field, value in (("precision", "bfloat16"), ("revision", "b"), ("dirty", True)):
        mixed = [
            dataclasses.replace(
                each, execution=each.execution | ({field: value} if each.recipe == "SWRN 28-2 cutout" else {})
            )
            for each in good
        ]
        assert judge(mixed, claim())[0].verdict == "not run", field
    other = [dataclasses.replace(each, data={"source": "CIFAR-10 (JPEG)", "fingerprint": "x"}) for each in good[::2]]
    assert judge([*other, *good[1::2]], claim())[0].verdict == "not run"


def test_a_pair_of_unknown_code_does_not_count():
    for change in ({"revision": None}, {"revision": ""}, {"dirty": True}):
        changed = [dataclasses.replace(each, execution=each.execution | change) for each in pairs([0.5, 0.52, 0.48])]
        assert judge(changed, claim())[0].verdict == "not run", change


def test_of_repeated_seeds_the_earliest_counts_and_editions_do_not_mix():
    first, second = (
        pairs([0.5, 0.52, 0.48], date="2026-02-01"),
        pairs([-0.5, -0.5, -0.4], revision="b", date="2026-03-01"),
    )
    assert judge([*second, *first], claim())[0].mean == pytest.approx(0.5)
    jpeg = [each for each in pairs([0.1, 0.2, 0.3, 0.4], data="CIFAR-10 (JPEG)") if each.seed > 1]
    found = judge([*first[:4], *jpeg[:2], *pairs([0.7, 0.7, 0.7], data="CIFAR-10 (PNG)", date="x")], claim())[0]
    assert found.n == 3 and found.note.endswith("run on CIFAR-10 (PNG)")


def test_no_spread_and_no_number_resolve_nothing():
    (found,) = judge(pairs([0.01, 0.01]), claim())
    assert found.verdict == "not resolved" and "no spread" in found.note and found.needed is None
    broken = pairs([0.5, 0.52, 0.48, 0.5])
    broken[0].metrics["error"] = math.nan
    del broken[2].metrics["error"]
    assert judge(broken, claim())[0].n == 2
    assert value_of([3.9, 3.9]).verdict == "not resolved"


def test_no_verdict_depends_on_which_other_claims_were_run():
    """The same data are judged at the same level whether or not the other claims of the study have runs."""
    others = [claim(name, against=name) for name in ("SWRN 28-2-2 cutout", "SWRN 28-2-1 cutout")]
    records = pairs([0.5, 0.7, 0.3, 0.6])
    alone = judge(records, claim(), *others)[0]
    assert alone.level == pytest.approx(1 - 0.05 / 3)
    more = [record(other.against, seed, error=4.0) for other in others for seed in range(4)]
    again = judge([*records, *more], claim(), *others)[0]
    assert (again.verdict, again.interval) == (alone.verdict, alone.interval)


def test_the_sign_flip_of_not_worse_tests_the_margin():
    (found,) = judge(pairs([-0.02, 0.01, -0.01, 0.02, 0.0]), claim(kind="not worse"))
    assert found.verdict == "reproduced" and found.sign_flip == pytest.approx(2 / 32)


def test_lower_seeds_do_not_count():
    assert judge(pairs([0.5, 0.52, 0.48]), claim(seeds=1))[0].n == 2


def value_of(errors, data="CIFAR-10", profile="paper"):
    records = [record("WRN 28-10", seed, profile, data, error=error) for seed, error in enumerate(errors)]
    return judge(
        records, claim(kind="value", recipe="WRN 28-10", against="", margin=0.3, published="cifar/cifar10_error")
    )[0]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(2, 6),
    st.sampled_from((3.4, 3.9, 4.0, 4.25, 4.9)),
    st.sampled_from((0.01, 0.1, 0.4)),
    st.integers(0, 2**31),
)
def test_values_agree_with_scipy(n, mean, spread, seed):
    """Published: 4.0."""
    errors = np.random.default_rng(seed).normal(mean, spread, n)
    interval = stats.ttest_1samp(errors, 0).confidence_interval(0.95)
    if interval.low > 3.7 and interval.high < 4.3:
        word = "reproduced"
    elif interval.low > 4.3 or interval.high < 3.7:
        word = "contradicted"
    else:
        word = "not resolved"
    assert value_of(errors).verdict == word


def test_values_need_the_papers_schedule_and_the_published_edition():
    assert value_of([]).verdict == "not run" and value_of([4.0]).verdict == "one run: told, not judged"
    assert value_of([4.0, 4.01, 3.99], profile="short").verdict == "not run"
    found = value_of([4.0, 4.01, 3.99], data="CIFAR-10 (JPEG)")
    assert found.verdict == "not comparable" and found.n == 3 and "CIFAR-10 (JPEG)" in found.note


def test_figures(monkeypatch):
    shown = {}
    monkeypatch.setitem(verdicts.SIGNS, "structure", lambda run, folds: shown[run.seed])
    figure = claim(kind="figure", recipe="SWRN 40-8-8", against="", measure="structure")

    def found(*signs, profile="paper"):
        shown.update(enumerate(signs))
        return judge([record("SWRN 40-8-8", seed, profile) for seed in range(len(signs))], figure)[0].verdict

    assert found() == "not run" and found(None) == "not run"
    assert found(True) == found(False, None) == "one run: told, not judged"
    assert found(True, True, True) == "reproduced" and found(True, False) == "not resolved"
    assert found(False, False) == "not resolved", "two runs that do not show it say little"
    assert found(False, False, False, profile="short") == "contradicted, at profile short"
    assert found(True, profile="short") == "one run: told, not judged, at profile short"
    shown.update({0: True, 1: True, 2: True})
    short = [record("SWRN 40-8-8", seed, "short") for seed in range(3)]
    assert judge([record("SWRN 40-8-8", 0), *short], figure)[0].verdict == "reproduced, at profile short"
    shuffled = [record("SWRN 40-8-8 shuffled", 1, "short")]
    assert judge([*short, *shuffled], figure)[0].note == "seen in 3 of 3 runs; with shuffled labels in 1 of 1"
    editions = [record("SWRN 40-8-8", 0, "short", data) for data in ("CIFAR-10", "CIFAR-10 (JPEG)")]
    assert judge(editions, figure)[0].n == 1 and judge(editions, figure)[0].records[0].data["source"] == "CIFAR-10"


def test_a_part_of_the_training_needs_the_papers_schedule(monkeypatch):
    monkeypatch.setitem(verdicts.SIGNS, "a pair by 2%", lambda run, folds: True)
    early = claim(kind="figure", recipe="SWRN 40-8-8", against="", measure="a pair by 2%")
    for profile, word in (("short", "not run"), ("paper", "reproduced")):
        assert judge([record("SWRN 40-8-8", seed, profile) for seed in range(3)], early)[0].verdict == word


def test_claims_that_runs_do_not_judge():
    definition, argument = claim("a", "definition", test="tests/x.py::y"), claim("b", "argument")
    found = judge(pairs([0.5, 0.52]), definition, argument)
    assert [each.verdict for each in found] == ["follows from the definition, tested", "an argument, not tested"]
    assert found[0].note == "tests/x.py::y"


def test_older_versions_do_not_count(monkeypatch):
    records = pairs([0.5, 0.52, 0.48])
    monkeypatch.setattr(STUDIES["cifar"], "version", STUDIES["cifar"].version + 1)
    assert judge(records, claim())[0].verdict == "not run"


# ------------------------------------------------------------------------------------------------------------- the claims


def test_claims_are_those_of_the_poster():
    claims = verdicts.read_claims()
    kinds = Counter(each.kind for each in claims)
    rows = sum(len(tables.paper_table(name)) for name in tables.TABLES)
    cells = {(each.recipe, each.published) for each in claims if each.kind == "value"}
    assert rows == 27 and len(cells) == kinds["value"] == 11 * 2 + 4 * 2 + 12
    assert {recipe for recipe, _ in cells} == {
        row["model"] for name in tables.TABLES for row in tables.paper_table(name)
    }
    assert {each.place for each in claims} == {
        "Approach", "Soft parameter sharing", "Folding learned networks into explicitly recurrent forms",
        "Improved parameter efficiency", "Evolution of sharing patterns", "Comparison to neural architecture search",
        "Extrapolation bias",
    }  # fmt: skip


def test_claims_name_what_there_is():
    for each in verdicts.read_claims():
        assert each.says and each.rule, each.claim
        if each.kind == "definition":
            path, name = each.test.split("::")
            assert re.search(rf"^def {name}\(", (ROOT / path).read_text(encoding="utf-8"), re.M), each.test
        if each.kind in ("contrast", "not worse", "value", "figure"):
            assert {each.recipe, each.against} <= {*RECIPES, ""} and each.measure and each.study, each.claim
        if each.kind == "value":
            margin = {"CIFAR-10": 0.3, "CIFAR-100": 0.6, "ImageNet": 0.3}[each.data]
            assert each.margin == margin and verdicts.published_value(each) > 0
        if each.kind in ("contrast", "not worse"):
            assert each.margin > 0 and each.better and each.against


def test_bad_claims_are_refused():
    text = (ROOT / "data/paper/claims.csv").read_text(encoding="utf-8")
    line = next(line for line in text.splitlines() if ",contrast," in line)
    for changed, message in (
        (line.replace(",contrast,", ",guess,"), "unknown kind"),
        (line, "stands there twice"),
        ("x,x,x,contrast,s,SCNN,CNN,accuracy,,2,,,,rule,10", "lacks a recipe, a measure or a direction"),
    ):
        with pytest.raises(ValueError, match=message):
            verdicts.parse_claims(text + changed + "\n")
    with pytest.raises(ValueError, match="no row 'x'"):
        verdicts.published_value(claim(recipe="x", published="cifar/cifar10_error"))


def test_the_published_gain_needs_thousands_of_runs():
    boost = next(each for each in verdicts.read_claims() if each.claim == "boost, CIFAR-10")
    assert verdicts.needed_for_published(boost, 0.15) > 3_000  # 3.88 against 3.89
    assert verdicts.needed_for_published(dataclasses.replace(boost, published=""), 0.15) is None


def test_rows_for_people():
    rows = verdicts.as_rows(judge(pairs([0.5, 0.52, 0.48]), claim(), claim("b", "argument")))
    assert rows[0]["mean"] == "+0.50" and rows[0]["n"] == "3" and rows[0]["interval"].endswith("(95%)")
    assert rows[1] == dict.fromkeys(rows[0], "") | {"claim": "b", "verdict": "an argument, not tested"}
    assert len(tables.as_text(rows, "c").splitlines()) == 5


# ------------------------------------------------------------------------------------------------- rules older than runs


def git(*command):
    done = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else None


JUDGING = ("kind", "study", "recipe", "against", "measure", "better", "margin", "data", "rule")
"""The parts of a claim that decide its verdict."""


def test_every_claim_is_older_than_the_runs_that_judge_it():
    """At the revision of each run, data/paper/claims.csv holds the claim as it is now."""
    if git("rev-parse", "--is-shallow-repository") != "false\n":
        pytest.skip("needs the whole history")
    checked, old = 0, {}
    for verdict in verdicts.verdicts(find_records(runs_folder(profile="paper"))):
        for run in verdict.records if verdict.n > 1 else ():
            revision = run.execution["revision"]
            if revision not in old:
                text = git("show", f"{revision}:data/paper/claims.csv")
                assert text is not None, f"{run.path.name}: no claims at {revision}"
                old[revision] = {row["claim"]: row for row in csv.DictReader(text.splitlines())}
            then = old[revision][verdict.claim.claim]
            for name in JUDGING:
                now = str(getattr(verdict.claim, name))
                same = float(then[name] or 0) == float(now) if name == "margin" else then[name] == now
                assert same, f"{verdict.claim.claim}: {name} was changed after {run.path.name}"
            checked += 1
    print(f"{checked} runs are younger than the claims they judge")
