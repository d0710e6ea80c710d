"""The poster's names: parsed, written back, and refused if they contradict themselves."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from softshare import models
from softshare.models import Network
from softshare.models.names import CELL_WIDTHS, GRID_LAYERS, GRID_WIDTH

POSTER = (
    *("WRN 28-10", "SWRN 28-10", "SWRN 28-10-2", "SWRN 28-14", "SWRN 28-14-2", "SWRN 28-18", "SWRN 28-18-2"),
    *("SWRN 28-6-2", "SWRN 40-8-8", "WRN 50-2", "SWRN 50-2", "CNN", "SCNN", "SCNN 100 layers"),
    *("ResNeXt-29 16x64", "DenseNet 100-24", "DenseNet 190-40", "DenseNet-264", "ResNet-200"),
    *("NASNet-A", "AmoebaNet-B", "DARTS", "SNAS", "ENAS"),
)
"""The 24 networks of the poster."""

SIZES = ("NASNet-A 27.6M", "AmoebaNet-B 13.7M", "AmoebaNet-B 34.9M")
MORE = ("WRN 28-10*", "SWRN 28-10-2*", "SWRN 50-2-3", "SCNN-5", "SCNN-8 100 layers", "CNN width 12", "SCNN-4 width 12")

parse = Network.parse


@pytest.mark.parametrize("name", (*POSTER, *SIZES, *MORE))
def test_a_name_goes_through_parse_and_back(name):
    assert str(parse(name)) == name and parse(str(parse(name))) == parse(name)


def test_no_two_of_the_posters_networks_are_the_same():
    assert len(POSTER) == 24 and len({parse(name) for name in (*POSTER, *SIZES)}) == 27


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("WRN 28-10", Network("WRN", 28, 10)),
        ("SWRN 28-10", Network("WRN", 28, 10, shared=True)),
        ("SWRN 28-10-2*", Network("WRN", 28, 10, shared=True, templates=2, dropout=True)),
        ("CNN", Network("CNN", 20, 32)),
        ("SCNN", Network("CNN", 20, 32, shared=True)),
        ("SCNN-5", Network("CNN", 20, 32, shared=True, templates=5)),
        ("SCNN 100 layers", Network("CNN", 100, 32, shared=True)),
        ("SCNN-8 100 layers", Network("CNN", 100, 32, shared=True, templates=8)),
        ("CNN width 12", Network("CNN", 20, 12)),
        ("ResNeXt-29 16x64", Network("ResNeXt", 29, 64, cardinality=16)),
        ("DenseNet 100-24", Network("DenseNet", 100, 24)),
        ("DenseNet 190-40", Network("DenseNet", 190, 40, compressed=True)),
        ("DenseNet-264", Network("DenseNet", 264, 32, compressed=True)),
        ("ResNet-200", Network("ResNet", 200, 64)),
        ("NASNet-A", Network("NASNet-A", None, 32)),
        ("AmoebaNet-B 34.9M", Network("AmoebaNet-B", None, 128)),
        ("ENAS", Network("ENAS", None, 36)),
    ],
)
def test_what_a_name_means(name, expected):
    assert parse(name) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("SWRN  28-10-2 *", "SWRN 28-10-2*"),
        (" SWRN 28-10-2* ", "SWRN 28-10-2*"),
        ("WRN-28-10", "WRN 28-10"),
        ("SWRN-28-10-2*", "SWRN 28-10-2*"),
        ("SCNN 5", "SCNN-5"),
        ("SCNN  100\tlayers", "SCNN 100 layers"),
        ("SCNN 20 layers", "SCNN"),
        ("CNN width 32", "CNN"),
        ("ResNeXt 29 16 x 64", "ResNeXt-29 16x64"),
        ("DenseNet-100-24", "DenseNet 100-24"),
        ("DenseNet-BC 190-40", "DenseNet 190-40"),
        ("DenseNet 264", "DenseNet-264"),
        ("DenseNet 264-32", "DenseNet-264"),
        ("ResNet 200", "ResNet-200"),
        ("NASNet-A 3.3M", "NASNet-A"),
        ("AmoebaNet-B width 80", "AmoebaNet-B 13.7M"),
        ("DARTS 3.4M", "DARTS"),
    ],
)
def test_spellings_of_one_name(name, expected):
    assert str(parse(name)) == expected and parse(name) == parse(expected)


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("SWRN 28-10-2*", "WRN 28-10*"),
        ("SWRN 28-10", "WRN 28-10"),
        ("SWRN 50-2-3", "WRN 50-2"),
        ("SCNN", "CNN"),
        ("SCNN-5 width 12", "CNN width 12"),
        ("SCNN-8 100 layers", "CNN 100 layers"),
        ("WRN 28-10", "WRN 28-10"),
        ("DenseNet 190-40", "DenseNet 190-40"),
    ],
)
def test_plain_counterparts(name, plain):
    assert str(parse(name).plain) == plain and parse(name).plain == parse(plain)


@pytest.mark.parametrize("name", (*POSTER, *SIZES, *MORE))
def test_narrow_relatives(name):
    network = parse(name)
    narrow = network.narrowed()
    assert 0 < narrow.width <= network.width and (narrow.width < network.width or narrow == network)
    assert parse(str(narrow)) == narrow
    for field in (
        "family",
        "depth",
        "shared",
        "templates",
        "dropout",
        "cardinality",
        "compressed",
        "imagenet",
        "grids",
    ):
        assert getattr(narrow, field) == getattr(network, field), field
    assert narrow.narrowed() == narrow
    assert network.narrowed(network.width) == network == network.narrowed(10**6)
    assert network.narrowed(3).width == min(3, network.width)


@pytest.mark.parametrize(
    ("name", "narrow"),
    [
        ("SWRN 28-10-2*", "SWRN 28-1-2*"),
        ("SCNN 100 layers", "SCNN 100 layers width 12"),
        ("ResNeXt-29 16x64", "ResNeXt-29 16x4"),
        ("DenseNet 190-40", "DenseNet 190-4"),  # still with bottlenecks and compression
        ("DenseNet 100-24", "DenseNet 100-4"),  # still without
        ("DenseNet-264", "DenseNet-264 width 4"),
        ("ResNet-200", "ResNet-200 width 8"),
        ("AmoebaNet-B 13.7M", "AmoebaNet-B width 4"),
    ],
)
def test_names_of_narrow_relatives(name, narrow):
    assert str(parse(name).narrowed()) == narrow


def test_which_networks_solve_which_task():
    assert {name for name in POSTER if parse(name).grids} == {"CNN", "SCNN", "SCNN 100 layers"}
    assert {name for name in POSTER if parse(name).imagenet} == {"WRN 50-2", "SWRN 50-2", "DenseNet-264", "ResNet-200"}


def test_sizes_of_the_searched_networks():
    for family, sizes in CELL_WIDTHS.items():
        widths = [parse(f"{family} {size}").width for size in sizes]
        assert widths == list(sizes.values()) and parse(family).width == min(widths)
    with pytest.raises(ValueError, match=r"unknown size '5\.0M' of AmoebaNet-B; known: 2\.8M, 13\.7M, 34\.9M"):
        parse("AmoebaNet-B 5.0M")
    with pytest.raises(ValueError, match=r"unknown size '27\.6M' of DARTS"):
        parse("DARTS 27.6M")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("WRN 28-10-2", "a plain network has no templates.*did you mean 'SWRN 28-10-2'"),
        ("WRN 50-2-3", "did you mean 'SWRN 50-2-3'"),
        ("CNN-5", "did you mean 'SCNN-5'"),
        ("WRN 50-2*", r"no dropout.*WRN 50-2 \*"),
        ("SCNN-100", "100 templates for 20 layers.*'SCNN 100 layers'"),
        ("SCNN-6 5 layers", "6 templates for 5 layers"),
        ("SWRN 28-10-0", "at least 1, got 'SWRN 28-10-0'"),
        ("SWRN 50-2-0", "at least 1"),
        ("WRN 28-0", "at least 1"),
        ("WRN 0-1", "at least 1"),
        ("SCNN-0", "at least 1"),
        ("CNN 0 layers", "at least 1"),
        ("CNN width 0", "at least 1"),
        ("ResNeXt-29 0x64", "at least 1"),
        ("ResNeXt-29 16x0", "at least 1"),
        ("DenseNet 100-0", "at least 1"),
        ("NASNet-A width 0", "at least 1"),
    ],
)
def test_the_error_for_a_contradictory_name_explains_what_is_meant(name, says):
    with pytest.raises(ValueError, match=says):
        parse(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "WRN",
        "SWRN 28",
        "wrn-28-10",
        "SWRN 28-x",
        "WRN 28-10 2",
        "WRN 28 10",
        "SCNN layers",
        "CNN 5 layer",
        "ResNeXt-29",
    ]
    + [
        "DenseNet",
        "DenseNet 100",
        "NASNet",
        "AmoebaNet-A",
        "DARTS-2",
        "WRN 28-10**",
        "SWRN 28-10-2*x",
        "WRN 28-10 width 2",
    ],
)
def test_an_unknown_name_lists_the_known_ones(name):
    with pytest.raises(ValueError, match=r"unknown model.*WRN L-w.*SWRN L-w-k.*SCNN.*DenseNet-264.*NASNet-A"):
        parse(name)


@pytest.mark.parametrize("name", [28, None, b"WRN 28-10", ("WRN", 28, 10)])
def test_a_name_is_a_string(name):
    with pytest.raises(TypeError, match="must be a string such as 'SWRN 28-10-2'"):
        parse(name)


number = st.integers(1, 999)


@given(depth=number, width=number, shared=st.booleans(), templates=number | st.none(), dropout=st.booleans())
def test_any_wide_resnet_goes_through_its_name(depth, width, shared, templates, dropout):
    assume(depth != 50 or not dropout)
    layers = (depth - 4) // 3 - 2
    if templates and depth != 50:
        assume(templates < layers or layers <= 0)
    network = Network("WRN", depth, width, shared, templates if shared else None, dropout)
    assert parse(str(network)) == network
    assert (
        str(network)
        == f"{'S' * shared}WRN {depth}-{width}" + f"-{templates}" * bool(shared and templates) + "*" * dropout
    )


@pytest.mark.parametrize(
    ("name", "same"),
    [("SWRN 28-10-6", "SWRN 28-10"), ("SWRN 28-10-100*", "SWRN 28-10*"), ("SWRN 40-8-10", "SWRN 40-8"),
     ("SCNN-20", "SCNN"), ("SCNN-100 100 layers", "SCNN 100 layers"), ("SWRN 40-8-9", "SWRN 40-8-9")],
)  # fmt: skip
def test_one_template_per_layer_is_one_network_however_it_is_written(name, same):
    assert str(parse(name)) == same


def test_a_name_holds_a_size_or_a_width():
    with pytest.raises(ValueError, match="a size or a width, not both"):
        parse("DARTS 3.4M width 4")


@given(
    depth=number | st.just(GRID_LAYERS),
    width=number | st.just(GRID_WIDTH),
    shared=st.booleans(),
    templates=number | st.none(),
)
def test_any_grid_network_goes_through_its_name(depth, width, shared, templates):
    assume(templates is None or templates < depth)
    network = Network("CNN", depth, width, shared, templates if shared else None)
    assert parse(str(network)) == network


@given(depth=number | st.sampled_from([100, 190, 264]), width=number | st.sampled_from([24, 32, 40]))
def test_any_other_network_goes_through_its_name(depth, width):
    names = [f"ResNeXt-{depth} {width}x{depth}", f"ResNet-{depth} width {width}", f"DenseNet-264 width {width}"]
    names += [f"DenseNet {depth}-{width}", f"DenseNet-BC {depth}-{width}", f"ENAS width {width}"]
    for network in map(parse, names):
        assert parse(str(network)) == network


@pytest.mark.parametrize(
    "name, twin",
    [
        ("SWRN 28-6-2", "WRN 16-6"),
        ("SWRN 28-10-2*", "WRN 16-10*"),
        ("SWRN 28-10-4", "WRN 22-10"),
        ("SWRN 40-8-8", "WRN 34-8"),
        ("SWRN 28-10", "WRN 28-10"),
        ("SWRN 28-10-1", None),
        ("WRN 28-10", None),
        ("SWRN 50-2-2", None),
        ("SCNN-4", None),
        ("DARTS", None),
    ],
)
def test_the_twin_has_as_many_layers_as_there_are_templates(name, twin):
    found = parse(name).twin
    assert found == (parse(twin) if twin else None)
    if found:
        n, m = models.parameters(found), models.parameters(name)
        assert abs(n / m - 1) < 2e-3
