"""All studies and their recipes: one for every row and figure of the poster that our own networks can fill."""

from __future__ import annotations

from .cifar import Cifar
from .imagenet import ImageNet
from .paths import Paths
from .records import check_profile
from .study import Plan, Recipe, Study

STUDIES: dict[str, Study] = {study.name: study for study in (Cifar(), ImageNet(), Paths())}
"""The studies that train, by name; a new study is a new file and an entry here."""

RECIPES: dict[str, Recipe] = {recipe.name: recipe for study in STUDIES.values() for recipe in study.recipes()}
"""All recipes by the poster's names."""


def find_recipe(name: str) -> Recipe:
    """The recipe with that name; capitals, commas and extra spaces do not matter. Raises ValueError for an unknown one."""
    plain = " ".join(str(name).replace(",", " ").split()).replace(" *", "*").lower()
    for known, recipe in RECIPES.items():
        if known.lower() == plain:
            return recipe
    raise ValueError(f"unknown recipe {name!r}; known: {', '.join(RECIPES)}")


def study_of(plan: Plan) -> Study:
    """The study that a plan belongs to."""
    return STUDIES[plan.recipe.study]


def make_plan(name: str, profile: str, seed: int = 0, rehearse: bool = False) -> Plan:
    """What a run will do: a recipe in a profile with everything chosen; with `rehearse`, at toy sizes.

    Raises ValueError for an unknown recipe or profile, or a seed out of range.
    """
    recipe = find_recipe(name)
    check_profile(profile)
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be at least 0 and below 2**32, got {seed}")
    study = STUDIES[recipe.study]
    plan = study.plan(recipe, profile, seed)
    return study.rehearsal(plan) if rehearse else plan
