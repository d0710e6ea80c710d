"""Every chapter, run from its source in profile fast, by what it wrote and not by what it printed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from build import Book, prepare_kernels, run_chapter

import softshare

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
    # One template a layer, frozen orthogonal coefficients: the plain network under SGD, not under Adam, nor once they learn.
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
    found = records["chapter 2"]["metrics"]
    assert found["plain_parameters"] == sum(p.numel() for p in softshare.models.build("WRN 22-1").parameters())
    assert found["shared_parameters"] == sum(p.numel() for p in softshare.models.build("SWRN 22-1-2").parameters())
    for kind in ("plain", "shared"):
        assert found[f"{kind}_accuracy"] > 2.5 * found["chance_accuracy"]
        assert found[f"{kind}_last_loss"] < 0.8 * found[f"{kind}_first_loss"]
    assert abs(found["plain_accuracy"] - found["shared_accuracy"]) < 15
    for recipe in ("WRN 22-1", "SWRN 22-1-2"):
        assert records[recipe]["config"]["settings"]["seed"] == 0 and records[recipe]["data"]["fingerprint"]
    if os.environ.get("SOFTSHARE_DATA"):
        assert records["chapter 2"]["data"]["source"].startswith("CIFAR-10")


def test_similarity(top, tmp_path):
    records = {record["recipe"]: record for record in run(top, "03-similarity", tmp_path)}
    found = records["chapter 3"]["metrics"]
    assert found["plain_distinct_at_09"] == found["layers"] == 18  # unregularised, nothing folds
    assert found["penalised_distinct_at_09"] < 18
    assert found["initial_95"] < 0.01 < found["plain_largest_similarity"] < 0.9 <= found["penalised_largest_similarity"]
    assert found["by_hand_plan"].split("\n")[1] == "stage2: 1 -> 2 -> (3 -> 4) x 4"
    assert found["by_hand_difference"] < 1e-5
    # The bank of 8 templates and 10 rows goes; two loop weights, two others and the loop's 8 scales come. The untied
    # groups have more layers than templates and keep their banks.
    weight = 32 * 32 * 9
    assert found["by_hand_parameters_saved"] == 8 * (weight + 10) - 4 * weight


def test_results(top, tmp_path):
    (record,) = run(top, "results", tmp_path)
    found = record["metrics"]
    assert found["records"] == 0 and found["cells_measured"] == 0  # an empty folder fills no cell
    assert found["cells_not_run"] > 25
    assert found["largest_parameter_gap"] < 1  # the poster's numbers are rounded, some of them down


def test_shortest_path(top, tmp_path):
    (record,) = run(top, "04-shortest-path", tmp_path)
    found = record["metrics"]
    phases = range(1, len(record["config"]["boxes"]) + 1)
    assert found["search_agreement"] == 1.0
    for name in ("f1", "exact"):  # the rule falls as the box grows
        rule = [found[f"rule_phase{phase}_{name}"] for phase in phases]
        assert rule == sorted(rule, reverse=True)
    for model in ("cnn", "scnn"):
        for phase in phases:
            here = f"phase{phase}"
            # Better than the rule on all grids, and clearly so on those where the rule fails.
            assert found[f"{model}_{here}_exact"] > found[f"rule_{here}_exact"] + 0.02, (model, phase)
            assert found[f"{model}_{here}_hard_f1"] > found[f"rule_{here}_hard_f1"] + 0.02, (model, phase)
            assert found[f"{model}_{here}_exact"] > found[f"{model}_{here}_before_exact"]
            if phase > 1:  # a larger box costs exact solutions at first
                before = found[f"{model}_phase{phase - 1}_exact"]
                assert found[f"{model}_{here}_before_exact"] < before - 0.02, (model, phase)
    # Learned search carries to larger grids, but not to larger boxes.
    for model in ("cnn", "scnn"):
        assert found[f"{model}_size48_box9_exact"] > found["rule_size48_box9_exact"] + 0.05
        assert found[f"{model}_size48_box21_hard_f1"] < found["rule_size48_box21_hard_f1"] - 0.1
    assert found["scnn_similarity_start"] < 1e-5 < 0.01 < found["scnn_similarity_end"] < 0.6
    rows = record["history"]
    assert len(rows) == 2 * len(phases) * (record["config"]["epochs"] + 1)
    assert all(0 <= row[key] <= 1 for row in rows for key in ("exact", "f1", "hard_f1", "raw_exact", "raw_f1"))
    assert list((tmp_path / "runs").glob("*.npz")), "no similarity snapshots"
