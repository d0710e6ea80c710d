"""The GPU list: the order of its runs, what fits into the time, what is already done, and how runs end."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from softshare import models
from softshare.studies import RECIPES, STUDIES, find_records, gpu_list, make_plan, study_of, write_record
from softshare.studies.gpu_list import Entry, Job, Places
from softshare.training.processor import processor_name


def test_entries_are_ordered_by_value():
    entries = gpu_list.entries()
    assert entries[0].jobs == () and [len(entry.jobs) for entry in entries[1:8]] == [10, 2, 10, 10, 40, 1, 10]
    for entry, first in ((entries[1], 10), (entries[3], 15)):
        assert entry.jobs == tuple(Job(name, seed) for seed in range(first, first + 5) for name in ("CNN", "SCNN"))
    deep = Job("SWRN 40-8-8", 1, "short")
    assert entries[2].jobs == (deep, deep._replace(folds=True))
    for entry, width, seeds in ((entries[5], 2, 8), (entries[11], 6, 3), (entries[12], 10, 1)):
        for seed in range(seeds):
            some = entry.jobs[5 * seed : 5 * seed + 5]
            assert {job.seed for job in some} == {seed} and {job.profile for job in some} == {"short"}
            assert {job.recipe for job in some} == {
                f"{name} cutout" for name in (f"WRN 28-{width}", f"SWRN 28-{width}-2", f"SWRN 28-{width}-1",
                                              f"SWRN 28-{width}", f"WRN 16-{width}")
            }  # fmt: skip
    assert {job.recipe for entry in entries[14:] for job in entry.jobs} == {
        name for name in RECIPES if name.endswith("*")
    }
    jobs = [job for entry in entries for job in entry.jobs]
    assert len(set(jobs)) == len(jobs)
    for job in jobs:
        make_plan(job.recipe, job.profile, job.seed)
    assert {name for name in RECIPES if RECIPES[name].study == "paths"} <= {job.recipe for job in jobs}


def test_networks_of_equal_parameters_are_about_equal():
    """What their recipes say of them."""
    for width in (2, 6, 10):
        sizes = [models.parameters(f"{name}-{width}{k}") for name, k in (("WRN 16", ""), ("SWRN 28", "-2"))]
        assert sizes[0] == pytest.approx(sizes[1], rel=0.01)


@pytest.fixture
def images(monkeypatch):
    """As if both CIFAR data sets were available."""
    monkeypatch.setattr(
        STUDIES["cifar"], "fingerprint", lambda plan, data=None, download=False: f"{data}", raising=False
    )


def write_done(job, runs):
    plan = make_plan(job.recipe, job.profile, job.seed)
    if not job.folds:
        data = {"fingerprint": study_of(plan).fingerprint(plan, job.data)}
        write_record(study_of(plan).identity(plan, data["fingerprint"]), {}, data=data, runs=runs)


@pytest.fixture
def clock(monkeypatch, images):
    """A list whose jobs take as long as they are expected to, on a GPU; yields what was done, with its limit."""
    now, calls = [0.0], []
    monkeypatch.setattr(gpu_list.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(gpu_list, "_hardware", lambda places: "H")

    def done(command, limit, next_time):
        if command[3] == "bench":
            return "done after 1 s"
        job = Job(command[4], int(command[6]), command[8], folds=command[3] == "fold")
        needs = gpu_list.still_needs(job, Places("cuda", command[12], command[14]), None)
        now[0] += min(needs, limit)
        calls.append((job, limit))
        if needs > limit:
            return f"stopped at its limit; {next_time}"
        write_done(job, command[12])
        return "done after 1 s"

    monkeypatch.setattr(gpu_list, "done", done)
    return calls


def worked(clock, monkeypatch, tmp_path, minutes, carry, *jobs):
    monkeypatch.setattr(gpu_list, "entries", lambda: [Entry("benchmark"), *(Entry("e", (job,)) for job in jobs)])
    assert gpu_list.run_list(minutes, Places("cuda", tmp_path, tmp_path, carry)) == 0
    return [job for job, _ in clock]


def test_what_fits_is_done_and_what_can_go_on_is_begun(clock, monkeypatch, tmp_path):
    """In half an hour: a run of hours with large checkpoints is skipped, one with small checkpoints is begun."""
    small, large, short = Job("SCNN", 10), Job("SWRN 28-10-2*", 0), Job("CNN", 10)
    monkeypatch.setattr(gpu_list.costs, "LAUNCH_SECONDS", 1e-2)
    assert worked(clock, monkeypatch, tmp_path / "a", 30, 12.0, large, small) == [small]
    assert clock[0][1] <= 30 * 60, "under the time left"
    clock.clear()
    assert worked(clock, monkeypatch, tmp_path / "b", 30, math.inf, large, small, short) == [large], (
        "where checkpoints stay"
    )


def test_a_checkpoint_grows_with_its_snapshots():
    """100 layers with 100 templates each: snapshots of their coefficients weigh as much as weights and optimizer."""
    plan = make_plan("SCNN 100 layers", "paper", 10)
    snapshots = 1 + 250 + 2 * 19
    weights = 3 * 4 * models.parameters("SCNN 100 layers")
    assert gpu_list.costs.checkpoint_bytes(plan) == pytest.approx(weights + 4 * snapshots * 100 * 100, rel=0.01)
    for name in ("CNN", "SCNN", "SCNN-5"):
        assert gpu_list.costs.checkpoint_bytes(make_plan(name, "paper", 10)) < 12e6, "these can be carried"


def test_jobs_that_were_stopped_get_a_second_turn(clock, monkeypatch, tmp_path):
    """A run that takes three times as long as expected is stopped at its limit; the others come first, then it again."""
    one, other = Job("SCNN", 10), Job("CNN", 10)
    real, asked = gpu_list.still_needs, []

    def slow(job, places, speed):
        asked.append(job)
        return real(job, places, speed) * (5 if job == one and len(asked) == 2 else 1)  # asked by `done`

    monkeypatch.setattr(gpu_list, "still_needs", slow)
    assert worked(clock, monkeypatch, tmp_path, 6000, 12.0, one, other) == [one, other, one]


def test_a_run_that_cannot_go_on_elsewhere_may_take_all_the_time(clock, monkeypatch, tmp_path):
    deep = Job("SWRN 40-8-8", 1, "short")
    needs = gpu_list.still_needs(deep, Places("cuda", tmp_path, tmp_path), None)
    assert worked(clock, monkeypatch, tmp_path, 1.2 * needs / 60, 12.0, deep) == []
    assert worked(clock, monkeypatch, tmp_path, 10 * needs / 60, 12.0, deep) == [deep]
    assert clock[0][1] == pytest.approx(10 * needs)


def test_damaged_records_and_folds_of_other_weights_do_not_count(tmp_path, images):
    places, job = Places(runs=tmp_path), Job("SWRN 40-8-8", 1, "short")
    write_done(job, tmp_path)
    assert gpu_list.recorded(job, places) and not gpu_list.recorded(job._replace(folds=True), places)
    (path,) = tmp_path.glob("*.json")
    record = gpu_list.read_record(path)
    for facts, counts in (
        ({"record folded": gpu_list.files.file_checksum(path)}, True),
        ({"record folded": "0"}, False),
    ):
        write_record(gpu_list.folding.fold_identity(record), {}, data=record.data, execution=facts, runs=tmp_path)
        assert gpu_list.recorded(job._replace(folds=True), places) is counts
    path.write_text(path.read_text()[:200])
    with pytest.raises(ValueError, match=f"is not a record.*; move {path.name} away"):
        gpu_list.recorded(job, places)


def test_a_benchmark_counts_for_its_hardware_and_for_steps_as_they_are_now(tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr(gpu_list, "_hardware", lambda places: "NVIDIA X")
    place = gpu_list._benchmark_output(Places("cuda", tmp_path))
    assert place == tmp_path / "benchmarks" / "nvidia-x.json"
    for steps, quick in (({}, False), ({"captured": True}, True), ({"captured": True}, False)):
        record = {"steps": {"batch": 10, "seconds": {"ours": [2.0]}} | steps, "quick": quick}
        record |= {"ceiling": {"multiply-adds an image": 7.0}}
        monkeypatch.setattr(gpu_list, "load_benchmark", lambda path, record=record: record)
        monkeypatch.setattr(gpu_list.costs, "load_benchmark", lambda path, record=record: record)
        found.append((gpu_list._is_full_benchmark(place), gpu_list.costs.measured_speed(place)))
    speed = gpu_list.costs.Speed
    assert found == [(False, speed(105.0)), (False, None), (True, speed(105.0, True))]


def test_costs_are_told_before_anything_starts(tmp_path, monkeypatch, images, capsys):
    jobs = (Job("CNN", 10), Job("CNN", 11), Job("WRN 28-2 cutout", 0, "short"))
    entries = [Entry("benchmark"), Entry("both", jobs), Entry("big", (Job("SWRN 50-2", 0),))]
    monkeypatch.setattr(gpu_list, "entries", lambda: entries)
    monkeypatch.setattr(gpu_list, "done", lambda *_: 1 / 0)
    places = Places("cpu", tmp_path, tmp_path)
    expected = sum(gpu_list.still_needs(job, places, None) for job in jobs[1:]) / 3600
    write_done(jobs[0], tmp_path)
    assert gpu_list.tell_costs(places) == pytest.approx(expected)
    output = capsys.readouterr().out
    assert "2 of 3 jobs to do" in output and "0 of 1 jobs to do, 1 without data" in output
    assert f"{expected:.1f} h in all on {processor_name()}, from an assumed speed" in output


def test_data_are_looked_at_once_per_list(tmp_path, monkeypatch):
    looked = []

    def fingerprint(plan, data=None, download=False):
        looked.append(data)
        return "x"

    monkeypatch.setattr(STUDIES["cifar"], "fingerprint", fingerprint)
    places = Places("cpu", tmp_path, tmp_path)
    for seed in (0, 0, 1):
        job = Job("WRN 28-2 cutout", seed, "short")
        assert not gpu_list.recorded(job, places) and gpu_list.still_needs(job, places, None) > 0
    assert len(looked) == 2, "once per seed"


def test_a_run_is_begun_only_if_its_folds_fit_too(clock, monkeypatch, tmp_path, capsys):
    deep = Job("SWRN 40-8-8", 1, "short")
    entry = Entry("deep", (deep, deep._replace(folds=True)))
    monkeypatch.setattr(gpu_list, "entries", lambda: [entry])
    run, folds = (gpu_list.still_needs(job, Places("cuda", tmp_path, tmp_path), None) for job in entry.jobs)
    for spare, begun in ((-1, []), (1, [deep])):
        gpu_list.run_list(
            (gpu_list.MARGIN * (run + folds) + spare) / 60, Places("cuda", tmp_path / "r", tmp_path, 12.0)
        )
        assert [job for job, _ in clock] == begun
    assert "skipped: the weights of its network are not here" in capsys.readouterr().out


def test_each_job_has_a_limit_of_its_own(clock, monkeypatch, tmp_path):
    worked(clock, monkeypatch, tmp_path, 600, 12.0, Job("CNN", 10))
    ((job, limit),) = clock
    assert limit == pytest.approx(120 + 2 * gpu_list.still_needs(job, Places("cuda", tmp_path / "x", tmp_path), None))


def test_time_already_covered_by_a_checkpoint_is_not_needed_again(tmp_path, images):
    places, job = Places("cpu", tmp_path / "r", tmp_path), Job("SWRN 28-14-2*", 3, data="cifar100")
    whole = gpu_list.still_needs(job, places, None)
    plan = make_plan("SWRN 28-14-2*", "paper", 3)
    folder = tmp_path / study_of(plan).identity(plan, "cifar100").stem
    folder.mkdir()
    (folder / f"step-{391 * 150:08d}-aaaaaaaa-bbbbbbbbbbbbbbbb.safetensors").touch()
    start = gpu_list.STARTUP
    assert gpu_list.still_needs(job, places, None) - start == pytest.approx((whole - start) / 4)
    # The checkpoint does not count for another seed or another data set.
    assert gpu_list.still_needs(job._replace(seed=4), places, None) == whole
    assert gpu_list.still_needs(job._replace(data="cifar10"), places, None) == whole


def test_what_was_measured_here_tells_how_long_the_next_seed_takes(tmp_path, images):
    places, job = Places("cpu", tmp_path, tmp_path / "c"), Job("WRN 28-2 cutout", 3, "short")
    estimated = gpu_list.still_needs(job, places, None)

    def write(seed, seconds, **facts):
        plan = make_plan(job.recipe, job.profile, seed)
        facts = {"hardware": processor_name(), "seconds": seconds} | facts
        data = {"source": "x", "fingerprint": "None"}
        write_record(study_of(plan).identity(plan, "None"), {}, data=data, execution=facts, runs=tmp_path)

    write(0, 77.0, hardware="another")
    write(1, 88.0, earlier=[{}])
    assert gpu_list.still_needs(job, places, None) == estimated
    write(2, 1000.0)
    write(4, 999.0)
    assert gpu_list.still_needs(job, places, None) == gpu_list.STARTUP + 1000.0
    assert gpu_list.still_needs(job._replace(recipe="WRN 16-2 cutout"), places, None) != gpu_list.STARTUP + 1000.0


def test_only_the_same_run_on_the_same_data_counts_as_done(tmp_path, images):
    def write(seed, data, **change):
        plan = make_plan("WRN 28-10*", "paper", seed)
        plan = dataclasses.replace(plan, augmentation={**plan.augmentation, **change})
        facts = {"source": "x", "fingerprint": data}
        write_record(study_of(plan).identity(plan, data), {}, data=facts, runs=tmp_path)

    def recorded(seed, data, profile="paper"):
        return gpu_list.recorded(Job("WRN 28-10*", seed, profile, data), Places(runs=tmp_path))

    write(0, "cifar100")
    write(2, "cifar10", cutout=16)
    assert recorded(0, "cifar100") and not recorded(0, "cifar10") and not recorded(5, "cifar100")
    assert not recorded(2, "cifar10") and not recorded(0, "cifar100", "short")
    write(2, "cifar10")
    assert recorded(2, "cifar10") and not recorded(2, "cifar100")


def test_a_missing_data_set_is_reported_and_other_runs_continue(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_list, "entries", lambda: [Entry("both", (Job("WRN 28-6", 0), Job("CNN", 0)))])
    monkeypatch.setattr(gpu_list, "done", lambda *_: "done")
    monkeypatch.setattr(gpu_list, "_hardware", lambda places: "H")
    monkeypatch.setattr("softshare.files.cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setenv("SOFTSHARE_DATA", "")
    assert gpu_list.run_list(60, Places("cuda", tmp_path, tmp_path)) == 1
    output = capsys.readouterr().out
    assert (
        "WRN 28-6, paper, seed 0: failed: profile paper needs the images" in output
        and "CNN, paper, seed 0: done" in output
    )


@pytest.mark.parametrize("trouble", ["a damaged archive", "a file in the place of the folder"])
def test_trouble_with_one_data_set_does_not_hide_the_other_runs(tmp_path, monkeypatch, capsys, trouble):
    monkeypatch.setattr(gpu_list, "entries", lambda: [Entry("both", (Job("WRN 28-6", 0), Job("CNN", 0)))])
    monkeypatch.setattr(gpu_list, "done", lambda *_: "done")
    monkeypatch.setattr(gpu_list, "_hardware", lambda places: "H")
    place = tmp_path / "cifar.zip" if trouble.startswith("a file") else tmp_path / "data"
    monkeypatch.setenv("SOFTSHARE_DATA", str(place))
    if place.suffix:
        place.write_bytes(b"PK but no zip")
    else:
        place.mkdir()
        (place / "cifar10.zip").write_bytes(b"PK but no zip")
    assert gpu_list.run_list(60, Places("cuda", tmp_path / "runs", tmp_path)) == 1
    output = capsys.readouterr().out
    assert "WRN 28-6, paper, seed 0: failed: " in output and "is truncated, damaged" in output
    assert "CNN, paper, seed 0: done" in output


def test_inside_an_application_runs_cannot_be_started(monkeypatch):
    monkeypatch.setattr(gpu_list.sys, "executable", "/opt/app/editor")
    with pytest.raises(RuntimeError, match="'/opt/app/editor' is not a Python interpreter"):
        Places()


def test_the_folders_of_a_list_may_be_in_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    places = Places(runs="~/r", checkpoints="~/c")
    command = places.command(Job("CNN", 0))
    assert str(tmp_path / "r") in command and str(tmp_path / "c") in command
    assert (
        gpu_list._benchmark_output(places)
        == tmp_path / "r" / "benchmarks" / gpu_list.default_output(processor_name()).name
    )


def test_the_command_of_a_run(tmp_path, monkeypatch):
    """A stand-in for the interpreter writes down what it was called with."""
    program = tmp_path / "python"
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n')
    program.chmod(0o755)
    monkeypatch.setattr(gpu_list.sys, "executable", str(program))
    jobs = [Job("WRN 28-10*", 2, data="cifar100"), Job("CNN", 0, "short"), Job("SWRN 40-8-8", 1, "short", folds=True)]
    for places in (Places("cuda", "r", "c"), Places(runs="r", checkpoints="c", rehearse=True)):
        assert all(gpu_list.done(places.command(job), 60.0, "").startswith("done after") for job in jobs)
    calls = (tmp_path / "calls").read_text().splitlines()
    where = "--device cuda --runs r --checkpoints c"
    assert calls[0] == f"-m softshare run WRN 28-10* --seed 2 --profile paper {where} --data cifar100"
    assert calls[1] == f"-m softshare run CNN --seed 0 --profile short {where} --checkpoint-seconds 20"
    assert calls[2] == f"-m softshare fold SWRN 40-8-8 --seed 1 --profile short {where} --sweep"
    assert all(f"--profile fast {where.replace('cuda', 'cpu')}" in call and "--rehearse" in call for call in calls[3:])


def test_sigterm_ends_the_runs_too(tmp_path):
    code = (
        "import sys; from softshare import cli\nfrom softshare.studies import costs, gpu_list\n"
        "gpu_list.entries = lambda: [gpu_list.Entry('one', (gpu_list.Job('CNN', 0),))]\n"
        "costs.GPU_SPEED = costs.CPU_SPEED = 1e15\n"
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "gpu", "--minutes", "60", "--device", "cpu"]
    command += ["--runs", str(tmp_path), "--checkpoints", str(tmp_path / "c")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=tmp_path)
    tasks = Path(f"/proc/{process.pid}/task")
    if not tasks.exists():
        process.kill()
        pytest.skip("needs Linux")

    def children() -> list[str]:  # of all its threads
        return [pid for path in tasks.glob("*/children") for pid in path.read_text().split()]

    limit = time.monotonic() + 60
    while not (found := children()) and time.monotonic() < limit:
        time.sleep(0.05)
    process.terminate()
    try:
        assert process.wait(timeout=120) == 143 and found
    finally:
        process.kill()
    assert not any(Path(f"/proc/{child}").exists() for child in found)


def test_sigterm_while_a_run_is_starting_ends_it_too(monkeypatch, tmp_path):
    """The signal arrives after the process exists, before Python knows it."""
    started = []

    class Slow(subprocess.Popen):
        def __init__(self, command):
            super().__init__(command)
            started.append(self)
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(gpu_list.subprocess, "Popen", Slow)
    with pytest.raises(SystemExit), gpu_list._terminated_like_ctrl_c():
        gpu_list.done([sys.executable, "-c", "import time; time.sleep(60)"], 60.0, "")
    assert started[0].returncode == -signal.SIGKILL


def test_sigterm_received_by_another_thread_is_handled(tmp_path):
    # Such a signal, like one that arrives just before the main thread starts to wait, does not wake the main thread.
    code = (
        "import sys, threading\nfrom signal import SIGTERM, raise_signal\nfrom softshare.studies import gpu_list\n"
        "class Places(gpu_list.Places):\n"
        "    def command(self, job):\n"
        "        threading.Timer(1, raise_signal, [SIGTERM]).start()\n"
        "        return [sys.executable, '-c', 'import time; time.sleep(100)']\n"
        "gpu_list.entries = lambda: [gpu_list.Entry('one', (gpu_list.Job('CNN', 0),))]\n"
        "gpu_list.run_list(1e9, Places(runs=sys.argv[1], checkpoints=sys.argv[1], device='cpu'))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    assert subprocess.run(command, stdout=subprocess.DEVNULL, timeout=60, cwd=tmp_path).returncode == 143


def test_a_mistyped_folder_is_reported_and_other_runs_continue(tmp_path, monkeypatch, capsys):
    entry = Entry("broken", (Job("WRN 28-6", 0), Job("CNN", 0)))
    monkeypatch.setattr(gpu_list, "entries", lambda: [entry])
    monkeypatch.setenv("SOFTSHARE_DATA", str(tmp_path / "mistyped"))
    assert gpu_list.run_list(6, Places(runs=tmp_path, checkpoints=tmp_path / "c", rehearse=True)) == 1
    output = capsys.readouterr().out
    assert (
        "WRN 28-6, paper, seed 0 (rehearsal): failed: " in output
        and "mistyped" in output
        and "CNN, paper, seed 0 (rehearsal): done after" in output
    )


def test_a_failed_run_is_reported_with_its_status(tmp_path, monkeypatch):
    monkeypatch.setenv("SOFTSHARE_DATA", str(tmp_path / "mistyped"))
    outcome = gpu_list.done(Places(runs=tmp_path, checkpoints=tmp_path).command(Job("WRN 28-6", 0)), 60.0, "")
    assert outcome.startswith("failed with status 1 after")


def test_a_run_over_its_limit_is_stopped(tmp_path):
    started = time.monotonic()
    outcome = gpu_list.done(
        Places(runs=tmp_path, checkpoints=tmp_path).command(Job("CNN", 0)), 2.0, "the same command goes on"
    )
    assert time.monotonic() - started < 10
    assert outcome == "stopped at its limit of 2 s; the same command goes on"


def test_a_list_needs_time_and_some_checkpoints():
    for minutes, carry in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="minutes and carry must be above 0"):
            gpu_list.run_list(minutes, Places(carry=carry))


@pytest.mark.long
def test_a_rehearsal_executes_every_step_and_a_second_one_finds_all_records(tmp_path):
    arguments = ["gpu", "--minutes", "60", "--rehearse", "--device", "cpu"]
    arguments += ["--runs", str(tmp_path / "runs"), "--checkpoints", str(tmp_path / "c")]
    command = [sys.executable, "-m", "softshare", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "SOFTSHARE_DATA": ""}
    first = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    assert first.returncode == 0, first.stdout + first.stderr
    found = find_records(tmp_path / "runs")
    wanted = {f"fold of {job.recipe}" * job.folds or job.recipe for entry in gpu_list.entries() for job in entry.jobs}
    assert {record.recipe for record in found} == wanted and len(found) == len(wanted), "each recipe once"
    (benchmark,) = (tmp_path / "runs" / "benchmarks").glob("*.json")
    assert json.loads(benchmark.read_text())["quick"] is True
    before = {record.path: record.path.stat().st_mtime_ns for record in found}
    second = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    assert second.returncode == 0 and "already recorded" in second.stdout and "skipped" not in second.stdout
    assert before == {path: path.stat().st_mtime_ns for path in before}
