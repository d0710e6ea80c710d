"""Transfer to larger grids and longer distances than in training, as a record of its own."""

from __future__ import annotations

import pytest

from softshare import shortest_path
from softshare.studies import make_plan, paths, study_of, train, transfer
from softshare.training.evaluation import evaluate, with_reestimated_statistics
from softshare.training.tasks import ShortestPaths


def test_a_transfer_writes_a_record_of_its_own(tmp_path):
    places = {"runs": tmp_path, "checkpoints": tmp_path / "c", "progress": False, "device": "cpu", "rehearse": True}
    pair = {name: train(name, "fast", 1, **places) for name in ("CNN", "SCNN")}
    records, networks = ({name: each[place] for name, each in pair.items()} for place in (0, 1))
    plan = make_plan("CNN", "fast", 1, rehearse=True)
    tasks = study_of(plan).tasks(plan)
    found = transfer.transfer(records, networks, tasks, [(12, 5), (16, 9)], grids=20, runs=tmp_path)
    assert found.identity.study == "transfer" and found.path.parent == tmp_path and found.data == records["CNN"].data
    assert found.identity.chosen["of"] == {name: record.identity.hash for name, record in records.items()}
    assert found.execution["precision"] == "float32"
    there = transfer.scores_at(found, 16, 9)
    assert set(there) == {"CNN", "SCNN", "rectangle rule"} and set(there["CNN"]) == set(paths.SCORES)
    grids = shortest_path.generate(20, 16, 9, 0.2, 2**62 + 2**33)
    fresh = with_reestimated_statistics(networks["CNN"], study_of(plan).sample(plan, tasks), "float32")
    assert there["CNN"]["f1"] == pytest.approx(evaluate(fresh, ShortestPaths(grids, grids), "float32")["f1"])
    rule = shortest_path.scores(shortest_path.rectangle_rule(grids.inputs), grids.targets)
    assert there["rectangle rule"]["exact"] == pytest.approx(rule["exact"])
