"""The poster's tables, and which records fill a cell beside them."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import softshare
from softshare import models
from softshare.speed import benchmark
from softshare.studies import find_records, folding, make_plan, read_record, study_of, tables, write_record


def test_tables_hold_the_posters_figures():
    cifar = {row["model"]: row for row in tables.paper_table("cifar")}
    assert cifar["SWRN 28-10-2*"]["cifar10_error"] == "3.75" and cifar["SWRN 28-18*"]["cifar100_error"] == "17.43"
    assert len(cifar) == 11 and len(tables.paper_table("imagenet")) == 4 and len(tables.paper_table("search")) == 12
    assert all(row["source"].startswith("poster") for name in tables.TABLES for row in tables.paper_table(name))
    with pytest.raises(ValueError, match="cifar, imagenet, search"):
        tables.paper_table("mnist")


def test_only_runs_at_the_papers_schedule_fill_a_cell(tmp_path):
    def run(profile, seed, error, source="CIFAR-10 (JPEG)", images=50_000, **change):
        plan = make_plan("SWRN 28-10-2*", profile, seed)
        if change:
            plan = dataclasses.replace(plan, augmentation={**plan.augmentation, **change})
        identity, data = study_of(plan).identity(plan, source), {"source": source, "fingerprint": source}
        config = {"sizes": {"train": images, "test": 10_000}}
        write_record(identity, {"error": error}, data=data, config=config, runs=tmp_path)

    def cell():
        return tables.measured(find_records(tmp_path), "SWRN 28-10-2*", "error", "CIFAR-10")

    run("fast", 0, 60.0)
    run("gpu", 0, 6.0)
    run("short", 0, 5.0)
    run("paper", 0, 17.0, "CIFAR-100")
    run("paper", 0, 9.0, cutout=16)  # not the recipe's
    run("paper", 0, 1.0, "CIFAR-10 (PNG)", images=20)  # ten classes of that name, but not all their images
    assert cell() == "not run"
    run("paper", 0, 3.0)
    assert cell() == "3.00 (1 run, paper, CIFAR-10 (JPEG))"
    run("paper", 1, 4.0)
    assert cell() == "3.50 ± 0.71 (2 runs, paper, CIFAR-10 (JPEG))"
    found = next(iter(tmp_path.glob("*-paper-s1-*.json")))
    shutil.copy(found, tmp_path / "a-copy.json")  # counts once
    run("paper", 2, 5.0, "CIFAR-10")
    assert cell() == "5.00 (1 run, paper, CIFAR-10); 3.50 ± 0.71 (2 runs, paper, CIFAR-10 (JPEG))"


def test_records_of_another_version_fill_no_cell(tmp_path, monkeypatch):
    plan = make_plan("CNN", "paper")
    write_record(study_of(plan).identity(plan), {"phase1_exact": 0.5}, data={"source": "grids"}, runs=tmp_path)
    records = find_records(tmp_path)
    assert tables.measured(records, "CNN", "phase1_exact", "grids").startswith("0.50 (1 run")
    monkeypatch.setattr(study_of(plan), "version", 99, raising=False)
    assert tables.measured(records, "CNN", "phase1_exact", "grids") == "not run"


def test_html_is_escaped():
    assert "<b>" not in tables.as_html([{"a<b>": "<b>x"}], "<b>") + tables.finding("<b>")


def test_speeds_show_the_median_and_the_range():
    record = {"ratios": {"a / b": [1.0, 0.5, 1360.4]}, "generator": {"ratios": {"c / d": [3.0, 2.0, 4.0]}}}
    record["steps"] = {"seconds": {"a": [float(n) for n in range(1, 10)], "b": [2.0] * 9}}
    rows = tables.speeds(record)
    assert rows[0] == {"ratio": "a / b", "median": "1", "range": "0.5 to 1360", "interval": "1 to 4"}, "ranks 2 and 8"
    assert rows[1] == {"ratio": "c / d", "median": "3", "range": "2 to 4", "interval": ""}


def test_the_speeds_in_the_readme_are_those_of_the_record():
    top = Path(__file__).resolve().parents[2]
    text = " ".join((top / "README.md").read_text(encoding="utf-8").split())
    cpu, gpu = re.findall(r"\[record\]\((data/benchmarks/[^)]+)\)", text)
    ratios = benchmark.load_benchmark(top / cpu)["ratios"]
    assert f"takes {ratios['ours / plain'][0]:.2f} times the plain network's" in text
    assert f"the authors' scheme {ratios['authors / ours'][0]:.2f} times ours" in text
    record = benchmark.load_benchmark(top / gpu)
    ratios, seconds = record["ratios"], record["steps"]["seconds"]
    assert f"{1000 * np.median(seconds['ours']):.1f} ms, {ratios['ours / plain'][0]:.2f} times the plain" in text
    assert f"{ratios['authors, TF32 off / ours'][0]:.1f} times ours" in text


def test_what_runs_show_about_structure(tmp_path):
    """From coefficients set by hand: a loop in stage 2, nothing elsewhere."""
    model = models.swrn(40, 1, 8)
    recorder = softshare.SimilarityRecorder()
    with torch.no_grad():
        for bank in softshare.banks(model).values():
            bank.coefficients.copy_(torch.cat([torch.eye(8), torch.eye(8)[:2] + torch.eye(8)[2:4]]))
        recorder.record(model, 0)
        alpha = softshare.banks(model)["stage2"].coefficients
        alpha[4::2], alpha[5::2] = -2 * alpha[2], alpha[3]
        recorder.record(model, 3)
    plan = make_plan("SWRN 40-8-8", "short", 5)
    config, data = plan.config(), {"source": "CIFAR-10", "fingerprint": "x"}
    found = {"error": 5.125}
    write_record(
        study_of(plan).identity(plan, "x"), found, data=data, config=config, similarity=recorder, runs=tmp_path
    )
    ((title, rows),) = tables.structure(find_records(tmp_path)).items()
    assert title == "SWRN 40-8-8, profile short (30 epochs), seed 5, CIFAR-10: test error 5.12%"
    assert [row["stage"] for row in rows] == ["stage1", "stage2", "stage3", "all"]
    assert [row["plan at 0.8"] for row in rows] == [
        "1 -> 2 -> 3 -> 4 -> 5 -> 6 -> 7 -> 8 -> 9 -> 10",
        "1 -> 2 -> (3 -> 4) x 4",
        "1 -> 2 -> 3 -> 4 -> 5 -> 6 -> 7 -> 8 -> 9 -> 10",
        "",
    ]
    assert [row["largest similarity"].split(" (")[0] for row in rows] == ["0.71", "1.00", "0.71", "1.00"]
    assert [row["first at 0.8 (epoch)"] for row in rows] == ["never", "3", "never", ""]
    for name, row in zip(softshare.banks(model), rows, strict=False):
        start, end = ({name: torch.from_numpy(recorder.coefficients[name][place])} for place in (0, -1))
        test = softshare.similarity.beyond_chance(end, start)["chessboard"]
        assert row["chessboard"] == f"{test.observed:.2f} (by chance up to {test.chance:.2f}, p {test.p:.2g})"
    assert rows[1]["chessboard"].endswith("p 0.001)") and rows[3]["chessboard"].endswith("p 0.001)")
    assert tables.structure(find_records(tmp_path), "SWRN 28-10-2") == {}


def test_what_the_readme_says_about_folding_matches_the_record():
    top = Path(__file__).resolve().parents[2]
    text = " ".join((top / "README.md").read_text(encoding="utf-8").split())
    (path,) = re.findall(r"\[record\]\((data/runs/[^)]+)\)", text)
    record = read_record(top / path)
    plan = folding.plan_from_snapshots(record, 0.8)
    assert str(plan.groups[1]).removeprefix("stage2: ") in text
    assert f"{plan.distinct_layers} of {plan.total_layers} layers stay distinct" in text
    assert f"test error {record.metrics['error']:.2f}%" in text and record.data["source"] in text
