"""The curriculum: which grids belong to which set, and what is measured when."""

from __future__ import annotations

import pytest
import torch

from softshare import shortest_path
from softshare.studies import make_plan, paths, study_of, train
from softshare.training.evaluation import evaluate, with_reestimated_statistics


def tasks_of(seed):
    plan = make_plan("SCNN", "fast", seed, rehearse=True)
    return study_of(plan).tasks(plan)


def test_validation_grids_are_never_training_grids():
    mine, theirs = tasks_of(1), tasks_of(2)
    assert not torch.equal(mine.train.phases[0].train.inputs, theirs.train.phases[0].train.inputs)
    for one, other in zip(mine.train.phases, theirs.train.phases, strict=True):
        assert torch.equal(one.held_out.inputs, other.held_out.inputs)
        seen = {grid.numpy().tobytes() for grid in one.train.inputs}
        assert not any(grid.numpy().tobytes() in seen for grid in [*one.held_out.inputs, *mine.test.held_out.inputs])
    with pytest.raises(ValueError, match="makes its own grids"):
        plan = make_plan("SCNN", "fast")
        study_of(plan).tasks(plan, "cifar10")


class Fixed(torch.nn.Module):
    """A model whose answer is the rectangle rule."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, inputs):
        return self.scale * (shortest_path.rectangle_rule(inputs).float() - 0.5)


def test_each_epoch_is_scored_on_its_phase_and_each_phase_before_it_begins():
    tasks = tasks_of(0)
    watcher = paths.PhaseScores(tasks.train, "float32")
    model = Fixed()
    tasks.train.epochs = 3
    for epoch in range(7):
        watcher(model, epoch)
    assert [row[:2] for row in watcher.found] == [
        [0, 1], [1, 1], [2, 1], [3, 1], [3, 2], [4, 2], [5, 2], [6, 2],
    ]  # fmt: skip
    assert [watcher.phase_of(epoch) for epoch in range(1, 7)] == [1, 1, 1, 2, 2, 2]
    found = watcher.metrics()
    for phase in (1, 2):
        for key in paths.SCORES:  # the model is the rule
            assert found[f"phase{phase}_{key}"] == found[f"before{phase}_{key}"] == found[f"rule{phase}_{key}"]
    assert found["phase1_exact"] != found["phase2_exact"] and watcher.row(4)["phase"] == 2
    again = paths.PhaseScores(tasks.train, "float32")
    again.load_state_dict(watcher.state_dict())
    assert again.metrics() == found


def test_statistics_are_reestimated_on_the_last_phase():
    tasks, plan = tasks_of(0), make_plan("SCNN", "fast", 0, rehearse=True)
    assert torch.equal(study_of(plan).sample(plan, tasks), tasks.train.phases[-1].train.inputs[:1000].float())


def test_plans_do_not_share_their_lists():
    make_plan("SCNN", "paper").sizes["boxes"].append(25)
    assert (
        make_plan("SCNN", "paper").sizes["boxes"]
        == [5, 9, 13, 17, 21]
        == study_of(make_plan("SCNN", "paper")).defaults["sizes"]["boxes"]
    )


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    places = {"runs": folder, "checkpoints": folder / "c", "progress": False, "device": "cpu", "rehearse": True}
    return {name: train(name, "fast", 1, **places) for name in ("CNN", "SCNN")}


def test_a_record_holds_what_was_seen(pair):
    record, model = pair["SCNN"]
    assert len(record.history) == 2 and [row["phase"] for row in record.history] == [1.0, 2.0]
    for row in record.history:
        assert {f"{kind}_{key}" for kind in ("held_out", "reestimated") for key in paths.SCORES} <= set(row)
    assert record.metrics["phase2_exact"] == record.history[-1]["reestimated_exact"]
    tasks = tasks_of(1)
    fresh = with_reestimated_statistics(model, tasks.train.phases[-1].train.inputs[:1000].float(), "float32")
    assert record.metrics["reestimated_f1"] == pytest.approx(evaluate(fresh, tasks.test, "float32")["f1"])
    assert record.metrics["f1"] == pytest.approx(evaluate(model, tasks.test, "float32")["f1"])
