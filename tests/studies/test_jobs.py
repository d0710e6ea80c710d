"""Jobs: what is recorded, what each still needs, and the command that does it."""

from __future__ import annotations

import dataclasses

import pytest

from softshare import files, models
from softshare.studies import STUDIES, costs, folding, gpu_list, jobs, make_plan, read_record, study_of, write_record
from softshare.studies.jobs import Job, Places
from softshare.training.processor import processor_name


def test_a_checkpoint_grows_with_its_snapshots():
    """100 layers with 100 templates each: snapshots of their coefficients weigh as much as weights and optimizer."""
    plan = make_plan("SCNN 100 layers", "paper", 10)
    snapshots = 1 + 250 + 2 * 19
    weights = 3 * 4 * models.parameters("SCNN 100 layers")
    assert costs.checkpoint_bytes(plan) == pytest.approx(weights + 4 * snapshots * 100 * 100, rel=0.01)
    for name in ("CNN", "SCNN", "SCNN-5"):
        assert costs.checkpoint_bytes(make_plan(name, "paper", 10)) < 12e6, "these can be carried"


def test_damaged_records_and_folds_of_other_weights_do_not_count(tmp_path, images, write_done):
    places, job = Places(runs=tmp_path), Job("SWRN 40-8-8", 1, "short")
    write_done(job, tmp_path)
    assert jobs.recorded(job, places) and not jobs.recorded(job._replace(folds=True), places)
    (path,) = tmp_path.glob("*.json")
    record = read_record(path)
    for facts, counts in (
        ({"record folded": files.file_checksum(path)}, True),
        ({"record folded": "0"}, False),
    ):
        write_record(folding.fold_identity(record.identity), {}, data=record.data, execution=facts, runs=tmp_path)
        assert jobs.recorded(job._replace(folds=True), places) is counts
    path.write_text(path.read_text()[:200])
    with pytest.raises(ValueError, match=f"is not a record.*; move {path.name} away"):
        jobs.recorded(job, places)


def test_data_are_looked_at_once_per_list(tmp_path, monkeypatch):
    looked = []

    def fingerprint(plan, data=None, download=False):
        looked.append(data)
        return "x"

    monkeypatch.setattr(STUDIES["cifar"], "fingerprint", fingerprint)
    places = Places("cpu", tmp_path, tmp_path)
    for seed in (0, 0, 1):
        job = Job("WRN 28-2 cutout", seed, "short")
        assert not jobs.recorded(job, places) and jobs.still_needs(job, places, None) > 0
    assert len(looked) == 1, "images are the same for all seeds"
    grids = [jobs.path_of(Job("CNN", seed), places) for seed in (0, 1)]
    assert grids[0] != grids[1] and len(places.fingerprints) == 3


def test_time_already_covered_by_a_checkpoint_is_not_needed_again(tmp_path, images):
    places, job = Places("cpu", tmp_path / "r", tmp_path), Job("SWRN 28-14-2*", 3, data="cifar100")
    whole = jobs.still_needs(job, places, None)
    plan = make_plan("SWRN 28-14-2*", "paper", 3)
    folder = tmp_path / study_of(plan).identity(plan, "cifar100").stem
    folder.mkdir()
    (folder / f"step-{391 * 150:08d}-aaaaaaaa-bbbbbbbbbbbbbbbb.safetensors").touch()
    start = jobs.STARTUP
    assert jobs.still_needs(job, places, None) - start == pytest.approx((whole - start) / 4)
    # The checkpoint does not count for another seed or another data set.
    assert jobs.still_needs(job._replace(seed=4), places, None) == whole
    assert jobs.still_needs(job._replace(data="cifar10"), places, None) == whole


def test_what_was_measured_here_tells_how_long_the_next_seed_takes(tmp_path, images):
    places, job = Places("cpu", tmp_path, tmp_path / "c"), Job("WRN 28-2 cutout", 3, "short")
    estimated = jobs.still_needs(job, places, None)

    def write(seed, seconds, **facts):
        plan = make_plan(job.recipe, job.profile, seed)
        facts = {"hardware": processor_name(), "seconds": seconds} | facts
        data = {"source": "x", "fingerprint": "None"}
        write_record(study_of(plan).identity(plan, "None"), {}, data=data, execution=facts, runs=tmp_path)

    write(0, 77.0, hardware="another")
    write(1, 88.0, earlier=[{}])
    assert jobs.still_needs(job, places, None) == estimated
    write(2, 1000.0)
    write(4, 999.0)
    assert jobs.still_needs(job, places, None) == jobs.STARTUP + 1000.0
    write(5, 600.0, processes=2)
    assert jobs.still_needs(job, places, None) == jobs.STARTUP + 1200.0, "on one GPU"
    write(5, 400.0, processes=2)
    assert jobs.still_needs(job._replace(recipe="WRN 16-2 cutout"), places, None) != jobs.STARTUP + 1000.0


def test_only_the_same_run_on_the_same_data_counts_as_done(tmp_path, images):
    def write(seed, data, **change):
        plan = make_plan("WRN 28-10*", "paper", seed)
        plan = dataclasses.replace(plan, augmentation={**plan.augmentation, **change})
        facts = {"source": "x", "fingerprint": data}
        write_record(study_of(plan).identity(plan, data), {}, data=facts, runs=tmp_path)

    def recorded(seed, data, profile="paper"):
        return jobs.recorded(Job("WRN 28-10*", seed, profile, data), Places(runs=tmp_path))

    write(0, "cifar100")
    write(2, "cifar10", cutout=16)
    assert recorded(0, "cifar100") and not recorded(0, "cifar10") and not recorded(5, "cifar100")
    assert not recorded(2, "cifar10") and not recorded(0, "cifar100", "short")
    write(2, "cifar10")
    assert recorded(2, "cifar10") and not recorded(2, "cifar100")


def test_inside_an_application_runs_cannot_be_started(monkeypatch):
    monkeypatch.setattr(jobs.sys, "executable", "/opt/app/editor")
    with pytest.raises(RuntimeError, match="'/opt/app/editor' is not a Python interpreter"):
        Places()


def test_the_folders_of_a_list_may_be_in_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    places = Places(runs="~/r", checkpoints="~/c")
    command = places.command(Job("CNN", 0))
    assert str(tmp_path / "r") in command and str(tmp_path / "c") in command
    assert gpu_list.benchmark_output(places).parent == tmp_path / "r" / "benchmarks"


def test_the_command_of_a_run():
    jobs = [Job("WRN 28-10*", 2, data="cifar100"), Job("CNN", 0, "short"), Job("SWRN 40-8-8", 1, "short", folds=True)]
    places = Places("cuda", "r", "c")
    calls = [" ".join(places.command(job, seconds)[1:]) for job, seconds in zip(jobs, (120, 20, 20), strict=True)]
    where = "--device cuda --runs r --checkpoints c"
    assert calls[0] == f"-m softshare run WRN 28-10* --seed 2 --profile paper {where} --data cifar100"
    assert calls[1] == f"-m softshare run CNN --seed 0 --profile short {where} --checkpoint-seconds 20"
    assert calls[2] == f"-m softshare fold SWRN 40-8-8 --seed 1 --profile short {where} --sweep"
    rehearsed = [" ".join(Places(runs="r", checkpoints="c", rehearse=True).command(job)) for job in jobs]
    assert all(f"--profile fast {where.replace('cuda', 'cpu')} --rehearse" in call for call in rehearsed)


def test_a_run_of_several_gpus_starts_under_torchrun():
    """A fold needs one: nothing is trained."""
    places, job = Places("cuda"), Job("SWRN 50-2", 0, data="/images")
    launcher = "-m torch.distributed.run --standalone --nproc-per-node=4 -m softshare run SWRN 50-2"
    assert " ".join(places.command(job, processes=4)[1:]).startswith(launcher)
    fold = Job("SWRN 40-8-8", 1, "short", folds=True)
    assert places.command(fold, processes=4) == places.command(fold)


def test_where_the_folds_of_a_run_will_be_is_known_before_the_run(tmp_path, images):
    """Their name follows from what decides the run's outcome, not from its record."""
    places, job = Places(runs=tmp_path), Job("SWRN 40-8-8", 1, "short", "cifar10")
    before = jobs.path_of(job._replace(folds=True), places)
    data = {"fingerprint": "cifar10"}
    plan = make_plan(job.recipe, job.profile, job.seed)
    record = write_record(study_of(plan).identity(plan, "cifar10"), {}, data=data, runs=tmp_path)
    assert before == tmp_path / f"{folding.fold_identity(record.identity).stem}.json"
    assert jobs.path_of(job, places) == record.path
