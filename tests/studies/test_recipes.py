"""Recipes: what is chosen for each row and figure of the poster, in each profile."""

from __future__ import annotations

import pytest
import torch

import softshare
from softshare.models import Network
from softshare.studies import PROFILES, RECIPES, STUDIES, find_recipe, make_plan, study_of, tables
from softshare.studies.paths import LADDER

PATHS = [name for name, recipe in RECIPES.items() if recipe.study == "paths"]


def test_every_row_of_the_poster_has_a_recipe():
    for table in tables.TABLES:
        for row in tables.paper_table(table):
            assert row["model"] in RECIPES, row["model"]
    networks = {recipe.network for recipe in RECIPES.values()}
    assert {"WRN 28-6", "SWRN 40-8-8", "CNN", "SCNN", "SCNN-5", "SCNN-1", "SCNN 100 layers"} <= networks
    assert {RECIPES[name].penalty for name in PATHS} == {0.0, 1e-2, 1e-3, 1e-4, 1e-2 / 400}
    searched = {row["model"] for row in tables.paper_table("search")}  # all of these errors are with cutout
    assert all(RECIPES[name].cutout == 16 * (name in searched or name.endswith("cutout")) for name in RECIPES)
    assert all(recipe.study in STUDIES for recipe in RECIPES.values())


def test_every_name_of_a_published_table_stands_for_exactly_one_network():
    """Recipes have "cutout" after the network's name; the other rows are plain names."""
    names = [row["model"].removesuffix(" cutout") for table in tables.TABLES for row in tables.paper_table(table)]
    for table in tables.TABLES:
        models = [row["model"] for row in tables.paper_table(table)]
        assert len(set(models)) == len(models), table
    for name in names:
        assert str(Network.parse(name)) == name


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_builds_the_network_of_its_name(name):
    plan = make_plan(name, "paper")
    assert str(plan.network) == RECIPES[name].network
    with torch.device("meta"):
        net = study_of(plan).network(plan)
    banks = softshare.banks(net)
    assert bool(banks) == plan.network.shared
    dropouts = {module.p for module in net.modules() if isinstance(module, torch.nn.Dropout)}
    if RECIPES[name].study == "cifar" and "WRN" in name:
        assert dropouts == {0.3 if "*" in name else 0.0}
        numbers = RECIPES[name].network.split(" ")[1].rstrip("*").split("-")
        assert net.classifier.in_features == 64 * int(numbers[1])
        if banks:
            layers = (int(numbers[0]) - 4) // 3 - 2
            k = int(numbers[2]) if len(numbers) == 3 else layers
            assert [(bank.num_layers, bank.num_templates) for bank in banks.values()] == [(layers, k)] * 3
    if RECIPES[name].study == "paths":
        layers = 100 if "100" in name else 20
        assert (net.steps if name in LADDER else len(net.layers)) == layers
        if banks:
            assert banks["layers"].num_templates == {"SCNN-5": 5, "SCNN-1": 1}.get(name, layers)


def test_the_papers_schedule():
    settings = make_plan("SWRN 28-10-2*", "paper").settings
    rates = [settings.rate_of(epoch) for epoch in range(settings.epochs)]
    assert settings.epochs == 200 and settings.batch_size == 128 and settings.optimizer == "sgd"
    assert settings.weight_decay == 5e-4 and settings.penalty == 0.0
    for first, last, rate in ((0, 60, 0.1), (60, 120, 0.02), (120, 160, 0.004), (160, 200, 0.0008)):
        assert rates[first:last] == pytest.approx([rate] * (last - first))
    paths = make_plan("SCNN lambda 0.01", "paper")
    assert paths.settings.epochs == 250 and paths.settings.optimizer == "adam" and paths.settings.penalty == 0.01
    assert {paths.settings.rate_of(epoch) for epoch in range(250)} == {0.01}
    assert paths.sizes["boxes"] == [5, 9, 13, 17, 21] and paths.sizes["train"] == 5000 and paths.sizes["side"] == 32


def test_what_each_profile_chooses():
    """Everything that decides the outcome, against literals."""
    sgd = {"optimizer": "sgd", "rate": 0.1, "factor": 0.2, "weight_decay": 5e-4, "penalty": 0.0}
    sgd |= {"milestones": [0.3, 0.6, 0.8]}
    adam = {"optimizer": "adam", "rate": 0.01, "weight_decay": 0.0, "milestones": [], "cycle": 0}
    boxes, whole = [5, 9, 13, 17, 21], {"train": None, "held_out": 0, "test": None, "side": 32}
    wanted = {
        ("WRN 28-6 cutout", "fast"): ("WRN 28-1", 8, 32, sgd, {"train": 2_000, "held_out": 300, "test": 1_000, "side": 16}),
        ("SWRN 28-10-2*", "gpu"): ("SWRN 28-4-2*", 10, 128, sgd, {"train": 45_000, "held_out": 5_000, "side": 32}),
        ("SWRN 40-8-8", "short"): ("SWRN 40-8-8", 30, 128, sgd, whole),
        ("SWRN 40-8-8", "paper"): ("SWRN 40-8-8", 200, 128, sgd, whole),
        ("SCNN lambda 0.001", "gpu"): ("SCNN", 125, 100, adam | {"penalty": 1e-3, "cycle": 25, "milestones": [0.6, 0.8]},
                                       {"obstacles": 0.1, "boxes": boxes}),
        ("CNN", "short"): ("CNN", 50, 100, adam, {"train": 5_000, "boxes": boxes, "obstacles": 0.1, "side": 32}),
        ("SCNN 100 layers", "paper"): ("SCNN 100 layers", 250, 100, adam, {"train": 5_000}),
        ("SCNN", "fast"): ("SCNN width 12", 9, 32, adam | {"cycle": 3, "milestones": [0.34, 0.67], "factor": 0.25},
                           {"side": 12, "boxes": [5, 7, 9], "obstacles": 0.2, "train": 3_000}),
        ("SWRN 50-2", "short"): ("SWRN 50-2", 10, 256, {}, {"side": 224}),
        ("SWRN 50-2", "paper"): ("SWRN 50-2", 100, 256, sgd | {"factor": 0.1, "weight_decay": 1e-4,
                                                             "milestones": [0.3, 0.6, 0.9]}, {"side": 224}),
    }  # fmt: skip
    for (name, profile), (network, epochs, batch, schedule, sizes) in wanted.items():
        plan = make_plan(name, profile, 7)
        found = plan.config()
        assert str(plan.network) == network and plan.seed == 7, (name, profile)
        assert found["schedule"] | schedule == found["schedule"], (name, profile)
        assert found["schedule"]["epochs"] == epochs and found["schedule"]["batch_size"] == batch, (name, profile)
        assert found["sizes"] | sizes == found["sizes"], (name, profile)
    assert make_plan("SWRN 28-6-2 cutout", "paper").augmentation == {"flip": True, "pad": 4, "cutout": 16}
    assert make_plan("SWRN 28-6-2 cutout", "fast").augmentation == {"flip": True, "pad": 2, "cutout": 8}
    penalties = {make_plan("SWRN 40-8-8 with penalty", profile).settings.penalty for profile in PROFILES}
    assert min(penalties) == 1e-5 and 0.0 not in penalties


@pytest.mark.parametrize("name", RECIPES)
def test_profile_fast_is_float32_everywhere_and_the_others_are_free(name):
    fast = make_plan(name, "fast").settings
    assert fast.precision == "float32" and fast.tf32 is False
    assert all(make_plan(name, profile).settings.precision == "auto" for profile in PROFILES[1:])


def test_names_as_people_write_them_and_unknown_ones():
    assert find_recipe(" SWRN 28-6-2,  cutout ").name == "SWRN 28-6-2 cutout"
    assert find_recipe("resnext-29 16x64").name == "ResNeXt-29 16x64"
    with pytest.raises(ValueError, match="unknown recipe 'PNASNet'; known: ResNeXt-29 16x64"):
        make_plan("PNASNet", "fast")
    with pytest.raises(ValueError, match="fast, gpu, short, paper"):
        make_plan("CNN", "quick")
    with pytest.raises(ValueError, match="below 2\\*\\*32"):
        make_plan("SCNN", "fast", 2**32)
