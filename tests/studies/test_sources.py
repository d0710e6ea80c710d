"""The schedules of the networks that the poster compares with, against literals from their sources."""

from __future__ import annotations

import math

import pytest
import torch

from softshare.models.cells import DropPath
from softshare.studies import RECIPES, make_plan, study_of, tables
from softshare.studies.sources import SOURCES

SEARCHED = (
    "NASNet-A",
    "NASNet-A 27.6M",
    "AmoebaNet-B",
    "AmoebaNet-B 13.7M",
    "AmoebaNet-B 34.9M",
    "DARTS",
    "SNAS",
    "ENAS",
)


def rates(name, profile="paper"):
    settings = make_plan(name, profile).settings
    return [settings.rate_of(epoch) for epoch in range(settings.epochs)]


def test_every_network_that_is_not_the_authors_has_a_source_and_says_what_is_not_known():
    compared = {
        row["model"] for table in tables.TABLES for row in tables.paper_table(table) if "WRN" not in row["model"]
    }
    assert compared == set(SOURCES) and all(RECIPES[name].source is SOURCES[name] for name in compared)
    assert all("/" in source.note or "not published" in source.note for source in SOURCES.values())
    for name in ("NASNet-A", "AmoebaNet-B", "DenseNet-264", "ResNet-200"):
        assert "not stated" in SOURCES[name].note or "not published" in SOURCES[name].note


@pytest.mark.parametrize(
    ("name", "epochs", "batch", "decay", "falls"),
    [
        ("ResNeXt-29 16x64", 300, 128, 5e-4, (147, 222)),
        ("DenseNet 100-24", 300, 64, 1e-4, (150, 225)),
        ("DenseNet 190-40", 300, 64, 1e-4, (150, 225)),
        ("DenseNet-264", 90, 256, 1e-4, (30, 60)),
        ("ResNet-200", 90, 256, 1e-4, (30, 60)),
    ],
)
def test_networks_made_by_hand_fall_in_steps(name, epochs, batch, decay, falls):
    settings = make_plan(name, "paper").settings
    assert (settings.epochs, settings.batch_size, settings.weight_decay, settings.nesterov) == (
        epochs,
        batch,
        decay,
        True,
    )
    first, second = falls
    expected = [0.1] * first + [0.01] * (second - first) + [0.001] * (epochs - second)
    assert rates(name) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["DARTS", "SNAS", "NASNet-A", "AmoebaNet-B 34.9M"])
def test_searched_networks_follow_one_cosine(name):
    start = 0.024 if name.startswith("Amoeba") else 0.025
    assert rates(name) == pytest.approx([start * (1 + math.cos(math.pi * e / 600)) / 2 for e in range(600)])
    settings = make_plan(name, "paper").settings
    assert settings.nesterov == (name not in ("DARTS", "SNAS")) and settings.clip == (0 if name.startswith("Am") else 5)
    assert rates(name, "short") == pytest.approx([start * (1 + math.cos(math.pi * e / 30)) / 2 for e in range(30)])


def test_enas_restarts_with_doubled_periods():
    expected = [
        1e-4 + (0.05 - 1e-4) * (1 + math.cos(math.pi * e / length)) / 2
        for length in (10, 20, 40, 80, 160, 320)
        for e in range(length)
    ]
    assert len(expected) == 630 and rates("ENAS") == pytest.approx(expected)
    assert make_plan("ENAS", "paper").settings.weight_decay == 4e-4, "L2 of 2e-4 without the usual half"


@pytest.mark.parametrize(("profile", "lengths"), [("fast", [8]), ("gpu", [10]), ("short", [2, 4, 8, 16])])
def test_shorter_profiles_have_whole_cycles_too(profile, lengths):
    expected = [
        1e-4 + (0.05 - 1e-4) * (1 + math.cos(math.pi * e / length)) / 2 for length in lengths for e in range(length)
    ]
    assert rates("ENAS", profile) == pytest.approx(expected)


def test_the_large_nasnet_keeps_its_own_cell_however_narrow():
    for profile in ("fast", "gpu", "short", "paper"):
        small, large = make_plan("NASNet-A", profile), make_plan("NASNet-A 27.6M", profile)
        assert large.options["cell"] == "NASNet-A figure" and "cell" not in small.options


@pytest.mark.parametrize("name", SEARCHED)
def test_drop_path_and_heads_are_those_of_the_sources(name):
    plan = make_plan(name, "paper")
    assert plan.config()["options"] == plan.options and plan.augmentation["cutout"] == 16
    with torch.device("meta"):
        net = study_of(plan).network(plan)
    largest = max(module.probability for module in net.modules() if isinstance(module, DropPath))
    assert largest == {"N": 0.4, "E": 0.4, "A": 0.3, "D": 0.2, "S": 0.2}[name[0]]
    assert net.auxiliary is not None and net.dropout.p == {"A": 0.3, "E": 0.2}.get(name[0], 0.0)
    fast = make_plan(name, "fast")
    assert fast.options["repeats"] == 1 and "auxiliary" not in fast.options


def test_drop_path_follows_the_progress_of_training():
    plan = make_plan("DARTS", "paper")
    study = study_of(plan)
    net = study.network(make_plan("DARTS", "fast"))
    (tell,) = study.watchers(plan, None)
    for epoch, progress in ((0, 0.0), (300, 0.5), (600, 1.0)):
        tell(net, epoch)
        assert {float(m.progress) for m in net.modules() if isinstance(m, DropPath)} == {progress}


def test_the_options_decide_the_outcome():
    plan = make_plan("DARTS", "paper")
    study = study_of(plan)
    assert "options" in study.identity(plan).chosen
    assert "options" not in study.identity(make_plan("WRN 28-10", "paper")).chosen
