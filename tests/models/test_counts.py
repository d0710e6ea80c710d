"""Parameters and multiply-adds against figures that others published, and against formulas."""

from __future__ import annotations

import pytest
import torch

from softshare import models
from softshare.models import Network, multiply_adds, parameters


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("WRN 28-10", "36.48"),
        ("SWRN 28-10", "36.48"),
        ("SWRN 28-10-4", "26.80"),
        ("SWRN 28-10-2", "17.13"),
        ("SWRN 28-10-1", "12.29"),
        ("SWRN 28-6-2", "6.18"),
        ("SWRN 28-14", "71.47"),
        ("SWRN 28-14-2", "33.54"),
        ("SWRN 28-18", "118.12"),
        ("SWRN 28-18-2", "55.41"),
        ("SWRN 40-8-8", "29.56"),
        ("WRN 40-8", "35.75"),
        ("SWRN 28-10-2*", "17.13"),
    ],
)
def test_parameter_counts_of_the_poster(name, millions):
    assert f"{parameters(name) / 1e6:.2f}" == millions


@pytest.mark.parametrize(
    ("name", "parameters_", "multiply_adds_"),
    [
        ("WRN 28-6", 13_144_794, 1_894_174_464),
        ("WRN 28-10", 36_479_194, 5_243_328_768),
        ("WRN 28-14", 71_470_810, 10_261_816_064),
        ("WRN 28-18", 118_119_642, 16_949_636_352),
        ("WRN 40-8", 35_748_314, 5_172_024_320),
        ("WRN 50-2", 68_883_240, 11_398_021_120),
        ("ResNeXt-29 16x64", 68_155_210, 10_688_866_304),
        ("DenseNet 100-24", 27_249_082, 6_889_347_744),
        ("DenseNet 190-40", 25_624_430, 9_301_945_740),
        ("DenseNet-264", 33_337_704, 5_751_653_376),
        ("ResNet-200", 64_666_152, 15_007_481_856),
    ],
)
def test_counts_of_the_plain_networks(name, parameters_, multiply_adds_):
    """Counted once on throw-away networks written for this purpose; those of WRN 50-2 are also torchvision's."""
    assert parameters(name) == parameters_ and multiply_adds(name) == multiply_adds_


@pytest.mark.parametrize(("n", "width", "templates", "side"), [(2, 1, None, 32), (4, 3, 2, 16), (3, 2, 9, 40)])
def test_multiply_adds_of_wide_resnets_by_closed_form(n, width, templates, side):
    total, before, pixels = 27 * 16 * side**2, 16, side**2
    for stage in (1, 2, 3):
        after, pixels = 16 * width * 2 ** (stage - 1), pixels // (1 if stage == 1 else 4)
        total += pixels * (9 * before * after + (2 * n - 1) * 9 * after * after + (before != after) * before * after)
        before = after
    name = f"{6 * n + 4}-{width}"
    assert multiply_adds(f"WRN {name}", side) == total + 10 * before
    shared = f"SWRN {name}" + ("" if templates is None else f"-{templates}")
    assert multiply_adds(shared, side) == multiply_adds(f"{shared}*", side) == total + 10 * before


@pytest.mark.parametrize(("layers", "width", "templates"), [(20, 32, None), (20, 32, 5), (7, 12, 7), (100, 32, 100)])
def test_counts_of_grid_networks_by_closed_form(layers, width, templates):
    name = f"{'S' * bool(templates)}CNN" + f"-{templates}" * bool(templates) + f" {layers} layers width {width}"
    d = 9 * width * width
    weights = layers * d if templates is None else templates * (layers + d)
    assert parameters(name) == weights + layers * 2 * width + 3 * width + width + 1
    assert multiply_adds(name, 9) == 81 * (2 * width + layers * d + width)
    assert multiply_adds(name) == 32 * 32 * (2 * width + layers * d + width)


def test_sharing_does_not_change_the_multiply_adds():
    for shared, plain in (("SWRN 28-1-2", "WRN 28-1"), ("SWRN 50-1-2", "WRN 50-1"), ("SCNN-5", "CNN")):
        assert multiply_adds(shared) == multiply_adds(plain) and parameters(shared) < parameters(plain)


def test_counts_take_networks_as_well_as_names():
    network = Network.parse("SWRN 28-2-3*")
    assert parameters(network) == parameters(str(network)) and multiply_adds(network) == multiply_adds(str(network))


def test_counts_are_those_of_the_network_that_is_built():
    model = models.build("SWRN 22-2-2")
    assert parameters("SWRN 22-2-2") == sum(parameter.numel() for parameter in model.parameters())


def test_counting_draws_no_random_numbers():
    state = torch.get_rng_state()
    parameters("SWRN 16-3-1"), multiply_adds("SWRN 16-3-1", 8)
    assert torch.equal(torch.get_rng_state(), state)


def test_activations_are_those_that_a_real_forward_pass_keeps():
    """On a batch of real numbers, with the memory that autograd holds counted by its address."""
    for name, side, shape in (("WRN 16-1", 16, (3, 16, 16)), ("CNN", 8, (2, 8, 8)), ("DenseNet 22-4", 16, (3, 16, 16))):
        model, kept = models.build(name), {}
        own = {parameter.data_ptr() for parameter in model.parameters()}

        def keep(tensor, kept=kept, own=own):
            if tensor.untyped_storage().data_ptr() not in own:
                kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = model(torch.randn(16, *shape))
        held = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
        assert models.activations(name, side) == pytest.approx(held / 4 / 16, rel=0.02), name
        del output
