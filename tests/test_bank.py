"""Template banks: what they mix, how they are stored, and how coefficients and templates are initialised."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from softshare import TemplateBank
from softshare.bank import initial_coefficients


@given(st.integers(1, 5), st.integers(1, 5), st.lists(st.integers(1, 4), min_size=1, max_size=5), st.integers(0, 2**31))
def test_a_bank_mixes_its_templates(layers, templates, shape, seed):
    torch.manual_seed(seed)
    bank = TemplateBank(layers, templates, shape).double()
    first, *rest = shape
    stored = (first, *rest[1:], *rest[:1])  # the documented order: first, kernel, second dimension
    assert bank.templates.shape == (templates, math.prod(shape))
    assert bank.coefficients.shape == (layers, templates)
    assert bank().shape == (layers, *shape)
    for i in range(layers):
        weight = torch.zeros(stored, dtype=torch.double)
        for j in range(templates):
            weight += bank.coefficients[i, j] * bank.templates[j].reshape(stored)
        torch.testing.assert_close(bank()[i], weight.movedim(-1, 1) if rest else weight)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.integers(1, 3), st.booleans())
def test_weights_are_stored_and_shaped_again(shape, layers, channels_last):
    bank = TemplateBank(layers, 2, shape)
    bank.channels_last = channels_last
    weights = torch.randn(layers, *shape)
    assert torch.equal(bank.shaped(bank.stored(weights)), weights)
    assert torch.equal(bank.shaped(bank.stored(weights[0])), weights[0])
    for i in range(layers):
        torch.testing.assert_close(bank.mix(i), bank()[i])
    with pytest.raises(ValueError, match="expected a weight of shape"):
        bank.stored(torch.randn(*shape, 5))


def test_a_fresh_bank_has_initial_coefficients():
    for init in ("orthogonal", "sparse", "normal"):
        torch.manual_seed(3)
        expected = initial_coefficients(6, 4, init)
        torch.manual_seed(3)
        assert torch.equal(TemplateBank(6, 4, (2, 2), init).coefficients, expected)


@pytest.mark.parametrize(("layers", "templates"), [(6, 1), (6, 2), (10, 8), (6, 6), (3, 5)])
def test_orthogonal_coefficients(layers, templates):
    a = TemplateBank(layers, templates, (2, 2)).coefficients.detach()
    gram = a.T @ a if templates <= layers else a @ a.T
    torch.testing.assert_close(gram, torch.eye(len(gram)), atol=1e-5, rtol=0)
    if templates <= layers:
        assert a.square().sum(1).mean().item() == pytest.approx(templates / layers)


@given(st.integers(1, 12), st.integers(1, 8), st.integers(0, 2**31))
def test_sparse_coefficients_are_half_zero_and_no_row_is(layers, templates, seed):
    torch.manual_seed(seed)
    a = TemplateBank(layers, templates, (1,), init="sparse").coefficients
    assert (a == 0).sum() == (layers * templates // 2 if templates > 1 else 0)
    assert (a != 0).any(1).all()


@pytest.mark.parametrize("init", ["sparse", "normal"])
def test_normal_coefficients_have_rows_of_expected_square_one(init):
    a = TemplateBank(4000, 6, (1,), init=init).coefficients.detach()
    assert a.square().sum(1).mean().item() == pytest.approx(1.0, abs=0.05)
    used = a[a != 0]
    assert abs(used.mean().item()) < 0.02
    kurtosis = (used**4).mean() / used.square().mean() ** 2
    assert kurtosis.item() == pytest.approx(3.0, abs=0.3)


def test_identity_coefficients():
    assert torch.equal(TemplateBank(3, 3, (2, 2), init="identity").coefficients, torch.eye(3))


@pytest.mark.parametrize(("shape", "fan_in"), [((64, 16, 3, 3), 144), ((400, 100), 100), ((20000,), 20000)])
def test_templates_start_with_variance_two_over_fan_in(shape, fan_in):
    templates = TemplateBank(4, 3, shape).templates.detach()
    assert templates.var().item() == pytest.approx(2 / fan_in, rel=0.05)
    assert templates.mean().abs().item() < 0.1 * math.sqrt(2 / fan_in)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ((0, 2, (3, 3)), ValueError, "num_layers.*0"),
        ((4, 0, (3, 3)), ValueError, "num_templates.*0"),
        ((4, -1, (3, 3)), ValueError, "num_templates.*-1"),
        ((4, 2, ()), ValueError, "weight_shape"),
        ((4, 2, (3, 0)), ValueError, "weight_shape"),
        ((4, 2, (3, 3), "random"), ValueError, "random.*orthogonal.*sparse.*identity.*normal"),
        ((4, 2, (3, 3), "identity"), ValueError, "identity"),
        ((4.0, 2, (3, 3)), TypeError, "num_layers"),
        ((4, True, (3, 3)), TypeError, "num_templates"),
        ((4, 2, 9), TypeError, "weight_shape"),
        ((4, 2, (3.5, 3)), TypeError, "weight_shape"),
    ],
)
def test_a_bank_refuses_bad_arguments(arguments, error, says):
    with pytest.raises(error, match=says):
        TemplateBank(*arguments)


def test_half_precision_by_default_still_draws_a_bank():
    try:
        torch.set_default_dtype(torch.bfloat16)
        assert TemplateBank(3, 2, (4, 4)).templates.dtype is torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
