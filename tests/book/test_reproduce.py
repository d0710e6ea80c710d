"""The reproduction with Snakemake: options, plans, how it tells time and failures, and whole runs on this machine."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import engine
import pytest
import reproduce
import slurm_queue
import with_gpus
from build import BuildError
from places import SHOWN, TRAINED, Book
from reproducing import command, environment, processes_with

from softshare.studies import RECIPES, find_records, read_record

needs_snakemake = pytest.mark.skipif(
    importlib.util.find_spec("snakemake") is None, reason='needs the extra "pipeline": make .venv/.has-pipeline'
)


# ---------------------------------------------------------------------------------------------------------------------
# Options and plans


def test_options_are_names_and_values():
    options = reproduce.parse_options(["PROFILE=short", "SEEDS= x3", "ONLY=WRN 28-10*, CNN", "DATA="])
    assert (options.PROFILE, options.SEEDS, options.DATA, options.ENGINE) == ("short", "x3", "", "local")
    assert reproduce.split(options.ONLY) == ["WRN 28-10*", "CNN"]
    for wrong, message in (
        ("PROFILES=fast", "expected NAME=VALUE, where NAME is one of PROFILE, SEEDS"),
        ("fast", "expected NAME=VALUE"),
        ("ENGINE=sge", "ENGINE must be one of local, slurm, got 'sge'"),
        ("UNTIL=now", "UNTIL must be one of records, site"),
        ("JOBS=0", "JOBS must be a whole number above 0, got '0'"),
        ("JOBS=1.5", "JOBS must be a whole number above 0, got '1.5'"),
        ("DEVICE=tpu", "DEVICE must be one of cpu, cuda, got 'tpu'"),
        ("DRY=yes", "DRY must be one of 0, 1, got 'yes'"),
        ("HOURS=a", "HOURS must be a number above 0, got 'a'"),
        ("RUNS=r", "RUNS needs UNTIL=records"),
    ):
        with pytest.raises(BuildError, match=message):
            reproduce.parse_options([wrong])


def test_every_option_can_be_given_to_make(top):
    makefile = (top / "Makefile").read_text(encoding="utf8")
    names = re.search(r"^REPRODUCE := (.*)$", makefile, re.M)[1].split()
    assert ["PROFILE", *names] == [field.name for field in reproduce.fields(reproduce.Options)]


def test_mistakes_are_told_in_one_line(capsys):
    for options, message in (
        (["PROFILE=big"], "unknown profile 'big'"),
        (["ONLY=SWRN 29*"], "no recipe fits 'SWRN 29*'"),
        (["SEEDS=x"], "seeds must be numbers"),
        (["HARDWARE=abacus"], "there are: amd-epyc, intel-xeon-processor, nvidia-h100-80gb-hbm3"),
        (["HARDWARE=nvidia-h100-80gb-hbm3", "DEVICE=cpu"], "is another kind of device than the jobs', cpu"),
        (["DATA=cifar-100"], "DATA: 'cifar-100' is neither a data set (cifar10, cifar100, digits) nor a folder"),
    ):
        assert reproduce.main(["DRY=1", *options]) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error


def test_paths_are_made_absolute(tmp_path, monkeypatch):
    """Jobs run in another folder than the command."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    options = reproduce.parse_options(["RUNS=r", "CHECKPOINTS=~/c", "DATA=cifar10,images", "UNTIL=records"])
    assert options.RUNS == str(tmp_path / "r") and options.CHECKPOINTS == str(Path("~/c").expanduser())
    assert options.data == ["cifar10", str(tmp_path / "images")] and options.pages == tmp_path / "r" / "pipeline"


def test_a_damaged_record_is_named_at_the_end(tmp_path, capsys, monkeypatch):
    from softshare.studies.jobs import Job, Places, path_of

    monkeypatch.setattr(reproduce, "carry_out", lambda *_: [])
    path = path_of(Job("CNN", 10, "short"), Places(runs=tmp_path))
    path.write_text("{}")
    options = ["PROFILE=short", "ONLY=CNN", "SEEDS=10", "UNTIL=records", f"RUNS={tmp_path}"]
    assert reproduce.main(options) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("FAILED: CNN, short, seed 10: ") and last.endswith(
        f"move {path.name} away to have it made again"
    )


def test_the_list_is_told_and_nothing_started(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(reproduce, "carry_out", lambda *_: 1 / 0)
    options = ["PROFILE=paper", "ONLY=CNN,SCNN", "DRY=1", "UNTIL=records", f"RUNS={tmp_path / 'r'}"]
    assert reproduce.main([*options, "ENGINE=slurm", "HARDWARE=nvidia-h100-80gb-hbm3"]) == 0
    output = capsys.readouterr().out
    assert "10 of 10 jobs to do" in output and "on one nvidia-h100-80gb-hbm3, at the speed measured on it" in output


def test_jobs_for_a_gpu_elsewhere_are_listed_on_a_machine_without_one(tmp_path, capsys):
    """Also if there are records of other seeds, whose times count only for the hardware that they were measured on."""
    options = ["PROFILE=short", "ONLY=CNN", "SEEDS=10-13", "DRY=1", "ENGINE=slurm"]
    assert reproduce.main(options) == 0
    assert "on one GPU of the cluster, at an assumed speed" in capsys.readouterr().out


def test_chapters_show_the_runs_that_the_plan_contains(top):
    """The chapters name the same recipes."""
    for name, recipes in SHOWN.items():
        text = (top / "book" / f"{name}.md").read_text(encoding="utf8")
        (line,) = re.findall(r"^(?:PAIR = |plans = .* for name in \().*$", text, re.M)[:1]
        named = [text for text in re.findall(r'"([^"]+)"', line) if text in RECIPES]
        assert named == list(recipes)
        assert ("folding.fold_costs(" in text) == any(recipes.values())
        assert (" train(" in text) == (name in TRAINED)


def test_a_chapter_without_its_runs_shows_profile_fast(tmp_path, monkeypatch):
    monkeypatch.setenv("SOFTSHARE_DATA", "")
    monkeypatch.setattr("softshare.studies.records.runs_folder", lambda runs="", profile="fast": tmp_path)
    why = reproduce.in_fast(reproduce.Options(PROFILE="gpu"))
    assert set(why) == set(SHOWN) and why["04-shortest-path"] == "CNN, gpu, seed 0: no record"
    book = Book(reproduce.TOP, None, why)
    assert book.parameters_of("04-shortest-path", {"PROFILE": "gpu"}) == {"PROFILE": "fast"}
    assert book.parameters_of("01-templates", {"PROFILE": "gpu"}) == {"PROFILE": "gpu"}


# ---------------------------------------------------------------------------------------------------------------------
# The engine


def test_jobs_go_to_slurm_with_what_they_need(tmp_path):
    slurm = engine.Engine(True, tmp_path, sbatch="--partition=gpu")
    found = " ".join(slurm.command(tmp_path / "p.json", "records", 2, again=[f"{tmp_path}/again.json"]))
    for part in ("--cpus-per-task={threads}", "--mem={resources.mem_mb}", "--time={resources.runtime}",
                 "{resources.devices} --partition=gpu", "--jobs 100", "--keep-going", "--retries 2", "slurm_queue.py status",
                 f"--forcerun {tmp_path}/again.json", "--cluster-generic-cancel-cmd scancel"):  # fmt: skip
        assert part in found
    here = engine.Engine(False, tmp_path, jobs=3).command(tmp_path / "p.json", "records", 1, threads=4)
    assert here[here.index("--cores") + 1] == "12" and "slot=3" in here and "gpu=0" in here


@pytest.mark.parametrize("engine_name, devices, prefixed", [("slurm", "--gres=gpu:2", False), ("local", "", True)])
def test_a_job_gets_gpus_from_slurm_or_from_this_machine(engine_name, devices, prefixed):
    options = reproduce.Options(ENGINE=engine_name)
    step = reproduce.dressed({"name": "a", "command": "train", "gpus": 2, "threads": 16}, options)
    assert step["devices"] == devices and step["command"].endswith("env OMP_NUM_THREADS=8 train")
    assert ("with_gpus.py 2 env" in step["command"]) is prefixed
    assert reproduce.dressed({"name": "a", "command": "train", "gpus": 0}, options)["command"] == "train"


def test_two_commands_never_share_a_gpu(tmp_path):
    """Three of them want two of four GPUs each: the third waits until one of the first ends."""
    program = (
        "import os, time; print(os.environ['CUDA_VISIBLE_DEVICES'], time.time(), flush=True); time.sleep(1.5); "
        "print(time.time())"
    )
    call = [sys.executable, str(reproduce.TOP / "book" / "with_gpus.py"), "2", sys.executable, "-c", program]
    where = os.environ | {"CUDA_VISIBLE_DEVICES": "0,1,2,GPU-x", "TMPDIR": str(tmp_path)}
    started = [subprocess.Popen(call, env=where, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    times = []
    for process in started:
        first, last = process.communicate(timeout=60)[0].splitlines()
        taken, begin = first.split()
        times.append((set(taken.split(",")), float(begin), float(last)))
        assert process.returncode == 0 and len(times[-1][0]) == 2
    for one in times:
        for other in times:
            if one is not other and one[0] & other[0]:
                assert one[1] >= other[2] or other[1] >= one[2], times


def test_a_job_for_more_gpus_than_there_are_fails_and_says_so(capsys, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert with_gpus.main(["3", "true"]) == 1
    assert "3 GPUs are needed, 2 found" in capsys.readouterr().err


@pytest.mark.parametrize(
    "shown, kept, found",
    [
        ("JobId=1 JobState=RUNNING Reason=None", "", "running"),
        ("JobId=1 JobState=PENDING Reason=Resources", "", "running"),
        ("JobId=1 JobState=COMPLETING Reason=None", "", "running"),
        ("JobId=1 JobState=COMPLETED Reason=None", "", "success"),
        *((f"JobId=1 JobState={state}", "", "failed")
          for state in ("FAILED", "TIMEOUT", "OUT_OF_MEMORY", "CANCELLED", "NODE_FAIL", "PREEMPTED")),
        ("slurm_load_jobs error: Invalid job id specified", "", "failed"),
        ("slurm_load_jobs error: Invalid job id specified", "COMPLETED\n", "success"),
        ("slurm_load_jobs error: Invalid job id specified", "CANCELLED by 0\n", "failed"),
        ("slurm_load_jobs error: Unable to contact slurm controller", "", "running"),
    ],
)  # fmt: skip
def test_what_slurm_says_of_a_job(tmp_path, monkeypatch, shown, kept, found):
    for name, text in (("scontrol", shown), ("sacct", kept)):
        stream = ">&2" if "error" in text else ""
        (tmp_path / name).write_text(f"#!/bin/sh\ncat <<'END' {stream}\n{text}\nEND\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert slurm_queue.status("17;cluster") == found


@pytest.mark.parametrize("folder, sent", [("here", False), ("elsewhere", True)])
def test_a_job_that_is_in_the_queue_is_not_sent_again(tmp_path, monkeypatch, capfd, folder, sent):
    """By its name, and the folder that it was sent from: another checkout may have one of the same name."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name in ("here", "elsewhere"):
        (tmp_path / name).mkdir()
    for name, text in (("squeue", f"echo '12|{tmp_path / folder}'"), ("sbatch", "echo 13")):
        (tmp_path / name).write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/{name}.calls\n{text}\n')
        (tmp_path / name).chmod(0o755)
    monkeypatch.chdir(tmp_path / "here")
    assert slurm_queue.submit(["--job-name=run-a", "--time=3", "script"]) == 0
    assert capfd.readouterr().out == ("13\n" if sent else "12\n")
    assert "--name=run-a" in (tmp_path / "squeue.calls").read_text()
    assert not sent or (tmp_path / "sbatch.calls").read_text() == "--parsable --job-name=run-a --time=3 script\n"


def test_snakemake_names_what_failed():
    log = (
        "sbatch: error: Batch job submission failed: Requested time limit is invalid\nError submitting jobscript\n"
        "Error in rule run:\n    message: None\n    jobid: 1\n    output: /a b/one.json\n    log: x\n"
        "[date]\nError in rule fold:\n    jobid: 2\n    output: /two.json\nTrying to restart job 2.\n"
        "rule run:\n    output: /three.json\n"
    )
    refusal = "Batch job submission failed: Requested time limit is invalid"
    assert engine.failed_outputs(log) == {"/a b/one.json": refusal, "/two.json": ""}


def test_why_a_job_failed():
    log = "epoch 1\nsoftshare run: no such file\n"
    killed = "Building DAG\nslurmstepd: error: *** JOB 5 ON n1 CANCELLED AT 2026-01-01T00:00:00 DUE TO TIME LIMIT ***\n"
    memory = "slurmstepd: error: Step 5.batch exceeded memory limit (5 > 4), being killed\n"
    cancelled = "slurmstepd: error: *** JOB 5 ON n1 CANCELLED AT 2026-01-01T00:00:00 ***\n"
    assert engine.reason([log, "Building DAG\n"]) == ("softshare run: no such file", 0)
    assert engine.reason([log, killed]) == ("over its time limit", 1)
    assert engine.reason([log, memory]) == ("over its memory limit", 1)
    assert engine.reason([log, cancelled]) == ("cancelled", 1)
    assert engine.reason(["", "sbatch: broken"]) == ("sbatch: broken", 1)


def test_time_left_follows_from_checkpoints_and_the_pace_so_far(tmp_path, monkeypatch, capsys):
    def step(name, seconds):
        folder = tmp_path / f"{name}-c"
        folder.mkdir()
        return {"name": name, "title": name, "output": str(tmp_path / name), "log": str(tmp_path / f"{name}.log"),
                "checkpoints": str(folder), "steps": 100, "seconds": seconds}  # fmt: skip

    now = [0.0]
    monkeypatch.setattr(engine.time, "monotonic", lambda: now[0])
    watch = engine.Watch([step("a", 100.0), step("b", 300.0)])
    now[0] = 61.0
    (tmp_path / "b-c" / "step-00000050-aaaa.safetensors").touch()  # 150 of 400 expected seconds after 61
    watch.look()
    assert capsys.readouterr().out == "0 of 2 done after 0:01:01, about 0:01:42 left\n"
    resumed = engine.Watch(watch.steps)  # what the plan says is what was left then
    assert resumed.first == pytest.approx(400)
    (tmp_path / "b-c" / "step-00000075-aaaa.safetensors").touch()
    assert resumed.work() == pytest.approx(100 + 150)
    (tmp_path / "b-c" / "step-00000075-aaaa.safetensors").unlink()
    (tmp_path / "a").touch()
    now[0] = 100.0
    watch.look()
    assert capsys.readouterr().out == "done: a (1 of 2)\n"
    (tmp_path / "b.log").write_text("ValueError: broken\n")
    assert watch.failures({}) == [], "it may be at work"
    assert watch.failures({str(tmp_path / "b"): ""}) == [f"b: ValueError: broken; log: {tmp_path / 'b.log'}"]


def test_only_one_reproduction_at_a_time(tmp_path):
    with reproduce.alone(tmp_path):
        with pytest.raises(BuildError, match="another `make reproduce` is at work"), reproduce.alone(tmp_path):
            pass
    with reproduce.alone(tmp_path):
        pass


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs


def image_folder(folder: Path) -> Path:
    """A few images, one of them damaged."""
    import numpy as np
    from PIL import Image

    for split in ("train", "val"):
        for name in "ab":
            (folder / split / name).mkdir(parents=True)
            for number in range(4):
                pixels = np.full((64, 64, 3), 40 * number, np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{number}.png")
    (folder / "train" / "a" / "2.png").write_bytes(b"\x89PNG\r\n\x1a\n and nothing else")
    return folder


@pytest.mark.long
@needs_snakemake
def test_a_failed_job_is_tried_again_then_named_and_the_rest_goes_on(tmp_path, top):
    images = image_folder(tmp_path / "images")
    options = ["ONLY=WRN 50-2,WRN 16-2 cutout", f"DATA={images}", "UNTIL=records", f"RUNS={tmp_path / 'r'}"]
    options += [f"CHECKPOINTS={tmp_path / 'c'}"]
    done = subprocess.run(command(top, *options), env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 1, done.stdout + done.stderr
    (failure,) = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    log = Path(failure.rpartition("log: ")[2])
    assert failure.startswith(f"FAILED: WRN 50-2, fast, seed 0, {images}: ") and "2.png" in failure
    assert log.read_text().count("softshare run: ") == 2, "tried again"
    assert "done: WRN 16-2 cutout, fast, seed 0 (1 of 2)" in done.stdout
    assert [record.recipe for record in find_records(tmp_path / "r")] == ["WRN 16-2 cutout"]


@pytest.mark.long
@needs_snakemake
def test_what_slurm_refuses_is_named_and_limits_grow_as_they_may(tmp_path, top):
    """With stand-ins for Slurm's commands: one job is refused, the other is killed for its memory whenever it runs."""
    programs = tmp_path / "bin"
    programs.mkdir()
    sbatch = f"""echo "$@" >> {tmp_path}/calls
case "$*" in *wrn-28-2*) echo 'sbatch: error: Requested time limit is invalid' >&2; exit 1;; esac
for each; do case $each in --output=*) echo 'error: Step exceeded memory limit' >> "${{each#--output=}}";; esac; done
echo 1"""
    for name, text in (("sbatch", sbatch), ("scontrol", "echo JobState=OUT_OF_MEMORY"), ("squeue", "")):
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    where = environment(PATH=f"{programs}:{os.environ['PATH']}")
    options = [
        "ONLY=WRN 16-2 cutout,WRN 28-2 cutout",
        "UNTIL=records",
        f"RUNS={tmp_path / 'r'}",
        "ENGINE=slurm",
        "HOURS=0.02",
    ]
    done = subprocess.run(command(top, *options), env=where, capture_output=True, text=True, timeout=300)
    failures = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    assert done.returncode == 1 and len(failures) == 2, done.stdout + done.stderr
    assert any("WRN 28-2 cutout, fast, seed 0: Requested time limit is invalid; log:" in line for line in failures)
    assert any("WRN 16-2 cutout, fast, seed 0: over its memory limit; log:" in line for line in failures)
    calls = [line for line in (tmp_path / "calls").read_text().splitlines() if "wrn-16-2" in line]
    memory = [int(re.search(r"--mem=(\d+)", line)[1]) for line in calls]
    assert memory == [memory[0] * (1 + number) for number in range(len(calls))] and len(calls) > 2
    assert {re.search(r"--time=(\d+)", line)[1] for line in calls} == {"2"}, "never above HOURS"


@pytest.mark.long
@needs_snakemake
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_reproduction_goes_on_from_its_checkpoint(tmp_path, top, number):
    options = ["ONLY=WRN 16-2 cutout", "UNTIL=records", f"RUNS={tmp_path / 'r'}", f"CHECKPOINTS={tmp_path / 'c'}"]
    process = subprocess.Popen(command(top, *options), env=environment(), stdout=subprocess.PIPE, text=True)
    limit = time.monotonic() + 120
    while not list((tmp_path / "c").rglob("step-*")) and time.monotonic() < limit:
        time.sleep(0.1)
    working = processes_with(str(tmp_path))
    if number == signal.SIGKILL:  # as if the machine were switched off
        for each in [process.pid, *working]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(each, number)
    else:
        process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert ("the same command goes on where it was" in output) == (number == signal.SIGTERM)
    limit = time.monotonic() + 30
    while processes_with(str(tmp_path)) and time.monotonic() < limit:
        time.sleep(0.1)
    assert not processes_with(str(tmp_path)), "nothing is left running"
    assert not list((tmp_path / "r").glob("*.json"))
    done = subprocess.run(command(top, *options), env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (log,) = (tmp_path / "r" / "pipeline" / "logs").glob("*.log")
    assert "resuming at epoch" in log.read_text()
    again = subprocess.run(command(top, *options), env=environment(), capture_output=True, text=True, timeout=300)
    assert again.returncode == 0 and "0 of 1 jobs to do" in again.stdout and "\ndone: " not in again.stdout


@pytest.mark.long
@needs_snakemake
def test_a_run_of_several_processes_starts_under_torchrun(tmp_path, top, monkeypatch):
    """On the CPU, by a plan for two: the record names both processes."""
    monkeypatch.setenv("SOFTSHARE_DATA", "")
    from softshare.studies.jobs import Job, Places
    from softshare.studies.pipeline import Machine, listed

    places = Places("cpu", tmp_path / "r", tmp_path / "c")
    (row,) = listed([Job("WRN 16-2 cutout", 0, "fast")], places, Machine())
    options = reproduce.Options(UNTIL="records", RUNS=str(tmp_path / "r"))
    step = reproduce.dressed(row.step, options)
    step["command"] = " ".join(f"'{part}'" for part in places.command(row.job, 2, processes=2))
    assert engine.carry_out(reproduce.frame(options) | {"runs": [step]}, "records", reproduce.engine(options)) == []
    assert read_record(step["output"]).execution["processes"] == 2
    (written,) = options.pages.glob("records-*.json")
    assert json.loads(written.read_text())["runs"] == [step]
