"""What folding makes: the same outputs, each distinct weight held once, loops that run, a model like any other."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from softshare import FoldPlan, banks, fold, models, plan_fold, share_, tie, unshare
from softshare.folded import sweep


def with_realistic_statistics(model):
    """The model, with BatchNorm statistics and parameters as after some training."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
    return model


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


LOOP = [(3, 5, 7, 9), (4, 6, 8, 10)]


# ------------------------------------------------------------------------------------------- exact ties change no output


EXACT = {
    "swrn loop": (lambda: models.swrn(40, 1, 8), "stage2", LOOP, (2, 3, 8, 8)),
    "swrn one layer": (lambda: models.swrn(28, 1, 6), "stage1", [(1, 2, 3, 4, 5, 6)], (2, 3, 8, 8)),
    "swrn reuse": (lambda: models.swrn(28, 2, 4), "stage3", [(1, 4, 6), (2, 5)], (2, 3, 8, 8)),
    "swrn loop and reuse": (lambda: models.swrn(40, 1, 3), "stage1", [(1, 3, 5, 9), (2, 4, 6)], (2, 3, 8, 8)),
    "gridnet loop": (lambda: models.gridnet(8, 4, 5), "layers", [(2, 4, 6), (3, 5, 7)], (2, 2, 6, 6)),
    "gridnet reuse": (lambda: models.gridnet(8, 4, 2), "layers", [(1, 4, 8), (2, 6)], (2, 2, 6, 6)),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", EXACT)
def test_exact_ties_change_no_output(case, training, write_coefficients, tied_rows):
    make, group, clusters, shape = EXACT[case]
    model = with_realistic_statistics(make()).train(training)
    bank = banks(model)[group]
    write_coefficients(model, tied_rows(clusters, bank.num_templates, bank.num_layers), group)
    before = copy.deepcopy(model.state_dict())
    plan = plan_fold(model, 1.0)
    assert set(clusters) <= set(plan.clusters[group])
    folded = fold(model, 1.0)
    assert folded.training == training and all(m.training == training for m in folded.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), "the original is untouched"
    assert {t.data_ptr() for t in model.parameters()}.isdisjoint(t.data_ptr() for t in folded.parameters())
    x = torch.rand(shape)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)
    assert parameters(folded) < parameters(model)


def test_in_double_precision_exact_ties_change_nothing_at_all(write_coefficients, tied_rows):
    for make, group, clusters, shape in EXACT.values():
        model = with_realistic_statistics(make()).double()
        bank = banks(model)[group]
        write_coefficients(model, tied_rows(clusters, bank.num_templates, bank.num_layers, torch.double), group)
        x = torch.rand(shape, dtype=torch.double)
        torch.testing.assert_close(fold(model, 1.0)(x), model(x), rtol=1e-10, atol=1e-10)


def test_every_step_keeps_its_own_batchnorm(write_coefficients, tied_rows):
    model = with_realistic_statistics(models.swrn(40, 1, 8, dropout=0.3))
    write_coefficients(model, tied_rows(LOOP, 8, 10))
    folded = fold(model, 1.0)
    norms = {}
    for net in (model, folded):
        norms[net] = ran = []
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_hook(lambda m, *_, ran=ran: ran.append(m))
    x = torch.randn(4, 3, 8, 8)
    for net in (model, folded):
        torch.manual_seed(3)  # the same dropout
        net(x).sum().backward()
    assert len(norms[model]) == len(norms[folded]) == len(set(norms[folded])) == 37
    for mine, theirs in zip(norms[model], norms[folded], strict=True):
        torch.testing.assert_close(theirs.running_mean, mine.running_mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(theirs.weight.grad, mine.weight.grad, rtol=1e-3, atol=1e-3)


def test_a_loop_runs_as_a_loop():
    model = models.swrn(40, 1, 8)
    folded = fold(model, tie(model, {f"stage{s}": LOOP for s in (1, 2, 3)}))
    calls = {}
    for name, module in folded.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda *_, name=name: calls.update({name: calls.get(name, 0) + 1}))
    folded(torch.randn(1, 3, 8, 8))
    for stage in (1, 2, 3):
        inner = {name: n for name, n in calls.items() if name.startswith(f"stage{stage}.")}
        assert sorted(inner.values()) == [1] * (2 + 2 + (stage > 1)) + [4, 4]
    assert sum(calls.values()) == 37 + 2, "depth and multiply-adds stay"


def test_loops_are_found_where_the_network_is_part_of_another(write_coefficients, tied_rows):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.BatchNorm2d(3), models.swrn(28, 1, 2))

        def forward(self, x):
            return self.net(x)

    model = Outer()
    write_coefficients(model, tied_rows([(1, 3, 5), (2, 4, 6)], 2, 6))
    assert str(plan_fold(model, 1.0)).splitlines() == [f"stage{s}: (1 -> 2) x 3" for s in (1, 2, 3)]
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(fold(model, 1.0)(x), model(x), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------- what a folded group holds


@pytest.mark.parametrize("templates", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("clusters", [[], [(1, 3, 5), (2, 4, 6)], [(2, 3)], [(1, 6), (2, 5), (3, 4)]])
def test_parameters_by_closed_form(templates, clusters):
    """One plain weight per distinct layer if there are no more of these than templates; else templates and a row each."""
    model = models.gridnet(layers=6, width=3, templates=templates)
    plan = tie(model, {"layers": clusters})
    folded = fold(model, plan)
    distinct, d = 6 - sum(len(cluster) - 1 for cluster in clusters), 81
    group = distinct * d if distinct <= templates else templates * (distinct + d)
    assert parameters(folded) == group + 6 * 6 + (2 * 3 + 3) + (3 + 1)
    assert plan.groups[0].rolls_back == (distinct <= templates)
    assert bool(banks(folded)) == (distinct > templates)
    assert plan.distinct_layers == distinct
    x = torch.rand(1, 2, 4, 4)
    assert folded(x).shape == (1, 4, 4)
    state = folded.state_dict()
    assert len({tensor.data_ptr() for tensor in state.values() if tensor.numel()}) == len(state), "each held once"


def test_a_group_where_nothing_ties_stays_as_it_is():
    model = models.swrn(28, 1, 2)
    folded = fold(model, tie(model, {}))
    assert list(folded.state_dict()) == list(model.state_dict()) and list(banks(folded)) == list(banks(model))
    full = models.swrn(28, 1)  # with a template for each layer, plain weights take less room
    assert list(fold(full, tie(full, {})).state_dict()) == list(models.wrn(28, 1).state_dict())


@pytest.mark.parametrize("templates", [2, 5])
def test_below_one_a_cluster_becomes_the_best_single_direction(templates, linears):
    """Tied weights are the rank-one approximation, by singular values, of the weights that they replace."""
    model = linears(torch.randn(6, templates, dtype=torch.double))
    weights = torch.stack([layer.weight.detach().flatten() for layer in model[::2]])
    clusters = [(1, 4, 5), (2, 6), (3,)]
    plan = tie(model, {"Linear 4x4": clusters})
    folded = fold(model, plan)
    for cluster in clusters:
        rows = [layer - 1 for layer in cluster]
        u, s, vh = torch.linalg.svd(weights[rows], full_matrices=False)
        expected = u[:, :1] * s[0] @ vh[:1]
        found = torch.stack([folded[2 * row].weight.flatten() for row in rows])
        torch.testing.assert_close(found, expected)
        scales = torch.tensor([plan.scales["Linear 4x4"][row] for row in rows], dtype=torch.double)
        ratio = found / scales[:, None]  # one representative
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))
        assert scales[0] > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_memory_format_and_frozen_parameters_stay(dtype):
    model = models.swrn(28, 1, 5).to(dtype).to(memory_format=torch.channels_last)
    folded = fold(model, tie(model, {"stage1": [(1, 2)], "stage2": [(1, 3), (2, 5)]}))
    assert {p.dtype for p in folded.parameters()} == {dtype}
    folded(torch.randn(2, 3, 8, 8, dtype=dtype))
    kept = models.swrn(28, 1, 2).to(memory_format=torch.channels_last)
    banks(kept)["stage1"].coefficients.requires_grad_(False)
    folded = fold(kept, tie(kept, {"stage1": [(1, 2)]}))
    assert not banks(folded)["stage1"].coefficients.requires_grad
    assert banks(folded)["stage1"].templates.requires_grad
    weight = folded.stage1[1].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_modules_keep_their_mode():
    model = models.gridnet(6, 3, 2)
    model.layers[3].norm.eval()  # frozen, as in fine-tuning
    folded = fold(model, tie(model, {"layers": [(2, 3), (4, 5)]}))
    held = [name for name, module in folded.named_modules() if not module.training]
    assert len(held) == 1 and "norm" in held[0]
    assert all(not module.training for module in fold(model.eval(), 0.5).modules())


def test_folding_draws_no_random_numbers():
    model = models.gridnet(6, 3, 2)
    state = torch.get_rng_state()
    fold(model, 0.5)
    fold(model, tie(model, {"layers": [(1, 2)]}))
    assert torch.equal(torch.get_rng_state(), state)


def test_folding_twice():
    model = with_realistic_statistics(models.swrn(28, 1, 2)).eval()
    ties = {"stage1": [(1, 3), (2, 4)], "stage3": [(1, 2, 3)]}
    first = tie(model, {"stage1": ties["stage1"]})
    once = fold(model, first)
    assert [group.name for group in tie(once, {}).groups] == ["stage2", "stage3"], "stage1 is folded already"
    with pytest.raises(ValueError, match="another model"):
        fold(once, first)
    twice = fold(once, tie(once, {"stage3": ties["stage3"]}))
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(twice(x), fold(model, tie(model, ties))(x))
    everything = fold(models.gridnet(4, 2, 4), 1.0)
    with pytest.raises(ValueError, match="nothing to fold"):
        fold(everything, 1.0)


def test_a_plan_of_another_model_is_refused():
    plan = tie(models.swrn(28, 1, 2), {})
    others = models.swrn(40, 1, 2), models.swrn(28, 1, 3), models.gridnet(6, 2, 2), nn.Sequential(models.swrn(28, 1, 2))
    for other in others:
        with pytest.raises(ValueError, match="another model"):
            fold(other, plan)


# --------------------------------------------------------------------------------------------- a folded model is a model


@pytest.mark.parametrize("templates", [2, 8])
def test_a_saved_folded_model_loads_from_its_plan(templates, tmp_path):
    def make():
        return with_realistic_statistics(models.swrn(40, 1, templates)).eval()

    model = make()
    plan = tie(model, {"stage1": LOOP, "stage2": [(1, 2)], "stage3": [(2, 9), (1, 3, 5), (4, 6)]})
    folded = fold(model, plan)
    save_file(folded.state_dict(), tmp_path / "folded.safetensors")
    (tmp_path / "plan.json").write_text(plan.to_json())
    torch.manual_seed(99)
    other = fold(make(), FoldPlan.from_json((tmp_path / "plan.json").read_text()))
    other.load_state_dict(load_file(tmp_path / "folded.safetensors"), strict=True)
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(other(x), folded(x), rtol=0, atol=0)


def test_a_large_folded_model_loads_through_the_meta_device():
    torch.manual_seed(0)
    model = models.swrn(22, 1, 4).eval()
    plan = tie(model, {"stage2": [(1, 3), (2, 4)]})
    folded = fold(model, plan)
    with torch.device("meta"):
        empty = models.swrn(22, 1, 4).eval()
    with pytest.raises(ValueError, match="no values"):
        plan_fold(empty, 0.5)
    again = fold(empty, plan)
    again.load_state_dict(folded.state_dict(), strict=True, assign=True)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(again(x), folded(x))


@pytest.fixture(params=["loop", "rolled back", "linear"])
def folded_network(request, linears):
    """A folded network and a batch for it."""
    if request.param == "linear":
        model = linears(torch.randn(5, 3))
        return fold(model, tie(model, {"Linear 4x4": [(1, 4)]})), torch.rand(2, 4)
    templates, clusters = (2, [(2, 4), (3, 5)]) if request.param == "loop" else (6, [(1, 4), (3, 6)])
    model = models.gridnet(6, 4, templates)
    return fold(model, tie(model, {"layers": clusters})), torch.rand(2, 2, 5, 5)


def test_a_folded_model_trains_copies_checkpoints_and_unshares(folded_network):
    folded, x = folded_network
    for copied in (copy.deepcopy(folded), pickle.loads(pickle.dumps(folded))):
        torch.testing.assert_close(copied(x), folded(x))
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter.zero_()
        assert not torch.allclose(copied(x), folded(x))
    plain = unshare(folded.eval())
    torch.testing.assert_close(plain(x), folded(x))
    assert not any("Shared" in type(module).__name__ for module in plain.modules())
    folded(x).square().sum().backward()
    grads = [parameter.grad.clone() for parameter in folded.parameters()]
    assert all(grad.abs().sum() > 0 for grad in grads), "every parameter is used"
    for reentrant in (True, False):
        folded.zero_grad()
        checkpoint(folded, x.clone().requires_grad_(), use_reentrant=reentrant).square().sum().backward()
        for parameter, grad in zip(folded.parameters(), grads, strict=True):
            torch.testing.assert_close(parameter.grad, grad)
    optimizer, losses = torch.optim.Adam(folded.parameters(), 0.01), []
    for _ in range(20):
        optimizer.zero_grad()
        loss = folded.train()(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.long
def test_a_folded_model_compiles_into_one_graph(folded_network):
    torch._dynamo.reset()
    folded, x = folded_network
    compiled = torch.compile(folded, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), folded(x), rtol=1e-4, atol=1e-5)


def test_a_folded_model_can_be_reset_and_saved_if_a_layer_occurs_twice(tmp_path):
    first = nn.Linear(4, 4, bias=False)
    model = nn.Sequential(first, nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), first)
    share_(model, 3)
    folded = fold(model, tie(model, {"Linear 4x4": [(1, 2)]}))
    save_file(folded.state_dict(), tmp_path / "folded.safetensors")
    before = folded[1].weight.detach().clone()
    folded.apply(lambda module: module.reset_parameters() if hasattr(module, "reset_parameters") else None)
    assert not torch.equal(folded[1].weight, before) and folded[1].weight.isfinite().all()


def test_foreign_networks_fold(foreign):
    model, x = foreign
    share_(model.eval(), 2)
    for bank in banks(model).values():
        with torch.no_grad():
            bank.coefficients[1] = -0.5 * bank.coefficients[0]
    plan = plan_fold(model, 1.0)
    assert all((1, 2) in {cluster[:2] for cluster in clusters} for clusters in plan.clusters.values())
    assert not any(plan.loops.values()), "loops are for networks whose blocks are known"
    folded = fold(model, plan)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)
    assert parameters(folded) < parameters(model)
    other = fold(model, FoldPlan.from_json(plan.to_json()))
    other.load_state_dict(folded.state_dict(), strict=True)
    folded(x).square().mean().backward()
    assert all(parameter.grad is not None for parameter in folded.parameters())
    torch.testing.assert_close(unshare(folded)(x), folded(x))


def test_sweep_reports_each_threshold(linears):
    angles = torch.tensor([0.0, 30.0, 60.0, 60.0], dtype=torch.double).deg2rad()
    model = linears(torch.stack([angles.cos(), angles.sin()], 1))
    x = torch.randn(8, 4, dtype=torch.double)
    rows = sweep(model, lambda net: net(x).square().mean().item(), [1.0, 0.8, 0.1])
    assert [row["threshold"] for row in rows] == [1.0, 0.8, 0.1]
    assert [row["distinct"] for row in rows] == [3, 2, 1] and {row["total"] for row in rows} == {4}
    before = model(x).square().mean().item()
    for row in rows:
        folded = fold(model, row["threshold"])
        assert row["parameters"] == parameters(folded) and row["plan"] == str(plan_fold(model, row["threshold"]))
        assert row["value"] == pytest.approx(folded(x).square().mean().item())
        assert row["change"] == pytest.approx(row["value"] - before)
    assert rows[0]["change"] == pytest.approx(0.0, abs=1e-12)
