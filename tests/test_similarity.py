"""Layer similarity, its penalty, and its values at initialisation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from softshare import (
    TemplateBank,
    banks,
    layer_similarity,
    models,
    recurrence_penalty,
    share_,
    similarity_matrices,
)
from softshare.similarity import beyond_chance, initial_similarity, off_diagonal, weight_similarity


def by_loop(rows) -> np.ndarray:
    """|cos| of all pairs of rows, one at a time."""
    rows = np.asarray(rows, dtype=float)
    matrix = np.zeros((len(rows), len(rows)))
    for i, a in enumerate(rows):
        for j, b in enumerate(rows):
            length = np.linalg.norm(a) * np.linalg.norm(b)
            matrix[i, j] = abs(a @ b) / length if length else 0.0
    return matrix


@given(st.integers(1, 8), st.integers(1, 6), st.floats(-30, 30), st.booleans(), st.integers(0, 2**31))
def test_similarity_equals_a_double_loop(layers, templates, magnitude, with_zero, seed):
    torch.manual_seed(seed)
    a = torch.randn(layers, templates, dtype=torch.double) * 10**magnitude
    if with_zero:
        a[seed % layers] = 0.0
    found = layer_similarity(a)
    np.testing.assert_allclose(found.numpy(), by_loop(a), atol=1e-12)
    assert torch.equal(found, found.T) and found.min() >= 0 and found.max() <= 1
    single = layer_similarity(a.float())
    torch.testing.assert_close(single.double(), found, rtol=0, atol=1e-5)
    assert torch.equal(single, single.T), "to the bit, on every processor"


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_signs_and_lengths_do_not_matter(scale, dtype):
    row = torch.tensor([1.0, -2.0, 0.5]) * scale
    found = layer_similarity(torch.stack([row, -4 * row, torch.tensor([2.0, 1.0, 0.0])]).to(dtype))
    torch.testing.assert_close(found, torch.tensor([[1.0, 1, 0], [1, 1, 0], [0, 0, 1]]))


def test_a_zero_row_resembles_nothing_and_is_never_nan():
    a = torch.tensor([[0.0, 0.0], [1.0, 2.0], [0.0, 0.0]], requires_grad=True)
    found = layer_similarity(a)
    assert (found[0, 1:] == 0).all() and (found[2, :2] == 0).all()
    assert found[1, 1].item() == pytest.approx(1.0)
    found.sum().backward()
    assert a.grad.isfinite().all()


@pytest.mark.parametrize(
    ("value", "error"),
    [(torch.zeros(3), ValueError), (torch.zeros(2, 3, 4), ValueError), ([[1.0]], TypeError), (None, TypeError)],
)
def test_coefficients_must_be_a_matrix(value, error):
    with pytest.raises(error, match="coefficients"):
        layer_similarity(value)


def test_empty_and_non_real_coefficients_are_refused():
    with pytest.raises(ValueError, match="matrix"):
        layer_similarity(torch.zeros(3, 0))
    for dtype in (torch.bool, torch.complex64):
        with pytest.raises(TypeError, match="real"):
            layer_similarity(torch.ones(2, 2, dtype=dtype))


def test_similarity_matrices_of_a_model():
    model = models.swrn(22, 1, 2)
    found = similarity_matrices(model)
    assert list(found) == ["stage1", "stage2", "stage3"]
    for name, bank in banks(model).items():
        np.testing.assert_allclose(found[name].numpy(), by_loop(bank.coefficients.detach()), atol=1e-6)
        assert not found[name].requires_grad
    assert similarity_matrices(models.wrn(10, 1)) == {}


@pytest.mark.parametrize("kernel", [(3, 3), (), (2, 3, 1)])
def test_weight_similarity_equals_cosines_of_mixed_weights(kernel):
    bank = TemplateBank(5, 3, (4, 6, *kernel))
    expected = by_loop(bank().flatten(1).detach().double())
    np.testing.assert_allclose(weight_similarity(bank).numpy(), expected, atol=1e-6)
    np.fill_diagonal(expected, 0)
    # Another basis of the same weights: the similarity of the weights stays the same, unlike that of the coefficients.
    before = layer_similarity(bank.coefficients.detach())
    basis = torch.randn(3, 3)
    with torch.no_grad():
        bank.coefficients.copy_(bank.coefficients @ basis)
        bank.templates.copy_(torch.linalg.solve(basis, bank.templates))
    assert (layer_similarity(bank.coefficients.detach()) - before).abs().max() > 0.05
    np.testing.assert_allclose(weight_similarity(bank).fill_diagonal_(0).numpy(), expected, atol=1e-4)


def test_weight_similarity_of_more_templates_than_elements():
    bank = TemplateBank(4, 5, (3,))
    np.testing.assert_allclose(weight_similarity(bank).numpy(), by_loop(bank().detach()), atol=1e-6)


# -------------------------------------------------------------------------------------------------------------- penalty


def test_the_penalty_is_minus_the_sum_over_groups_and_pairs():
    model = models.swrn(22, 1, 3)
    expected = -sum(by_loop(bank.coefficients.detach()).sum() for bank in banks(model).values())
    found = recurrence_penalty(model)
    assert found.shape == () and found.item() == pytest.approx(expected, rel=1e-5)


def test_the_gradient_of_the_penalty_is_a_finite_difference():
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(4))).double()
    (bank,) = share_(model, 3).values()
    recurrence_penalty(model).backward()
    a, step = bank.coefficients, 1e-6
    for index in np.ndindex(*a.shape):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                moved = a.clone()
                moved[index] += sign * step
            values.append(-by_loop(moved).sum())
        assert a.grad[index].item() == pytest.approx((values[0] - values[1]) / (2 * step), abs=1e-6)
    assert bank.templates.grad is None


def test_the_penalty_has_a_finite_gradient_at_zero_rows_and_equal_rows():
    model = models.gridnet(layers=4, width=2, templates=2)
    (bank,) = banks(model).values()
    with torch.no_grad():
        bank.coefficients[0] = 0.0
        bank.coefficients[1] = bank.coefficients[2]
    recurrence_penalty(model).backward()
    assert bank.coefficients.grad.isfinite().all()


def test_the_penalty_of_a_model_without_banks_is_zero():
    assert recurrence_penalty(nn.Linear(2, 2)).item() == 0.0
    assert recurrence_penalty(nn.ReLU()).item() == 0.0


def test_autocast_does_not_make_similarities_less_precise():
    model = models.swrn(28, 1, 4)
    with torch.autocast("cpu", torch.bfloat16):
        inside = recurrence_penalty(model)
    assert torch.equal(inside, recurrence_penalty(model))


def test_following_the_penalty_makes_layers_alike():
    model = models.gridnet(layers=6, width=2, templates=4)
    optimizer = torch.optim.SGD(model.parameters(), 0.02)
    before = off_diagonal(similarity_matrices(model))["layers"]
    for _ in range(150):
        optimizer.zero_grad()
        recurrence_penalty(model).backward()
        optimizer.step()
    assert off_diagonal(similarity_matrices(model))["layers"] > max(0.9, before)


# --------------------------------------------------------------------------------------------------- at initialisation


@pytest.mark.parametrize(
    ("layers", "templates", "expected"),
    [(6, 1, 1.00), (6, 2, 0.59), (6, 4, 0.27), (10, 8, 0.13), (6, 6, 0.0), (20, 20, 0.0)],
)
def test_mean_similarity_at_initialisation(layers, templates, expected):
    matrices = [layer_similarity(TemplateBank(layers, templates, (1,)).coefficients.detach()) for _ in range(300)]
    mean = np.mean([off_diagonal({"": matrix})[""] for matrix in matrices])
    assert mean == pytest.approx(expected, abs=0.012)


@pytest.mark.parametrize(
    ("layers", "templates", "threshold", "share"),
    [(6, 2, 0.8, 1.0), (6, 4, 0.8, 0.4), (10, 8, 0.8, 0.01), (20, 5, 0.8, 1.0), (6, 2, 0.95, 0.98)],
)
def test_the_largest_similarity_at_initialisation(layers, templates, threshold, share):
    state = torch.get_rng_state()
    largest = initial_similarity(layers, templates, draws=1000)
    assert torch.equal(torch.get_rng_state(), state), "the default generator is left alone"
    assert largest.shape == (1000,)
    assert (largest > threshold).float().mean().item() == pytest.approx(share, abs=0.05)
    assert torch.equal(initial_similarity(layers, templates, draws=5), initial_similarity(layers, templates, draws=5))


def test_off_diagonal_is_the_mean_of_pairs():
    matrix = torch.tensor([[1.0, 0.2, 0.4], [0.2, 1.0, 0.9], [0.4, 0.9, 1.0]])
    assert off_diagonal({"a": matrix, "b": torch.ones(1, 1)}) == {"a": pytest.approx(0.5), "b": 0.0}


def by_loops(groups):
    """The three statistics, pair by pair."""
    even, odd = [], []
    for rows in groups:
        for i in range(len(rows)):
            for j in range(i):
                cosine = abs(np.dot(rows[i], rows[j]) / np.sqrt(np.dot(rows[i], rows[i]) * np.dot(rows[j], rows[j])))
                (odd if (i - j) % 2 else even).append(cosine)
    return {"mean": np.mean(even + odd), "largest": np.max(even + odd), "chessboard": np.mean(even) - np.mean(odd)}


@pytest.mark.parametrize("known", [False, True])
def test_chance_equals_loops_over_random_displacements(known):
    """Observed values to rounding; percentiles and p within the error of other random numbers."""
    rng = np.random.default_rng(1)
    shapes = {"a": (6, 4), "b": (5, 7)}
    start = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    end = {name: rows + 0.7 * rng.normal(size=rows.shape) for name, rows in start.items()}
    as_tensors = lambda groups: {name: torch.from_numpy(rows) for name, rows in groups.items()}  # noqa: E731
    found = beyond_chance(as_tensors(end), as_tensors(start) if known else None, draws=2000)
    observed, draws = by_loops(end.values()), []
    for _ in range(2000):
        drawn = []
        for name, rows in start.items():
            before = rows if known else 0 * rows
            length = np.linalg.norm(end[name] - before, axis=1, keepdims=True)
            direction = rng.normal(size=rows.shape)
            drawn.append(before + length * direction / np.linalg.norm(direction, axis=1, keepdims=True))
        draws.append(by_loops(drawn))
    for name, test in found.items():
        values = np.array([draw[name] for draw in draws])
        assert test.observed == pytest.approx(observed[name])
        assert test.chance == pytest.approx(np.quantile(values, 0.95), abs=0.02)
        assert test.p == pytest.approx(np.mean(values >= observed[name]), abs=0.06)


def test_chance_is_rarely_exceeded_by_chance_and_always_by_structure():
    torch.manual_seed(0)
    start = torch.nn.init.orthogonal_(torch.empty(10, 8))
    below = 0
    for draw in range(200):
        moved = start + torch.nn.functional.normalize(torch.randn(10, 8), dim=1) * 0.8
        below += beyond_chance({"a": moved}, {"a": start}, draws=99, seed=draw)["mean"].p <= 0.05
    assert 2 <= below <= 20, "5% of 200, within 3 deviations"
    chessboard = torch.randn(2, 8)[torch.arange(10) % 2] + 0.3 * torch.randn(10, 8)
    tests = beyond_chance({"a": chessboard}, draws=199)
    assert all(test.p == 1 / 200 and test.observed > test.chance for test in tests.values())
    alike = torch.randn(1, 8) + 0.1 * torch.randn(10, 8)
    assert beyond_chance({"a": alike}, draws=199)["chessboard"].p > 0.05, "all alike is no chessboard"


def test_chance_says_nothing_of_two_templates_and_touches_no_generator():
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="3 templates or more, got .*'a': .6, 2"):
        beyond_chance({"a": torch.randn(6, 2), "b": torch.randn(1, 5)})
    torch.set_rng_state(before)
    rows = {"a": torch.ones(6, 2), "b": torch.eye(4, 5)}
    assert beyond_chance(rows) == beyond_chance({"b": rows["b"]})
    assert torch.equal(torch.get_rng_state(), before)
    assert np.isnan(beyond_chance({"b": torch.eye(2, 5)})["chessboard"].p)
    for start in ({}, {"b": torch.eye(4, 4)}):
        with pytest.raises(ValueError, match="group 'b' is .4, 5. after training, but not before"):
            beyond_chance(rows, start)
    with pytest.raises((TypeError, ValueError), match="draws"):
        beyond_chance(rows, draws=0)
