"""The curriculum: which grids belong to which set, and what is measured when."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

import softshare
from softshare import models, shortest_path
from softshare.studies import curriculum, make_plan, paths, study_of, train
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
        self.unused = models.gridnet(3, 4).layers

    def forward(self, inputs):
        return self.scale * (shortest_path.rectangle_rule(inputs).float() - 0.5)


def test_each_epoch_is_scored_on_its_phase_and_each_end_on_two():
    plan = make_plan("SCNN", "fast", 0, rehearse=True)
    tasks = study_of(plan).tasks(plan)
    (watcher,) = study_of(plan).watchers(plan, tasks)
    model = Fixed()
    tasks.train.epochs = 3
    for epoch in range(7):
        watcher(model, epoch)
    assert [row[0] for row in watcher.rows["scores"]] == [1, 2, 3, 4, 5, 6]
    assert [row[:2] for row in watcher.rows["ends"]] == [[0, 1], [3, 1], [3, 2], [6, 2], [6, 3]]
    assert [watcher.phase_of(epoch) for epoch in range(1, 7)] == [1, 1, 1, 2, 2, 2]
    found = watcher.metrics()
    for key in paths.SCORES:  # the model is the rule
        for phase in (1, 2):
            assert found[f"phase{phase}_{key}"] == found[f"before{phase}_{key}"] == found[f"rule{phase}_{key}"]
        assert found[f"before3_{key}"] == found[f"rule3_{key}"] and f"phase3_{key}" not in found
    assert found["phase1_exact"] != found["phase2_exact"] and watcher.row(4)["phase"] == 2
    again = study_of(plan).watchers(plan, tasks)[0]
    again.load_state_dict(watcher.state_dict())
    assert again.metrics() == found and again.row(5) == watcher.row(5)


def test_grids_that_are_scored_decide_nothing_and_are_no_others():
    """Those at the ends of phases are neither training grids nor those of each epoch; one box lies beyond the last."""
    plan = make_plan("SCNN", "fast", 0, rehearse=True)
    tasks = study_of(plan).tasks(plan)
    (watcher,) = study_of(plan).watchers(plan, tasks)
    assert plan.sizes["boxes"] == [5, 7] and len(watcher.ends) == 3
    assert max(watcher.ends[2].held_out.distances) > max(watcher.ends[1].held_out.distances)
    for end, phase in zip(watcher.ends, tasks.train.phases, strict=False):
        seen = {grid.numpy().tobytes() for grid in [*phase.train.inputs, *phase.held_out.inputs]}
        assert not any(grid.numpy().tobytes() in seen for grid in end.held_out.inputs)
    other = study_of(plan).watchers(make_plan("CNN", "fast", 5, rehearse=True), tasks)[0]
    assert torch.equal(other.ends[0].held_out.inputs, watcher.ends[0].held_out.inputs), "the same for all"
    sizes = make_plan("SCNN", "paper").sizes
    assert (sizes["held_out"], sizes["ends"]) == (2_000, 20_000)


def test_folds_and_similar_weights_are_found_when_a_phase_ends():
    plan = make_plan("SCNN", "fast", 0, rehearse=True)
    tasks = study_of(plan).tasks(plan)
    (watcher,) = study_of(plan).watchers(plan, tasks)
    model = study_of(plan).network(plan)
    watcher(model, 0)
    bank = softshare.banks(model)["layers"]
    with torch.no_grad():  # all layers become one
        bank.coefficients.copy_(bank.coefficients[:1].expand_as(bank.coefficients))
    watcher(model, 1)
    found, layers = watcher.metrics(), bank.num_layers
    assert found["start_weights_mean"] < 0.2 and watcher.row(1)["weights_mean"] == pytest.approx(1.0)
    assert watcher.row(1)["weights_largest"] == pytest.approx(1.0) and layers > 1
    assert {key for key in found if key.startswith("fold")} == {
        f"fold1_{threshold:g}_{what}" for threshold in paths.FOLDED_AT for what in ("layers", "exact")
    }
    assert found["fold1_0.9_layers"] == 1
    assert found["fold1_0.9_exact"] == watcher.row(1)["reestimated_exact"]
    plain = study_of(plan).network(make_plan("CNN", "fast", 0, rehearse=True))
    weights = torch.stack([layer.conv.weight.flatten() for layer in plain.layers]).detach()
    similarity = torch.nn.functional.cosine_similarity(weights[:, None], weights[None], dim=2).abs()
    pairs = similarity[~torch.eye(layers, dtype=bool)]
    assert paths.weights_alike(plain) == pytest.approx((float(pairs.mean()), float(pairs.max())), rel=1e-5)


def test_the_curriculum_is_the_posters():
    """32 x 32 x 2 inputs, two query points, many obstacles, 50 epochs per phase, growing distances."""
    plan = make_plan("SCNN", "paper", 10)
    assert plan.settings.epochs == 50 * len(plan.sizes["boxes"]) and plan.sizes["boxes"] == sorted(plan.sizes["boxes"])
    small = dataclasses.replace(plan, sizes={**plan.sizes, "train": 200, "held_out": 10, "ends": 10})
    tasks, distances = study_of(plan).tasks(small), []
    for phase in tasks.train.phases:
        inputs = phase.train.inputs
        assert inputs.shape == (200, 2, 32, 32) and (inputs[:, 0].flatten(1).sum(1) == 2).all()
        assert 0.05 < inputs[:, 1].float().mean() < 0.15
        distances.append(phase.train.distances.float().mean())
    assert distances == sorted(distances) and len(set(distances)) == len(distances)
    assert [tasks.train.at(epoch) is tasks.train.phases[0] for epoch in (1, 50, 51)] == [True, True, False]


def test_a_pair_starts_from_the_same_function():
    plans = [make_plan(name, "fast", 3) for name in ("CNN", "SCNN")]
    plain, shared = (study_of(plan).network(plan).eval() for plan in plans)
    assert not softshare.banks(plain) and softshare.banks(shared)
    x = torch.randn(2, 2, 12, 12)
    torch.testing.assert_close(plain(x), shared(x))
    assert all(parameter.requires_grad for parameter in plain.parameters())
    same = study_of(plans[0]).network(plans[0]).eval()
    assert torch.equal(plain(x), same(x)) and not torch.equal(
        plain(x), study_of(plans[0]).network(make_plan("CNN", "fast", 4)).eval()(x)
    )


def test_other_readings_are_half_of_their_combinations():
    """Every reading stands in half of the settings, and so does every pair of them, together or with neither."""
    signs = torch.tensor([[1.0 if name in each else -1.0 for name in paths.READINGS] for each in paths.HALF])
    assert len(paths.HALF) == 8 == len(set(paths.HALF)) and paths.HALF[0] == ()
    assert torch.equal(signs.T @ signs, 8 * torch.eye(4)) and torch.equal(signs.sum(0), torch.zeros(4))
    for first, second in itertools.combinations(range(4), 2):  # no effect is that of two others
        assert torch.equal((signs[:, first] * signs[:, second]) @ signs, torch.zeros(4))
    for each in paths.HALF[1:]:
        for network in ("CNN", "SCNN"):
            plan = make_plan(paths.named(network, each), "short", 10)
            ours = make_plan(network, "short", 10)
            assert (plan.settings.rate == 0.003) == ("rate 0.003" in each) and ours.settings.rate == 0.01
            assert (plan.sizes["obstacles"] == 0.3) == ("obstacles 0.3" in each) and ours.sizes["obstacles"] == 0.1
            assert plan.sizes.get("fresh", False) == ("fresh grids" in each) and "fresh" not in ours.sizes
            assert (plan.options == {"skip": False}) == ("no skip" in each)


def test_a_pair_starts_from_the_same_function_in_all_readings():
    for each in (paths.HALF[1], paths.HALF[-1]):
        plain, shared = (
            study_of(plan).network(plan).eval()
            for plan in (make_plan(paths.named(name, each), "fast", 3) for name in ("CNN", "SCNN"))
        )
        x = torch.randn(2, 2, 12, 12)
        torch.testing.assert_close(plain(x), shared(x))
        assert plain.layers[0].skip is ("no skip" not in each)


def test_fresh_grids_are_new_in_each_epoch_and_the_same_for_a_seed():
    plan = make_plan("SCNN no skip + fresh grids", "fast", 3, rehearse=True)
    phase, again = (study_of(plan).tasks(plan).train.to(torch.device("cpu")).phases[0] for _ in range(2))
    indices, seen = torch.arange(20), []
    for epoch in (1, 2):
        (inputs, _), place = phase.prepare(3, epoch), phase.drawn.inputs.data_ptr()
        again.prepare(3, epoch)
        for mine, theirs in zip(phase.batch(indices, 3, epoch), again.batch(indices, 3, epoch), strict=True):
            assert torch.equal(mine, theirs)
        assert inputs.data_ptr() == place and torch.equal(inputs[:20].float(), phase.batch(indices, 3, epoch)[0])
        seen.append(inputs.clone())
    assert not torch.equal(*seen) and not torch.equal(seen[0], phase.train.inputs)
    other = study_of(plan).tasks(plan).train.phases[1]
    assert other.identity() != phase.identity() and "fresh" in phase.identity()
    other = other.to(torch.device("cpu"))
    other.prepare(3, 1)
    assert not torch.equal(other.drawn.inputs, seen[0])


def test_shuffled_answers_belong_to_other_grids():
    plans = [make_plan(name, "fast", 3, rehearse=True) for name in ("SCNN", "SCNN shuffled")]
    ours, theirs = (study_of(plan).tasks(plan).train.phases[0] for plan in plans)
    assert torch.equal(ours.train.inputs, theirs.train.inputs) and not torch.equal(
        ours.train.targets, theirs.train.targets
    )
    counts = [sorted(task.train.targets.flatten(1).sum(1).tolist()) for task in (ours, theirs)]
    assert counts[0] == counts[1] and torch.equal(ours.held_out.targets, theirs.held_out.targets)


def test_unit_coefficients_stay_units_and_gains_learn(tmp_path):
    how = {"rehearse": True, "runs": tmp_path, "checkpoints": tmp_path / "c", "progress": False, "device": "cpu"}
    record, model = train("SCNN unit", **how)
    coefficients = softshare.banks(model)["layers"].coefficients
    torch.testing.assert_close(coefficients.detach().norm(dim=1), torch.ones(len(coefficients)))
    start, *_, end = record.similarity().coefficients["layers"]
    assert (start != end).any()
    weights = [layer.conv.weight.detach() for layer in model.layers]
    with torch.no_grad():
        coefficients.mul_(3.0)
    for layer, weight in zip(model.layers, weights, strict=True):
        torch.testing.assert_close(layer.conv.weight, weight)
    record, model = train("CNN gain", **how)
    assert all(layer.gain != 1 for layer in model.layers)
    plans = [make_plan(name, "fast", rehearse=True) for name in ("CNN", "CNN gain")]
    x = torch.randn(2, 2, 12, 12)
    torch.testing.assert_close(*(study_of(plan).network(plan).eval()(x) for plan in plans))


@pytest.mark.parametrize("name", ["CNN fresh grids + obstacles 0.3", "SCNN shuffled", "SCNN lambda 0.01 per pair"])
def test_explored_recipes_train(name, tmp_path):
    record, _ = train(name, rehearse=True, runs=tmp_path, checkpoints=tmp_path / "c", progress=False, device="cpu")
    assert record.recipe == name and len(record.history) == 2


@pytest.mark.parametrize("name", paths.LADDER)
def test_ingredients_of_search_train_and_run_longer(name, tmp_path):
    record, model = train(name, rehearse=True, runs=tmp_path, checkpoints=tmp_path / "c", progress=False, device="cpu")
    steps = {key for key in record.metrics if key.startswith("steps")}
    if "GroupNorm" not in name:
        assert not steps
        return
    assert {key.split("_")[1] for key in steps} == {"box7", "box9", "box11"} and len(steps) == 3 * len(paths.STEPS)
    plan = make_plan(name, "fast", rehearse=True)
    tasks = study_of(plan).tasks(plan)
    found = paths.exact_by_steps(model, plan, tasks)
    assert found == {key: record.metrics[key] for key in steps}
    rows = curriculum.step_rows([record], "fast")
    assert rows == []  # seeds below 10 were trials


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
    assert {"before3_exact", "phase2_exact", "before1_exact"} <= set(record.metrics)
    tasks = tasks_of(1)
    fresh = with_reestimated_statistics(model, tasks.train.phases[-1].train.inputs[:1000].float(), "float32")
    assert record.metrics["reestimated_f1"] == pytest.approx(evaluate(fresh, tasks.test, "float32")["f1"])
    assert record.metrics["f1"] == pytest.approx(evaluate(model, tasks.test, "float32")["f1"])
