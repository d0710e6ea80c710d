"""What a fold costs, as a record of its own."""

from __future__ import annotations

import pytest
import torch

import softshare
from softshare.studies import find_records, folding, make_plan, study_of, train
from softshare.training.evaluation import evaluate, with_reestimated_statistics


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    places = {"runs": folder, "checkpoints": folder / "c", "progress": False, "device": "cpu", "rehearse": True}
    record, model = train("SWRN 40-8-8", "fast", 0, "digits", **places)
    plan = make_plan("SWRN 40-8-8", "fast", 0, rehearse=True)
    return record, model, study_of(plan).tasks(plan, "digits")


def test_a_fold_is_tested_in_two_ways_and_recorded(trained, tmp_path):
    record, model, tasks = trained
    found = folding.fold_costs(record, model, tasks, [0.3, 0.9], runs=tmp_path)
    assert find_records(tmp_path) == [found] and found.identity.study == "folding"
    assert found.identity.chosen == {"of": record.identity.hash, "thresholds": [0.3, 0.9]} and found.data == record.data
    rows = folding.rows_by_way(found)
    assert list(rows) == [folding.REESTIMATED, folding.KEPT] and [len(each) for each in rows.values()] == [2, 2]
    folds = softshare.plan_fold(model, 0.3)
    assert folds.distinct_layers < folds.total_layers
    folded = softshare.fold(model, folds)
    kept = folding.row_at(rows[folding.KEPT], 0.3)
    assert (kept["distinct"], kept["total"], kept["plan"]) == (folds.distinct_layers, 30, str(folds))
    assert kept["value"] == pytest.approx(evaluate(folded, tasks.test, "float32")["error"])
    plan = make_plan("SWRN 40-8-8", "fast", 0, rehearse=True)
    inputs = study_of(plan).sample(plan, tasks)
    assert len(inputs) == tasks.train.size == 300 and found.execution["precision"] == "float32"
    fresh = evaluate(with_reestimated_statistics(folded, inputs, "float32"), tasks.test, "float32")["error"]
    assert folding.row_at(rows[folding.REESTIMATED], 0.3)["value"] == pytest.approx(fresh)
    assert found.metrics["distinct_at_0.3"] == folds.distinct_layers and found.metrics["layers"] == 30
    # Both ways compare the folded network with the unfolded one that was tested in the same way.
    unfolded = evaluate(with_reestimated_statistics(model, inputs, "float32"), tasks.test, "float32")["error"]
    assert found.metrics["reestimated_before"] == pytest.approx(unfolded)
    assert found.metrics["kept_before"] == pytest.approx(record.metrics["error"])
    with pytest.raises(ValueError, match="no row at threshold 0.5"):
        folding.row_at(rows[folding.KEPT], 0.5)


def test_statistics_are_reestimated_on_examples_drawn_at_random(trained):
    """A data set may be sorted by class: statistics of its first thousand images would not fit the other classes."""
    _, _, tasks = trained
    plan = make_plan("SWRN 40-8-8", "fast", 0, rehearse=True)
    order = torch.randperm(tasks.train.size, generator=torch.Generator().manual_seed(0))
    expected, _ = tasks.train.batch(order[:1000], 0, 1)
    assert torch.equal(study_of(plan).sample(plan, tasks), expected) and not torch.equal(order, order.sort().values)


def test_a_plan_from_snapshots_equals_that_of_the_network(trained):
    record, model, _ = trained
    found, expected = folding.plan_from_snapshots(record, 0.3), softshare.plan_fold(model, 0.3)
    assert str(found) == str(expected) and found.clusters == expected.clusters
