"""DenseNets: plain, compressed, and for ImageNet."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from softshare import banks, models, share_
from softshare.models.densenet import DenseLayer, Transition


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "classes", "side", "expected", "multiply_adds"),
    [
        ("DenseNet 100-24", 10, 32, 27_249_082, 6_889_347_744),
        ("DenseNet 100-24", 100, 32, 27_457_972, 6_889_556_544),
        ("DenseNet 190-40", 10, 32, 25_624_430, 9_301_945_740),
        ("DenseNet 190-40", 100, 32, 25_821_620, 9_302_142_840),
        ("DenseNet-264", 1000, 224, 33_337_704, 5_751_653_376),
    ],
)
def test_counts(name, classes, side, expected, multiply_adds):
    with torch.device("meta"):
        model = models.build(name, classes).eval()
        with FlopCounterMode(display=False) as counter:
            assert model(torch.empty(1, 3, side, side)).shape == (1, classes)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert parameters(model) == expected and counter.get_total_flops() == 2 * multiply_adds


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("DenseNet 40-12", "1.0"),
        ("DenseNet 100-12", "7.0"),
        ("DenseNet 100-24", "27.2"),
        ("DenseNet-BC 100-12", "0.8"),
        ("DenseNet-BC 250-24", "15.3"),
        ("DenseNet-BC 190-40", "25.6"),
        ("DenseNet-BC 40-36", "1.5"),
        ("DenseNet-BC 40-48", "2.7"),
        ("DenseNet-BC 40-60", "4.3"),
    ],
)
def test_counts_that_the_authors_published(name, millions):
    """Those of liuzhuang13/DenseNet@README.md."""
    assert f"{models.parameters(name) / 1e6:.1f}" == millions


@given(st.integers(1, 5), st.integers(1, 9), st.booleans(), st.integers(1, 20))
def test_parameters_by_closed_form(n, growth, compressed, classes):
    channels = 2 * growth if compressed else 16
    total = 27 * channels
    for stage in range(3):
        if stage:
            after = channels // 2 if compressed else channels
            total, channels = total + 2 * channels + channels * after, after
        for _ in range(n):
            inner = 4 * growth if compressed else channels
            total += 2 * inner + 9 * inner * growth + (2 * channels + channels * inner) * compressed
            channels += growth
    with torch.device("meta"):
        model = models.densenet((6 if compressed else 3) * n + 4, growth, classes, compressed)
    assert parameters(model) == total + 2 * channels + channels * classes + classes


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (
            lambda: models.densenet(10, 5, 7),
            {"stem": (16, 64), "stage1": (26, 64), "stage2": (36, 32), "stage3": (46, 16)},
        ),
        (
            lambda: models.densenet(16, 5, 7, compressed=True),
            {"stem": (10, 64), "stage1": (20, 64), "stage2": (20, 32), "stage3": (20, 16)},
        ),
        (
            lambda: models.densenet264(1, 7),
            {"stem": (2, 16), "stage1": (8, 16), "stage2": (16, 8), "stage3": (72, 4), "stage4": (84, 2)},
        ),
    ],
    ids=["plain", "compressed", "ImageNet"],
)
def test_shapes_at_every_stage(make, expected):
    """(channels, side) behind each stage; a transition begins each stage but the first."""
    model, seen = make(), {}
    for name in expected:
        model.get_submodule(name).register_forward_hook(lambda m, i, x, name=name: seen.update({name: tuple(x.shape)}))
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 7)
    assert seen == {name: (2, channels, side, side) for name, (channels, side) in expected.items()}
    moved = {name for name, module in model.named_modules() if isinstance(module, Transition)}
    assert moved == {f"{name}.0" for name in expected} - {"stem.0", "stage1.0"}
    strided = {name for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.stride != (1, 1)}
    assert strided == ({"stem.0"} if "stage4" in expected else set())


def with_statistics(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 1.5)
            module.running_mean.normal_()
            nn.init.normal_(module.bias)
    return model.double().eval()


@pytest.mark.parametrize("bottleneck", [False, True])
def test_a_layer_appends_to_its_input(bottleneck):
    layer, x = DenseLayer(6, 4, bottleneck), torch.randn(2, 6, 5, 5)
    out = layer(x)
    assert out.shape == (2, 10, 5, 5) and torch.equal(out[:, :6], x)


@pytest.mark.parametrize(
    "make",
    [lambda: models.densenet(13, 3, 7), lambda: models.densenet(22, 3, 7, True), lambda: models.densenet264(1, 7)],
    ids=["plain", "compressed", "ImageNet"],
)
def test_the_network_by_hand(make):
    """As the paper describes it: each layer takes the results of all layers before it in its dense block."""
    model, f = with_statistics(make()), nn.functional
    images, state = torch.randn(2, 3, 32, 32, dtype=torch.double), model.state_dict()
    blocks = (6, 12, 64, 48) if "stem.1.weight" in state else (3, 3, 3)

    def activation(x, name):
        values = (state[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias"))
        return f.relu(f.batch_norm(x, *values))

    if "stem.weight" in state:
        x = f.conv2d(images, state["stem.weight"], padding=1)
    else:
        x = activation(f.conv2d(images, state["stem.0.weight"], stride=2, padding=3), "stem.1")
        x = f.max_pool2d(x, kernel_size=3, stride=2, padding=1)
    for stage, layers in enumerate(blocks, start=1):
        p = f"stage{stage}"
        if stage > 1:
            x = f.avg_pool2d(f.conv2d(activation(x, f"{p}.0.norm"), state[f"{p}.0.conv.weight"]), 2)
        results = [x]
        for place in range(layers):
            q = f"{p}.{place + (stage > 1)}"
            h = torch.cat(results, dim=1)
            if f"{q}.reduction.0.weight" in state:
                h = f.conv2d(activation(h, f"{q}.reduction.0"), state[f"{q}.reduction.2.weight"])
            results.append(f.conv2d(activation(h, f"{q}.norm"), state[f"{q}.conv.weight"], padding=1))
        x = torch.cat(results, dim=1)
    x = activation(x, "norm").mean((2, 3))
    torch.testing.assert_close(model(images), f.linear(x, state["classifier.weight"], state["classifier.bias"]))


def test_initialisation_as_in_the_authors_code():
    model = models.densenet(16, 48, compressed=True)
    expected = {"stem": 96 * 9, "stage1.0.reduction.2": 192, "stage3.1.conv": 48 * 9, "stage2.0.conv": 96}
    for name, outputs in expected.items():
        assert model.get_submodule(name).weight.var().item() == pytest.approx(2 / outputs, rel=0.1)
    assert (model.classifier.bias == 0).all()


def test_what_can_share():
    """In the compressed networks the 3x3 convolutions of all stages are one group; the plain ones have nothing to share."""
    model = models.densenet(22, 4, compressed=True)
    share_(model, 2)
    assert max(bank.num_layers for bank in banks(model).values()) == 9
    with pytest.raises(ValueError, match="nothing to share"):
        share_(models.densenet(22, 4), 2)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: models.densenet(99, 24), ValueError, r"DenseNet depth.*3n \+ 4.*99"),
        (lambda: models.densenet(4, 24), ValueError, r"3n \+ 4.*got 4"),
        (lambda: models.densenet(103, 24, compressed=True), ValueError, r"DenseNet-BC depth.*6n \+ 4.*103"),
        (lambda: models.densenet(7, 24, compressed=True), ValueError, r"6n \+ 4.*got 7"),
        (lambda: models.densenet(100, 0), ValueError, "growth.*0"),
        (lambda: models.densenet(100, 24, 0), ValueError, "num_classes.*0"),
        (lambda: models.densenet(100.0, 24), TypeError, "depth.*100.0"),
        (lambda: models.densenet(100, "24"), TypeError, "growth.*'24'"),
        (lambda: models.densenet(100, 24, True), TypeError, "num_classes.*True"),
        (lambda: models.densenet264(-1), ValueError, "growth.*-1"),
        (lambda: models.densenet264(32, 0), ValueError, "num_classes.*0"),
        (lambda: models.densenet264(1.5), TypeError, "growth.*1.5"),
        (lambda: models.build("DenseNet-BC 103-24"), ValueError, r"6n \+ 4.*103"),
    ],
)
def test_bad_sizes(call, error, says):
    with torch.device("meta"), pytest.raises(error, match=says):
        call()
