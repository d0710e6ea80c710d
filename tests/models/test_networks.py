"""What all networks for images have in common: they learn, are saved, share, fold, and run as users run networks."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

from softshare import banks, fold, models, plan_fold, share_
from softshare.models.blocks import mean_over_pixels

SMALL = {
    "WRN": lambda: models.wrn(16, 1, 7),
    "WRN 50": lambda: models.wrn50(1, 7),
    "ResNeXt": lambda: models.resnext(29, 2, 2, 7),
    "DenseNet": lambda: models.densenet(10, 4, 7),
    "DenseNet-BC": lambda: models.densenet(22, 4, 7, compressed=True),
    "DenseNet-264": lambda: models.densenet264(2, 7),
    "ResNet-200": lambda: models.resnet200(2, 7),
}
SIDE = {"WRN 50": 64, "DenseNet-264": 64, "ResNet-200": 64}
SHARING = [name for name in SMALL if name != "DenseNet"]  # no two layers of a plain DenseNet have the same shape


def images(name, **options):
    side = SIDE.get(name, 16)
    return torch.randn(4, 3, side, side, **options)


@pytest.mark.parametrize("name", SMALL)
def test_gradients_reach_every_parameter(name):
    model = SMALL[name]().double()
    model(images(name, dtype=torch.double)).square().sum().backward()
    missed = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert missed == []
    moved = [p.grad.abs().sum() > 0 for p in model.parameters()]
    assert sum(moved) > 0.95 * len(moved)  # a few ReLUs of narrow networks are dead


@pytest.mark.parametrize("name", SMALL)
def test_a_saved_network_loads_strictly(name, tmp_path):
    model = SMALL[name]()
    model(images(name))  # BatchNorm learns
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    fresh = SMALL[name]()
    fresh.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    x = images(name)
    torch.testing.assert_close(fresh.eval()(x), model.eval()(x), rtol=0, atol=0)


@pytest.mark.parametrize("name", SHARING)
def test_it_shares_and_exact_ties_change_no_output(name, write_coefficients, tied_rows):
    model = SMALL[name]().double()
    share_(model, 2)
    plain = sum(p.numel() for p in SMALL[name]().parameters())
    assert sum(p.numel() for p in model.parameters()) < plain
    for group, bank in banks(model).items():
        layers = bank.num_layers
        rows = tied_rows([(1, layers)], bank.num_templates, layers, torch.double)
        write_coefficients(model, rows, group)
    model(images(name, dtype=torch.double))
    model.eval()
    for clusters in plan_fold(model, 1.0).clusters.values():
        assert any({1, max(map(max, clusters))} <= {*cluster} for cluster in clusters)
    folded, x = fold(model, 1.0), images(name, dtype=torch.double)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-8, atol=1e-8)
    assert sum(p.numel() for p in folded.parameters()) < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", SMALL)
def test_precision_and_memory_format(name):
    model = SMALL[name]()
    model(images(name))
    model.eval()
    x = images(name)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(x)
    assert low.dtype == torch.float32 and (low - expected).norm() < 0.1 * expected.norm()
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    found = last(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", SMALL)
def test_it_is_traced_and_reports_that_it_cannot_be_scripted(name):
    model, x = SMALL[name]().eval(), images(name)
    traced = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(traced(x), model(x))
    assert any(node.target is mean_over_pixels for node in traced.graph.nodes)
    with pytest.raises(RuntimeError, match="cannot be scripted; use torch.compile, torch.export"):
        torch.jit.script(model)
