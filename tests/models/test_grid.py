"""The network of the shortest-path task, plain and shared."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from softshare import banks, models, unshare


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("templates", [None, 1, 3, 99])
def test_gridnet(templates):
    model = models.gridnet(layers=4, width=5, templates=templates)
    found = banks(model)
    assert [(b.num_layers, b.num_templates) for b in found.values()] == ([(4, min(templates, 4))] if templates else [])
    grids = torch.rand(2, 2, 7, 9) < 0.2
    assert model(grids).shape == (2, 7, 9)
    torch.testing.assert_close(model.eval()(grids), model(grids.float()))
    k = 4 if templates is None else min(templates, 4)
    weights = 4 * 225 if templates is None else k * (4 + 225)
    assert parameters(model) == weights + 4 * 10 + (2 * 5 + 5) + (5 + 1)
    torch.testing.assert_close(unshare(model)(grids), model(grids))


def test_gridnet_by_hand():
    model = models.gridnet(layers=3, width=4).eval()
    state, f = model.state_dict(), nn.functional
    x = torch.rand(2, 2, 6, 6)
    h = f.conv2d(x, state["stem.weight"], state["stem.bias"])
    for i in range(3):
        y = f.conv2d(h, state[f"layers.{i}.conv.weight"], padding=1)
        h = h + f.relu(y / (1 + 1e-5) ** 0.5)  # a fresh BatchNorm
    expected = f.conv2d(h, state["head.weight"], state["head.bias"])[:, 0]
    torch.testing.assert_close(model(x), expected)
    assert sum(p.numel() for p in models.gridnet().parameters()) == 20 * (9216 + 64) + 96 + 33


def test_gridnet_in_other_precisions():
    grids = torch.rand(1, 2, 5, 5) < 0.3
    assert models.gridnet(2, 4, 1).double()(grids).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert models.gridnet(2, 4, 1)(grids).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: models.gridnet(0), ValueError, "layers.*0"),
        (lambda: models.gridnet(width=0), ValueError, "width.*0"),
        (lambda: models.gridnet(1, templates=1), ValueError, "at least 2 layers"),
        (lambda: models.gridnet(templates=0), ValueError, "templates.*0"),
        (lambda: models.gridnet(2.5), TypeError, "layers"),
    ],
)
def test_bad_sizes(call, error, says):
    with pytest.raises(error, match=says):
        call()
