"""The style sheet, the colours, and the package's front door: every name is there, and none needs the extras."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
from importlib import resources

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_rgb

import softshare
from softshare import models, pictures
from softshare.pictures.style import STYLE_SHEET

SETTINGS = {
    "figure.dpi": 96,
    "savefig.dpi": 160,
    "savefig.facecolor": "white",
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "lines.linewidth": 2.0,
    "legend.frameon": False,
}


def test_the_style_sheet_is_what_use_style_applies():
    sheet = matplotlib.rc_params_from_file(STYLE_SHEET, use_default_template=False)
    assert set(sheet) == {*SETTINGS, "axes.prop_cycle"}
    matplotlib.rcdefaults()
    before = dict(matplotlib.rcParams)
    pictures.use_style()
    after = dict(matplotlib.rcParams)
    assert {name: after[name] for name in sheet} == dict(sheet)
    assert {name: after[name] for name in SETTINGS} == SETTINGS
    assert tuple(after["axes.prop_cycle"].by_key()["color"]) == pictures.CYCLE
    # Notebooks also set the format of inline pictures; of matplotlib's own settings, only the sheet's change.
    assert {name for name in before if before[name] != after[name]} <= set(sheet)


def test_the_style_sheet_ships_with_the_package():
    assert resources.files(pictures).joinpath("softshare.mplstyle").read_bytes() == STYLE_SHEET.read_bytes()
    matplotlib.rcdefaults()
    matplotlib.style.use("softshare.pictures.softshare")  # as its first lines say
    named = dict(matplotlib.rcParams)
    matplotlib.rcdefaults()
    pictures.use_style()
    assert named == dict(matplotlib.rcParams)


def test_all_names_exist_and_none_hides_a_module():
    assert len(set(pictures.__all__)) == len(pictures.__all__)
    missing = [name for name in pictures.__all__ if not hasattr(pictures, name)]
    assert not missing
    for each in pkgutil.iter_modules(pictures.__path__):
        module = importlib.import_module(f"{pictures.__name__}.{each.name}")
        assert getattr(pictures, each.name) is module, f"{each.name} is both a module and something else"


def test_still_plots_need_neither_altair_nor_widgets():
    code = """
import sys
for name in ("altair", "ipywidgets", "vl_convert", "IPython", "matplotlib_inline"):
    sys.modules[name] = None
import torch
from softshare import pictures
pictures.use_style()
pictures.similarity_matrix(torch.eye(3)).figure.canvas.draw()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_numbers_on_coloured_boxes_can_be_read():
    def luminance(colour):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in np.array(colour)]
        return float(np.dot([0.2126, 0.7152, 0.0722], linear))

    for fill in (*pictures.CYCLE, *pictures.COLOURS.values(), "#DDDDDD", "gold", "navy"):
        light = luminance(to_rgb(fill))
        text = 1.0 if pictures.ink(fill) == "white" else 0.0
        assert (max(light, text) + 0.05) / (min(light, text) + 0.05) >= 4.5, fill
    with pytest.raises(ValueError, match="no colour"):
        pictures.ink("no colour")


def test_every_cluster_has_its_own_colour_however_many_there_are():
    model = models.gridnet(40, 4, 40)
    for clusters in (0, 3, 7, 8, 20):
        plan = softshare.tie(model, {"layers": [(2 * i + 1, 2 * i + 2) for i in range(clusters)]})
        (group,) = plan.groups
        colours = pictures.cluster_colours(group)
        assert list(colours) == sorted(set(group.schedule))
        shared = [colours[cluster[0]] for cluster in group.clusters if len(cluster) > 1]
        assert len(set(shared)) == clusters and "#DDDDDD" not in shared
        assert all(colours[cluster[0]] == "#DDDDDD" for cluster in group.clusters if len(cluster) == 1)
        if clusters <= 7:
            assert shared == list(pictures.CYCLE[:clusters])
