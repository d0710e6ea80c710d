"""The GPU list: the order of its runs, what fits into the time, what is already done, and how runs end."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from softshare.studies import RECIPES, STUDIES, find_records, gpu_list, make_plan, study_of, write_record
from softshare.studies.gpu_list import Entry, Job, Places


def test_entries_are_ordered_by_value():
    jobs = [entry.jobs for entry in gpu_list.entries()]
    assert jobs[0] == ()
    assert set(jobs[1]) == {Job(name, seed) for name in ("CNN", "SCNN") for seed in range(10, 15)}
    assert jobs[2] == (Job("SWRN 40-8-8", 0, "short"),)
    for seed in range(3):
        assert [job[:2] for job in jobs[4 + seed]] == [("WRN 28-6 cutout", seed), ("SWRN 28-6-2 cutout", seed)]
    assert [each[0][0] for each in jobs[8:10]] == ["WRN 28-10 cutout", "SWRN 28-10-2 cutout"]
    assert {each[0][0] for each in jobs[10:]} == {name for name in RECIPES if name.endswith("*")}
    for job in (job for each in jobs for job in each):
        make_plan(job.recipe, job.profile, job.seed)


@pytest.fixture
def images(monkeypatch):
    """As if both CIFAR data sets were available."""
    monkeypatch.setattr(
        STUDIES["cifar"], "fingerprint", lambda plan, data=None, download=False: f"{data}", raising=False
    )


@pytest.mark.parametrize(("minutes", "chosen"), [(1, []), (30, ["curriculum"]), (80, ["curriculum", "similarity"])])
def test_what_fits_is_chosen_from_the_top(minutes, chosen, tmp_path, monkeypatch, images):
    """At the assumed speed the curriculum takes minutes, run side by side, and SWRN 40-8-8 three quarters of an hour."""
    done, clock = [], [0.0]
    monkeypatch.setattr(gpu_list.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(gpu_list, "_benchmark", lambda *_: ("done", 1.0))
    first = gpu_list.entries()[:3]
    monkeypatch.setattr(gpu_list, "entries", lambda: first)
    places = Places("cuda", tmp_path, tmp_path)

    def train(waiting, where, side, limit):
        done.append("curriculum" if waiting[0][0] == "CNN" else "similarity")
        needs = sum(gpu_list.still_needs(job, where, None) for job in waiting) / side
        clock[0] += min(needs, limit)
        assert where == places and clock[0] <= minutes * 60 + 1e-6
        return [(job, "done after 1 s") for job in waiting]

    monkeypatch.setattr(gpu_list, "side_by_side", train)
    assert gpu_list.run_list(minutes, places) == 0
    assert done[: len(chosen)] == chosen and len(done) <= len(chosen) + 1


def test_time_already_covered_by_a_checkpoint_is_not_needed_again(tmp_path, images):
    places, job = Places("cuda", "", tmp_path), Job("SWRN 28-14-2*", 3, data="cifar100")
    whole = gpu_list.still_needs(job, places, None)
    plan = make_plan("SWRN 28-14-2*", "paper", 3)
    folder = tmp_path / study_of(plan).identity(plan, "cifar100").stem
    folder.mkdir()
    (folder / f"step-{391 * 150:08d}-aaaaaaaa-bbbbbbbbbbbbbbbb.safetensors").touch()
    assert gpu_list.still_needs(job, places, None) == pytest.approx(whole / 4)
    # The checkpoint does not count for another seed or another data set.
    assert gpu_list.still_needs(job._replace(seed=4), places, None) == whole
    assert gpu_list.still_needs(job._replace(data="cifar10"), places, None) == whole


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
    monkeypatch.setattr(gpu_list, "side_by_side", lambda waiting, *_: [(job, "done") for job in waiting])
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
    monkeypatch.setattr(gpu_list, "side_by_side", lambda waiting, *_: [(job, "done") for job in waiting])
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
    command = places.command(Job("CNN", 0), quiet=True)
    assert str(tmp_path / "r") in command and str(tmp_path / "c") in command
    assert gpu_list._benchmark_output(places) == tmp_path / "r" / "benchmarks" / "benchmark.json"


def test_the_command_of_a_run(tmp_path, monkeypatch):
    """A stand-in for the interpreter writes down what it was called with."""
    program = tmp_path / "python"
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n')
    program.chmod(0o755)
    monkeypatch.setattr(gpu_list.sys, "executable", str(program))
    jobs = [Job("WRN 28-10*", 2, data="cifar100"), Job("CNN", 0, "short")]
    for places in (Places("cuda", "r", "c"), Places(runs="r", checkpoints="c", rehearse=True)):
        outcomes = gpu_list.side_by_side(jobs, places, 1, 60.0)
        assert [job for job, _ in outcomes] == jobs and all(outcome.startswith("done") for _, outcome in outcomes)
    calls = (tmp_path / "calls").read_text().splitlines()
    start, where = "-m softshare run", "--device cuda --runs r --checkpoints c"
    assert calls[0] == f"{start} WRN 28-10* --seed 2 --profile paper {where} --data cifar100"
    assert calls[1] == f"{start} CNN --seed 0 --profile short {where}"
    where = "--device cpu --runs r --checkpoints c --rehearse --quiet"
    assert calls[2:] == [f"{start} {job.recipe} --seed {job.seed} --profile fast {where}" for job in jobs]


@pytest.fixture
def endless_jobs(monkeypatch):
    """Runs that would take hours."""
    monkeypatch.setenv("SOFTSHARE_DATA", "")
    return [Job("CNN", seed) for seed in range(3)]


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


def test_sigterm_received_by_another_thread_is_handled(tmp_path):
    # Such a signal, like one that arrives just before the main thread starts to wait, does not wake the main thread.
    code = (
        "import sys, threading\nfrom signal import SIGTERM, raise_signal\nfrom softshare.studies import gpu_list\n"
        "class Places(gpu_list.Places):\n"
        "    def command(self, job, quiet):\n"
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
        "WRN 28-6, paper, seed 0: failed: " in output
        and "mistyped" in output
        and "CNN, paper, seed 0: done after" in output
    )


def test_a_failed_run_is_reported_with_its_status(tmp_path, monkeypatch):
    monkeypatch.setenv("SOFTSHARE_DATA", str(tmp_path / "mistyped"))
    ((job, outcome),) = gpu_list.side_by_side(
        [Job("WRN 28-6", 0)], Places(runs=tmp_path, checkpoints=tmp_path), 1, 60.0
    )
    assert outcome.startswith("failed with status 1 after")


def test_a_run_over_its_limit_is_stopped(endless_jobs, tmp_path):
    started = time.monotonic()
    outcomes = gpu_list.side_by_side(endless_jobs, Places(runs=tmp_path, checkpoints=tmp_path), 2, 2.0)
    assert time.monotonic() - started < 10
    assert [outcome.split(":")[0] for _, outcome in outcomes] == [
        "stopped at its limit; the same command resumes it",
        "stopped at its limit; the same command resumes it",
        "not started",
    ]


def test_a_list_needs_time_and_at_least_one_process():
    for minutes, parallel in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="minutes must be above 0 and parallel at least 1"):
            gpu_list.run_list(minutes, Places(parallel=parallel))


@pytest.mark.long
def test_a_rehearsal_executes_every_step_and_a_second_one_finds_all_records(tmp_path):
    arguments = ["gpu", "--minutes", "60", "--rehearse", "--parallel", "2", "--device", "cpu"]
    arguments += ["--runs", str(tmp_path / "runs"), "--checkpoints", str(tmp_path / "c")]
    command = [sys.executable, "-m", "softshare", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "SOFTSHARE_DATA": ""}
    first = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    assert first.returncode == 0, first.stdout + first.stderr
    found = find_records(tmp_path / "runs")
    wanted = {job[:2] for entry in gpu_list.entries() for job in entry.jobs}
    assert {(record.recipe, record.seed) for record in found} == wanted
    assert json.loads((tmp_path / "runs" / "benchmarks" / "benchmark.json").read_text())["quick"] is True
    before = {record.path: record.path.stat().st_mtime_ns for record in found}
    second = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    assert second.returncode == 0 and "has its record" in second.stdout and "skipped" not in second.stdout
    assert before == {path: path.stat().st_mtime_ns for path in before}
