"""Searched cells: their data, their operations, and one cell against a plain loop written out by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from softshare.models import cells
from softshare.models.cells import CONVENTIONS, OPERATIONS, CellModule, FactorizedReduction, genotypes, make_operation

CELLS = [(name, kind) for name in genotypes() for kind in ("normal", "reduction")]


@pytest.mark.parametrize(("name", "kind"), CELLS)
def test_every_cell_is_complete_and_says_where_it_was_read(name, kind):
    genotype = genotypes()[name]
    cell = getattr(genotype, kind)
    assert len(cell.blocks) == (5 if name.startswith(("NASNet", "Amoeba", "ENAS")) else 4)
    assert len(genotype.commit) == 7 and "/" in genotype.source
    used = {state for block in cell.blocks for _, state in block} | set(cell.output)
    assert used >= set(range(2, cell.states)), "a block that nothing reads would be computed for nothing"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"blocks": [["sep4(0)", "id(1)"]], "output": [2]}, "mine: unknown operation 'sep4\\(0\\)'; known: sep3, sep5"),
        ({"blocks": [["sep3", "id(1)"]], "output": [2]}, "unknown operation 'sep3'"),
        (
            {"blocks": [["sep3(2)", "id(1)"]], "output": [2]},
            "'sep3\\(2\\)' in block 2 reads a state that does not exist",
        ),
        ({"blocks": [["sep3(0)"]], "output": [2]}, "block 2 has 1 operations, expected 2"),
        ({"blocks": [["sep3(0)", "id(1)"]], "output": [3]}, "output \\[3\\] must list states from 0 to 2"),
        ({"blocks": [["sep3(0)", "id(1)"]], "output": []}, "output"),
    ],
)
def test_what_is_no_cell_is_refused_by_name(entry, message):
    with pytest.raises(ValueError, match=message):
        cells.read_cell(entry, "mine")


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("family", CONVENTIONS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_keep_or_halve_the_size(name, family, stride):
    for before, after in ((8, 8), (12, 8)):
        operation = make_operation(name, before, after, stride, CONVENTIONS[family]).eval()
        assert operation(torch.randn(2, before, 8, 8)).shape == (2, after, 8 // stride, 8 // stride)
    assert not any(module.bias is not None for module in operation.modules() if isinstance(module, torch.nn.Conv2d))


def test_an_unknown_operation_is_refused_by_name():
    with pytest.raises(ValueError, match="unknown operation 'sep9'; known: sep3"):
        make_operation("sep9", 4, 4, 1, CONVENTIONS["DARTS"])


@given(st.sampled_from(["avg3", "max3", "max2"]), st.sampled_from([8, 12]), st.integers(0, 2**16))
def test_strided_pools_are_tensorflows_same(name, side, seed):
    """A plain loop: for an even size, windows start at the pixel itself and what lies outside does not count."""
    kernel = int(name[-1])
    x = torch.randn(1, 2, side, side, generator=torch.Generator().manual_seed(seed))
    found = make_operation(name, 2, 2, 2, CONVENTIONS["NASNet-A"])(x)
    for row in range(side // 2):
        for column in range(side // 2):
            window = x[:, :, 2 * row : 2 * row + kernel, 2 * column : 2 * column + kernel]
            expected = window.mean((2, 3)) if name.startswith("avg") else window.amax((2, 3))
            torch.testing.assert_close(found[:, :, row, column], expected)


def test_strided_convolutions_are_placed_as_each_source_places_them():
    """A kernel of one 1 in its middle copies pixels: the even ones with equal padding, the odd ones with SAME."""
    x = torch.arange(64.0).view(1, 1, 8, 8)
    for family, first in (("DARTS", 0), ("NASNet-A", 1)):
        for kernel in (3, 5, 7):
            strided = cells.convolution(1, 1, kernel, 2, same=CONVENTIONS[family].same)
            (weight,) = strided.parameters()
            with torch.no_grad():
                weight.zero_()[0, 0, kernel // 2, kernel // 2] = 1.0
            torch.testing.assert_close(strided(x), x[:, :, first::2, first::2])


def test_a_factorized_reduction_sees_even_and_odd_pixels():
    module = FactorizedReduction(3, 5, relu=True).eval()
    x = torch.randn(2, 3, 6, 6)
    even = F.conv2d(F.relu(x), module.even.weight, stride=2)
    odd = F.conv2d(F.relu(x)[:, :, 1:, 1:], module.odd.weight, stride=2)
    torch.testing.assert_close(module(x), module.norm(torch.cat([even, odd], 1)))


def test_the_darts_cell_equals_a_plain_loop():
    """DARTS_V2's normal cell after a reduction, written out by hand from its parameters."""
    cell = CellModule(genotypes()["DARTS"].normal, (6, 10), 4, False, True, False, CONVENTIONS["DARTS"]).eval()
    for module in cell.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 2.0)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)

    def norm(x, module):
        return F.batch_norm(x, module.running_mean, module.running_var, module.weight, module.bias)

    def separable(x, operation, halves, padding, dilation):
        steps = list(operation)
        for half in range(halves):
            _, depthwise, pointwise, last = steps[4 * half : 4 * half + 4]
            x = F.conv2d(F.relu(x), depthwise.weight, padding=padding, dilation=dilation, groups=x.shape[1])
            x = norm(F.conv2d(x, pointwise.weight), last)
        return x

    large, small = torch.randn(2, 6, 8, 8), torch.randn(2, 10, 4, 4)
    active = F.relu(large)
    reduction, projection = cell.input0, cell.input1
    halves = (
        F.conv2d(active, reduction.even.weight, stride=2),
        F.conv2d(active[:, :, 1:, 1:], reduction.odd.weight, stride=2),
    )
    s0 = norm(torch.cat(halves, 1), reduction.norm)
    s1 = norm(F.conv2d(F.relu(small), projection[1].weight), projection[2])
    ops = cell.operations
    s2 = separable(s0, ops[0], 2, 1, 1) + separable(s1, ops[1], 2, 1, 1)
    s3 = separable(s0, ops[2], 2, 1, 1) + separable(s1, ops[3], 2, 1, 1)
    s4 = separable(s1, ops[4], 2, 1, 1) + s0
    s5 = s0 + separable(s2, ops[7], 1, 2, 2)
    torch.testing.assert_close(cell(large, small), torch.cat([s2, s3, s4, s5], 1))


def test_a_cell_that_reads_the_stem_itself_projects_what_it_puts_out():
    """NASNet-A's first cell: input 0 has three times the channels, and is part of the output."""
    cell = CellModule(genotypes()["NASNet-A"].normal, (12, 12), 4, False, False, True, CONVENTIONS["NASNet-A"]).eval()
    x = torch.randn(1, 12, 8, 8)
    out = cell(x, x)
    assert out.shape == (1, 24, 8, 8)
    torch.testing.assert_close(out[:, :4], cell.raw_output(x))


def test_drop_path_drops_whole_results_of_examples_and_keeps_the_mean():
    drop = cells.DropPath(0.5)
    x = torch.ones(4000, 3, 2, 2)
    assert torch.equal(drop(x), x), "nothing is dropped at the start of training"
    drop.progress.fill_(0.5)
    out = drop(x)
    kept = out.flatten(1).amax(1) > 0
    assert torch.equal(out, torch.where(kept[:, None, None, None], x / 0.75, 0.0))
    assert 0.7 < float(kept.float().mean()) < 0.8 and torch.equal(drop.eval()(x), x)
