"""What is made of the curriculum's records, from records of known content."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from softshare.studies import (
    curriculum,
    find_records,
    make_plan,
    measures,
    paths,
    runs_folder,
    study_of,
    train,
    write_record,
)


def write(folder, recipe, seed, level, profile="short"):
    """A record of five phases whose exact rate is the same in all epochs."""
    plan = make_plan(recipe, profile, seed)
    identity = study_of(plan).identity(plan, "x")
    history = [
        {"epoch": 10 * phase + epoch + 1, "phase": phase + 1.0, "reestimated_exact": level, "held_out_f1": level}
        for phase in range(5)
        for epoch in range(10)
    ]
    found = {f"before{phase}_exact": level / 2 for phase in range(1, 7)} | {
        f"rule{phase}_exact": 0.1 for phase in range(1, 7)
    }
    facts = {"seconds": 1800.0, "hardware": "a machine", "revision": "a", "dirty": False}
    return write_record(identity, found, data={"fingerprint": "x"}, history=history, execution=facts, runs=folder)


def found(records):
    profile, pairs = curriculum.best_pairs(records)
    assert all((one.recipe, other.recipe, one.seed) == ("SCNN", "CNN", other.seed) for one, other in pairs)
    return profile, [one.seed for one, _ in pairs]


def test_pairs_are_found_and_the_papers_schedule_goes_first(tmp_path):
    for seed, level in ((9, 0.1), (10, 0.5), (11, 0.6)):
        for name in ("CNN", "SCNN"):
            write(tmp_path, name, seed, level)
    write(tmp_path, "SCNN", 12, 0.5)
    records = find_records(tmp_path)
    assert found(records) == ("short", [10, 11])
    assert set(curriculum.runs_of(records, "SCNN", "short")) == {10, 11, 12}
    for name in ("CNN", "SCNN"):
        write(tmp_path, name, 10, 0.5, "paper")
    assert found(find_records(tmp_path)) == ("short", [10, 11]), "one pair is not enough"
    for name in ("CNN", "SCNN"):
        write(tmp_path, name, 11, 0.5, "paper")
    assert found(find_records(tmp_path)) == ("paper", [10, 11])
    assert found([])[1] == []
    record = curriculum.runs_of(records, "CNN", "short")[11]
    assert (curriculum.curve(record, "reestimated_exact") == 0.6).all() and len(
        curriculum.curve(record, "held_out_f1")
    ) == 50
    assert curriculum.by_phase(record, "before") == [0.3] * 6 and curriculum.by_phase(record, "rule") == [0.1] * 6
    assert curriculum.cost(list(curriculum.runs_of(records, "CNN", "short").values())) == {
        "runs": 2, "hours": 1.0, "hardware": "a machine",
    }  # fmt: skip


def test_the_committed_runs_count():
    """A change that gave their recipes another identity would make them disappear from the pages."""
    records = [record for record in find_records(runs_folder(profile="paper")) if record.identity.study == "paths"]
    assert len(records) >= 2
    for record in records:
        assert curriculum.runs_of(records, record.recipe, record.profile)[record.seed] == record


def test_effects_of_readings_are_those_of_least_squares(tmp_path):
    rng = np.random.default_rng(3)
    levels = {}
    for each in paths.HALF:
        for name in ("CNN", "SCNN"):
            levels[name, each] = round(float(rng.uniform(0.3, 0.9)), 4)
            write(tmp_path, paths.named(name, each), 10, levels[name, each])
    records = find_records(tmp_path)
    differences, effects = curriculum.reading_effects(records, "accuracy")
    values = np.array([100 * (levels["SCNN", each] - levels["CNN", each]) for each in paths.HALF])
    assert list(differences.values()) == pytest.approx(values.tolist())
    inside = np.array([[name in each for name in paths.READINGS] for each in paths.HALF], dtype=float)
    matrix = np.column_stack([np.ones(8), inside])
    solution, residuals, *_ = np.linalg.lstsq(matrix, values, rcond=None)
    errors = np.sqrt(np.diag(np.linalg.inv(matrix.T @ matrix)) * residuals[0] / 3)
    whole = effects.pop("mean of all readings")
    assert whole.mean == pytest.approx(values.mean())
    assert whole.interval[1] - whole.mean == pytest.approx(stats.t.ppf(0.975, 3) * np.sqrt(residuals[0] / 3 / 8))
    for place, effect in enumerate(effects.values(), start=1):
        half = stats.t.ppf(0.975, 3) * errors[place]
        assert effect.mean == pytest.approx(solution[place])
        assert effect.interval == pytest.approx((solution[place] - half, solution[place] + half))
        name = list(paths.READINGS)[place - 1]
        assert effect.mean == pytest.approx(
            values[inside[:, place - 1] == 1].mean() - values[inside[:, place - 1] == 0].mean()
        )
        assert name in effects
    assert curriculum.reading_effects(records[1:], "accuracy")[1] == {}, "all eight are needed"
    assert curriculum.reading_effects([], "accuracy") == ({}, {})


def test_the_ladder_shows_means_and_what_was_not_run(tmp_path):
    for seed, level in ((10, 0.5), (11, 0.7)):
        write(tmp_path, "CNN", seed, level)
        record = write(tmp_path, "CNN tied GroupNorm", seed, level)
        steps = {"steps20_box21_exact": level, "steps40_box21_exact": level / 2, "steps20_box25_exact": 0.1}
        write_record(record.identity, record.metrics | steps, data=record.data, history=record.history, runs=tmp_path)
    records = find_records(tmp_path)
    rows = {row["network"]: row for row in curriculum.ladder_rows(records)}
    assert list(rows) == ["CNN", "SCNN", *paths.LADDER]
    assert rows["CNN"] == {
        "network": "CNN", "runs": "2", "adaptation": "60.0", "accuracy": "60.0", "extrapolation": "30.0",
    }  # fmt: skip
    assert rows["SCNN"]["runs"] == "not run" and rows["SCNN"]["accuracy"] == ""
    assert curriculum.step_rows(records) == [
        {"network": "CNN tied GroupNorm", "box": "21", "20 steps": "60.0", "40 steps": "30.0"},
        {"network": "CNN tied GroupNorm", "box": "25", "20 steps": "10.0"},
    ]


def test_structure_by_phase_of_a_real_run(tmp_path, monkeypatch):
    record, _ = train("SCNN", rehearse=True, runs=tmp_path, checkpoints=tmp_path / "c", progress=False, device="cpu")
    rows = curriculum.structure_rows(record)
    assert [row["end of phase"] for row in rows] == ["1", "2"]
    test = measures.structure_at(record)["largest"]
    assert rows[1]["largest"] == f"{test.observed:.2f} (chance {test.chance:.2f}, p {test.p:.2g})"
    assert rows[0]["folds"].startswith(("at 0.", "nothing down to 0.5"))
    monkeypatch.setitem(record.metrics, "fold2_0.6_layers", 3.0)
    monkeypatch.setitem(record.metrics, "fold2_0.6_exact", 0.25)
    folds = curriculum.structure_rows(record)[1]["folds"]
    assert folds.startswith("at 0.6: 3 of 20 layers, exact ") and folds.endswith("to 25.0%")
    for threshold in paths.FOLDED_AT:  # all layers alike
        monkeypatch.setitem(record.metrics, f"fold2_{threshold:g}_layers", 1.0)
    assert curriculum.structure_rows(record)[1]["folds"].startswith("at 0.95: 1 of 20 layers")
