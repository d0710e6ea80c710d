"""What the tests of the pictures share: charts as a reader sees them, and the data of two of the pictures."""

from __future__ import annotations

import os
import re
from typing import NamedTuple
from xml.etree import ElementTree

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch
from torch import nn

import softshare
from softshare import models, pictures
from softshare.folded import sweep
from softshare.training import SimilarityRecorder

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def own_style():
    """Undo what a test sets, and close the figures that it leaves open."""
    with matplotlib.rc_context():
        yield
    plt.close("all")


class RenderedChart:
    """The chart as a reader sees it after moving the controls to `values`, rendered by Vega itself."""

    def __init__(self, moving: pictures.Moving, **values: float | str) -> None:
        import vl_convert

        spec = moving.spec()
        for parameter in spec["params"]:
            parameter["value"] = values.pop(parameter["name"], parameter["value"])
        assert not values, f"no such controls: {values}"
        svg = ElementTree.fromstring(vl_convert.vegalite_to_svg(spec))
        self.paths = list(svg.iter("{http://www.w3.org/2000/svg}path"))
        self.fills = [path.get("fill", "") for path in self.paths]
        self.texts = [each.text or "" for each in svg.iter("{http://www.w3.org/2000/svg}text")]

    @property
    def shades(self) -> list[str]:
        """The colours of the squares, in order: those taken from a colour ramp."""
        return [fill for fill in self.fills if fill.startswith("rgb(")]

    def find_text(self, pattern: str) -> tuple[str, ...]:
        """The groups of `pattern` in the one text of the chart that matches it."""
        found = [match for text in self.texts if (match := re.search(pattern, text))]
        assert len(found) == 1, (pattern, self.texts)
        return found[0].groups()


@pytest.fixture(scope="session")
def rendered() -> type[RenderedChart]:
    if not os.environ.get("CI"):  # must not be missing on CI
        pytest.importorskip("vl_convert")
    return RenderedChart


@pytest.fixture(scope="module")
def runs() -> dict[str, SimilarityRecorder]:
    """Four snapshots of two networks whose coefficients wander."""
    torch.manual_seed(0)
    found = {}
    for name in ("SWRN with penalty", "SWRN"):
        model, recorder = models.swrn(22, 1), SimilarityRecorder()
        for step in range(4):
            recorder.record(model, step)
            with torch.no_grad():
                for bank in softshare.banks(model).values():
                    bank.coefficients.add_(0.5 * torch.randn_like(bank.coefficients))
        found[name] = recorder
    return found


class Folding(NamedTuple):
    picture: pictures.Moving
    networks: dict[str, nn.Module]
    sweeps: dict[str, list[dict]]


@pytest.fixture(scope="module")
def folding() -> Folding:
    """A network with a loop and one without, swept at three thresholds."""
    torch.manual_seed(0)
    looped, loose = models.swrn(40, 1, templates=8), models.swrn(40, 1, templates=8)
    with torch.no_grad():
        alpha = softshare.banks(looped)["stage2"].coefficients
        for block in range(2, 5):  # a loop of two layers, the second with its sign turned
            alpha[2 * block], alpha[2 * block + 1] = alpha[2], -alpha[3]
    networks = {"SWRN": looped, "tied by hand": loose}
    calls = []

    def error(network):
        calls.append(network)
        return 0.25 + sum(p.numel() for p in network.parameters()) / 1e5

    sweeps = {name: sweep(network, error, (0.8, 0.9, 1.0)) for name, network in networks.items()}
    assert len(calls) == 5, "each network before folding, and once for each of the three different plans"
    doubled = {name: [row | {"value": 2 * row["value"]} for row in rows] for name, rows in sweeps.items()}
    return Folding(pictures.folds(networks, {"once": sweeps, "twice": doubled}, {"once": error}), networks, sweeps)
