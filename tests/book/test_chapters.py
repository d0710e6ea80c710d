"""Every chapter, run from its source in profile fast and judged by its records, not by its output."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from build import Book, prepare_kernels, run_chapter

import softshare
from softshare.studies import make_plan, pipeline, study_of, write_record
from softshare.studies.verdicts import read_claims

pytestmark = pytest.mark.long


def run(top: Path, name: str, folder: Path) -> list[dict[str, Any]]:
    """Run a chapter with its records going to `folder`; returns them."""
    prepare_kernels()
    runs = folder / "runs"
    runs.mkdir()
    run_chapter(Book(top), name, {"PROFILE": "fast", "RUNS": str(runs)}, output=folder)
    records = [json.loads(path.read_text(encoding="utf8")) for path in sorted(runs.rglob("*.json"))]
    assert records, f"{name} wrote no record"
    return records


def test_templates(top, tmp_path):
    (record,) = run(top, "01-templates", tmp_path)
    found = record["metrics"]
    # One template per layer and frozen orthogonal coefficients: equal to the plain network under SGD, but not under
    # Adam or once the coefficients learn.
    assert found["sgd_difference"] < 1e-13
    assert found["adam_difference"] > 1e-3 and found["learned_difference"] > 1e-3
    counts = {
        "wrn_28_10": 36.48, "swrn_28_10": 36.48, "swrn_28_10_2": 17.13, "swrn_28_6_2": 6.18, "swrn_28_14": 71.47,
        "swrn_28_14_2": 33.54, "swrn_28_18": 118.12, "swrn_28_18_2": 55.41,
    }  # fmt: skip
    assert {name: round(found[f"parameters_{name}"], 2) for name in counts} == counts
    means = {(6, 1): 1.00, (6, 2): 0.59, (6, 4): 0.27, (10, 8): 0.13, (6, 6): 0.0, (20, 20): 0.0}
    for (layers, k), mean in means.items():
        assert found[f"initial_mean_{layers}_{k}"] == pytest.approx(mean, abs=0.03), (layers, k)
    assert found["initial_largest95_6_2"] > 0.98 and found["initial_largest95_10_8"] < 0.85


def test_training(top, tmp_path):
    records = {record["recipe"]: record for record in run(top, "02-training", tmp_path)}
    assert set(records) == {"WRN 28-10", "SWRN 28-10-2", "chapter 2"}
    found = records["chapter 2"]["metrics"]
    assert found["plain_parameters"] == sum(p.numel() for p in softshare.models.build("WRN 28-1").parameters())
    assert found["shared_parameters"] == sum(p.numel() for p in softshare.models.build("SWRN 28-1-2").parameters())
    for kind in ("plain", "shared"):
        assert found[f"{kind}_accuracy"] > 2.5 * found["chance_accuracy"]
        assert found[f"{kind}_last_loss"] < 0.8 * found[f"{kind}_first_loss"]
    assert abs(found["plain_accuracy"] - found["shared_accuracy"]) < 15
    for recipe in ("WRN 28-10", "SWRN 28-10-2"):  # the record that `softshare run` makes and finds
        record, plan = records[recipe], make_plan(recipe, "fast")
        identity = study_of(plan).identity(plan, record["data"]["fingerprint"])
        assert record["hash"] == identity.hash and record["execution"]["precision"] == "float32"
    if os.environ.get("SOFTSHARE_DATA"):
        assert records["chapter 2"]["data"]["source"].startswith("CIFAR-10")


def test_similarity(top, tmp_path):
    records = {record["recipe"]: record for record in run(top, "03-similarity", tmp_path)}
    assert {"SWRN 40-8-8", "SWRN 40-8-8 with penalty", "fold of SWRN 40-8-8", "chapter 3"} <= set(records)
    found = records["chapter 3"]["metrics"]
    assert found["layers"] == 30
    assert found["plain_distinct_at_09"] >= 25  # unregularised, hardly anything folds
    assert found["penalised_distinct_at_09"] < found["plain_distinct_at_09"]
    # The cost of folding is mostly stale BatchNorm: with re-estimated statistics hardly any of it is left.
    assert found["reestimated_change_at_09"] < max(5.0, found["kept_change_at_09"] / 2)
    assert found["plain_distinct_at_02"] < 30, "at a low enough threshold everything folds"
    assert found["fresh_95"] < found["random_95"] < found["penalised_largest_similarity"]
    assert found["by_hand_plan"].split("\n")[1] == "stage2: 1 -> 2 -> (3 -> 4) x 4"
    assert found["by_hand_difference"] < 1e-5
    # The bank of 8 templates and 10 rows is replaced by two loop weights, two others and the loop's 8 scales. The untied
    # groups have more layers than templates and keep their banks.
    weight = 32 * 32 * 9
    assert found["by_hand_parameters_saved"] == 8 * (weight + 10) - 4 * weight


def test_shortest_paths(top, tmp_path):
    records = {record["recipe"]: record for record in run(top, "04-shortest-path", tmp_path)}
    assert set(records) == {"CNN", "SCNN", "transfer of CNN, SCNN", "chapter 4"}
    for name in ("CNN", "SCNN"):
        record, plan = records[name], make_plan(name, "fast")
        assert record["hash"] == study_of(plan).identity(plan, record["data"]["fingerprint"]).hash
        found = record["metrics"]
        for phase in (1, 2, 3):  # better than the rule, which needs no search
            assert found[f"phase{phase}_exact"] > found[f"rule{phase}_exact"] + 0.02
            assert found[f"rule{phase}_hard_exact"] == 0.0
        assert found["before2_exact"] < found["phase2_exact"]
        assert record["history"][-1]["loss"] < record["history"][0]["loss"]
    transfer = records["transfer of CNN, SCNN"]
    assert transfer["chosen"]["of"] == {name: records[name]["hash"] for name in ("CNN", "SCNN")}
    assert records["chapter 4"]["metrics"]["search_agreement"] == 1.0
    assert records["chapter 4"]["metrics"]["scnn_similarity_start"] < 0.01


def test_results(top, tmp_path):
    (record,) = run(top, "results", tmp_path)
    found = record["metrics"]
    assert found["records"] == 0 and found["cells_measured"] == 0  # an empty folder fills no cell
    assert found["cells_not_run"] > 60
    assert found["largest_parameter_gap"] < 1  # the poster's numbers are rounded, some of them down


def test_claims(top, tmp_path):
    (record,) = run(top, "claims", tmp_path)
    found, claims = record["metrics"], read_claims()
    assert found["claims"] == len(claims)
    assert found["follows from the definition, tested"] == sum(claim.kind == "definition" for claim in claims)
    assert found["not run"] + found["an argument, not tested"] + found["follows from the definition, tested"] == len(
        claims
    )


def test_compared(top, tmp_path):
    (record,) = run(top, "compared", tmp_path)
    found = record["metrics"]
    assert found["networks"] == 11 + 12 + 4  # the rows of the poster's tables
    assert found["largest_parameter_difference"] < 0.02
    assert found["twin_difference"] < 1e-3
    assert found["work_of_shared"] == 1.0 and 0.4 < found["work_of_twin"] < 0.5


def test_scaling(top, tmp_path):
    (record,) = run(top, "scaling", tmp_path)
    found = record["metrics"]
    assert found["rows"] == 11 + 12 + 4 and found["row_jobs"] == 5 * (11 * 2 + 12 + 4)
    assert found["jobs"] == len(pipeline.jobs_of("paper", data=("cifar10", "cifar100", "folder")))
    assert found["days_1"] == pytest.approx(found["hours"] / 24)
    for count in (8, 64):  # at least its share, and the longest run
        bound = max(found["days_1"] / count, found["longest"] / 24)
        assert bound <= found[f"days_{count}"] <= 4 / 3 * bound * 1.01
    assert found["runs_compared"] >= 8


def test_every_number_of_ours_on_the_results_page_comes_from_a_record(top, tmp_path):
    """With records of known content, every filled cell of ours shows one of them, and every record fills a cell."""

    def write(name, seed, metrics, source="CIFAR-10 (JPEG)", profile="paper", **change):
        plan = make_plan(name, profile, seed)
        plan = replace(plan, augmentation={**plan.augmentation, **change})
        identity, data = study_of(plan).identity(plan, source), {"source": source, "fingerprint": source}
        config = {"sizes": {"train": 50_000, "test": 10_000}}
        write_record(identity, metrics, data=data, config=config, runs=tmp_path / "runs")

    for seed, error in enumerate((3.125, 3.375)):
        write("SWRN 28-6-2 cutout", seed, {"error": error})
    write("WRN 28-6 cutout", 0, {"error": 3.5})
    write("WRN 28-6 cutout", 1, {"error": 77.77}, profile="gpu")  # from another schedule
    write("WRN 28-10*", 0, {"error": 66.66}, source="SVHN")
    write("WRN 28-10*", 0, {"error": 55.55}, cutout=16)  # not as in the recipe
    grids = {f"{who}{n}_exact": value + n for n in range(1, 6) for who, value in (("phase", 0.5), ("rule", 0.25))}
    write("SCNN lambda 0.01", 3, grids, source="shortest paths, generated")
    notebook = tmp_path / "results.ipynb"
    prepare_kernels()
    run_chapter(Book(top), "results", {"PROFILE": "fast", "RUNS": str(tmp_path / "runs")}, output=tmp_path)
    cells = json.loads(notebook.read_text(encoding="utf8"))["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    pages = ["".join(output["data"]["text/html"]) for output in outputs if "text/html" in output.get("data", {})]
    filled = set()
    for page in pages:
        head, *rows = ElementTree.fromstring(page).iter("tr")
        names = [cell.text or "" for cell in head]
        for row in rows:
            for name, cell in zip(names, row, strict=True):
                if "measured here" in name or name.startswith("phase"):
                    filled.add((row[0].text, name, cell.text))
    filled = {each for each in filled if each[2] not in ("not run", "not planned")}
    expected = {("SWRN 28-6-2 cutout", "C-10, measured here", "3.25 ± 0.18 (2 runs, paper, CIFAR-10 (JPEG))")}
    expected.add(("WRN 28-6 cutout", "C-10, measured here", "3.50 (1 run, paper, CIFAR-10 (JPEG))"))
    for n in range(1, 6):
        text = f"{0.5 + n:.3f} (1 run, paper, shortest paths, generated)"
        expected |= {("SCNN lambda 0.01", f"phase {n}", text), ("rectangle rule", f"phase {n}", f"{0.25 + n:.3f}")}
    assert filled == expected
    everything = json.dumps(outputs)
    assert not any(number in everything for number in ("77.77", "66.66", "55.55"))
