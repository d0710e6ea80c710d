"""`mixed_once`: the same weights and gradients by one product per bank, wherever a model is run."""

from __future__ import annotations

import copy
import gc
import shutil
import subprocess
import sys
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from softshare import banks, fold, models, share_
from softshare.bank import TemplateBank
from softshare.sharing import mixed_once


def stack(layers):
    return nn.Sequential(*(nn.Conv2d(4, 4, 3, padding=1) for _ in range(layers)))


def gradients(model, x, once=False):
    """The gradient of each parameter, with all weights mixed once or each when it is read."""
    model.zero_grad()
    with mixed_once(model if once else nn.Identity()):
        model(x).square().mean().backward()
    return found_gradients(model)


def found_gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


class Products(TorchDispatchMode):
    """Counts matrix products by dtype."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default):
            self.dtypes.append(args[0].dtype)
        return function(*args, **(kwargs or {}))


def test_outputs_and_gradients_are_those_of_single_products(foreign):
    model, x = foreign
    share_(model.eval(), 2)
    expected = model(x)
    with mixed_once(model):
        torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(gradients(model, x, once=True), gradients(model, x))


@pytest.mark.parametrize("layers", [2, 7])
def test_a_bank_needs_one_product_forward_and_two_backward(layers):
    model = stack(layers)
    share_(model, 2)
    with Products() as products:
        gradients(model, torch.randn(1, 4, 5, 5), once=True)
    assert len(products.dtypes) == 3
    with Products() as products:
        gradients(model, torch.randn(1, 4, 5, 5))
    assert len(products.dtypes) == 3 * layers, "outside, each weight is mixed when it is read"


@given(st.lists(st.integers(0, 3), max_size=8), st.booleans())
def test_layers_may_be_read_never_or_often(reads, last_layout):
    torch.manual_seed(0)
    bank = TemplateBank(4, 3, (2, 3, 2, 2)).double()
    bank.channels_last = last_layout
    factors = torch.randn(len(reads) + 1, 2, 3, 2, 2, dtype=torch.double)

    def total():
        return sum((bank.mix(index) * factor for index, factor in zip(reads, factors)), factors[-1]).square().sum()  # noqa: B905

    found = []
    for once in (False, True):
        bank.zero_grad()
        with mixed_once(bank if once else nn.Identity()):
            value = total()
            if reads:
                value.backward()
        found.append([value.detach(), *(each.grad for each in bank.parameters() if each.grad is not None)])
    torch.testing.assert_close(found[0], found[1])


# ---------------------------------------------------------------------------------------------------- how long it lasts


@pytest.mark.parametrize("inside", [True, False], ids=["backward inside", "backward later"])
def test_weights_are_released_after_the_block_and_the_backward_pass(inside):
    model = stack(3)
    (bank,) = share_(model, 2).values()
    with mixed_once(model):
        held = weakref.ref(bank.mixed.rows[0])
        loss = model(torch.randn(1, 4, 5, 5)).square().mean()
        if inside:
            loss.backward()
    assert bank.mixed is None
    gc.collect()
    if not inside:
        loss.backward()
    del loss
    gc.collect()
    assert held() is None


def test_blocks_may_be_nested_and_errors_end_them():
    model = stack(3)
    (bank,) = share_(model, 2).values()
    with mixed_once(model):
        outer = bank.mixed
        with pytest.raises(ZeroDivisionError), mixed_once(model):
            assert bank.mixed is not outer
            raise ZeroDivisionError
        assert bank.mixed is outer
    assert bank.mixed is None


def test_changes_after_a_block_are_seen_by_the_next():
    model, x = stack(3), torch.randn(1, 4, 5, 5)
    (bank,) = share_(model, 2).values()
    with torch.no_grad():
        for _ in range(3):
            bank.templates.mul_(1.1)
            with mixed_once(model):
                found = model(x)
            torch.testing.assert_close(found, model(x))


def test_gradients_accumulate_over_blocks():
    model, x = stack(3), torch.randn(2, 4, 5, 5)
    share_(model, 2)
    expected = {name: 2 * grad for name, grad in gradients(model, x).items()}
    model.zero_grad()
    for _ in range(2):
        with mixed_once(model):
            model(x).square().mean().backward()
    torch.testing.assert_close(found_gradients(model), expected)


# -------------------------------------------------------------------------------------------- reads that need their own


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_of_parts(reentrant):
    """Parts run again inside the backward pass, some of them with a backward pass of their own."""
    model, x = stack(6), torch.randn(2, 4, 5, 5)
    share_(model, 2)
    expected = gradients(model, x)
    model.zero_grad()
    with mixed_once(model):
        y = model[0](x)  # not checkpointed
        for start in (1, 3):
            y = checkpoint(model[start : start + 2], y, use_reentrant=reentrant)
        model[5](y).square().mean().backward()
    torch.testing.assert_close(found_gradients(model), expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_of_whole_models(foreign, reentrant):
    model, x = foreign
    share_(model.eval(), 2)
    expected = gradients(model, x)
    model.zero_grad()
    with mixed_once(model):
        checkpoint(model, x.clone().requires_grad_(), use_reentrant=reentrant).square().mean().backward()
    torch.testing.assert_close(found_gradients(model), expected)


def test_gradients_switched_on_inside_a_block_without_them():
    model, x = stack(3), torch.randn(1, 4, 5, 5)
    share_(model, 2)
    expected = gradients(model, x)
    with torch.no_grad(), mixed_once(model), torch.enable_grad():
        torch.testing.assert_close(gradients(model, x), expected)


def test_functional_call_inside_a_block(foreign):
    model, x = foreign
    share_(model.eval(), 2)
    other = {name: torch.randn_like(parameter) * 0.1 for name, parameter in model.named_parameters()}
    expected = torch.func.functional_call(model, other, (x,))
    with mixed_once(model):
        torch.testing.assert_close(torch.func.functional_call(model, other, (x,)), expected)


def test_a_copy_made_inside_a_block_mixes_for_itself():
    model, x = stack(3), torch.randn(1, 4, 5, 5)
    share_(model, 2)
    with mixed_once(model):
        copied = copy.deepcopy(model)
        with torch.no_grad():
            next(iter(banks(copied).values())).templates.zero_()
        assert not copied[0].weight.any() and model[0].weight.any()
    torch.testing.assert_close(gradients(copied, x)["0.bank.coefficients"], torch.zeros(3, 2))


def test_a_bank_with_a_way_of_its_own_keeps_it():
    class Doubled(TemplateBank):
        def mix(self, index):
            return 2 * super().mix(index)

    model = stack(3)
    (bank,) = share_(model, 2).values()
    bank.__class__ = Doubled
    expected = model[1].weight
    with mixed_once(model):
        torch.testing.assert_close(model[1].weight, expected)


# ------------------------------------------------------------------------------------------------------------ precision


def test_autocast_never_rounds_mixed_weights():
    model = stack(3)
    (bank,) = share_(model, 2).values()
    exact = bank.coefficients.detach().double() @ bank.templates.detach().double()
    with torch.autocast("cpu", dtype=torch.bfloat16), mixed_once(model):
        for index in range(3):
            assert bank.mix(index).dtype is torch.float32
            torch.testing.assert_close(bank.stored(bank.mix(index)), exact[index].float())


@pytest.mark.parametrize("allowed", ["high", "medium"])
def test_mixing_is_exact_where_products_may_be_rounded(allowed):
    model, x = stack(3), torch.randn(1, 4, 5, 5)
    (bank,) = share_(model, 2).values()
    expected = gradients(model, x)
    torch.set_float32_matmul_precision(allowed)
    try:
        with Products() as products:
            torch.testing.assert_close(gradients(model, x, once=True), expected)
            bank()
        assert products.dtypes == [torch.float64] * 4
        assert torch.get_float32_matmul_precision() == allowed, "no switch of the program is touched"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("allowed", ["highest", "high"])
def test_tf32_never_rounds_mixed_weights_or_their_gradients(allowed):
    """TF32 keeps 10 bits, so products of this size would be off by a thousandth."""
    bank = TemplateBank(6, 4, (64, 64, 3, 3), device="cuda")
    factors = torch.randn(6, bank.templates.shape[1], device="cuda")
    exact = bank.coefficients.detach().double() @ bank.templates.detach().double()
    torch.set_float32_matmul_precision(allowed)
    try:
        with mixed_once(bank):
            rows = torch.stack([bank.stored(bank.mix(index)) for index in range(6)])
            (rows * factors).sum().backward()
    finally:
        torch.set_float32_matmul_precision("highest")
    torch.testing.assert_close(rows, exact.float(), rtol=1e-5, atol=1e-6)
    gradient = bank.coefficients.detach().double().T @ factors.double()
    torch.testing.assert_close(bank.templates.grad, gradient.float(), rtol=1e-5, atol=1e-5)


def test_mixing_is_exact_under_the_newer_switches():
    program = (
        "import torch; torch.backends.cuda.matmul.fp32_precision = 'tf32'\n"
        "from softshare import TemplateBank; bank = TemplateBank(3, 2, (4, 4))\n"
        "exact = bank.coefficients.double() @ bank.templates.double()\n"
        "torch.testing.assert_close(bank().flatten(1), exact.float(), rtol=0, atol=0)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


# --------------------------------------------------------------------------------------- compilers, processes, training


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_compiled_models_take_the_weights_and_are_not_compiled_again(foreign, backend):
    if backend == "inductor" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("inductor needs a C++ compiler on the CPU")
    model, x = foreign
    share_(model.eval(), 2)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=backend)
    with torch.compiler.set_stance("default"):
        for turn in range(3):
            model.zero_grad()
            with mixed_once(model):
                compiled(x).square().mean().backward()
            found = found_gradients(model)
            torch.testing.assert_close(found, gradients(model, x), rtol=1e-3, atol=1e-5)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.01 * torch.randn_like(parameter))
            if not turn:
                torch.compiler.set_stance("fail_on_recompile")


def test_folded_templates_are_mixed_once_too():
    model = models.swrn(16, 1, templates=2).eval()
    with torch.no_grad():
        for bank in banks(model).values():
            bank.coefficients.copy_(torch.randn(bank.coefficients.shape))
            bank.coefficients[1] = 2 * bank.coefficients[0]
    folded, x = fold(model, 0.999), torch.randn(2, 3, 8, 8)
    expected = folded(x)
    with mixed_once(folded):
        torch.testing.assert_close(folded(x), expected)
