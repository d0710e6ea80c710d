"""The searched networks: counts of the whole and of the parts, shapes, training details, and what sharing makes of them."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import softshare
from softshare import models
from softshare.models import cell_network, cells, multiply_adds, parameters
from softshare.models.cells import DropPath
from softshare.models.searched import set_progress

FAMILIES = ("NASNet-A", "AmoebaNet-B", "DARTS", "SNAS", "ENAS")

# Name, options, parameters, with the auxiliary head, multiply-adds; counted by independent implementations.
COUNTS = [
    ("NASNet-A", {}, 3_346_538, 4_978_036, 544_333_312),
    ("NASNet-A 27.6M", {}, 27_844_906, 29_574_708, 4_464_155_136),
    ("NASNet-A 27.6M", {"cell": "NASNet-A"}, 28_213_546, 29_943_348, 4_501_903_872),
    ("NASNet-A 27.6M", {"cell": "NASNet-A", "repeats": 7}, 32_590_954, 34_320_756, 5_151_250_944),
    ("AmoebaNet-B", {}, 2_839_186, 4_458_396, 454_925_952),
    ("AmoebaNet-B 13.7M", {}, 13_716_250, 15_380_516, 2_195_468_800),
    ("AmoebaNet-B 34.9M", {}, 34_874_506, 36_587_924, 5_580_279_808),
    ("DARTS", {}, 3_349_342, 3_825_768, 528_359_040),
    ("DARTS", {"cell": "DARTS V1"}, 3_169_414, 3_645_840, 500_987_520),
    ("SNAS", {}, 2_848_222, 3_324_648, 440_687_232),
    ("ENAS", {}, 4_587_372, 5_082_220, 727_702_560),
    ("ENAS", {"repeats": 5}, 3_894_372, 4_389_220, 620_907_552),
]

# Stem, the cells in order, classifier.
PARTS = {
    "NASNet-A": (2_784, [40_384, 25_152, *[28_224] * 4, 87_168, 81_024, 93_312, *[101_504] * 4, 305_408, 301_312, 350_464,
                         *[383_232] * 4], 7_690),
    "NASNet-A 27.6M": (8_352, [311_616, 192_192, *[219_840] * 4, 654_720, 624_000, 734_592, *[845_184] * 4, 2_489_088,
                               2_427_648, 2_870_016, *[3_312_384] * 4], 23_050),
    "AmoebaNet-B": (3_132, [33_264, 21_456, *[22_752] * 4, 58_284, 66_240, 76_608, *[86_976] * 4, 220_896, 256_896, 298_368,
                            *[339_840] * 4], 5_770),
    "AmoebaNet-B 13.7M": (6_960, [158_400, 100_480, *[106_880] * 4, 271_200, 316_160, 367_360, *[418_560] * 4, 1_057_600,
                                  1_246_720, 1_451_520, *[1_656_320] * 4], 12_810),
    "AmoebaNet-B 34.9M": (11_136, [400_896, 252_928, *[269_312] * 4, 681_216, 800_768, 931_840, *[1_062_912] * 4, 2_681_344,
                                   3_174_400, 3_698_688, *[4_222_976] * 4], 20_490),
    "DARTS": (3_132, [26_532, 27_828, *[29_124] * 4, 21_024, 97_128, *[107_496] * 5, 83_520, 370_512, *[411_984] * 5],
    5_770), "SNAS": (3_132, [19_224, 20_520, *[21_816] * 4, 99_720, 69_552, *[79_920] * 5, 354_960, 263_520, *[304_992]
    * 5], 5_770), "ENAS": (3_132, [34_200, 36_792, *[39_384] * 4, 115_488, 120_240, 133_200, *[138_384] * 4, 427_968,
                     442_656, 494_496, *[515_232] * 4], 7_200),
}  # fmt: skip


def size(module):
    return sum(parameter.numel() for parameter in module.parameters())


def small(family, **options):
    torch.manual_seed(0)
    return cell_network(family, 4, repeats=1, **options)


@pytest.mark.parametrize(("name", "options", "alone", "with_head", "operations"), COUNTS)
def test_counts_to_the_last_digit(name, options, alone, with_head, operations):
    with torch.device("meta"):
        model = models.build(name, auxiliary=True, **options)
    assert size(model) == with_head and size(model) - size(model.auxiliary) == alone
    assert multiply_adds(name, **options) == operations


def test_an_auxiliary_head_counts_only_if_asked_for_and_never_as_work():
    assert parameters("DARTS") == 3_349_342 and parameters("DARTS", auxiliary=True) == 3_825_768
    assert multiply_adds("DARTS", auxiliary=True) == 528_359_040


@pytest.mark.parametrize("name", PARTS)
def test_counts_part_by_part(name):
    with torch.device("meta"):
        model = models.build(name)
    stem, each, classifier = PARTS[name]
    assert (size(model.stem), [size(cell) for cell in model.cells], size(model.classifier)) == (stem, each, classifier)


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_at_every_cell_and_gradients_everywhere(family):
    model = small(family, auxiliary=True)
    shapes = []
    for cell in model.cells:
        cell.register_forward_hook(lambda _, __, out: shapes.append(tuple(out.shape)))
    outputs = model(torch.randn(2, 3, 32, 32))
    parts = [len(cell.cell.output) for cell in model.cells]
    sides, widths = (32, 16, 16, 8, 8), (4, 8, 8, 16, 16)
    assert shapes == [(2, n * width, side, side) for n, width, side in zip(parts, widths, sides, strict=True)]
    assert outputs.shape == (2, 2, 10)
    outputs.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert model.eval()(torch.randn(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_network_saves_and_loads_strictly(family, tmp_path):
    first, second = (
        small(family, auxiliary=True, drop_path=0.2).eval(),
        small(family, auxiliary=True, drop_path=0.2).eval(),
    )
    for parameter in first.parameters():
        nn.init.normal_(parameter, 0.0, 0.1)
    save_file(first.state_dict(), tmp_path / "x.safetensors")
    second.load_state_dict(load_file(tmp_path / "x.safetensors"))
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(first(x), second(x))


@pytest.mark.parametrize("family", FAMILIES)
def test_autocast_channels_last_and_tracing(family):
    model = small(family).eval()
    x = torch.randn(2, 3, 32, 32)
    expected = model(x)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), expected)
    model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x.contiguous(memory_format=torch.channels_last)), expected, atol=1e-4, rtol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(x)
    assert found.dtype is torch.float32 and (found - expected).abs().max() < 0.2 * expected.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_sharing_and_folding_work(family):
    """Nobody has shown what sharing does to searched cells; here is that it can be done, and that ties fold."""
    model = cell_network(family, 4, repeats=2).eval()
    before = size(model)
    shared = softshare.share_(model, templates=2)
    assert shared and size(model) < before
    x = torch.randn(1, 3, 16, 16)
    expected = model(x)
    assert expected.shape == (1, 10)
    with torch.no_grad():
        for bank in shared.values():
            bank.coefficients[1:] = bank.coefficients[0] * torch.linspace(-2, 3, len(bank.coefficients) - 1)[:, None]
    expected = model(x)
    plan = softshare.plan_fold(model, 1.0)
    folded = softshare.fold(model, plan)
    assert plan.distinct_layers < plan.total_layers and size(folded) < size(model)
    torch.testing.assert_close(folded(x), expected, atol=1e-4, rtol=1e-3)


def test_drop_path_grows_with_training_and_in_some_sources_with_depth():
    growing = [0.04, 0.08, 0.12, 0.16, 0.2]
    for family, expected in (
        ("DARTS", [0.2] * 5),
        ("AmoebaNet-B", [0.2] * 5),
        ("NASNet-A", growing),
        ("ENAS", growing),
    ):
        model = small(family, drop_path=0.2)
        drops = [module for module in model.modules() if isinstance(module, DropPath)]
        assert [drop.probability for drop in drops] == pytest.approx(expected)
        set_progress(model, 0.5)
        assert all(float(drop.progress) == 0.5 for drop in drops)
        x = torch.randn(8, 3, 16, 16)
        first, second = model(x), model(x)
        assert not torch.equal(first, second)
        assert torch.equal(model.eval()(x), model(x))
    with pytest.raises(ValueError, match="from 0 to 1, got 1.5"):
        set_progress(model, 1.5)


def test_identities_are_not_dropped_unless_they_have_a_stride_and_are_of_darts():
    """In DARTS, an identity at stride 2 is a factorized reduction like any other operation; ENAS spares it."""
    for family, name, spared in (("ENAS", None, True), ("DARTS", "DARTS V1", True)):
        model = small(family, cell=name, drop_path=0.9)
        for cell in model.cells:
            names = [name for block in cell.cell.blocks for name, _ in block]
            assert [name == "id" for name in names] == cell.kept or not spared
    assert ("id", 0) in [operation for block in small("ENAS").cells[1].cell.blocks for operation in block]
    strided = cells.read_cell({"blocks": [["id(0)", "sep3(1)"]], "output": [2]})
    for family, kept in (("DARTS", False), ("SNAS", False), ("ENAS", True), ("NASNet-A", True)):
        module = cells.CellModule(strided, (4, 4), 4, True, False, False, cells.CONVENTIONS[family])
        assert module.kept == [kept, False], family


@pytest.mark.parametrize("family", FAMILIES)
def test_the_auxiliary_head_is_that_of_the_source(family):
    """ENAS pads its last convolution and averages; in the others it reads all that is left."""
    model = small(family, auxiliary=True)
    head, side = model.auxiliary, {"NASNet-A": 16, "AmoebaNet-B": 16}.get(family, 8)
    x = torch.randn(3, model.cells[model.auxiliary_after].out_channels, side, side)
    shapes = []
    head.features[-2].register_forward_hook(lambda _, given, __: shapes.append(tuple(given[0].shape)))
    assert head(x).shape == (3, 10)
    left = 2 if family == "ENAS" else 1
    assert shapes == [(3, 768, left, left)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_single_image_trains_without_the_auxiliary_head(family):
    """As the last batch of an epoch may be; BatchNorm cannot normalise one number per channel."""
    model = small(family, auxiliary=True)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 10) and model(torch.randn(2, 3, 32, 32)).shape == (2, 2, 10)


def test_sides_that_cannot_be_halved_twice_are_named():
    with pytest.raises(ValueError, match="divisible by 4, since two cells halve them, got 32 x 30"):
        small("DARTS")(torch.randn(1, 3, 32, 30))


def test_convolutions_start_as_in_each_source():
    """The spread of a wide layer's weights shows which fan was taken, groups counted."""
    for family, expected in (("NASNet-A", (2 / (12 * 9)) ** 0.5), ("ENAS", (2 / 27) ** 0.5)):
        torch.manual_seed(0)
        stem = cell_network(family, 4, repeats=1).stem[0].weight
        assert float(stem.std()) == pytest.approx(expected, rel=0.2)
    depthwise = cell_network("NASNet-A", 64, repeats=1).cells[1].operations[0][1]
    depthwise = depthwise[1] if isinstance(depthwise, nn.Sequential) else depthwise
    assert depthwise.groups == depthwise.out_channels
    assert float(depthwise.weight.std()) == pytest.approx((2 / 25) ** 0.5, rel=0.1)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("PNAS", 32), {}, "unknown family 'PNAS'; known: NASNet-A"),
        (("DARTS", 32), {"cell": "DARTS V3"}, "unknown cell 'DARTS V3'; known: NASNet-A"),
        (("DARTS", 0), {}, "width must be at least 1"),
        (("DARTS", 4), {"repeats": 0}, "repeats must be at least 1"),
        (("DARTS", 4), {"drop_path": 1.0}, "drop_path must be at least 0 and below 1"),
        (("DARTS", 4), {"drop_path": "x"}, "drop_path must be a number, got 'x'"),
        (("DARTS", 4), {"side": 30}, "divisible by 4"),
        (("DARTS", 4), {"side": 16, "auxiliary": True}, "at least 5 x 5 pixels, got 4 x 4"),
    ],
)
def test_wrong_arguments_are_named(arguments, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        cell_network(*arguments, **options)


def test_options_are_for_searched_networks_alone():
    with pytest.raises(TypeError, match="WRN 28-10 has no options, got auxiliary"):
        models.build("WRN 28-10", auxiliary=True)
