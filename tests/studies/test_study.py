"""Identities hash what decides an outcome, and nothing else; they must never change by accident."""

from __future__ import annotations

import dataclasses

import pytest

from softshare.studies import PROFILES, RECIPES, STUDIES, Plan, make_plan, study_of
from softshare.training.settings import Schedule, Settings

GOLDEN = {  # of data with the fingerprint "x"
    ("WRN 28-10", "paper", 0): "c884f585fca0",
    ("WRN 28-10*", "paper", 0): "887b315aac37",
    ("SWRN 28-10-2*", "paper", 1): "f0e2b24c454d",
    ("SWRN 28-10-2 cutout", "paper", 0): "2c862dfde57e",
    ("SWRN 28-6-2 cutout", "short", 3): "db50550c9b0f",
    ("SWRN 28-10-2", "gpu", 0): "737214a2c94a",
    ("SWRN 40-8-8", "short", 0): "03f4eda1dddc",
    ("SWRN 40-8-8 with penalty", "paper", 0): "28289cae7078",
    ("SWRN 50-2", "paper", 0): "f995a377f4e8",
    ("CNN", "paper", 10): "6ef040fc4416",
    ("SCNN", "paper", 10): "4962f7ebca01",
    ("SCNN lambda 0.01", "short", 0): "b42bf1e45556",
    ("SCNN 100 layers", "gpu", 2): "4047e87c54c4",
    ("CNN", "gpu", 0): "15ac0f6179f0",
}


def identity(plan: Plan, fingerprint: str = "x"):
    return study_of(plan).identity(plan, fingerprint)


@pytest.mark.parametrize(("recipe", "profile", "seed", "expected"), [(*key, value) for key, value in GOLDEN.items()])
def test_golden_identities(recipe, profile, seed, expected):
    """A record must always be found by the identity it was made with: raise the study's version if its meaning changes."""
    assert identity(make_plan(recipe, profile, seed)).hash == expected


@dataclasses.dataclass(frozen=True)
class LaterSettings(Settings):
    """Settings as a later version may have them: with one more field of the schedule."""

    warmup: int = 0

    def schedule(self):
        return super().schedule() | {"warmup": self.warmup}


@pytest.mark.parametrize("name", STUDIES)
def test_a_field_added_with_a_default_changes_no_identity(name, monkeypatch):
    study = STUDIES[name]
    plan = study.plan(study.recipes()[0], "paper", 3)
    before = study.identity(plan, "x")
    later = {**study.defaults, "schedule": {**study.defaults["schedule"], "warmup": 0}}
    monkeypatch.setattr(study, "defaults", later, raising=False)
    fields = {field.name: getattr(plan.settings, field.name) for field in dataclasses.fields(plan.settings)}
    assert study.identity(dataclasses.replace(plan, settings=LaterSettings(**fields)), "x") == before
    other = dataclasses.replace(plan, settings=LaterSettings(**fields, warmup=5))
    assert study.identity(other, "x").hash != before.hash


@pytest.mark.parametrize("name", STUDIES)
def test_every_field_of_the_schedule_has_its_meaning_written_down(name):
    """Otherwise a default changed elsewhere would change what a run does but not its identity, or the reverse."""
    fields = {field.name for field in dataclasses.fields(Schedule)} - {"epochs", "seed"}
    assert set(STUDIES[name].defaults["schedule"]) == fields


def test_what_a_default_leaves_out_and_what_it_does_not():
    plan = make_plan("WRN 28-10", "paper")
    assert identity(plan).chosen == {"schedule": {"epochs": 200}}
    cutout = make_plan("WRN 28-10 cutout", "paper")
    assert identity(cutout).chosen == {"augmentation": {"cutout": 16}, "schedule": {"epochs": 200}}
    changed = dataclasses.replace(plan, settings=dataclasses.replace(plan.settings, rate=0.05))
    assert identity(changed).chosen["schedule"] == {"epochs": 200, "rate": 0.05}


def test_how_it_runs_is_not_part_of_an_identity():
    plan = make_plan("SWRN 28-10-2*", "paper")
    for change in ({"precision": "float32"}, {"tf32": False}, {"channels_last": False}, {"compile": True}):
        assert identity(dataclasses.replace(plan, settings=dataclasses.replace(plan.settings, **change))) == identity(
            plan
        )


def test_whatever_decides_the_outcome_changes_it():
    plan = make_plan("SCNN", "short")
    found = {identity(plan).hash, identity(plan, "y").hash}
    for field in dataclasses.fields(Schedule):
        value = getattr(plan.settings, field.name)
        others = {"optimizer": "sgd", "milestones": (0.5,), "cycle": 3, "weight_decay": 0.5, "penalty": 0.5, "seed": 3}
        others |= {"annealing": "cosine", "least_rate": 0.5, "nesterov": False, "clip": 1.0}
        other = {field.name: others.get(field.name, value * 2)}
        changed = dataclasses.replace(plan, settings=dataclasses.replace(plan.settings, **other))
        found.add(identity(changed).hash)
    for part in ("sizes", "augmentation", "options"):
        found.add(identity(dataclasses.replace(plan, **{part: {**getattr(plan, part), "train": 3}})).hash)
    found.add(identity(dataclasses.replace(plan, network=plan.network.narrowed())).hash)
    assert len(found) == 2 + len(dataclasses.fields(Schedule)) + 3 + 1


def test_no_two_plans_share_an_identity():
    plans = [make_plan(name, profile, seed) for name in RECIPES for profile in PROFILES for seed in (0, 1)]
    assert len({identity(plan).hash for plan in plans}) == len(plans)


@pytest.mark.parametrize("name", RECIPES)
def test_a_rehearsal_is_the_same_kind_at_toy_size(name):
    plan, toy = make_plan(name, "fast"), make_plan(name, "fast", rehearse=True)
    assert toy.recipe == plan.recipe and toy.settings.epochs <= plan.settings.epochs
    assert identity(toy).hash != identity(plan).hash
    assert (toy.network.family, toy.network.depth) == (plan.network.family, plan.network.depth)
