"""The recipes: one for every row and figure of the poster that our own networks can fill, in three profiles.

Profile "fast" is a toy of the same kind (same depth and templates, little width, few and small images) that runs in seconds
on two CPU cores, "gpu" the poster's network with a schedule of minutes on one GPU, "paper" the paper's own schedule.
"""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from . import models
from .records import PROFILES
from .training import Settings


@dataclass(frozen=True)
class Recipe:
    """One row or figure of the poster.

    Attributes:
        name: what the poster calls it.
        network: by the names of `softshare.models.build`.
        task: "cifar", "paths" or "imagenet".
        shows: where it stands on the poster, or what it is the control for.
        data: names of data sets that it is run on, for `softshare.images.load`; () for generated grids.
        cutout: side of the hole at 32 x 32 pixels; 0: none.
        penalty: lambda of the recurrence penalty.
        layers: of a grid network.
        dense_epochs: in so many first epochs similarities are recorded 20 times an epoch.
    """

    name: str
    network: str
    task: str
    shows: str
    data: tuple[str, ...] = ("cifar10",)
    cutout: int = 0
    penalty: float = 0.0
    layers: int = 20
    dense_epochs: int = 0


_PARAMETERS = "table Improved Parameter Efficiency"
_SEARCH = "table Comparison to Neural Architecture Search"
_CURRICULUM = "figure of the shortest-path curriculum"


def _recipes() -> dict[str, Recipe]:
    both = ("cifar10", "cifar100")
    names = ["WRN 28-10", "WRN 28-10*", "SWRN 28-10*", "SWRN 28-10-2*", "SWRN 28-14*", "SWRN 28-14-2*"]
    names += ["SWRN 28-18*", "SWRN 28-18-2*"]
    recipes = [Recipe(name, name, "cifar", _PARAMETERS, both) for name in names]
    for name in ("WRN 28-10", "SWRN 28-6-2", "SWRN 28-10-2", "SWRN 28-14-2"):
        recipes.append(Recipe(f"{name} cutout", name, "cifar", _SEARCH, cutout=16))
    recipes += [
        Recipe("WRN 28-6 cutout", "WRN 28-6", "cifar", "control for SWRN 28-6-2 cutout", cutout=16),
        Recipe("WRN 28-6", "WRN 28-6", "cifar", "control for WRN 28-6 cutout", both),
        Recipe("SWRN 40-8-8", "SWRN 40-8-8", "cifar", "figures of similarity and folding", dense_epochs=5),
        Recipe("WRN 50-2", "WRN 50-2", "imagenet", "table ImageNet", ()),
        Recipe("SWRN 50-2", "SWRN 50-2", "imagenet", "table ImageNet", ()),
        Recipe("CNN", "CNN", "paths", _CURRICULUM, ()),
        Recipe("SCNN", "SCNN", "paths", _CURRICULUM, ()),
        Recipe("SCNN-5", "SCNN-5", "paths", f"{_CURRICULUM}, fewer templates", ()),
        Recipe("SCNN-1", "SCNN-1", "paths", f"{_CURRICULUM}, one template", ()),
    ]
    for penalty in (1e-2, 1e-3, 1e-4):
        shows = f"{_CURRICULUM}, regularised"
        recipes.append(Recipe(f"SCNN lambda {penalty:g}", "SCNN", "paths", shows, (), penalty=penalty))
    deep = "figure of the similarity of a 100-layer network over training"
    recipes.append(Recipe("SCNN 100 layers", "SCNN-100", "paths", deep, (), layers=100, dense_epochs=2))
    return {recipe.name: recipe for recipe in recipes}


RECIPES = _recipes()
"""All recipes by the poster's names."""


def find_recipe(name: str) -> Recipe:
    """The recipe of a name; ``, cutout`` and spaces may be written as people do. Raises ValueError for an unknown one."""
    plain = " ".join(str(name).replace(",", " ").split())
    if plain not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; known: {', '.join(RECIPES)}")
    return RECIPES[plain]


@dataclass(frozen=True)
class Plan:
    """A recipe in one profile with everything chosen: what a record's `config` holds.

    Attributes:
        network: the one that is built; in profile "fast" a narrow relative of the recipe's.
        settings: without the seed.
        sizes: numbers of examples, sides, phases.
    """

    recipe: Recipe
    profile: str
    network: str
    settings: Settings
    sizes: dict[str, Any] = field(default_factory=dict)

    def config(self) -> dict[str, Any]:
        """As JSON."""
        settings = asdict(self.settings) | {"milestones": list(self.settings.milestones)}
        chosen = {"cutout": self.recipe.cutout, "layers": self.recipe.layers, "dense_epochs": self.recipe.dense_epochs}
        return {"network": self.network, "task": self.recipe.task, "settings": settings, **chosen, "sizes": self.sizes}


def plan(name: str, profile: str, seed: int = 0) -> Plan:
    """What `run` will do. Raises ValueError for an unknown recipe or profile."""
    recipe = find_recipe(name)
    if profile not in PROFILES:
        raise ValueError(f"unknown profile {profile!r}; known: {', '.join(PROFILES)}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be at least 0 and below 2**32, got {seed}")
    fast, paper = profile == "fast", profile == "paper"
    network = recipe.network
    if recipe.task == "cifar":
        if fast:  # the same depth and templates, width 1
            family, numbers = network.split(" ")
            depth, _, *templates = numbers.rstrip("*").split("-")
            network = f"{family} {'-'.join([depth, '1', *templates])}{'*' * network.endswith('*')}"
        sizes: dict[str, Any] = {"train": None, "held_out": 0, "test": None, "side": 32}
        if not paper:  # the seeded split of the authors' code is 90 / 10
            sizes |= {"train": 45_000, "held_out": 5_000}
        if fast:
            sizes |= {"train": 300, "held_out": 100, "test": 200, "side": 16}
        epochs = {"fast": 2, "gpu": 10, "paper": 200}[profile]
        settings = Settings(epochs=epochs, batch_size=50 if fast else 128, penalty=recipe.penalty, seed=seed)
    elif recipe.task == "paths":
        sizes = {"side": 32, "boxes": [5, 9, 13, 17, 21], "obstacles": 0.1, "train": 5_000, "held_out": 1_000}
        sizes |= {"epochs_a_phase": {"fast": 1, "gpu": 10, "paper": 50}[profile], "width": 32}
        if fast:
            sizes |= {"side": 12, "boxes": [5, 9], "train": 200, "held_out": 100, "width": 8}
        epochs = sizes["epochs_a_phase"] * len(sizes["boxes"])
        settings = Settings(
            epochs=epochs,
            batch_size=100,
            optimizer="adam",
            rate=0.01,
            milestones=(),
            weight_decay=0.0,
            penalty=recipe.penalty,
            seed=seed,
        )
    else:
        # The recipe of the poster's ImageNet rows is not known; this is the usual one for such networks.
        sizes = {"side": 64 if fast else 224}
        settings = Settings(
            epochs={"fast": 1, "gpu": 5, "paper": 100}[profile],
            batch_size=32 if fast else 256,
            milestones=(0.3, 0.6, 0.9),
            factor=0.1,
            weight_decay=1e-4,
            seed=seed,
        )
    return Plan(recipe, profile, network, settings, sizes)


CPU_SPEED, GPU_SPEED = 55e9, 8e12
"""Multiply-adds a second in training, for estimates. CPU: measured, one thread of a 2023 Xeon in float32 (WRN 16-4 at 47
images/s). GPU: assumed, a quarter of what a T4 is built for in float16; not measured."""

_LAUNCHES = 3e-4  # seconds a layer and step that a GPU needs however small the layer; assumed, not measured


@functools.lru_cache(maxsize=64)
def multiply_adds(network: str, layers: int, side: int, width: int) -> float:
    """Multiply-adds of one example's forward pass, those of the plain network: mixing is not counted."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        if "CNN" in network:
            model: nn.Module = models.gridnet(layers, width)
            x = torch.zeros(1, 2, side, side)
        else:
            family, numbers = network.removeprefix("S").split(" ")
            model = models.build(f"{family} {'-'.join(numbers.rstrip('*').split('-')[:2])}").eval()
            x = torch.zeros(1, 3, side, side)
    with FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops() / 2


def expected_seconds(plan: Plan, gpu: bool, speed: float | None = None) -> float:
    """An estimate of a run's time, from its network's multiply-adds (three times forward).

    Args:
        speed: multiply-adds a second; default: `CPU_SPEED` or `GPU_SPEED`.
    """
    sizes, settings = plan.sizes, plan.settings
    examples = sizes.get("train") or {"cifar": 50_000, "imagenet": 1_281_167}[plan.recipe.task]
    forward = multiply_adds(plan.network, plan.recipe.layers, sizes["side"], sizes.get("width", 0))
    seconds = 3 * forward * examples * settings.epochs / (speed or (GPU_SPEED if gpu else CPU_SPEED))
    if gpu and plan.recipe.task == "paths":
        return max(seconds, _LAUNCHES * plan.recipe.layers * examples / settings.batch_size * settings.epochs)
    return seconds
