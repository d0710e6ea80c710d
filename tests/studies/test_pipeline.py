"""The pipeline's plan: which jobs a profile has, in which order, what each needs, and what is due."""

from __future__ import annotations

import itertools
import math
import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softshare.studies import RECIPES, STUDIES, costs, folding, make_plan, pipeline, study_of, write_record
from softshare.studies.jobs import Job, Places, path_of
from softshare.studies.pipeline import Machine, gpus_for, jobs_of, listed, parse_seeds
from softshare.studies.running import checkpoints_folder


@pytest.fixture(autouse=True)
def images(monkeypatch):
    """As if both CIFAR data sets were available, and ImageNet in the folder /images."""
    for name in ("cifar", "imagenet"):
        monkeypatch.setattr(STUDIES[name], "fingerprint", lambda plan, data=None, download=False: f"{data}")


def record(job, places):
    """Write a job's record; a run leaves its weights, too."""
    plan = make_plan(job.recipe, job.profile, job.seed)
    identity = study_of(plan).identity(plan, study_of(plan).fingerprint(plan, job.data))
    if job.folds:
        identity = folding.fold_identity(identity)
    found = write_record(identity, {}, data={"fingerprint": identity.fingerprint}, runs=places.runs)
    folder = checkpoints_folder(found.path, places.checkpoints)
    folder.mkdir(parents=True)
    (folder / "step-00000010-aaaaaaaa-bbbbbbbbbbbbbbbb.safetensors").touch()


def due(jobs, places):
    return [row.job for row in listed(jobs, places, Machine()) if row.waiting]


def test_seeds_are_numbers_or_a_count():
    assert parse_seeds("") is None and parse_seeds("x3") == 3
    assert parse_seeds("0") == [0] and parse_seeds("0, 10-12,11") == [0, 10, 11, 12]
    for wrong in ("x0", "x", "3-1", "1,x2", "x1-3", "-1", "a", "1;2"):
        with pytest.raises(ValueError, match="seeds must be numbers"):
            parse_seeds(wrong)


@given(st.lists(st.integers(0, 50), min_size=1, unique=True))
def test_seeds_are_told_as_they_are_read(numbers):
    assert parse_seeds(pipeline._ranges(numbers)) == sorted(numbers)


def test_a_profile_has_all_recipes_on_all_their_data_with_its_seeds():
    jobs = jobs_of("paper", data=["/images", "cifar10", "cifar100"])
    assert len(set(jobs)) == len(jobs) and {job.recipe for job in jobs} == set(RECIPES)
    runs = {job for job in jobs if not job.folds}
    assert {job.data for job in runs if job.recipe == "WRN 28-10*"} == {"cifar10", "cifar100"}
    assert {job.data for job in runs if RECIPES[job.recipe].study == "imagenet"} == {"/images"}
    assert {job.data for job in runs if RECIPES[job.recipe].study == "paths"} == {None}
    for recipe in RECIPES.values():
        numbers = sorted({job.seed for job in runs if job.recipe == recipe.name})
        assert len(numbers) == 5 and numbers == list(range(numbers[0], numbers[0] + 5))
    assert {job.recipe for job in jobs if job.folds} == {"SWRN 40-8-8", "SWRN 40-8-8 with penalty"}
    assert all(job.run in runs for job in jobs if job.folds)


@pytest.mark.parametrize(
    "recipe, first",
    [("CNN", 10), ("SCNN shuffled", 10), ("SWRN 40-8-8", 1), ("SWRN 40-8-8 shuffled", 1), ("WRN 28-10*", 0)],
)
def test_seeds_start_where_the_rules_begin_to_count(recipe, first):
    assert {job.seed for job in jobs_of("short", 2, [recipe])} == {first, first + 1}
    assert {job.seed for job in jobs_of("short", [0, 7], [recipe])} == {0, 7}, "unless they are named"


def test_recipes_are_chosen_by_name_pattern_study_or_place():
    def names(*only):
        return {job.recipe for job in jobs_of("paper", only=only)}

    assert names("WRN 28-10*") == {"WRN 28-10*"}, "a name, not a pattern"
    assert names("WRN 28-?0", "CNN") == {"WRN 28-10", "CNN"}
    assert names("imagenet") == {"WRN 50-2", "DenseNet-264", "ResNet-200", "SWRN 50-2"}
    rows = names("table*")
    assert rows == {name for name, recipe in RECIPES.items() if recipe.shows.startswith("table")}
    with pytest.raises(ValueError, match=r"no recipe fits 'SWRN 29\*': give names"):
        names("SWRN 29*")
    assert {job.data for job in jobs_of("paper", only=["WRN 28-10*"], data=["cifar100"])} == {"cifar100"}
    with pytest.raises(ValueError, match="no recipe of those asked for is run on cifar100"):
        jobs_of("paper", only=["DARTS"], data=["cifar100"])


def test_what_is_worth_most_comes_first_seed_by_seed():
    jobs = jobs_of("paper", 2)
    assert jobs[:4] == [Job(name, seed) for seed in (10, 11) for name in ("CNN", "SCNN")]
    assert [job for job in jobs if job.recipe == "SWRN 40-8-8"][:2] == [
        Job("SWRN 40-8-8", 1, data="cifar10"), Job("SWRN 40-8-8", 1, data="cifar10", folds=True)
    ]  # fmt: skip
    steps = [row.step for row in listed(jobs[:6], Places(), Machine())]
    assert [step["priority"] for step in steps] == [6, 5, 4, 3, 2, 1]


def test_profile_fast_takes_the_first_data_set_or_the_digits():
    assert {job.data for job in jobs_of("fast", only=["cifar"])} == {None}


def test_what_has_its_record_is_up_to_date(tmp_path):
    places = Places(runs=tmp_path / "r", checkpoints=tmp_path / "c")
    jobs = jobs_of("short", 1, ["CNN", "SCNN", "SWRN 40-8-8", "WRN 28-2 cutout"])
    assert due(jobs, places) == jobs and len(jobs) == 5
    for job in jobs:
        record(job, places)
    assert due(jobs, places) == []


@pytest.mark.parametrize("changed, again", [("paths", {"CNN", "SCNN"}), ("cifar", {"SWRN 40-8-8", "WRN 28-2 cutout"}),
                                            ("folds", set())])  # fmt: skip
def test_a_changed_version_makes_due_what_depends_on_it_and_nothing_else(tmp_path, monkeypatch, changed, again):
    places = Places(runs=tmp_path / "r", checkpoints=tmp_path / "c")
    jobs = jobs_of("short", 1, ["CNN", "SCNN", "SWRN 40-8-8", "WRN 28-2 cutout"])
    for job in jobs:
        record(job, places)
    if changed == "folds":
        monkeypatch.setattr(folding, "VERSION", folding.VERSION + 1)
    else:
        monkeypatch.setattr(STUDIES[changed], "version", STUDIES[changed].version + 1)
    assert due(jobs, places) == [job for job in jobs if job.recipe in again or (job.folds and changed == "folds")]


def test_what_cannot_be_done_is_left_out_with_its_reason(tmp_path, monkeypatch):
    places = Places(runs=tmp_path / "r", checkpoints=tmp_path / "c")
    deep = Job("SWRN 40-8-8", 1, "short", "cifar10")
    record(deep, places)
    for path in (tmp_path / "c").rglob("step-*"):
        path.unlink()
    damaged = path_of(Job("CNN", 10, "short"), places)
    damaged.write_text("{}")

    def missing(plan, data=None, download=False):
        raise FileNotFoundError("no copy of CIFAR-100")

    monkeypatch.setattr(STUDIES["imagenet"], "fingerprint", missing)
    jobs = [
        deep._replace(folds=True),
        Job("CNN", 10, "short"),
        Job("SWRN 50-2", 0, data="/images"),
        Job("SCNN", 10, "short"),
    ]
    jobs.append(Job("SWRN 50-2", 0))
    rows = listed(jobs, places, Machine())
    assert [row.step is None for row in rows] == [True, True, True, False, True]
    assert [row.damaged for row in rows] == [False, True, False, False, False]
    assert "the weights are not here" in rows[0].why_not and "no copy of CIFAR-100" in rows[2].why_not
    assert "no folder with ImageNet's images" in rows[4].why_not
    assert f"move {damaged.name} away" in rows[1].why_not
    assert all(row.seconds > 0 for row in rows), "what it would take is told nevertheless"


def test_the_time_of_a_job_follows_from_the_cost_model(tmp_path):
    places = Places("cuda", tmp_path)
    job, speed = Job("WRN 28-10*", 0, data="cifar10"), costs.Speed(1e12)
    (row,) = listed([job], places, Machine(gpus=1, speed=speed))
    expected = costs.expected_seconds(make_plan(job.recipe, "paper", 0), True, speed) + 25
    assert row.seconds == pytest.approx(expected) and row.step["gpus"] == 1
    assert row.step["minutes"] == math.ceil((pipeline.SLACK * expected + 300) / 60) and row.step["attempts"] == 1
    # Where no job may take longer than a partition allows, it is started again until it is through.
    hours = expected / 3600 / 4.5
    (row,) = listed([job], places, Machine(gpus=1, speed=speed, hours=hours))
    assert row.step["minutes"] == math.ceil(60 * hours) and row.step["attempts"] == 1 + math.floor(pipeline.SLACK * 4.5)
    # With several GPUs per job it gets as many as bring it under that, and starts under torchrun.
    (row,) = listed([job], places, Machine(gpus=16, speed=speed, hours=hours))
    assert row.step["gpus"] == 8 and "--nproc-per-node=8" in shlex.split(row.step["command"])
    assert row.step["seconds"] == pytest.approx(expected / 8, abs=0.1)


@given(st.floats(1, 1e7), st.integers(1, 64), st.floats(0.1, 100))
def test_a_job_gets_no_more_gpus_than_it_needs_and_may_have(seconds, most, hours):
    found = gpus_for(seconds, most, hours)
    assert 1 <= found <= most and math.log2(found).is_integer()
    assert seconds / found <= 3600 * hours or 2 * found > most
    assert found == 1 or seconds / (found / 2) > 3600 * hours


@given(st.lists(st.integers(1, 50), min_size=1, max_size=6), st.integers(1, 3))
def test_the_time_on_several_machines_is_near_the_shortest_possible(seconds, machines):
    """Against all ways to divide the jobs."""

    def longest(places):
        return max(sum(each for each, place in zip(seconds, places, strict=True) if place == here) for here in places)

    shortest = min(map(longest, itertools.product(range(machines), repeat=len(seconds))))
    assert shortest <= pipeline.makespan(seconds, machines) <= 4 / 3 * shortest


def test_there_must_be_a_machine():
    with pytest.raises(ValueError, match="machines must be at least 1, got 0"):
        pipeline.makespan([1.0], 0)


def test_memory_grows_with_activations_and_weights():
    """Peaks in GB, measured on a Xeon in float32 with one thread: the estimate is above, by no more than about half."""
    for name, profile, peak in (
        ("CNN", "fast", 0.38), ("WRN 28-10", "fast", 0.57), ("WRN 16-2 cutout", "short", 1.10), ("SCNN", "short", 1.03),
        ("SWRN 28-2-2 cutout", "short", 1.43), ("WRN 28-6", "short", 2.86), ("DenseNet 100-24", "short", 16.1),
    ):  # fmt: skip
        estimate = costs.memory_bytes(make_plan(name, profile), gpu=False) / 1e9
        assert peak < estimate < 1.5 * peak + 1.1, (name, estimate)


def test_the_list_tells_hours_and_their_sum(tmp_path, capsys):
    places = Places(runs=tmp_path / "r", checkpoints=tmp_path / "c")
    jobs = jobs_of("short", [0, 1, 2, 5], ["CNN", "WRN 16-2 cutout"])
    record(Job("CNN", 0, "short"), places)
    rows = listed(jobs, places, Machine())
    hours = pipeline.print_list(rows, Machine(), "machine")
    lines = capsys.readouterr().out.splitlines()
    assert hours == pytest.approx(sum(row.seconds for row in rows) / 3600)
    assert lines[1].startswith("CNN ") and "0-2, 5 " in lines[1] and "3 of 4" in lines[1]
    assert lines[2].startswith("WRN 16-2 cutout, cifar10 ") and "4 of 4" in lines[2]
    time = costs.duration(3600 * hours)
    assert lines[-1].startswith(f"7 of 8 jobs to do: {time} one after another on one machine, at an assumed speed")
