"""Plans of folding: which layers tie, which repeats become loops, and how a plan is printed, read and refused."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.cluster.hierarchy import fcluster, linkage
from torch import nn

import softshare
from softshare import FoldPlan, banks, fold, layer_similarity, models, plan_fold, share_, tie, unshare
from softshare.files import content_checksum
from softshare.folded import sweep


def angles(*degrees):
    return torch.tensor([[math.cos(math.radians(d)), math.sin(math.radians(d))] for d in degrees], dtype=torch.double)


def clusters_of(model, threshold):
    (clusters,) = plan_fold(model, threshold).clusters.values()
    return clusters


# -------------------------------------------------------------------------------------------------------------- clusters


@given(st.integers(2, 9), st.integers(1, 4), st.floats(0.05, 0.999), st.integers(0, 2**31))
def test_clusters_are_those_of_complete_linkage(linears, layers, templates, threshold, seed):
    torch.manual_seed(seed)
    templates = min(templates, layers)
    model = linears(torch.randn(layers, templates, dtype=torch.double), size=2)
    similarity = layer_similarity(next(iter(banks(model).values())).coefficients.detach()).numpy()
    found = clusters_of(model, threshold)
    for cluster in found:  # every pair reaches the threshold
        assert all(similarity[a - 1, b - 1] >= threshold - 1e-6 for a in cluster for b in cluster)
    assert sorted(sum(found, ())) == list(range(1, layers + 1))
    assert list(found) == sorted(tuple(sorted(cluster)) for cluster in found)
    if templates > 1:  # at k = 1 all similarities are equal and the order of joining is open
        tree = linkage((1 - similarity)[np.triu_indices(layers, 1)], "complete")
        assume(np.abs(tree[:, 2] - (1 - threshold)).min() > 1e-6)
        labels = fcluster(tree, 1 - threshold, "distance")
        expected = {tuple(np.flatnonzero(labels == label) + 1) for label in set(labels)}
        assert set(found) == expected


def test_a_chain_is_not_one_cluster(linears):
    model = linears(angles(0, 30, 60))
    assert clusters_of(model, 0.8) == ((1, 2), (3,)), "ties of equal rank go to the lower layers"
    assert clusters_of(model, 0.49) == ((1, 2, 3),)
    assert clusters_of(model, 0.9) == ((1,), (2,), (3,))


def test_negative_cosines_tie(linears):
    model = linears(angles(0, 180, 90, 271))
    assert clusters_of(model, 0.99) == ((1, 2), (3, 4))
    assert clusters_of(model, 1.0) == ((1, 2), (3,), (4,))


def test_rows_of_zeros_tie_with_nothing(linears):
    model = linears([[0.0, 0.0], [1.0, 2.0], [0.0, 0.0], [2.0, 4.0]])
    assert clusters_of(model, 1e-6) == ((1,), (2, 4), (3,))
    x = torch.randn(3, 4)
    torch.testing.assert_close(fold(model, 1.0)(x), model(x))
    torch.testing.assert_close(fold(model, tie(model, {"Linear 4x4": [(1, 3)]}))(x), model(x))


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_exact_ties_in_float32_are_found_whatever_the_scale(scale, linears):
    rows = torch.randn(1, 5) * torch.tensor([[1.0], [-1 / 3], [1e-3], [7.7], [0.1]]) * scale
    assert clusters_of(linears(rows), 1.0) == ((1, 2, 3, 4, 5),)


@given(st.integers(0, 10**6), st.floats(-20, 20))
def test_multiples_rounded_to_float32_are_tied_at_one(seed, exponent):
    generator = torch.Generator().manual_seed(seed)
    row = torch.randn(8, generator=generator)
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    share_(model, 2)
    bank = banks(model)["Linear 3x3"]
    bank.coefficients = nn.Parameter(torch.stack([row, -row * 10.0**exponent]))
    bank.templates = nn.Parameter(torch.randn(8, 9, generator=generator))
    assert plan_fold(model, 1.0).distinct_layers == 1


@pytest.mark.parametrize("angle", [1e-3, 4e-5, 5e-6])
def test_nearly_equal_layers_are_not_tied_at_one(angle):
    """Layers that differ visibly in float32 outputs are not tied."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)).double()
    (bank,) = share_(model, 2).values()
    with torch.no_grad():
        bank.coefficients.copy_(torch.tensor([[1.0, 0.0], [1.0, angle]]))
    assert plan_fold(model, 1.0).distinct_layers == 2
    assert plan_fold(model, 1 - angle**2).distinct_layers == 1


def test_plans_are_deterministic(linears):
    for _ in range(5):
        rows = torch.randn(8, 3).round(decimals=0)  # many equal similarities
        model = linears(rows)
        plan = plan_fold(model, 0.7)
        torch.manual_seed(int(torch.randint(1000, ())))
        assert plan_fold(copy.deepcopy(model), 0.7) == plan
        assert plan_fold(linears(rows), 0.7).clusters == plan.clusters


@pytest.mark.parametrize("threshold", [0, 0.0, -0.5, 1.0001, float("nan"), float("inf")])
def test_a_threshold_outside_its_range(threshold, linears):
    with pytest.raises(ValueError, match="threshold"):
        plan_fold(linears(torch.eye(3)), threshold)
    with pytest.raises(ValueError, match="threshold"):
        fold(linears(torch.eye(3)), threshold)


@pytest.mark.parametrize("threshold", ["0.8", None, True, [0.8]])
def test_a_threshold_that_is_not_a_number(threshold, linears):
    with pytest.raises(TypeError, match="threshold"):
        fold(linears(torch.eye(3)), threshold)


def test_the_threshold_may_be_an_integer(linears):
    assert plan_fold(linears(torch.eye(3)), 1).threshold == 1.0


@pytest.mark.parametrize("call", [lambda m: plan_fold(m, 0.9), lambda m: fold(m, 0.9), lambda m: tie(m, {})])
def test_a_model_without_banks_cannot_be_folded(call, linears):
    for model in (models.wrn(16, 1), nn.ReLU(), unshare(linears(torch.eye(3)))):
        with pytest.raises(ValueError, match="share"):
            call(model)


def test_coefficients_that_are_not_finite_are_refused(linears):
    with pytest.raises(ValueError, match="not finite"):
        plan_fold(linears([[1.0, float("nan")], [1.0, 0.0]]), 0.9)


# ------------------------------------------------------------------------------------------- printing and reading plans


def test_a_plan_prints_as_a_person_would_say_it(write_coefficients, tied_rows):
    clusters = [(3, 5, 7, 9), (4, 6, 8, 10)]
    structure = models.swrn(40, 1, 8)
    assert str(tie(structure, {"stage1": clusters}).groups[0]) == "stage1: 1 -> 2 -> (3 -> 4) x 4"
    model = models.swrn(40, 1, 8)
    for bank in banks(model).values():
        write_coefficients(model, tied_rows(clusters, 8, 10), bank.name)
    lines = "stage1: 1 -> 2 -> (3 -> 4) x 4\nstage2: 1 -> 2 -> (3 -> 4) x 4\nstage3: 1 -> 2 -> (3 -> 4) x 4"
    assert str(plan_fold(model, 1.0)) == lines


@pytest.mark.parametrize(
    ("clusters", "text"),
    [
        ([], "1 -> 2 -> 3 -> 4 -> 5 -> 6"),
        ([(1, 3, 5), (2, 4, 6)], "(1 -> 2) x 3"),
        ([(1, 2, 3, 4, 5, 6)], "(1 -> 1) x 3"),
        ([(3, 5), (4, 6)], "1 -> 2 -> (3 -> 4) x 2"),
        ([(1, 3), (2, 4)], "(1 -> 2) x 2 -> 5 -> 6"),
        ([(1, 3, 5)], "1 -> 2 -> 1 -> 4 -> 1 -> 6"),  # blocks differ: reuse, no loop
        ([(2, 4), (3, 5)], "1 -> 2 -> 3 -> 2 -> 3 -> 6"),  # not aligned with blocks
        ([(1, 5), (2, 6)], "1 -> 2 -> 3 -> 4 -> 1 -> 2"),  # not consecutive
    ],
)
def test_loops_are_aligned_repeats_of_blocks(clusters, text):
    model = models.swrn(28, 1, 3)
    assert str(tie(model, {"stage2": clusters}).groups[1]) == f"stage2: {text}"


@pytest.mark.parametrize(
    ("clusters", "text"),
    [
        ([(2, 3, 4)], "1 -> (2) x 3 -> 5 -> 6 -> 7 -> 8"),
        ([(1, 3, 5), (2, 4, 6)], "(1 -> 2) x 3 -> 7 -> 8"),
        ([(1, 2, 5, 6), (3, 4, 7, 8)], "(1) x 2 -> (3) x 2 -> (1) x 2 -> (3) x 2"),
        ([(1, 5), (2, 6), (3, 7), (4, 8)], "(1 -> 2 -> 3 -> 4) x 2"),
        ([(1, 4), (2, 5), (3, 6)], "(1 -> 2 -> 3) x 2 -> 7 -> 8"),
    ],
)
def test_loops_of_the_grid_network(clusters, text):
    model = models.gridnet(layers=8, width=2, templates=3)
    assert str(tie(model, {"layers": clusters})) == f"layers: {text}"


def test_what_a_plan_holds():
    model = models.swrn(28, 1, 3)
    plan = tie(model, {"stage2": [(3, 5), (6, 4)]})
    assert plan.threshold is None and plan.total_layers == 18 and plan.distinct_layers == 16
    assert plan.clusters["stage2"] == ((1,), (2,), (3, 5), (4, 6))
    assert plan.schedule["stage2"] == (1, 2, 3, 4, 3, 4) and plan.schedule["stage1"] == (1, 2, 3, 4, 5, 6)
    (loop,) = plan.loops["stage2"]
    assert (loop.start, loop.length, loop.repeats) == (3, 2, 2) and plan.loops["stage1"] == ()
    assert plan.groups[1].layers == tuple(f"stage2.{b}.conv{c}" for b in (1, 2, 3) for c in (1, 2))
    assert plan_fold(model, 0.9).threshold == 0.9


@given(st.integers(0, 2**31), st.floats(0.3, 1.0))
def test_a_plan_goes_to_json_and_back(seed, threshold):
    torch.manual_seed(seed)
    model = models.gridnet(layers=6, width=1, templates=2)
    plan = plan_fold(model, threshold)
    text = plan.to_json()
    json.loads(text)
    assert FoldPlan.from_json(text) == plan
    by_hand = tie(model, {"layers": [(1, 2)]})
    assert FoldPlan.from_json(by_hand.to_json()) == by_hand


def edited(change):
    plan = json.loads(tie(models.gridnet(layers=4, width=1, templates=2), {"layers": [(1, 2)]}).to_json())
    change(plan["groups"][0])
    return json.dumps(plan | {"content": content_checksum(plan)})  # a wrong plan with a correct checksum


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        "[]",
        "[" * 100_000,
        "{}",
        '{"format": "other", "threshold": 0.9, "groups": []}',
        '{"format": "softshare fold plan 2", "groups": []}',
        '{"format": "softshare fold plan 2", "threshold": 0.9, "groups": [3]}',
        edited(lambda group: group.update(clusters=[[1, 2], [3]])),
        edited(lambda group: group.update(clusters=[[1, 2], [2, 3, 4]])),
        edited(lambda group: group.update(scales=[1.0])),
        edited(lambda group: group.pop("layers")),
        edited(lambda group: group.update(loops=[{"start": 1}])),
        edited(lambda group: group.update(loops=[{"start": 2, "length": 1, "repeats": 2}])),  # 2 and 3 are not tied
        edited(lambda group: group.update(loops=[{"start": 1, "length": 1, "repeats": 9}])),
        edited(lambda group: group.update(loops=[{"start": 0, "length": 1, "repeats": 2}])),
    ],
)
def test_text_that_is_not_a_plan(text):
    with pytest.raises(ValueError, match="not a fold plan"):
        FoldPlan.from_json(text)


@given(st.data())
def test_a_plan_that_was_edited_by_hand_says_so(data):
    """One changed digit, wherever it is."""
    torch.manual_seed(0)
    text = tie(models.gridnet(layers=4, width=1, templates=2), {"layers": [(1, 3), (2, 4)]}).to_json()
    digits = [place for place, letter in enumerate(text) if letter in "123456789"]
    place = data.draw(st.sampled_from(digits))
    changed = text[:place] + str(int(text[place]) % 9 + 1) + text[place + 1 :]
    assume(json.loads(changed) != json.loads(text))  # the last digit of a number may not matter
    with pytest.raises(ValueError, match='edited by hand or damaged; softshare.tie makes a plan|lacks "format"'):
        FoldPlan.from_json(changed)


def test_a_plan_without_its_checksum_is_refused():
    fields = json.loads(tie(models.gridnet(4, 1, 2), {}).to_json())
    assert FoldPlan.from_json(json.dumps(fields)).total_layers == 4, "spacing does not matter"
    del fields["content"]
    with pytest.raises(ValueError, match="edited by hand"):
        FoldPlan.from_json(json.dumps(fields))


@pytest.mark.parametrize("clusters", [[(0, 1)], [(1, 7)], [(1, 2), (2, 3)], [(1, 1)]])
def test_ties_by_hand_must_fit_the_model(clusters):
    with pytest.raises(ValueError, match="stage1"):
        tie(models.swrn(28, 1, 2), {"stage1": clusters})
    with pytest.raises(ValueError, match="stage9.*stage1"):
        tie(models.swrn(28, 1, 2), {"stage9": []})


@pytest.mark.parametrize("clusters", [[()], [(1.0, 2.0)]])
def test_odd_clusters_by_hand_are_refused(clusters):
    with pytest.raises((ValueError, TypeError), match="group 'layers'"):
        tie(models.gridnet(4, 4, 4), {"layers": clusters})


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"clusters": ((1,), (2,), (3,), (4,)), "scales": (1.0,) * 4}, ValueError),  # its loop has no ties any more
        ({"clusters": ((1, 2), (2, 3), (4,))}, ValueError),
        ({"clusters": ((1.0, 3), (2, 4))}, TypeError),
        ({"clusters": ((2, 4), (1, 3))}, ValueError),
        ({"scales": (1.0,)}, ValueError),
        ({"scales": (float("nan"),) * 4}, ValueError),
    ],
)
def test_a_plan_that_contradicts_itself_cannot_be_made(change, error):
    model = models.gridnet(4, 4, 4)
    (group,) = tie(model, {"layers": [(1, 3), (2, 4)]}).groups
    with pytest.raises(error, match="layers"):
        dataclasses.replace(group, **change)


def shared_with(coefficients):
    model = models.gridnet(len(coefficients), 4, templates=coefficients.shape[1])
    with torch.no_grad():
        softshare.banks(model)["layers"].coefficients.copy_(coefficients)
    return model


def test_ties_within_chance_are_told():
    torch.manual_seed(1)
    rows = torch.randn(10, 8)
    largest = softshare.layer_similarity(rows).fill_diagonal_(0).max()
    limit = softshare.folding.largest_by_chance(((10, 8),))
    assert largest < limit == pytest.approx(0.89, abs=0.02)
    with pytest.warns(softshare.folding.WithinChance, match=r"layers \d+, \d+ of layers at 0.*some pair reaches 0.89"):
        plan_fold(shared_with(rows), float(largest) - 0.01)
    learned = torch.randn(2, 8)[torch.arange(10) % 2] + 0.05 * torch.randn(10, 8)
    exact = rows[torch.arange(10) // 2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan_fold(shared_with(rows), 0.99)  # nothing is tied
        assert plan_fold(shared_with(learned), 0.9).distinct_layers == 2
        plan_fold(shared_with(exact), 0.99)
        plan_fold(shared_with(exact[:, :2]), 1.0)  # exactly equal layers are no chance
        sweep(shared_with(rows), lambda model: 0.0, (0.3, 0.5))
    with pytest.warns(softshare.folding.WithinChance, match="2 templates some pair is nearly always close to 1"):
        plan_fold(shared_with(learned[:, :2]), 0.9)


def test_more_groups_give_chance_more_pairs():
    one, three = (softshare.folding.largest_by_chance(((10, 8),) * groups) for groups in (1, 3))
    assert one < three < 1 and softshare.folding.largest_by_chance(((6, 2), (1, 5))) == 0.0
