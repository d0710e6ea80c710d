"""The grid generator against networkx, its distribution, its bytes; the rectangle rule and the scores."""

from __future__ import annotations

import hashlib
from collections import Counter

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from softshare import shortest_path
from softshare.shortest_path import generate, rectangle_rule, scores, scores_beside_the_rule, steps_from


def graph_of(inputs):
    """The 4-connected graph of free pixels, and both queries."""
    queries, obstacles = inputs.numpy()
    graph = nx.grid_2d_graph(*obstacles.shape)
    graph.remove_nodes_from(map(tuple, np.argwhere(obstacles)))
    return graph, [tuple(place) for place in np.argwhere(queries)]


def assert_well_formed(grids, box):
    queries, obstacles = grids.inputs[:, 0], grids.inputs[:, 1]
    assert grids.inputs.dtype == grids.targets.dtype == torch.bool and grids.distances.dtype == torch.int64
    assert (queries.flatten(1).sum(1) == 2).all(), "two different pixels"
    assert not (queries & obstacles).any() and not (grids.targets & obstacles).any()
    assert (queries <= grids.targets).all(), "both queries are part of the answer"
    places = queries.nonzero().view(-1, 2, 3)[:, :, 1:]
    assert (places[:, 0] - places[:, 1]).abs().max() <= box // 2


CASES = [(size, box, p) for size, box in [(8, 7), (11, 11), (13, 5), (20, 11)] for p in (0.0, 0.1, 0.25, 0.4, 0.5)]


@pytest.mark.parametrize(("size", "box", "p"), CASES)
def test_targets_are_all_pixels_of_all_shortest_paths(size, box, p):
    grids = generate(20, size, box, p, seed=size)
    assert_well_formed(grids, box)
    for inputs, target, distance in zip(*grids, strict=True):
        graph, (a, b) = graph_of(inputs)
        paths = list(nx.all_shortest_paths(graph, a, b))
        assert len(paths[0]) - 1 == distance
        expected = torch.zeros_like(target)
        for path in paths:
            expected[tuple(zip(*path, strict=True))] = True
        assert torch.equal(target, expected)


@pytest.mark.parametrize("size", [3, 31, 32, 33, 48, 63, 64, 65, 100, 128, 129])
def test_any_size(size):
    box = size if size % 2 else size - 1
    grids = generate(4, size, box, 0.3, seed=1)
    assert_well_formed(grids, box)
    assert grids.inputs.shape == (4, 2, size, size) and grids.targets.shape == (4, size, size)
    for inputs, target, distance in zip(*grids, strict=True):
        graph, (a, b) = graph_of(inputs)  # a pixel is on a shortest path if its two distances add up
        first, second = (nx.single_source_shortest_path_length(graph, query) for query in (a, b))
        assert first[b] == distance
        on = [v for v in first if first[v] + second[v] == distance]
        assert sorted(map(tuple, target.nonzero().tolist())) == sorted(on)


def test_paths_can_use_the_whole_grid():
    grids = generate(300, 16, 3, 0.45, seed=0)
    assert grids.distances.max() > 8, "some paths lead far out of the box"


@given(st.integers(1, 30), st.integers(3, 12), st.data())
def test_well_formed_over_wide_ranges(n, size, data):
    box = data.draw(st.integers(1, (size - 1) // 2)) * 2 + 1
    p, seed = data.draw(st.floats(0, 0.6)), data.draw(st.integers(0, 2**63 - 1))
    grids = generate(n, size, box, p, seed)
    assert_well_formed(grids, box)
    assert (grids.distances >= 1).all() and len(grids.distances) == n
    on = grids.targets.flatten(1).sum(1)
    assert (on > grids.distances).all()


# ---------------------------------------------------------------------------------------------------------- distribution


@pytest.mark.parametrize(("size", "box"), [(5, 3), (6, 5), (4, 3)])
def test_queries_are_uniform_over_the_grid_and_then_over_the_box(size, box):
    """Chi-square of unordered pairs: P({a, b}) = (1 / box of a + 1 / box of b) / pixels, a box cut off at the border."""
    pixels = [(r, c) for r in range(size) for c in range(size)]
    reach = box // 2
    near = {a: [b for b in pixels if b != a and max(abs(a[0] - b[0]), abs(a[1] - b[1])) <= reach] for a in pixels}
    expected = Counter()
    for a in pixels:
        for b in near[a]:
            expected[frozenset((a, b))] += 1 / len(pixels) / len(near[a])
    assert sum(expected.values()) == pytest.approx(1)
    n = 40_000
    places = generate(n, size, box, 0.0, seed=3).inputs[:, 0].nonzero().view(n, 2, 3)[:, :, 1:].tolist()
    found = Counter(frozenset(map(tuple, pair)) for pair in places)
    assert found.keys() <= expected.keys()
    pairs = list(expected)
    assert stats.chisquare([found[pair] for pair in pairs], [n * expected[pair] for pair in pairs]).pvalue > 0.001


@pytest.mark.parametrize("p", [0.0, 0.05, 0.1, 0.25])
def test_obstacles_have_the_given_probability_everywhere(p):
    """Box 3: few pairs are redrawn, which hardly affects the pixels far from the queries."""
    grids = generate(4000, 12, 3, p, seed=5)
    obstacles, queries = grids.inputs[:, 1].double(), grids.inputs[:, 0].double()
    share = obstacles.sum() / (1 - queries).sum()
    assert share.item() == pytest.approx(p, abs=0.01)
    by_pixel = obstacles.sum(0) / (1 - queries).sum(0)
    assert (by_pixel - p).abs().max() < 0.04


# ----------------------------------------------------------------------------------------------------------- same bytes


def digest(grids):
    found = hashlib.sha256()
    for tensor in grids:
        found.update(np.ascontiguousarray(tensor.numpy()).astype("<i8").tobytes())
    return found.hexdigest()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((100,), "3303fd8b73601565e2838f92b64dee35812f6f9b61137169a1e63cd10d5a03ab"),
        ((20, 65, 21, 0.3, 2**63 - 1), "8d6cf94ccf6ee9ae984a24a8367e2bbb95da96c2131a2ec4850957666f748129"),
        ((50, 8, 5, 0.5, 7), "0b7a6b1248227f9831072bd387d2a14fd584df0cd87abccde516b5c80c6789cb"),
    ],
)
def test_a_seed_gives_the_same_bytes_everywhere(arguments, expected):
    assert digest(generate(*arguments)) == expected


def test_generating_more_grids_keeps_the_first_ones():
    many = generate(1200, 32, 9, 0.3, seed=4)
    for n in (1, 511, 512, 513):
        for few, all_ in zip(generate(n, 32, 9, 0.3, seed=4), many, strict=True):
            assert torch.equal(few, all_[:n])


def test_no_two_grids_are_alike_and_the_default_generator_is_left_alone():
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].tolist()
    grids = torch.cat([generate(200, 16, 9, 0.1, seed).inputs for seed in (0, 1, 2, 2**62)])
    assert len({grid.numpy().tobytes() for grid in grids}) == 800
    assert torch.equal(torch.get_rng_state(), state) and np.random.get_state()[1].tolist() == numpy_state


# ---------------------------------------------------------------------------------------------------------- bad arguments


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"n": 0}, ValueError, "n must be.*0"),
        ({"n": -5}, ValueError, "n must be.*-5"),
        ({"n": 2.0}, TypeError, "n must be"),
        ({"size": 0}, ValueError, "size.*0"),
        ({"size": 2, "box": 3}, ValueError, "size.*2"),
        ({"size": 32.0}, TypeError, "size"),
        ({"box": 8}, ValueError, "box must be odd.*8"),
        ({"box": 1}, ValueError, "box must be.*1"),
        ({"box": -3}, ValueError, "box.*-3"),
        ({"box": 33}, ValueError, "box.*32.*33"),
        ({"size": 8}, ValueError, "box.*8.*9"),
        ({"box": "9"}, TypeError, "box"),
        ({"obstacle_probability": -0.1}, ValueError, "obstacle_probability.*-0.1"),
        ({"obstacle_probability": 1.0}, ValueError, "obstacle_probability.*1.0"),
        ({"obstacle_probability": float("nan")}, ValueError, "obstacle_probability.*nan"),
        ({"obstacle_probability": "0.1"}, TypeError, "obstacle_probability"),
        ({"seed": -1}, ValueError, "seed.*-1"),
        ({"seed": 2**63}, ValueError, "seed"),
        ({"seed": 0.5}, TypeError, "seed"),
        ({"seed": None}, TypeError, "seed"),
    ],
)
def test_bad_arguments(arguments, error, says):
    with pytest.raises(error, match=says):
        generate(**{"n": 2, **arguments})


def test_a_probability_that_leaves_no_pair_stops_with_an_error():
    with pytest.raises(ValueError, match="obstacle_probability 0.9999"):
        generate(50, 65, 65, 0.9999)


def test_a_probability_close_to_one_leaves_neighbours():
    grids = generate(20, 9, 3, 0.9999)
    assert (grids.distances == 1).all() and torch.equal(grids.targets, grids.inputs[:, 0])


# ------------------------------------------------------------------------------------------------ curriculum, rule, scores


def test_the_curriculum_goes_through_the_phases():
    phases = list(shortest_path.curriculum(30, seed=5))
    assert [box for box, _ in phases] == [5, 9, 13, 17, 21]
    for phase, (box, grids) in enumerate(phases):
        assert digest(grids) == digest(generate(30, 32, box, 0.1, 5 + phase))
    means = [grids.distances.double().mean() for _, grids in phases]
    assert means == sorted(means)


def test_steps_are_those_of_a_breadth_first_search():
    grids = generate(20, 11, 9, 0.35, seed=6)
    for inputs, found in zip(grids.inputs, steps_from(grids.inputs), strict=True):
        graph, (first, _) = graph_of(inputs)
        expected = torch.full((11, 11), -1)
        for place, steps in nx.single_source_shortest_path_length(graph, first).items():
            expected[place] = steps
        assert torch.equal(found, expected)
    second = steps_from(grids.inputs)[grids.inputs[:, 0]].view(20, 2).max(1).values
    assert torch.equal(second, grids.distances)
    with pytest.raises(ValueError, match="must mark a query"):
        steps_from(torch.zeros(2, 2, 5, 5))
    with pytest.raises(ValueError, match=r"\(N, 2, H, W\)"):
        steps_from(torch.zeros(2, 5, 5))


def test_the_rectangle_rule_equals_a_loop():
    grids = generate(60, 12, 9, 0.3)
    for inputs, found in zip(grids.inputs, rectangle_rule(grids.inputs), strict=True):
        (r1, c1), (r2, c2) = inputs[0].nonzero().tolist()
        for r in range(12):
            for c in range(12):
                inside = min(r1, r2) <= r <= max(r1, r2) and min(c1, c2) <= c <= max(c1, c2)
                assert found[r, c] == (inside and not inputs[1, r, c])
    free = generate(60, 12, 9, 0.0)
    assert torch.equal(rectangle_rule(free.inputs), free.targets), "without obstacles the rule is exact"
    assert torch.equal(rectangle_rule(free.inputs.float()), free.targets)


@pytest.mark.parametrize(
    ("box", "p", "f1", "exact"),
    [
        (5, 0.1, 0.97, 0.87),
        (9, 0.1, 0.94, 0.65),
        (13, 0.1, 0.92, 0.47),
        (17, 0.1, 0.905, 0.36),
        (21, 0.1, 0.895, 0.29),
        (25, 0.1, 0.887, 0.23),
        (5, 0.3, 0.80, None),
        (13, 0.3, 0.65, None),
        (25, 0.3, 0.56, None),
    ],
)
def test_what_the_rectangle_rule_scores(box, p, f1, exact):
    grids = generate(4000, 32, box, p, seed=11)
    found = scores(rectangle_rule(grids.inputs), grids.targets)
    assert found["f1"] == pytest.approx(f1, abs=0.01)
    assert exact is None or found["exact"] == pytest.approx(exact, abs=0.025)


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**31))
def test_scores_equal_a_loop(n, size, seed):
    torch.manual_seed(seed)
    predictions, targets = torch.rand(2, n, size, size) < torch.rand(2, 1, 1, 1)
    tp = fp = fn = exact = 0
    for a, b in zip(predictions.tolist(), targets.tolist(), strict=True):
        pairs = [(x, y) for row, other in zip(a, b, strict=True) for x, y in zip(row, other, strict=True)]
        tp += sum(x and y for x, y in pairs)
        fp += sum(x and not y for x, y in pairs)
        fn += sum(y and not x for x, y in pairs)
        exact += all(x == y for x, y in pairs)
    found = scores(predictions, targets)
    assert found["f1"] == pytest.approx(2 * tp / (2 * tp + fp + fn) if tp + fp + fn else 1.0)
    assert found["exact"] == pytest.approx(exact / n)


def test_scores_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match="shape"):
        scores(torch.zeros(2, 3, 3), torch.zeros(2, 3, 4))


def test_scores_beside_the_rule_equal_a_loop():
    """The hard grids are those on which the rectangle rule is wrong anywhere; they are also scored separately."""
    grids = generate(60, 12, 9, 0.2, seed=2)
    predictions = grids.targets ^ (torch.rand(grids.targets.shape) < 0.002)  # some grids are right, some are not
    hard = []
    for index, (inputs, target) in enumerate(zip(grids.inputs, grids.targets, strict=True)):
        (r1, c1), (r2, c2) = inputs[0].nonzero().tolist()
        wrong = 0
        for r in range(12):
            for c in range(12):
                inside = min(r1, r2) <= r <= max(r1, r2) and min(c1, c2) <= c <= max(c1, c2)
                wrong += bool(target[r, c]) != (inside and not inputs[1, r, c])
        if wrong:
            hard.append(index)
    assert 10 < len(hard) < 50
    found = scores_beside_the_rule(predictions, grids)
    easy, rest = scores(predictions, grids.targets), scores(predictions[hard], grids.targets[hard])
    assert found == {**easy, "hard_f1": rest["f1"], "hard_exact": rest["exact"]}
    assert 0 < rest["exact"] < 1 and rest != easy
    of_the_rule = scores_beside_the_rule(rectangle_rule(grids.inputs), grids)
    assert of_the_rule["exact"] == pytest.approx(1 - len(hard) / 60) and of_the_rule["hard_exact"] == 0
    assert of_the_rule["hard_f1"] < of_the_rule["f1"]


def test_without_hard_grids_the_hard_scores_are_one():
    free = generate(5, 8, 5, 0.0)
    found = scores_beside_the_rule(torch.zeros_like(free.targets), free)
    assert found == {"f1": 0.0, "exact": 0.0, "hard_f1": 1.0, "hard_exact": 1.0}


def test_scores_of_no_grids_are_refused():
    with pytest.raises(ValueError, match="no grids"):
        scores(torch.zeros(0, 3, 3), torch.zeros(0, 3, 3))
