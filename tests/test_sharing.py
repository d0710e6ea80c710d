"""`share_` and all that it promises for any model, `banks`, `decay_groups` and `unshare`."""

from __future__ import annotations

import copy
import itertools
import os
import pickle
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

import softshare
from softshare import banks, decay_groups, share_, unshare


def stack(n=4, channels=4, **kwargs):
    return nn.Sequential(*(nn.Conv2d(channels, channels, 3, padding=1, **kwargs) for _ in range(n)))


def drawing(model, bank):
    """Names of the layers whose weight depends on a bank's templates, whatever the implementation."""
    found = []
    for name, layer in model.named_modules():
        if isinstance(layer, nn.modules.conv._ConvNd | nn.Linear) and layer.weight.requires_grad:
            (grad,) = torch.autograd.grad(layer.weight.sum(), [bank.templates], allow_unused=True)
            if grad is not None:
                found.append(name)
    return found


def gradients(model, x):
    model.zero_grad()
    model(x).square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_same(a, b, **tolerance):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}")


# ------------------------------------------------------------------------------------------------- equal to plain layers


KINDS = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1, groups=2), (2, 4, 5)),
    "conv2d": (lambda: nn.Conv2d(3, 5, (3, 2), stride=2), (2, 3, 6, 7)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (2, 2, 3, 4, 3)),
    "transposed1d": (lambda: nn.ConvTranspose1d(3, 2, 3, stride=2), (2, 3, 4)),
    "transposed2d": (lambda: nn.ConvTranspose2d(4, 2, (2, 3), groups=2, output_padding=1, stride=2), (2, 4, 3, 3)),
    "transposed3d": (lambda: nn.ConvTranspose3d(2, 3, 2), (1, 2, 2, 3, 2)),
    "linear": (lambda: nn.Linear(5, 3), (2, 5)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_one_hot_coefficients_equal_plain_layers_forward_and_gradient(kind):
    make, shape = KINDS[kind]
    plain = nn.ModuleList(make() for _ in range(3)).double()
    shared = copy.deepcopy(plain)
    (bank,) = share_(shared, 2).values()
    uses = [1, 0, 1]  # which template each layer is
    with torch.no_grad():
        bank.coefficients.copy_(F.one_hot(torch.tensor(uses), 2))
        for layer, mixed in zip(plain, bank(), strict=True):
            layer.weight.copy_(mixed)
    x = torch.randn(shape, dtype=torch.double)
    outputs = [sum(layer(x).sin().sum() * (i + 1) for i, layer in enumerate(model)) for model in (plain, shared)]
    torch.testing.assert_close(outputs[1], outputs[0])
    for output in outputs:
        output.backward()
    for j in (0, 1):
        grad = sum(layer.weight.grad for layer, use in zip(plain, uses, strict=True) if use == j)
        flat = grad.movedim(1, -1).flatten() if grad.dim() > 2 else grad.flatten()
        torch.testing.assert_close(bank.templates.grad[j], flat)
    for layer, other in zip(plain, shared, strict=True):
        torch.testing.assert_close(other.bias.grad, layer.bias.grad)
    for i, layer in enumerate(plain):  # d loss / d alpha_ij = <d loss / d W_i, T_j>
        for j in (0, 1):
            template = plain[uses.index(j)].weight
            torch.testing.assert_close(bank.coefficients.grad[i, j], (layer.weight.grad * template).sum())


def sgd_on_weights_and_templates(optimizer):
    torch.manual_seed(1)
    plain = nn.Sequential(*(m for _ in range(5) for m in (nn.Linear(6, 6), nn.Tanh()))).double()
    shared = copy.deepcopy(plain)
    (bank,) = share_(shared, 5).values()
    bank.coefficients.requires_grad_(False)
    with torch.no_grad():
        bank.coefficients.copy_(nn.init.orthogonal_(torch.empty(5, 5, dtype=torch.double)))
        for layer, mixed in zip(plain[::2], bank(), strict=True):
            layer.weight.copy_(mixed)
    steps = [optimizer([p for p in model.parameters() if p.requires_grad]) for model in (plain, shared)]
    for _ in range(60):
        x = torch.randn(8, 6, dtype=torch.double)
        for model, step in zip((plain, shared), steps, strict=True):
            step.zero_grad()
            (model(x) - x.flip(1)).square().mean().backward()
            step.step()
    weights = torch.stack([layer.weight for layer in plain[::2]])
    return ((weights - bank()).norm() / weights.norm()).item()


def test_sgd_on_templates_is_sgd_on_weights_for_frozen_orthogonal_coefficients():
    assert sgd_on_weights_and_templates(lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=1e-2)) < 1e-12


def test_adam_on_templates_is_not_adam_on_weights():
    assert sgd_on_weights_and_templates(lambda p: torch.optim.Adam(p, 0.01)) > 1e-3


# ------------------------------------------------------------------------------------------------------------- grouping


def test_groups_are_layers_of_one_class_shape_groups_and_dtype():
    class Own(nn.Conv2d):
        pass

    model = nn.ModuleDict(
        {
            "a": nn.Conv2d(4, 4, 3),
            "a_stride": nn.Conv2d(4, 4, 3, stride=2, bias=False),
            "a_dilated": nn.Conv2d(4, 4, 3, padding="same", dilation=2, padding_mode="circular"),
            "kernel": nn.Conv2d(4, 4, 1),
            "grouped": nn.Conv2d(8, 4, 3, groups=2),
            "precise": nn.Conv2d(4, 4, 3, dtype=torch.double),
            "own": Own(4, 4, 3),
            "transposed": nn.ConvTranspose2d(4, 4, 3),
            "linear": nn.Linear(4, 4),
            "one": nn.Conv1d(4, 4, 3),
            "own2": Own(4, 4, 3),
            "linear2": nn.Linear(4, 4, bias=False),
            "meta": nn.Conv2d(4, 4, 3, device="meta"),
            "norm": nn.BatchNorm2d(4),
            "embedding": nn.Embedding(4, 4),
        }
    )
    found = share_(model, 2)
    groups = [drawing(model, bank) for bank in found.values()]
    assert groups == [["a", "a_stride", "a_dilated"], ["own", "own2"], ["linear", "linear2"]]
    assert [bank.num_templates for bank in found.values()] == [2, 2, 2]
    assert model["a_stride"].bias is None and isinstance(model["a"].bias, nn.Parameter)
    assert model["a"].bias is not model["a_dilated"].bias


@pytest.mark.parametrize("templates", [1, 2, 3, 7])
def test_a_group_gets_the_smaller_of_templates_and_its_size(templates):
    model = nn.Sequential(*stack(4), nn.Linear(3, 3), nn.Linear(3, 3))
    assert [bank.num_templates for bank in share_(model, templates).values()] == [min(templates, 4), min(templates, 2)]


def test_banks_come_in_registration_order_and_share_returns_them():
    model = nn.Sequential(nn.Linear(3, 3), *stack(2), nn.Linear(3, 3))
    assert banks(model) == {}
    found = share_(model, 2)
    assert list(found) == list(banks(model)) and all(found[name] is banks(model)[name] for name in found)
    assert [bank.weight_shape for bank in found.values()] == [(3, 3), (4, 4, 3, 3)]
    assert list(banks(softshare.models.swrn(16, 1, 2))) == ["stage1", "stage2", "stage3"]


def test_select_makes_the_groups():
    model = stack(6)
    seen = {}

    def select(name, module):
        seen[name] = module
        return None if name == "0" else int(name) % 2

    found = share_(model, 2, select)
    assert seen == dict(model.named_children())
    assert {name: drawing(model, bank) for name, bank in found.items()} == {"1": ["1", "3", "5"], "0": ["2", "4"]}
    assert isinstance(model[0]._parameters["weight"], nn.Parameter)


def test_groups_with_the_same_name_stay_separate():
    model = stack(4)
    first = share_(model, 1, lambda name, _: "g" if name in "01" else None)
    second = share_(model, 1, lambda name, _: "g")
    assert len(banks(model)) == 2 and set(first).isdisjoint(second)
    assert [drawing(model, bank) for bank in banks(model).values()] == [["0", "1"], ["2", "3"]]


def test_a_module_used_in_two_places_is_one_layer():
    conv = nn.Conv2d(4, 4, 3, padding=1)
    model = nn.Sequential(conv, nn.ReLU(), conv, nn.Conv2d(4, 4, 3, padding=1))
    (bank,) = share_(model, 2).values()
    assert bank.num_layers == 2 and model[0] is model[2]
    model(torch.randn(1, 4, 3, 3)).sum().backward()


@pytest.mark.parametrize("init", ["orthogonal", "sparse", "normal", "identity"])
def test_mixed_weights_keep_the_mean_square(init):
    model = stack(5).requires_grad_(True)
    for i, layer in enumerate(model):
        nn.init.normal_(layer.weight, std=0.1 * (i + 1))
    before = torch.stack([layer.weight for layer in model]).square().mean().item()
    share_(model, 5 if init == "identity" else 3, init=init)
    after = torch.stack([layer.weight for layer in model]).square().mean().item()
    assert after == pytest.approx(before, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_svd_starts_from_the_current_weights(kind):
    model = nn.ModuleList(KINDS[kind][0]() for _ in range(4)).double()
    weights = torch.stack([layer.weight.detach() for layer in model])
    few, all_ = copy.deepcopy(model), copy.deepcopy(model)
    share_(all_, 4, init="svd")
    torch.testing.assert_close(torch.stack([layer.weight for layer in all_]), weights, rtol=1e-12, atol=1e-12)
    share_(few, 2, init="svd")  # the best approximation of rank 2 (Eckart and Young)
    error = (torch.stack([layer.weight for layer in few]) - weights).square().sum()
    torch.testing.assert_close(error, torch.linalg.svdvals(weights.flatten(1))[2:].square().sum())


# ----------------------------------------------------------------------------------------------------------- bad requests


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ((0,), ValueError, "templates.*0"),
        ((-3,), ValueError, "templates.*-3"),
        ((2.0,), TypeError, "templates"),
        (("2",), TypeError, "templates"),
        ((True,), TypeError, "templates"),
        ((2, None, "xavier"), ValueError, "xavier.*orthogonal.*svd"),
        ((2, None, "identity"), ValueError, "identity"),
    ],
)
def test_share_refuses_bad_arguments_and_changes_nothing(arguments, error, says):
    model = stack(3)
    before = dict(model.named_parameters())
    with pytest.raises(error, match=says):
        share_(model, *arguments)
    assert all(before[name] is parameter for name, parameter in model.named_parameters()) and banks(model) == {}


def test_share_needs_a_module():
    with pytest.raises(TypeError, match="list"):
        share_([nn.Linear(2, 2)], 1)


@pytest.mark.parametrize("other", [nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, dtype=torch.double), nn.Linear(4, 4)])
def test_keys_that_mix_weights_raise_and_leave_the_model_unchanged(other):
    model = nn.Sequential(*stack(3), other)
    before, classes = dict(model.named_parameters()), [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="everything"):
        share_(model, 2, lambda name, module: "fine" if name in "01" else "everything")
    assert dict(model.named_parameters()).keys() == before.keys()
    assert all(before[name] is parameter for name, parameter in model.named_parameters())
    assert [type(module) for module in model.modules()] == classes


@pytest.mark.parametrize("model", [nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3)), nn.ReLU()])
def test_nothing_to_share_raises(model):
    with pytest.raises(ValueError, match="nothing to share"):
        share_(model, 2)


def test_sharing_again_with_nothing_left_raises():
    model = stack(4)
    share_(model, 2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="nothing to share.*4 layers are shared already"):
        share_(model, 2)
    assert_same(model.state_dict(), before, rtol=0, atol=0)


def test_layers_that_cannot_be_shared_are_left_alone_and_named_in_one_warning():
    tied, embedding = nn.Linear(4, 6), nn.Embedding(6, 4)
    tied.weight = embedding.weight
    layers = {name: nn.Linear(4, 4) for name in "frozen parametrized weightnorm spectral pruned fine good".split()}
    model = nn.ModuleDict({**layers, "lazy": nn.LazyLinear(4), "embedding": embedding, "tied": tied})
    model["frozen"].weight.requires_grad_(False)
    parametrizations.orthogonal(model["parametrized"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(model["weightnorm"])
    nn.utils.spectral_norm(model["spectral"])
    prune.l1_unstructured(model["pruned"], "weight", 0.5)
    with pytest.warns(UserWarning) as caught:
        (bank,) = share_(model, 2).values()
    assert len(caught) == 1
    text = str(caught[0].message)
    for name in ("frozen", "parametrized", "weightnorm", "spectral", "pruned", "lazy", "tied"):
        assert name in text
    assert "fine" not in text and "good" not in text
    assert caught[0].filename == __file__, "the warning points at the caller"
    assert bank.num_layers == 2
    assert tied.weight is embedding.weight
    assert type(model["frozen"]) is nn.Linear and type(model["tied"]) is nn.Linear
    assert prune.is_pruned(model["pruned"])


def test_no_warning_if_select_leaves_a_frozen_layer_out(recwarn):
    model = stack(3)
    model[0].weight.requires_grad_(False)
    share_(model, 1, lambda name, _: None if name == "0" else "rest")
    assert len(recwarn) == 0


# ---------------------------------------------------------------------------------------------- reading and writing weights


def test_the_weight_is_mixed_whenever_it_is_read():
    model = stack(3)
    (bank,) = share_(model, 2).values()
    torch.testing.assert_close(torch.stack([layer.weight for layer in model]), bank())
    attention = nn.ModuleList(nn.MultiheadAttention(4, 2) for _ in range(2))  # never calls out_proj.forward
    (bank,) = share_(attention, 1).values()
    x = torch.randn(3, 1, 4)
    attention[1](x, x, x)[0].sum().backward()
    assert bank.templates.grad.abs().sum() > 0 and bank.coefficients.grad[1].abs().sum() > 0


def test_the_transformer_fast_path_reads_mixed_weights():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()
    share_(model, 2)
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        fast = model(x)
        torch.testing.assert_close(fast, unshare(model)(x))
    torch.testing.assert_close(fast, model(x), rtol=1e-4, atol=1e-5)  # with gradients, the slow path


@pytest.mark.parametrize("value", [nn.Parameter(torch.zeros(4, 4, 3, 3)), torch.zeros(4, 4, 3, 3), None])
def test_assigning_a_shared_weight_raises(value):
    model = stack(2)
    share_(model, 1)
    before = model[1].weight.clone()
    with pytest.raises(AttributeError, match="mixed"):
        model[1].weight = value
    assert torch.equal(model[1].weight, before)
    model[1].bias = nn.Parameter(torch.zeros(4))  # anything else may be assigned


def test_edits_in_place_are_seen_at_once():
    model = stack(3).eval()
    (bank,) = share_(model, 2).values()
    x = torch.randn(1, 4, 5, 5)
    for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with context():
            model(x)
        with torch.no_grad():
            bank.templates.mul_(0.5)
            bank.coefficients[1].add_(0.1)
        bank.templates.data.add_(0.01)
        with context():
            torch.testing.assert_close(model[1].weight, bank()[1])
            torch.testing.assert_close(model(x), unshare(model)(x))


def test_gradients_accumulate(foreign):
    model, x = foreign
    share_(model.eval(), 2)
    whole = gradients(model, x)
    model.zero_grad()
    for part in x:
        (model(part[None]).square().mean() / len(x)).backward()
    assert_same({name: p.grad for name, p in model.named_parameters()}, whole, rtol=1e-4, atol=1e-6)
    y = model(x).square().mean()
    model.zero_grad()
    y.backward(retain_graph=True)
    y.backward()
    assert_same({n: p.grad for n, p in model.named_parameters()}, {n: 2 * g for n, g in whole.items()})


def test_gradients_are_those_of_the_plain_weights(foreign):
    model, x = foreign
    share_(model.double(), 2)
    plain = unshare(model)
    mine, theirs = gradients(model, x.double()), gradients(plain, x.double())
    for bank in banks(model).values():
        per_layer = [theirs[f"{name}.weight"] for name in drawing(model, bank)]
        flat = torch.stack([(g.movedim(1, -1) if g.dim() > 2 else g).flatten() for g in per_layer])
        prefix = next(name for name, module in model.named_modules() if module is bank)
        torch.testing.assert_close(mine[f"{prefix}.templates"], bank.coefficients.T @ flat)
        torch.testing.assert_close(mine[f"{prefix}.coefficients"], flat @ bank.templates.T)


def test_a_sequential_never_executes_a_bank():
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(3)))
    (bank,) = share_(model, 2).values()
    x = y = torch.randn(2, 3)
    for layer in model:
        y = F.linear(y, layer.weight, layer.bias)
    torch.testing.assert_close(model(x), y)
    assert len(model) == 3 and len(list(model.children())) == 3
    ran = []
    bank.register_forward_hook(lambda *_: ran.append(1))
    model(x)
    assert not ran


# --------------------------------------------------------------------------------------------------- copies and checkpoints


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deep", "pickle"])
def test_a_copy_follows_its_own_bank(foreign, duplicate):
    model, x = foreign
    share_(model.eval(), 2)
    before = model(x)
    other = duplicate(model)
    torch.testing.assert_close(other(x), before)
    assert {id(p) for p in model.parameters()}.isdisjoint(id(p) for p in other.parameters())
    with torch.no_grad():
        for bank in banks(other).values():
            bank.templates.zero_()
    torch.testing.assert_close(model(x), before)
    for bank in banks(other).values():
        names = drawing(other, bank)
        assert len(names) == bank.num_layers
        assert all((other.get_submodule(name).weight == 0).all() for name in names)
    assert not torch.allclose(other(x), before)


def test_an_averaged_model_follows_its_own_bank():
    model = stack(3)
    share_(model, 2)
    average = torch.optim.swa_utils.AveragedModel(model)
    total = 0
    for value in (1.0, 2.0, 6.0):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(value)
        average.update_parameters(model)
        total += value
    assert all(torch.allclose(p, torch.full_like(p, total / 3)) for p in average.module.parameters())
    torch.testing.assert_close(average.module[2].weight, torch.full((4, 4, 3, 3), 2 * 9.0))
    torch.testing.assert_close(model[2].weight, torch.full((4, 4, 3, 3), 2 * 36.0))


def test_the_state_dict_holds_each_tensor_once_and_round_trips(foreign, tmp_path):
    model, x = foreign
    share_(model.eval(), 2)
    state = model.state_dict()
    assert len({tensor.data_ptr() for tensor in state.values()}) == len(state)
    assert sum(key.endswith("templates") for key in state) == len(banks(model))
    assert sum(key.endswith("coefficients") for key in state) == len(banks(model))
    save_file(state, tmp_path / "model.safetensors")
    torch.save(state, tmp_path / "model.pt")
    for read in (load_file(tmp_path / "model.safetensors"), torch.load(tmp_path / "model.pt", weights_only=True)):
        other = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.normal_()
        other.load_state_dict(read, strict=True)
        torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)
        other.load_state_dict(read, strict=True, assign=True)
        torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)
    missing = dict(list(state.items())[1:])
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict(missing, strict=True)


def test_unshare_gives_plain_weights_and_leaves_the_original(foreign):
    model, x = foreign
    plain_state = model.state_dict()
    share_(model.eval(), 2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plain = unshare(model)
    assert list(plain.state_dict()) == list(plain_state), "names in the order of a model that was never shared"
    assert all(value.shape == plain_state[name].shape for name, value in plain.state_dict().items())
    assert banks(plain) == {} and type(plain) is type(model)
    assert not any("Shared" in type(module).__name__ for module in plain.modules())
    torch.testing.assert_close(plain(x), model(x))
    assert_same(model.state_dict(), before, rtol=0, atol=0)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.zero_()
    assert_same(model.state_dict(), before, rtol=0, atol=0)
    share_(plain, 2)  # and it can be shared again


def test_unshare_of_a_plain_model_is_a_copy():
    model = stack(2)
    other = unshare(model)
    assert other is not model
    assert_same(other.state_dict(), model.state_dict(), rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------------- PyTorch's own tools


def test_foreign_networks_train(foreign):
    model, x = foreign
    count = sum(parameter.numel() for parameter in model.parameters())
    share_(model, 1)
    assert sum(parameter.numel() for parameter in model.parameters()) < count
    optimizer = torch.optim.Adam(decay_groups(model, 1e-4), lr=0.01)
    target = x.flip(-1)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def assert_compiles(model, x, backend):
    torch._dynamo.reset()
    share_(model, 2)
    expected, grads = model(x), gradients(model, x)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)
    model.zero_grad()
    compiled(x).square().mean().backward()
    assert_same({name: p.grad for name, p in model.named_parameters()}, grads, rtol=1e-3, atol=1e-5)
    with torch.no_grad():
        for bank in banks(model).values():
            bank.templates.mul_(0.5)
        torch.testing.assert_close(compiled.eval()(x), copy.deepcopy(model).eval()(x), rtol=1e-4, atol=1e-5)


def test_compiles_into_one_graph():
    assert_compiles(stack(3), torch.randn(1, 4, 4, 4), "aot_eager")


@pytest.mark.long
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_foreign_networks_compile_into_one_graph(foreign, backend):
    if backend == "inductor" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("inductor needs a C++ compiler on the CPU")
    assert_compiles(*foreign, backend)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_nothing(foreign, reentrant):
    model, x = foreign
    share_(model.eval(), 2)
    grads = gradients(model, x)
    model.zero_grad()
    x = x.clone().requires_grad_(True)
    checkpoint(model, x, use_reentrant=reentrant).square().mean().backward()
    assert_same({name: p.grad for name, p in model.named_parameters()}, grads)


def test_functional_call_and_its_gradient(foreign):
    model, x = foreign
    share_(model.eval(), 2)
    other = {name: torch.randn_like(p) * 0.1 for name, p in model.named_parameters()}
    before = {name: p.clone() for name, p in model.named_parameters()}
    buffers = dict(model.named_buffers())
    output = torch.func.functional_call(model, (other, buffers), (x,))
    grads = torch.func.grad(lambda p: torch.func.functional_call(model, (p, buffers), (x,)).square().mean())(other)
    assert_same(dict(model.named_parameters()), before, rtol=0, atol=0)
    copied = copy.deepcopy(model)
    copied.load_state_dict(other, strict=False)
    torch.testing.assert_close(output, copied(x))
    assert_same(grads, gradients(copied, x))


DISTRIBUTED = """
import contextlib, sys, torch, torch.distributed as dist
from torch import nn
import softshare
from softshare.sharing import mixed_once
rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
torch.manual_seed(rank)  # DistributedDataParallel hands round the weights of rank 0
model = nn.Sequential(*(m for _ in range(3) for m in (nn.Conv2d(2, 2, 3, padding=1), nn.ReLU())))
softshare.share_(model, 2)
wrapped = nn.parallel.DistributedDataParallel(model)
optimizer = torch.optim.SGD(model.parameters(), 0.1)
start = {name: value.clone() for name, value in model.state_dict().items()}
data = torch.randn(8, 2, 4, 4, generator=torch.Generator().manual_seed(7))
for _ in range(3):
    optimizer.zero_grad()
    with mixed_once(wrapped) if sys.argv[3] == "once" else contextlib.nullcontext():
        wrapped(data[rank::2]).square().mean().backward()
    optimizer.step()
torch.save({"start": start, "end": model.state_dict()}, f"{folder}/rank{rank}.pt")
dist.destroy_process_group()
"""


@pytest.mark.parametrize("mixing", ["once", "each"])
def test_distributed_data_parallel_equals_one_process(tmp_path, mixing):
    script = tmp_path / "train.py"
    script.write_text(DISTRIBUTED)
    folder = os.path.dirname(os.path.dirname(softshare.__file__))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(script)]
    ranks = [subprocess.Popen([*command, str(rank), str(tmp_path), mixing], env=environment) for rank in (0, 1)]
    try:
        assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    saved = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert_same(saved[0]["start"], saved[1]["start"], rtol=0, atol=0)
    assert_same(saved[0]["end"], saved[1]["end"], rtol=0, atol=0)
    model = nn.Sequential(*(m for _ in range(3) for m in (nn.Conv2d(2, 2, 3, padding=1), nn.ReLU())))
    share_(model, 2)
    model.load_state_dict(saved[0]["start"])
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    data = torch.randn(8, 2, 4, 4, generator=torch.Generator().manual_seed(7))
    for _ in range(3):
        optimizer.zero_grad()
        model(data).square().mean().backward()
        optimizer.step()
    assert_same(model.state_dict(), saved[0]["end"])


def test_data_parallel_raises_both_ways():
    model = stack(3)
    share_(model, 2)
    with pytest.raises(RuntimeError, match="DistributedDataParallel"):
        nn.DataParallel(model)
    with pytest.raises(RuntimeError, match="DistributedDataParallel"):
        nn.DataParallel(nn.Sequential(nn.ReLU(), model))
    with pytest.raises(RuntimeError, match="DistributedDataParallel"):
        share_(nn.DataParallel(stack(3)), 2)
    nn.DataParallel(stack(3))  # plain models are unaffected


# --------------------------------------------------------------------------------------- memory formats, dtypes and devices


class Viewing(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = stack(3)

    def forward(self, x):
        return self.layers(x).view(len(x), -1)


def test_models_that_view_after_a_convolution_keep_working():
    model = Viewing()
    share_(model, 2)
    assert all(layer.weight.is_contiguous() for layer in model.layers)
    assert model(torch.randn(2, 4, 8, 8)).shape == (2, 256)


def test_channels_last_reaches_mixed_weights_and_leaves_them_again():
    model = stack(3)
    (bank,) = share_(model, 2).values()
    x = torch.randn(2, 4, 8, 8)
    expected, grads = model(x), gradients(model, x)
    model.to(memory_format=torch.channels_last)
    for weight in (*(layer.weight for layer in model), *copy.deepcopy(model)[1:2][0].weight[None]):
        assert weight.is_contiguous(memory_format=torch.channels_last)
        assert not weight.is_contiguous()
    torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), expected)
    assert_same(gradients(model, x), grads, rtol=1e-4, atol=1e-6)
    assert bank().shape == (3, 4, 4, 3, 3)
    assert unshare(model)[0].weight.is_contiguous()
    model.double().float()
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    model.to(memory_format=torch.contiguous_format)
    assert model[0].weight.is_contiguous()


def test_a_channels_last_model_stays_so_when_shared():
    model = stack(3).to(memory_format=torch.channels_last)
    share_(model, 2)
    assert model[1].weight.is_contiguous(memory_format=torch.channels_last)


def test_channels_last_3d():
    model = nn.Sequential(*(nn.Conv3d(2, 2, 3, padding=1) for _ in range(2)))
    share_(model, 1)
    assert model[0].weight.is_contiguous()
    model.to(memory_format=torch.channels_last_3d)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("init", ["orthogonal", "sparse", "svd"])
def test_other_dtypes(dtype, init):
    model = stack(3).to(dtype)
    (bank,) = share_(model, 2, init=init).values()
    assert {p.dtype for p in model.parameters()} == {dtype}
    y = model(torch.randn(1, 4, 4, 4, dtype=dtype))
    y.float().square().mean().backward()
    assert y.dtype == dtype and bank.templates.grad.isfinite().all()
    assert model.float()[0].weight.dtype == torch.float32


def test_under_autocast_weights_are_mixed_in_full_precision():
    model = stack(3)
    (bank,) = share_(model, 2).values()
    with torch.autocast("cpu", torch.bfloat16):
        assert model[0].weight.dtype == torch.float32
        y = model(torch.randn(1, 4, 4, 4))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert bank.templates.grad.dtype == torch.float32 and bank.templates.grad.isfinite().all()


@pytest.mark.parametrize("inside", [True, False])
def test_meta_models(inside):
    with torch.device("meta"):
        model = stack(3)
        if inside:
            share_(model, 2)
    if not inside:
        share_(model, 2)
    assert all(p.is_meta for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) == 2 * (3 + 144) + 3 * 4
    assert model[0].weight.shape == (4, 4, 3, 3)
    assert model(torch.empty(2, 4, 8, 8, device="meta")).shape == (2, 4, 8, 8)
    full = model.to_empty(device="cpu")
    source = stack(3)
    share_(source, 2)
    full.load_state_dict(source.state_dict())
    x = torch.randn(1, 4, 5, 5)
    torch.testing.assert_close(full(x), source(x))


def test_a_frozen_bank_gets_no_gradient():
    model = stack(3)
    (bank,) = share_(model, 2).values()
    bank.coefficients.requires_grad_(False)
    model(torch.randn(1, 4, 4, 4)).sum().backward()
    assert bank.coefficients.grad is None and bank.templates.grad is not None


# ----------------------------------------------------------------------------------------------------------- decay_groups


def test_decay_groups_recognise_coefficients_by_identity():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.coefficients = nn.Parameter(torch.ones(2))  # belongs to no bank
            self.layers = stack(3)

    model = Odd()
    (bank,) = share_(model, 2).values()
    decayed, undecayed = decay_groups(model, 0.5)
    assert decayed["weight_decay"] == 0.5 and undecayed["weight_decay"] == 0.0
    assert [id(p) for p in undecayed["params"]] == [id(bank.coefficients)]
    listed = [id(p) for group in (decayed, undecayed) for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in model.parameters())
    optimizer = torch.optim.SGD(decay_groups(model, 0.5), lr=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 1.0 if parameter is bank.coefficients else 0.95
        torch.testing.assert_close(parameter.detach(), factor * before[name])


def test_decay_groups_of_a_plain_model_and_bad_decay():
    model = stack(2)
    assert [len(group["params"]) for group in decay_groups(model, 0.1)] == [4]
    with pytest.raises(ValueError, match="-0.1"):
        decay_groups(model, -0.1)


# ------------------------------------------------------------------------------------------------------- many small models


@given(st.data())
def test_any_stack_of_layers_keeps_its_promises(data):
    kinds = data.draw(st.lists(st.sampled_from(["a", "b", "c", "d"]), min_size=2, max_size=8))
    templates = data.draw(st.integers(1, 4))
    make = {
        "a": lambda: nn.Conv2d(2, 2, 3, padding=1, bias=False),
        "b": lambda: nn.Conv2d(2, 2, 1),
        "c": lambda: nn.ConvTranspose2d(2, 2, 3, padding=1),
        "d": lambda: nn.Conv2d(2, 2, 3, padding=2, dilation=2),  # of a's group: bias and dilation may differ
    }
    model = nn.Sequential(*(make[kind]() for kind in kinds))
    groups = [
        positions
        for merged in ("ad", "b", "c")
        if len(positions := [str(i) for i, kind in enumerate(kinds) if kind in merged]) > 1
    ]
    if not groups:
        with pytest.raises(ValueError, match="nothing to share"):
            share_(model, templates)
        return
    found = share_(model, templates)
    assert sorted(drawing(model, bank) for bank in found.values()) == sorted(groups)
    for bank in found.values():
        assert bank.num_templates == min(templates, bank.num_layers)
    x = torch.randn(1, 2, 4, 4)
    torch.testing.assert_close(model(x), unshare(model)(x))
    assert len(list(itertools.chain(model.parameters()))) == len(model.state_dict())


def test_a_repeated_first_layer_leaves_the_state_dict_without_duplicates(tmp_path):
    first = nn.Linear(4, 4, bias=False)
    model = nn.Sequential(first, nn.Linear(4, 4, bias=False), first)
    softshare.share_(model, 2)
    assert sum(name.endswith("templates") for name in model.state_dict()) == 1
    save_file(model.state_dict(), tmp_path / "model.safetensors")


def test_resetting_redraws_the_bank():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    (bank,) = softshare.share_(model, 2).values()
    before = bank().detach().clone()
    model.apply(lambda module: module.reset_parameters() if hasattr(module, "reset_parameters") else None)
    assert not torch.equal(bank(), before) and bank().isfinite().all()


def test_unshared_weights_are_trainable_if_their_bank_was():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    softshare.share_(model, 2)
    assert all(parameter.requires_grad for parameter in softshare.unshare(model).parameters())
    with torch.no_grad():
        assert all(parameter.requires_grad for parameter in softshare.unshare(model).parameters())
    model.requires_grad_(False)
    for other in (softshare.unshare(model), softshare.fold(model, 0.01)):
        assert not any(parameter.requires_grad for parameter in other.parameters())


def test_a_bank_that_was_cut_off_is_named_before_training():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    softshare.share_(model, 2)
    with pytest.raises(ValueError, match="not part of this model"):
        softshare.decay_groups(model[1:], 0.1)


@pytest.mark.parametrize(
    "call",
    [
        softshare.banks,
        softshare.unshare,
        softshare.recurrence_penalty,
        softshare.similarity_matrices,
        lambda model: softshare.decay_groups(model, 0.1),
        lambda model: softshare.plan_fold(model, 0.5),
        lambda model: softshare.fold(model, 0.5),
        lambda model: softshare.share_(model, 2),
    ],
)
@pytest.mark.parametrize("model", [None, 3, "model", []])
def test_anything_but_a_model_is_a_type_error(call, model):
    with pytest.raises(TypeError, match="torch.nn.Module"):
        call(model)


def test_an_invalid_select_is_a_type_error():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    with pytest.raises(TypeError, match="select must be a function"):
        softshare.share_(model, 2, select="all")
    with pytest.raises(TypeError, match="hashable"):
        softshare.share_(model, 2, select=lambda name, module: [name])
    assert softshare.banks(model) == {}


def test_a_class_with_its_own_getstate_is_copied_with_it():
    class Odd(nn.Linear):
        def __getstate__(self):
            return {key: value for key, value in self.__dict__.items() if key != "handle"}

    model = nn.Sequential(Odd(4, 4), Odd(4, 4))
    model[1].handle = (each for each in ())  # a generator cannot be copied
    softshare.share_(model, 2)
    twin = copy.deepcopy(model)
    x = torch.randn(2, 4)
    assert torch.equal(twin(x), model(x)) and not hasattr(twin[1], "handle")
