"""The GPU list: the order of its runs, what fits into the time, what is already done, and how runs end."""

from __future__ import annotations

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
from softshare.studies import RECIPES, find_records, gpu_list, make_plan
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
def clock(monkeypatch, images, write_done):
    """A list whose jobs take as long as they are expected to, on a GPU; yields what was done, with its limit."""
    now, calls = [0.0], []
    monkeypatch.setattr(gpu_list.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(Places, "hardware", "H")

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
    assert gpu_list.run_list(minutes, Places("cuda", tmp_path, tmp_path), carry) == 0
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


def test_a_run_that_cannot_go_on_elsewhere_may_take_all_the_time(clock, monkeypatch, tmp_path):
    deep = Job("SWRN 40-8-8", 1, "short")
    needs = gpu_list.still_needs(deep, Places("cuda", tmp_path, tmp_path), None)
    assert worked(clock, monkeypatch, tmp_path, 1.2 * needs / 60, 12.0, deep) == []
    assert worked(clock, monkeypatch, tmp_path, 10 * needs / 60, 12.0, deep) == [deep]
    assert clock[0][1] == pytest.approx(10 * needs)


def test_a_benchmark_counts_for_its_hardware_and_for_steps_as_they_are_now(tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr(Places, "hardware", "NVIDIA X")
    place = gpu_list.benchmark_output(Places("cuda", tmp_path))
    assert place == tmp_path / "benchmarks" / "nvidia-x.json"
    for steps, quick in (({}, False), ({"captured": True}, True), ({"captured": True}, False)):
        record = {"steps": {"batch": 10, "seconds": {"ours": [2.0]}} | steps, "quick": quick}
        record |= {"ceiling": {"multiply-adds an image": 7.0}}
        monkeypatch.setattr(gpu_list, "load_benchmark", lambda path, record=record: record)
        monkeypatch.setattr(gpu_list.costs, "load_benchmark", lambda path, record=record: record)
        found.append((gpu_list._is_full_benchmark(place), gpu_list.costs.measured_speed(place)))
    speed = gpu_list.costs.Speed
    assert found == [(False, speed(105.0)), (False, None), (True, speed(105.0, True))]


def test_costs_are_told_before_anything_starts(tmp_path, monkeypatch, images, write_done, capsys):
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
    assert f"{expected:.1f} h in all on {processor_name()}, at an assumed speed" in output


def test_a_run_is_begun_only_if_its_folds_fit_too(clock, monkeypatch, tmp_path, capsys):
    deep = Job("SWRN 40-8-8", 1, "short")
    entry = Entry("deep", (deep, deep._replace(folds=True)))
    monkeypatch.setattr(gpu_list, "entries", lambda: [entry])
    run, folds = (gpu_list.still_needs(job, Places("cuda", tmp_path, tmp_path), None) for job in entry.jobs)
    for spare, begun in ((-1, []), (1, [deep])):
        gpu_list.run_list((gpu_list.MARGIN * (run + folds) + spare) / 60, Places("cuda", tmp_path / "r", tmp_path))
        assert [job for job, _ in clock] == begun
    assert "skipped: the weights of its network are not here" in capsys.readouterr().out


def test_each_job_has_a_limit_of_its_own(clock, monkeypatch, tmp_path):
    worked(clock, monkeypatch, tmp_path, 600, 12.0, Job("CNN", 10))
    ((job, limit),) = clock
    assert limit == pytest.approx(120 + 2 * gpu_list.still_needs(job, Places("cuda", tmp_path / "x", tmp_path), None))


def test_a_missing_data_set_is_reported_and_other_runs_continue(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_list, "entries", lambda: [Entry("both", (Job("WRN 28-6", 0), Job("CNN", 0)))])
    monkeypatch.setattr(gpu_list, "done", lambda *_: "done")
    monkeypatch.setattr(Places, "hardware", "H")
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
    monkeypatch.setattr(Places, "hardware", "H")
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
        "    def command(self, *_):\n"
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
            gpu_list.run_list(minutes, Places(), carry)


@pytest.mark.long
def test_a_rehearsal_executes_every_step_and_a_second_one_finds_all_records(tmp_path):
    """The first entries have every kind of job; `test_running` trains the recipes of all."""
    arguments = ["gpu", "--minutes", "60", "--rehearse", "--device", "cpu"]
    arguments += ["--runs", str(tmp_path / "runs"), "--checkpoints", str(tmp_path / "c")]
    code = (
        "import sys; from softshare import cli\nfrom softshare.studies import gpu_list\n"
        "some = gpu_list.entries()[:5]\ngpu_list.entries = lambda: some\nsys.exit(cli.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "SOFTSHARE_DATA": ""}
    first = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    assert first.returncode == 0, first.stdout + first.stderr
    found = find_records(tmp_path / "runs")
    wanted = {
        f"fold of {job.recipe}" * job.folds or job.recipe for entry in gpu_list.entries()[:5] for job in entry.jobs
    }
    assert {record.recipe for record in found} == wanted and len(found) == len(wanted), "each recipe once"
    (benchmark,) = (tmp_path / "runs" / "benchmarks").glob("*.json")
    assert json.loads(benchmark.read_text())["quick"] is True
    before = {record.path: record.path.stat().st_mtime_ns for record in found}
    second = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    assert second.returncode == 0 and "already recorded" in second.stdout and "skipped" not in second.stdout
    assert before == {path: path.stat().st_mtime_ns for path in before}
