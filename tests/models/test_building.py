"""From a name to the network that its family's function makes, also without allocating memory for it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from softshare import banks, models
from softshare.models import Network


def built(name, *arguments):
    with torch.device("meta"):
        return models.build(name, *arguments)


@pytest.mark.parametrize(
    ("name", "direct"),
    [
        ("WRN 16-2", lambda: models.wrn(16, 2)),
        ("SWRN 28-2", lambda: models.swrn(28, 2)),
        ("SWRN 28-2-3", lambda: models.swrn(28, 2, 3)),
        ("SWRN 28-2-3*", lambda: models.swrn(28, 2, 3, dropout=0.3)),
        ("WRN-28-2 *", lambda: models.wrn(28, 2, dropout=0.3)),
        ("WRN 50-2", lambda: models.wrn50(2)),
        ("SWRN 50-2", lambda: models.swrn50(2)),
        ("SWRN-50-2-3", lambda: models.swrn50(2, 3)),
        ("CNN", lambda: models.gridnet()),
        ("SCNN", lambda: models.gridnet(templates=20)),
        ("SCNN-5", lambda: models.gridnet(templates=5)),
        ("CNN width 12", lambda: models.gridnet(20, 12)),
        ("SCNN-8 100 layers width 4", lambda: models.gridnet(100, 4, 8)),
        ("ResNeXt-29 16x64", lambda: models.resnext()),
        ("ResNeXt-20 8x4", lambda: models.resnext(20, 8, 4)),
        ("DenseNet 100-24", lambda: models.densenet(100, 24)),
        ("DenseNet 190-40", lambda: models.densenet(190, 40, compressed=True)),
        ("DenseNet-BC 100-12", lambda: models.densenet(100, 12, compressed=True)),
        ("DenseNet-264", lambda: models.densenet264()),
        ("DenseNet-264 width 4", lambda: models.densenet264(4)),
        ("ResNet-200", lambda: models.resnet200()),
        ("ResNet-200 width 8", lambda: models.resnet200(8)),
    ],
)
def test_a_name_builds_what_its_function_makes(name, direct):
    with torch.device("meta"):
        expected = direct()
    for given in (name, Network.parse(name)):
        found = built(given)
        assert repr(found) == repr(expected) and all(parameter.is_meta for parameter in found.parameters())
        shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (found, expected)]
        assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("name", "layers", "templates"),
    [("SCNN", 20, 20), ("SCNN-5", 20, 5), ("SCNN 100 layers", 100, 100), ("SCNN-8 100 layers", 100, 8)],
)
def test_layers_and_templates_of_the_grid_networks(name, layers, templates):
    model = built(name)
    (bank,) = banks(model).values()
    assert len(model.layers) == bank.num_layers == layers and bank.num_templates == templates


def test_classes():
    assert built("WRN 16-1", 100).classifier.out_features == 100
    assert built("WRN 16-1").classifier.out_features == 10
    assert built("WRN 50-2").classifier.out_features == 1000
    assert built("SWRN 50-2-1", 10).classifier.out_features == 10
    for name in ("ResNeXt-29 16x64", "DenseNet 100-24", "DenseNet 190-40", "DenseNet-264", "ResNet-200"):
        assert built(name, 100).classifier.out_features == 100
        assert built(name).classifier.out_features == (1000 if Network.parse(name).imagenet else 10)


def test_the_star_is_dropout():
    assert {m.p for m in built("WRN 28-10*").modules() if isinstance(m, nn.Dropout)} == {0.3}
    assert not any(m.p for m in built("WRN 28-10").modules() if isinstance(m, nn.Dropout))


@pytest.mark.parametrize(
    "name",
    ["WRN 28-10", "SWRN 28-10-2*", "WRN 50-2", "SWRN 50-2", "CNN", "SCNN-5"]
    + ["ResNeXt-29 16x64", "DenseNet 100-24", "DenseNet 190-40", "DenseNet-264", "ResNet-200"],
)
def test_narrow_relatives_are_built(name):
    network = Network.parse(name).narrowed()
    model = models.build(network, 3).eval()
    inputs = torch.rand(2, 2 if network.grids else 3, 32, 32)
    assert model(inputs).shape == ((2, 32, 32) if network.grids else (2, 3))
    assert list(banks(model)) == list(banks(built(name)))


def test_a_family_without_a_model_is_reported():
    for call in (models.build, models.parameters, models.multiply_adds):
        with pytest.raises(ValueError, match="no model of family 'VGG' is known; known: CNN, WRN, ResNeXt"):
            call(Network("VGG", 16, 64))


@pytest.mark.parametrize("name", ["", "WRN", "SWRN 28", "wrn-28-10-2-2", "SWRN 28-x"])
def test_an_unknown_model_lists_the_known_ones(name):
    with pytest.raises(ValueError, match=r"unknown model.*WRN L-w.*SWRN L-w-k.*SCNN"):
        models.build(name)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        (("WRN 30-2",), ValueError, "30"),
        (("SWRN 10-2",), ValueError, "at least 16.*10"),
        (("SWRN 28-10-0",), ValueError, "at least 1.*SWRN 28-10-0"),
        (("SWRN 50-2-0",), ValueError, "at least 1.*SWRN 50-2-0"),
        (("SCNN-0",), ValueError, "at least 1.*SCNN-0"),
        (("WRN 50-0",), ValueError, "at least 1.*WRN 50-0"),
        (("SCNN 1 layers",), ValueError, "at least 2 layers"),
        (("SCNN-100",), ValueError, "SCNN 100 layers"),
        (("WRN 28-10-2",), ValueError, "did you mean 'SWRN 28-10-2'"),
        (("WRN 50-2-3",), ValueError, "did you mean 'SWRN 50-2-3'"),
        (("CNN-5",), ValueError, "did you mean 'SCNN-5'"),
        (("WRN 50-2*",), ValueError, "no dropout"),
        ((28,), TypeError, "name"),
        (("WRN 16-1", 0), ValueError, "num_classes.*0"),
        (("WRN 50-2", 0), ValueError, "num_classes.*0"),
        (("WRN 16-1", 2.0), TypeError, "num_classes"),
    ],
)
def test_bad_names_and_sizes(arguments, error, says):
    with pytest.raises(error, match=says):
        built(*arguments)
