"""WRN 50-2, SWRN 50-2 and ResNet-200."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from softshare import banks, fold, models, plan_fold, share_, unshare
from softshare.models.bottleneck import Bottleneck, PreactivationBottleneck


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.fixture(scope="module")
def shared():
    """The smallest network of its kind, with BatchNorm statistics that fit its weights."""
    torch.manual_seed(0)
    model = models.swrn50(1, 2, 7)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # a plain average over the batches seen
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    with torch.no_grad():
        model(torch.randn(4, 3, 64, 64))
    return model.eval()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("WRN 50-2", 68_883_240),  # the count that torchvision's documentation gives for wide_resnet50_2
        ("WRN 50-1", 25_557_032),  # and for resnet50
        ("SWRN 50-2", 68_883_240 + 3 * (2**2 + 3**2 + 5**2 + 2**2)),
        ("ResNet-200", 64_666_152),  # counted once on a throw-away network written for this purpose
    ],
)
def test_parameter_counts(name, expected):
    with torch.device("meta"):
        model = models.build(name)
        assert model(torch.empty(2, 3, 224, 224)).shape == (2, 1000)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert parameters(model) == expected


def test_parameters_with_fewer_templates():
    """Counted by hand: of each group's L weights of d elements, k (L + d) parameters are left."""
    left = 68_883_240
    for stage, layers in enumerate((2, 3, 5, 2)):
        out, inner = 256 * 2**stage, 128 * 2**stage
        for d in (out * inner, 9 * inner * inner, inner * out):
            left += min(2, layers) * (layers + d) - layers * d
    with torch.device("meta"):
        assert parameters(models.build("SWRN 50-2-2")) == left
        assert parameters(models.build("SWRN 50-2-99")) == parameters(models.build("SWRN 50-2"))


def test_groups():
    with torch.device("meta"):
        model = models.swrn50()
    found = {
        name: (bank.num_layers, bank.num_templates, tuple(bank.weight_shape)) for name, bank in banks(model).items()
    }
    expected = {}
    for stage, layers in enumerate((2, 3, 5, 2), start=1):
        out, inner = 128 * 2**stage, 64 * 2**stage
        expected[f"stage{stage}.conv1"] = (layers, layers, (inner, out, 1, 1))
        expected[f"stage{stage}.conv2"] = (layers, layers, (inner, inner, 3, 3))
        expected[f"stage{stage}.conv3"] = (layers, layers, (out, inner, 1, 1))
    assert found == expected
    plain = {name for name, p in model.named_parameters() if name.endswith("weight") and p.dim() > 1}
    first = {f"stage{s}.0.{layer}.weight" for s in (1, 2, 3, 4) for layer in ("conv1", "conv2", "conv3", "shortcut.0")}
    assert plain == first | {"stem.weight", "classifier.weight"}


def test_the_network_by_hand(shared):
    """WRN 50 again, as one function over a state dict; the shared network unshared is the same one."""
    model, images, f = unshare(shared), torch.randn(2, 3, 64, 64), nn.functional
    plain = models.wrn50(1, 7)
    assert list(plain.state_dict()) == list(model.state_dict())
    plain.load_state_dict(model.state_dict(), strict=True)
    state = model.state_dict()

    def norm(x, name):
        values = (state[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias"))
        return f.batch_norm(x, *values)

    x = f.relu(norm(f.conv2d(images, state["stem.weight"], stride=2, padding=3), "norm"))
    x = f.max_pool2d(x, kernel_size=3, stride=2, padding=1)
    for stage, blocks in enumerate((3, 4, 6, 3), start=1):
        for block in range(blocks):
            p, stride = f"stage{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            h = f.relu(norm(f.conv2d(x, state[f"{p}.conv1.weight"]), f"{p}.norm1"))
            h = f.relu(norm(f.conv2d(h, state[f"{p}.conv2.weight"], stride=stride, padding=1), f"{p}.norm2"))
            h = norm(f.conv2d(h, state[f"{p}.conv3.weight"]), f"{p}.norm3")
            if block == 0:
                x = norm(f.conv2d(x, state[f"{p}.shortcut.0.weight"], stride=stride), f"{p}.shortcut.1")
            x = f.relu(x + h)
    expected = f.linear(x.mean((2, 3)), state["classifier.weight"], state["classifier.bias"])
    for network in (shared, model, plain.eval()):
        torch.testing.assert_close(network(images), expected, rtol=1e-3, atol=1e-3)


def test_exact_ties_fold(shared):
    model = models.swrn50(1, 2, 7).eval()
    model.load_state_dict(shared.state_dict(), strict=True)
    found = banks(model)
    with torch.no_grad():
        for name, scale in {"stage3.conv1": 1.0, "stage3.conv2": -0.5, "stage4.conv3": 2.0}.items():
            rows = found[name].coefficients
            rows[-1] = scale * rows[0]
    plan = plan_fold(model, 1.0)
    tied = {name: [c for c in clusters if len(c) > 1] for name, clusters in plan.clusters.items()}
    assert {name: clusters for name, clusters in tied.items() if clusters} == {
        "stage3.conv1": [(1, 5)],
        "stage3.conv2": [(1, 5)],
        "stage4.conv3": [(1, 2)],
    }
    folded, images = fold(model, plan), torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(folded(images), model(images), rtol=1e-3, atol=1e-3)
    assert parameters(folded) < parameters(model)


def test_share_makes_the_same_groups():
    model = models.wrn50(1, 7)

    def shapes(name, module):
        stage, block, *layer = [*name.split("."), "0", "0"]
        return f"{stage}.{layer[0]}" if stage.startswith("stage") and block != "0" else None

    assert list(share_(model, 2, shapes)) == [f"stage{s}.conv{c}" for s in (1, 2, 3, 4) for c in (1, 2, 3)]
    models.swrn50(1, 2, 7).load_state_dict(model.state_dict(), strict=True)


def test_initialisation_as_in_the_authors_code(shared):
    model = models.wrn50(1, 7)
    for name, fan_in in {"stem": 147, "stage4.2.conv2": 512 * 9, "stage2.0.shortcut.0": 256}.items():
        assert model.get_submodule(name).weight.var().item() == pytest.approx(2 / fan_in, rel=0.1)
    assert (model.classifier.bias == 0).all()
    bank = banks(shared)["stage3.conv1"]
    assert bank.templates.var().item() == pytest.approx(2 / 1024, rel=0.1)
    torch.testing.assert_close(bank.coefficients.T @ bank.coefficients, torch.eye(2), atol=1e-5, rtol=0)


def test_a_step_of_training_reaches_every_parameter():
    model = models.swrn50(1, None, 3)
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@pytest.mark.parametrize("kind", [Bottleneck, PreactivationBottleneck])
def test_a_block_as_a_step_of_a_loop(kind):
    """A step takes other normalisations, and scales each convolution as if its weight were scaled."""
    block, other, scales = kind(6, 3, 6, 1, False), kind(6, 3, 6, 1, False), (0.5, -1.5, 2.0)
    for net in (block, other):
        for norm in net.eval().norms():
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 1.5)
    x = torch.randn(2, 6, 5, 5)
    found = block.step(x, other.norms(), [torch.tensor(scale) for scale in scales])
    with torch.no_grad():
        for name, scale in zip(kind.layer_names, scales, strict=True):
            getattr(other, name).weight.copy_(scale * getattr(block, name).weight)
    torch.testing.assert_close(found, other(x))


# ------------------------------------------------------------------------------------------------------------ ResNet-200


@pytest.fixture(scope="module")
def resnet200():
    """A narrow ResNet-200 in double precision, with BatchNorm statistics that fit its weights."""
    torch.manual_seed(0)
    model = models.resnet200(2, 7).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # a plain average over the batches seen
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    with torch.no_grad():
        model(torch.randn(4, 3, 64, 64, dtype=torch.double))
    return model.eval()


def test_resnet200_has_200_layers_and_these_shapes(resnet200):
    seen = {}
    handles = [
        resnet200.get_submodule(name).register_forward_hook(lambda m, i, x, name=name: seen.update({name: (*x.shape,)}))
        for name in ("stem", "stage1", "stage2", "stage3", "stage4", "classifier")
    ]
    resnet200(torch.zeros(2, 3, 96, 96, dtype=torch.double))
    for handle in handles:
        handle.remove()
    assert seen == {
        "stem": (2, 2, 48, 48),
        "stage1": (2, 8, 24, 24),
        "stage2": (2, 16, 12, 12),
        "stage3": (2, 32, 6, 6),
        "stage4": (2, 64, 3, 3),
        "classifier": (2, 7),
    }
    layers = {name: m for name, m in resnet200.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    shortcuts = {name for name in layers if "shortcut" in name}
    assert len(layers) - len(shortcuts) == 200 and shortcuts == {f"stage{stage}.0.shortcut" for stage in (1, 2, 3, 4)}
    strided = {name for name, layer in layers.items() if isinstance(layer, nn.Conv2d) and layer.stride == (2, 2)}
    assert strided == {"stem"} | {f"stage{stage}.0.{layer}" for stage in (2, 3, 4) for layer in ("conv2", "shortcut")}


def test_resnet200_by_hand(resnet200):
    """The network again, as one function over its state dict."""
    images, state, f = torch.randn(2, 3, 64, 64, dtype=torch.double), resnet200.state_dict(), nn.functional

    def activation(x, name):
        values = (state[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias"))
        return f.relu(f.batch_norm(x, *values))

    x = activation(f.conv2d(images, state["stem.weight"], stride=2, padding=3), "norm")
    x = f.max_pool2d(x, kernel_size=3, stride=2, padding=1)
    for stage, blocks in enumerate((3, 24, 36, 3), start=1):
        for block in range(blocks):
            p, stride = f"stage{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            h = x if (stage, block) == (1, 0) else activation(x, f"{p}.norm1")
            if block == 0:
                x = f.conv2d(h, state[f"{p}.shortcut.weight"], stride=stride)
            h = activation(f.conv2d(h, state[f"{p}.conv1.weight"]), f"{p}.norm2")
            h = activation(f.conv2d(h, state[f"{p}.conv2.weight"], stride=stride, padding=1), f"{p}.norm3")
            x = x + f.conv2d(h, state[f"{p}.conv3.weight"])
    x = activation(x, "last_norm").mean((2, 3))
    expected = f.linear(x, state["classifier.weight"], state["classifier.bias"])
    torch.testing.assert_close(resnet200(images), expected)
    assert "stage1.0.norm1.weight" not in state


def test_groups_of_resnet200():
    """Everything shares but the reductions of the first blocks; the first shortcut has the shape of an expansion."""
    model = models.resnet200(2, 7)
    share_(model, 4)
    layers = sorted(bank.num_layers for bank in banks(model).values())
    reductions, inner, expansions = [2, 23, 35, 2], [3, 24, 36, 3], [3 + 1, 24, 36, 3]
    assert layers == sorted(reductions + inner + expansions)


def test_initialisation_of_resnet200_as_in_its_source():
    model = models.resnet200(32, 7)
    expected = {"stem": 32 * 49, "stage4.2.conv2": 256 * 9, "stage2.0.shortcut": 256, "stage3.5.conv1": 128}
    for name, outputs in expected.items():
        assert model.get_submodule(name).weight.var().item() == pytest.approx(2 / outputs, rel=0.1)
    assert (model.classifier.bias == 0).all()


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: models.wrn50(0), ValueError, "width.*0"),
        (lambda: models.swrn50(2, 0), ValueError, "templates.*0"),
        (lambda: models.wrn50(2, 0), ValueError, "num_classes.*0"),
        (lambda: models.wrn50(2.0), TypeError, "width"),
        (lambda: models.swrn50(num_classes=-1), ValueError, "num_classes.*-1"),
        (lambda: models.resnet200(0), ValueError, "width.*0"),
        (lambda: models.resnet200(64, 0), ValueError, "num_classes.*0"),
        (lambda: models.resnet200(64.0), TypeError, "width.*64.0"),
        (lambda: models.resnet200(64, "10"), TypeError, "num_classes.*'10'"),
        (lambda: models.build("ResNet-50"), ValueError, "only for ResNet-200, got 'ResNet-50'"),
        (lambda: models.build("ResNet-101 width 8"), ValueError, "only for ResNet-200, got 'ResNet-101 width 8'"),
    ],
)
def test_bad_sizes(call, error, says):
    with torch.device("meta"), pytest.raises(error, match=says):
        call()
