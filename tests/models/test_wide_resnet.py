"""WRN and SWRN."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from softshare import banks, models, share_, unshare


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def closed_form(depth, width, templates, classes):
    """Parameters of SWRN counted by hand; templates None: WRN."""
    n, total, before = (depth - 4) // 6, 3 * 16 * 9, 16
    for c in (16 * width, 32 * width, 64 * width):
        total += 9 * before * c + 9 * c * c + (before * c if before != c else 0) + 2 * before + 2 * c
        layers = 2 * (n - 1)
        weights = layers * 9 * c * c if templates is None else min(templates, layers) * (layers + 9 * c * c)
        total, before = total + weights + layers * 2 * c, c
    return total + 2 * before + before * classes + classes


@given(st.integers(2, 5), st.integers(1, 3), st.integers(1, 9) | st.none(), st.integers(1, 20))
def test_parameters_by_closed_form(n, width, templates, classes):
    with torch.device("meta"):
        shared = models.swrn(6 * n + 4, width, templates, classes)
        plain = models.wrn(6 * n + 4, width, classes)
    assert parameters(shared) == closed_form(6 * n + 4, width, templates or 99, classes)
    assert parameters(plain) == closed_form(6 * n + 4, width, None, classes)


def test_layers_and_templates_of_a_group():
    for depth, layers in ((16, 2), (28, 6), (40, 10)):
        for k in (None, 1, 2, 50):
            with torch.device("meta"):
                found = banks(models.swrn(depth, 1, k))
            assert list(found) == ["stage1", "stage2", "stage3"]
            assert [bank.num_layers for bank in found.values()] == [layers] * 3
            assert [bank.num_templates for bank in found.values()] == [min(k or layers, layers)] * 3


@pytest.mark.parametrize("make", [lambda: models.wrn(10, 1, 7), lambda: models.swrn(16, 2, 2, 7)])
def test_images_to_logits(make):
    model = make()
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    assert isinstance(next(m for m in model.modules() if isinstance(m, nn.Conv2d)), nn.Conv2d)
    with torch.device("meta"):
        model = make()
        assert model(torch.empty(2, 3, 32, 32)).shape == (2, 7)


def test_a_wide_resnet_by_hand():
    """The network again, written as one function over the state dict of a WRN."""
    model = models.wrn(16, 2).eval().double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 1.5)
            module.running_mean.normal_()
    state, f = model.state_dict(), nn.functional

    def norm(x, name):
        values = (state[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias"))
        return f.relu(f.batch_norm(x, *values))

    images = torch.randn(2, 3, 16, 16, dtype=torch.double)
    x = f.conv2d(images, state["stem.weight"], padding=1)
    for stage in (1, 2, 3):
        for block in (0, 1):
            p, stride = f"stage{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            h = norm(x, f"{p}.norm1")
            if f"{p}.shortcut.weight" in state:
                x = f.conv2d(h, state[f"{p}.shortcut.weight"], stride=stride)
            h = norm(f.conv2d(h, state[f"{p}.conv1.weight"], stride=stride, padding=1), f"{p}.norm2")
            x = x + f.conv2d(h, state[f"{p}.conv2.weight"], padding=1)
    expected = f.linear(norm(x, "norm").mean((2, 3)), state["classifier.weight"], state["classifier.bias"])
    torch.testing.assert_close(model(images), expected)


def test_layers_stay_convolutions_and_the_stem_is_the_first():
    model = models.swrn(28, 1, 2)
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) == 25 + 2  # at width 1 the first stage has no shortcut
    assert convolutions[0].in_channels == 3 and convolutions[0].weight.is_leaf
    assert all(conv.bias is None for conv in convolutions)
    assert all(conv.weight.shape == (conv.out_channels, conv.in_channels, *conv.kernel_size) for conv in convolutions)


def test_what_is_not_shared():
    model = models.swrn(28, 2, 2)
    plain = {name for name, p in model.named_parameters() if name.endswith("weight") and p.dim() > 1}
    first = {f"stage{s}.0.{layer}.weight" for s in (1, 2, 3) for layer in ("conv1", "conv2", "shortcut")}
    assert plain == first | {"stem.weight", "classifier.weight"}


def test_unshared_parts_have_the_names_of_wrn(tmp_path):
    shared, plain = models.swrn(28, 1, 2), models.wrn(28, 1)
    mine, theirs = shared.state_dict(), plain.state_dict()
    own = {key for key in mine if key.endswith(("templates", "coefficients"))}
    assert len(own) == 6 and set(mine) - own < set(theirs)
    missing = set(theirs) - set(mine)
    assert missing == {f"stage{s}.{b}.conv{c}.weight" for s in (1, 2, 3) for b in (1, 2, 3) for c in (1, 2)}
    save_file(mine, tmp_path / "m.safetensors")
    other = models.swrn(28, 1, 2)
    other.load_state_dict(load_file(tmp_path / "m.safetensors"), strict=True)
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(other.eval()(x), shared.eval()(x), rtol=0, atol=0)


@pytest.mark.parametrize("templates", [None, 1, 3])
def test_unshared_swrn_loads_strictly_into_wrn(templates):
    shared, plain = models.swrn(22, 2, templates).eval(), models.wrn(22, 2).eval()
    unshared = unshare(shared)
    assert list(unshared.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(unshared.state_dict(), strict=True)
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(plain(x), shared(x))


def test_swrn_keeps_the_authors_initialisation():
    model = models.swrn(28, 4, 4)
    for bank in banks(model).values():
        fan_in = bank.weight_shape[1] * 9
        assert bank.templates.var().item() == pytest.approx(2 / fan_in, rel=0.1)
        gram = bank.coefficients.T @ bank.coefficients
        torch.testing.assert_close(gram, torch.eye(4), atol=1e-5, rtol=0)
    assert model.stem.weight.var().item() == pytest.approx(2 / 27, rel=0.3)
    assert (model.classifier.bias == 0).all()


def test_sharing_a_wrn_is_the_same_mechanism():
    """`share_` with the poster's groups gives the state dict of an SWRN."""
    model = models.wrn(28, 1)

    def stages(name, module):
        stage, block, *_ = [*name.split("."), "0"]
        return stage if stage.startswith("stage") and block != "0" else None

    share_(model, 2, stages)
    other = models.swrn(28, 1, 2)
    other.load_state_dict(model.state_dict(), strict=True)
    x = torch.randn(1, 3, 8, 8)
    torch.testing.assert_close(other.eval()(x), model.eval()(x))


@pytest.mark.parametrize("make", [lambda p: models.wrn(16, 1, dropout=p), lambda p: models.swrn(16, 1, 1, dropout=p)])
def test_dropout_acts_while_training_between_the_convolutions(make):
    model, x, seen = make(0.5), torch.randn(4, 3, 8, 8), []
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda m, args, out: seen.append((m, (args[0] == 0).float().mean().item())))
    a, b = model(x), model(x)
    assert not torch.equal(a, b)
    for name, block in model.named_modules():
        if hasattr(block, "conv2"):
            first = next(zeros for module, zeros in seen if module is block.conv1)
            second = next(zeros for module, zeros in seen if module is block.conv2)
            assert first < 0.6 < second, name  # a ReLU leaves half, dropout half of that
    model.eval()
    assert torch.equal(model(x), model(x))
    assert not any(isinstance(m, nn.Dropout) and m.p for m in make(0.0).modules())


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: models.wrn(30, 1), ValueError, r"6n \+ 4.*30"),
        (lambda: models.wrn(4, 1), ValueError, r"6n \+ 4.*4"),
        (lambda: models.swrn(29, 1), ValueError, r"6n \+ 4.*29"),
        (lambda: models.swrn(10, 1), ValueError, "at least 16.*10"),
        (lambda: models.swrn(16, 1, 0), ValueError, "templates.*0"),
        (lambda: models.swrn(16, 1, -2), ValueError, "templates.*-2"),
        (lambda: models.swrn(16, 0), ValueError, "width.*0"),
        (lambda: models.wrn(16, 1, 0), ValueError, "num_classes.*0"),
        (lambda: models.wrn(16, 1, dropout=1.0), ValueError, "dropout.*1.0"),
        (lambda: models.wrn(16, 1, dropout=-0.1), ValueError, "dropout.*-0.1"),
        (lambda: models.wrn(16.0, 1), TypeError, "depth"),
        (lambda: models.swrn(16, 1, 2.0), TypeError, "templates"),
        (lambda: models.wrn(16, "2"), TypeError, "width"),
        (lambda: models.wrn(16, 1, dropout="0.3"), TypeError, "dropout"),
    ],
)
def test_bad_sizes(call, error, says):
    with pytest.raises(error, match=says):
        call()
