"""The diagrams show what they are given: a cell can be read back from its picture, and nothing covers anything else."""

from __future__ import annotations

import itertools
from collections import Counter

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import same_color, to_rgb
from matplotlib.patches import Circle, FancyBboxPatch, PathPatch, Polygon

from softshare import pictures
from softshare.models.cells import OPERATIONS, Cell, genotypes
from softshare.pictures import diagrams

PAD = 0.03
CELLS = {
    f"{name}, {kind}": getattr(found, kind) for name, found in genotypes().items() for kind in ("normal", "reduction")
}
CHAIN = Cell(
    ((("sep3", 0), ("id", 1)), (("max2", 2), ("conv1", 2)), (("id", 3), ("dil5", 0)), (("avg3", 4), ("id", 1))),
    (0, 2, 5),
)
CELLS["a chain"] = CHAIN


def boxes(axes):
    """The boxes of a drawing, (left, bottom, right, top) in its own coordinates, with the text of each."""
    found = {}
    for patch in axes.patches:
        if isinstance(patch, FancyBboxPatch):
            x, y, width, height = patch.get_x(), patch.get_y(), patch.get_width(), patch.get_height()
            sides = (x - PAD, y - PAD, x + width + PAD, y + height + PAD)
            (text,) = (
                t
                for t in axes.texts
                if sides[0] < t.get_position()[0] < sides[2] and sides[1] < t.get_position()[1] < sides[3]
            )
            found[sides] = (text, patch)
    return found


def near(a, b):
    return np.allclose(a, b, atol=1e-6)


def read_back(axes):
    """The cell that a picture shows: its lines are followed from each operation and from the output to where they begin."""
    lines = [p.get_path().vertices for p in axes.patches if isinstance(p, PathPatch)]
    sums = sorted((p.center for p in axes.patches if isinstance(p, Circle)), key=lambda centre: (centre[0], -centre[1]))
    inputs = {text.get_text(): ((s[2], (s[1] + s[3]) / 2)) for s, (text, _) in boxes(axes).items()}

    def sources(point):
        for line in lines:
            if near(line[-1], point):
                yield from sources(line[0]) if any(near(other[-1], line[0]) for other in lines) else (tuple(line[0]),)

    def state(point):
        for number, name in ((0, "cell k−2"), (1, "cell k−1")):
            if near(point, inputs[name]):
                return number
        return next(
            ("sum", i) for i, centre in enumerate(sums) if near(point, (centre[0] + diagrams._RADIUS, centre[1]))
        )

    blocks = []
    for centre in sums:
        block = []
        for sides, (text, _) in boxes(axes).items():
            if any(near(line[0], (sides[2], (sides[1] + sides[3]) / 2)) and near(line[-1], centre) for line in lines):
                (source,) = sources((sides[0], (sides[1] + sides[3]) / 2))
                block.append((text.get_text(), state(source)))
        blocks.append(block)
    (bar,) = (sides for sides, (text, _) in boxes(axes).items() if text.get_text() == "concatenate")
    ends = [line[-1] for line in lines if np.isclose(line[-1][0], bar[0])]
    return blocks, [state(source) for end in ends for source in sources(end)]


def same_cell(blocks, output, cell):
    """Whether some order of the drawn blocks makes them those of the cell."""
    for order in itertools.permutations(range(len(blocks))):  # order[i]: the drawn block that is state i + 2
        numbers = {("sum", drawn): place + 2 for place, drawn in enumerate(order)} | {0: 0, 1: 1}
        drawn = [Counter((text, numbers[state]) for text, state in blocks[i]) for i in order]
        wanted = [Counter((diagrams.operation_text(name), state) for name, state in block) for block in cell.blocks]
        if drawn == wanted and sorted(numbers[state] for state in output) == sorted(cell.output):
            return True
    return False


@pytest.mark.parametrize("name", CELLS)
def test_a_cell_can_be_read_back_from_its_picture(name):
    axes = pictures.cell(CELLS[name], title=name)
    assert axes.get_title() == name
    blocks, output = read_back(axes)
    assert len(blocks) == len(CELLS[name].blocks) and all(len(block) == 2 for block in blocks)
    assert same_cell(blocks, output, CELLS[name])
    changed = CELLS[name]._replace(output=CELLS[name].output[1:])
    assert not same_cell(blocks, output, changed)


def assert_nothing_covers_anything(axes):
    axes.figure.canvas.draw()
    outlines = {sides: patch.get_window_extent() for sides, (_, patch) in boxes(axes).items()}
    texts = [text.get_window_extent() for text in axes.texts]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(outlines.values(), 2))
    assert not any(a.overlaps(b) for a, b in itertools.combinations(texts, 2))
    for sides, (text, _) in boxes(axes).items():
        inner, outer = text.get_window_extent(), outlines[sides]
        assert outer.x0 <= inner.x0 and inner.x1 <= outer.x1 and outer.y0 <= inner.y0 and inner.y1 <= outer.y1, (
            text.get_text()
        )
    frame = axes.figure.bbox
    assert all(frame.x0 <= each.x0 and each.x1 <= frame.x1 and each.y0 >= frame.y0 for each in outlines.values())


@pytest.mark.parametrize("name", CELLS)
def test_no_box_or_text_overlaps_another_and_no_line_crosses_a_box(name):
    axes = pictures.cell(CELLS[name])
    assert_nothing_covers_anything(axes)
    lines = [p.get_path() for p in axes.patches if isinstance(p, PathPatch)]
    circles = [(p.center, p.radius) for p in axes.patches if isinstance(p, Circle)]
    for line in lines:
        straight = np.linspace(*line.vertices[[0, -1]], 50)
        for x, y in (straight if len(line.vertices) == 2 else bezier(line.vertices))[1:-1]:
            assert not any(s[0] + 0.01 < x < s[2] - 0.01 and s[1] + 0.01 < y < s[3] - 0.01 for s in boxes(axes))
            for centre, radius in circles:
                assert near(line.vertices[-1], centre) or np.hypot(x - centre[0], y - centre[1]) > radius - 0.01


def bezier(vertices):
    t = np.linspace(0, 1, 50)[:, None]
    a, b, c, d = vertices
    return a * (1 - t) ** 3 + 3 * b * t * (1 - t) ** 2 + 3 * c * t**2 * (1 - t) + d * t**3


def test_operations_have_a_colour_by_kind_and_readable_ink():
    kinds = {name: diagrams._colour(diagrams.operation_text(name)) for name in OPERATIONS}
    assert kinds["sep3"] == kinds["sep7"] and kinds["dil3"] == kinds["dilsep5"] and kinds["max2"] == kinds["max3"]
    assert len(set(kinds.values())) == 6 and set(kinds.values()) <= {*pictures.CYCLE, diagrams.NEUTRAL}
    texts = {diagrams.operation_text(name) for name in OPERATIONS}
    assert {"sep 3×3", "dil sep 5×5", "conv 1×1", "identity"} <= texts and len(texts) == len(OPERATIONS)
    axes = pictures.cell(genotypes()["SNAS"].normal)
    for text, patch in boxes(axes).values():
        assert same_color(text.get_color(), pictures.ink(patch.get_facecolor()))
    assert {text.get_color() for text, _ in boxes(axes).values()} == {"black", "white"}


def test_a_drawing_fits_into_given_axes():
    axes = plt.figure(figsize=(3, 2), layout="none").add_axes((0.1, 0.1, 0.8, 0.8))
    assert pictures.cell(genotypes()["AmoebaNet-B"].normal, axes=axes) is axes
    assert_nothing_covers_anything(axes)
    block = plt.figure(figsize=(3, 2), layout="none").add_axes((0.1, 0.1, 0.8, 0.8))
    assert pictures.block(["norm, ReLU", "conv 3×3\n160"], axes=block) is block
    assert_nothing_covers_anything(block)


@pytest.mark.parametrize("name, rows", [("SNAS", 1), ("AmoebaNet-B", 2)])
def test_cells_are_drawn_side_by_side_where_they_fit_and_on_one_scale(name, rows):
    found = genotypes()[name]
    figure = pictures.cells({"normal": found.normal, "reduction": found.reduction}, width=9.0)
    figure.canvas.draw()
    assert [axes.get_title() for axes in figure.axes] == ["normal", "reduction"]
    assert len({round(axes.get_position().y0, 3) for axes in figure.axes}) == rows
    scales = [axes.transData.transform((1, 0))[0] - axes.transData.transform((0, 0))[0] for axes in figure.axes]
    np.testing.assert_allclose(scales, figure.dpi, rtol=0.02)  # an inch is an inch
    for axes in figure.axes:
        assert_nothing_covers_anything(axes)
    titles = [axes.title.get_window_extent() for axes in figure.axes]
    drawn = [patch.get_window_extent() for axes in figure.axes for patch in axes.patches]
    assert not any(title.overlaps(each) for title in titles for each in drawn)


@pytest.mark.parametrize("shortcut", ["", "conv 1×1\nnorm"])
@pytest.mark.parametrize("join, after", [("+", "ReLU"), ("+", ""), ("concatenate", "")])
def test_a_block_shows_its_steps_in_order_its_shortcut_and_where_they_meet(shortcut, join, after):
    axes = pictures.block(["norm, ReLU", "conv 3×3\n160", "conv 1×1\n640"], shortcut, join, after, title="a block")
    assert axes.get_title() == "a block"
    assert_nothing_covers_anything(axes)
    row = sorted((s[0], text.get_text()) for s, (text, _) in boxes(axes).items() if s[1] < -0.3)
    chain = [
        "norm, ReLU",
        "conv 3×3\n160",
        "conv 1×1\n640",
        *(["concatenate"] if join != "+" else []),
        *([after] if after else []),
    ]
    assert [text for _, text in row] == chain
    above = [text.get_text() for s, (text, _) in boxes(axes).items() if s[1] > 0]
    assert above == ([shortcut] if shortcut else [])
    assert sum(isinstance(patch, Circle) for patch in axes.patches) == (join == "+")
    tips = [patch.get_xy()[0] for patch in axes.patches if isinstance(patch, Polygon)]
    assert len(tips) == 3 + 1 + 1 + 1 + bool(after)  # steps, the join from two sides, what follows it, the way out
    fills = {text.get_text(): patch.get_facecolor()[:3] for text, patch in boxes(axes).values()}
    assert fills["conv 3×3\n160"] == to_rgb(diagrams.KINDS["conv"]) and fills["norm, ReLU"] == to_rgb(diagrams.NEUTRAL)


@pytest.mark.parametrize("name", CELLS)
def test_the_two_lines_into_a_block_do_not_cross(name):
    layout = diagrams._Layout(CELLS[name])
    for place in range(1, layout.last + 1):
        for item in layout.columns[place]:
            if not item.lane:
                (_, above, y0), (_, below, y1) = layout.operations(place, item.state)
                before = layout.heights[place - 1]
                assert y0 > y1 and before[above] >= before[below]
