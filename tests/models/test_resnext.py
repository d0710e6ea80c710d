"""ResNeXt."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from softshare import banks, models, share_
from softshare.models.bottleneck import Bottleneck


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("classes", "expected", "multiply_adds"), [
    (10, 68_155_210, 10_688_866_304),  # the paper rounds both to 68.1 M parameters
    (100, 68_247_460, 10_688_958_464),
])  # fmt: skip
def test_counts(classes, expected, multiply_adds):
    with torch.device("meta"):
        model = models.build("ResNeXt-29 16x64", classes).eval()
        with FlopCounterMode(display=False) as counter:
            assert model(torch.empty(1, 3, 32, 32)).shape == (1, classes)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert parameters(model) == expected and counter.get_total_flops() == 2 * multiply_adds


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.integers(1, 20))
def test_parameters_by_closed_form(n, cardinality, width, classes):
    total, before = 3 * 9 * 64 + 2 * 64, 64
    for stage in range(3):
        inner, after = cardinality * width * 2**stage, 256 * 2**stage
        total += before * after + 2 * after  # the shortcut
        for block in range(n):
            total += (after if block else before) * inner + 9 * inner * inner // cardinality + inner * after
            total += 2 * (inner + inner + after)
        before = after
    with torch.device("meta"):
        model = models.resnext(9 * n + 2, cardinality, width, classes)
    assert parameters(model) == total + 1024 * classes + classes


def test_shapes_at_every_stage():
    model, seen = models.resnext(20, 2, 2, 7), {}
    for name in ("stem", "stage1", "stage2", "stage3", "classifier"):
        model.get_submodule(name).register_forward_hook(lambda m, i, x, name=name: seen.update({name: tuple(x.shape)}))
    model(torch.randn(2, 3, 16, 16))
    assert seen == {
        "stem": (2, 64, 16, 16),
        "stage1": (2, 256, 16, 16),
        "stage2": (2, 512, 8, 8),
        "stage3": (2, 1024, 4, 4),
        "classifier": (2, 7),
    }
    strided = {name for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.stride == (2, 2)}
    assert strided == {f"stage{stage}.0.{layer}" for stage in (2, 3) for layer in ("conv2", "shortcut.0")}
    grouped = {name: m.groups for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.groups > 1}
    assert grouped == {f"stage{stage}.{block}.conv2": 2 for stage in (1, 2, 3) for block in (0, 1)}


def with_statistics(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 1.5)
            module.running_mean.normal_()
            nn.init.normal_(module.bias)
    return model.double().eval()


def test_a_block_with_each_group_on_its_own():
    """The paper's form: every group is a path of its own, and the paths' results are added up."""
    block, f, width = with_statistics(Bottleneck(6, 12, 8, 2, project=True, groups=4)), nn.functional, 3
    x = torch.randn(2, 6, 5, 5, dtype=torch.double)

    def norm(x, layer, part=slice(None)):
        values = (getattr(layer, key)[part] for key in ("running_mean", "running_var", "weight", "bias"))
        return f.batch_norm(x, *values)

    total = torch.zeros(2, 8, 3, 3, dtype=torch.double)
    for group in range(4):
        part = slice(width * group, width * (group + 1))
        h = f.relu(norm(f.conv2d(x, block.conv1.weight[part]), block.norm1, part))
        h = f.relu(norm(f.conv2d(h, block.conv2.weight[part], stride=2, padding=1), block.norm2, part))
        total += f.conv2d(h, block.conv3.weight[:, part])
    shortcut = norm(f.conv2d(x, block.shortcut[0].weight, stride=2), block.shortcut[1])
    torch.testing.assert_close(block(x), f.relu(norm(total, block.norm3) + shortcut))


def test_the_network_by_hand():
    model, f = with_statistics(models.resnext(20, 2, 3, 7)), nn.functional
    images, state = torch.randn(2, 3, 8, 8, dtype=torch.double), model.state_dict()

    def norm(x, name):
        values = (state[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias"))
        return f.batch_norm(x, *values)

    x = f.relu(norm(f.conv2d(images, state["stem.weight"], padding=1), "norm"))
    for stage in (1, 2, 3):
        for block in (0, 1):
            p, stride = f"stage{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            h = f.relu(norm(f.conv2d(x, state[f"{p}.conv1.weight"]), f"{p}.norm1"))
            weight = state[f"{p}.conv2.weight"]
            h = f.relu(norm(f.conv2d(h, weight, stride=stride, padding=1, groups=2), f"{p}.norm2"))
            h = norm(f.conv2d(h, state[f"{p}.conv3.weight"]), f"{p}.norm3")
            if block == 0:
                x = norm(f.conv2d(x, state[f"{p}.shortcut.0.weight"], stride=stride), f"{p}.shortcut.1")
            x = f.relu(x + h)
    expected = f.linear(x.mean((2, 3)), state["classifier.weight"], state["classifier.bias"])
    torch.testing.assert_close(model(images), expected)


def test_initialisation_as_in_the_authors_code():
    model = models.resnext(11, 16, 8)
    for name, outputs in {
        "stem": 64 * 9,
        "stage1.0.conv1": 128,
        "stage3.0.conv2": 512 * 9,
        "stage3.0.conv3": 1024,
    }.items():
        assert model.get_submodule(name).weight.var().item() == pytest.approx(2 / outputs, rel=0.1)
    assert (model.classifier.bias == 0).all()
    assert model.classifier.weight.abs().max() <= 1024**-0.5  # uniform, as Torch draws linear layers


def test_what_can_share():
    """One group for each layer of a block in each stage; the first block shares where shapes agree."""
    model = models.resnext(29, 2, 3)
    share_(model, 2)
    layers = {bank.num_layers for bank in banks(model).values()}
    assert len(banks(model)) == 9 and layers == {2, 3}


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: models.resnext(30), ValueError, r"9n \+ 2.*30"),
        (lambda: models.resnext(2), ValueError, r"9n \+ 2.*got 2"),
        (lambda: models.resnext(-7), ValueError, "depth.*-7"),
        (lambda: models.resnext(29, 0), ValueError, "cardinality.*0"),
        (lambda: models.resnext(29, 16, -4), ValueError, "width.*-4"),
        (lambda: models.resnext(29, 16, 64, 0), ValueError, "num_classes.*0"),
        (lambda: models.resnext(29.0), TypeError, "depth.*29.0"),
        (lambda: models.resnext(29, "16"), TypeError, "cardinality.*'16'"),
        (lambda: models.resnext(29, 16, 4.5), TypeError, "width.*4.5"),
        (lambda: models.resnext(29, 16, 64, True), TypeError, "num_classes.*True"),
        (lambda: models.build("ResNeXt-50 32x4"), ValueError, r"9n \+ 2.*50"),
    ],
)
def test_bad_sizes(call, error, says):
    with torch.device("meta"), pytest.raises(error, match=says):
        call()
