"""The same jobs through a real queue: a Slurm of one node on loopback, started for the test and ended by process id."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import engine
import pytest
import reproduce
import slurm
from reproducing import command, environment, without_speed

from softshare.studies import find_records
from softshare.studies.jobs import Job, Places
from softshare.studies.pipeline import Machine, listed

MISSING = [*slurm.missing(), *([] if importlib.util.find_spec("snakemake") else ["snakemake"])]

# Where the check of the whole project runs, Slurm is there; a skipped test would prove nothing.
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        bool(MISSING) and not os.environ.get("CI"),
        reason=f"not found: {', '.join(MISSING)} (Debian: slurmctld slurmd slurm-client munge; make .venv/.has-pipeline)",
    ),
]

STUDY = "ONLY=SWRN 40-8-8,WRN 28-2 cutout"


@pytest.fixture(scope="module")
def queue(tmp_path_factory):
    """The environment in which sbatch and the others find the test's own Slurm."""
    assert not MISSING, f"not found: {', '.join(MISSING)}"
    with slurm.one_node(tmp_path_factory.mktemp("slurm") / "node") as found:
        kept = {name: found[name] for name in ("SLURM_CONF", "PATH")}
        yield environment(**kept)


def asked(queue, *words):
    return subprocess.run(words, env=queue, capture_output=True, text=True, timeout=60, check=True).stdout


def numbers(queue, name):
    """The jobs in the queue with this in their names."""
    lines = asked(queue, "squeue", "--noheader", "--states=RUNNING", "--format=%i %j").splitlines()
    return [line.split()[0] for line in lines if name in line]


def until(happened, seconds=180):
    limit = time.monotonic() + seconds
    while not (found := happened()):
        assert time.monotonic() < limit, "waited in vain"
        time.sleep(0.2)
    return found


def options(folder):
    return [STUDY, "UNTIL=records", f"RUNS={folder / 'runs'}", f"CHECKPOINTS={folder / 'c'}", "THREADS=1", "JOBS=2"]


def test_a_study_through_slurm_gives_the_records_of_this_machine(tmp_path, top, queue):
    """Two jobs at a time; one is cancelled in the middle, comes back and goes on from its checkpoint."""
    there, here = tmp_path / "there", tmp_path / "here"
    process = subprocess.Popen(
        command(top, *options(there), "ENGINE=slurm"), env=queue, stdout=subprocess.PIPE, text=True
    )
    most = []

    def in_the_middle():
        most.append(len(numbers(queue, "run-")))
        steps = [int(path.name[5:13]) for path in (there / "c").glob("swrn-40-8-8-fast-*/step-*.safetensors")]
        return max(steps, default=0) > 2 * 41  # of 41 steps per epoch of the digits

    until(in_the_middle)
    (cancelled,) = numbers(queue, "run-swrn-40-8-8-fast")
    asked(queue, "scancel", cancelled)
    output, _ = process.communicate(timeout=400)
    logs = {path.name: path.read_text() for path in (there / "runs" / "pipeline" / "logs").iterdir()}
    assert process.returncode == 0 and "3 of 3 jobs to do" in output, (output, logs)
    assert max(most) == 2, "two jobs at a time"
    (log,) = [text for name, text in logs.items() if re.fullmatch(r"swrn-40-8-8-fast-\S+\.log", name)]
    assert int(re.search(r"resuming at epoch (\d+)", log)[1]) > 1
    assert any("CANCELLED" in text for name, text in logs.items() if name.endswith(".slurm"))

    done = subprocess.run(command(top, *options(here)), env=environment(), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    found, expected = (find_records(folder / "runs") for folder in (there, here))
    assert {record.recipe for record in found} == {"SWRN 40-8-8", "fold of SWRN 40-8-8", "WRN 28-2 cutout"}
    assert [without_speed(record) for record in found] == [without_speed(record) for record in expected]
    assert {record.execution["threads"] for record in (*found, *expected)} == {1}


def test_jobs_over_their_limits_are_named(tmp_path, queue, monkeypatch):
    """A run with less memory than it needs, and one that takes longer than its minute."""
    for name, value in queue.items():
        monkeypatch.setenv(name, value)
    places = Places("cpu", tmp_path / "r", tmp_path / "c")
    chosen = reproduce.Options(UNTIL="records", RUNS=str(tmp_path / "r"), ENGINE="slurm", JOBS="2")
    jobs = [Job("WRN 28-2 cutout", 7, "fast"), Job("SCNN", 7, "gpu")]
    big, slow, good = (
        reproduce.dressed(row.step, chosen)
        for row in listed([*jobs, Job("WRN 16-2 cutout", 7, "fast")], places, Machine())
    )
    big |= {"memory": 150, "attempts": 0}
    slow |= {"minutes": 1, "attempts": 0}
    good |= {"attempts": 0}
    plan = reproduce.frame(chosen) | {"runs": [big, slow, good]}
    failures = engine.carry_out(plan, "records", reproduce.engine(chosen))
    assert failures == [
        f"WRN 28-2 cutout, fast, seed 7: over its memory limit; log: {Path(big['log']).with_suffix('.slurm')}",
        f"SCNN, gpu, seed 7: over its time limit; log: {Path(slow['log']).with_suffix('.slurm')}",
    ]
    assert [record.recipe for record in find_records(tmp_path / "r")] == ["WRN 16-2 cutout"], "the rest goes on"


def test_jobs_that_are_in_the_queue_already_are_not_sent_again(tmp_path, top, queue):
    """The machine from which they were sent is switched off; the same command finds them."""
    call = command(top, "ONLY=WRN 28-2 cutout", *options(tmp_path)[1:], "ENGINE=slurm")
    process = subprocess.Popen(call, env=queue, stdout=subprocess.DEVNULL)
    (number,) = until(lambda: numbers(queue, "run-wrn-28-2"))
    (snakemake,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.wait()
    second = subprocess.run(call, env=queue, capture_output=True, text=True, timeout=300)
    assert second.returncode == 1 and "another `make reproduce` is at work" in second.stderr, "Snakemake still is"
    os.killpg(int(snakemake), signal.SIGKILL)  # its jobs belong to Slurm
    done = subprocess.run(call, env=queue, capture_output=True, text=True, timeout=300)
    log = (tmp_path / "runs" / "pipeline" / "snakemake.log").read_text()
    assert done.returncode == 0, done.stdout + done.stderr + log
    assert re.findall(r"external jobid '(\d+)'", log) == [number, number], "found, not sent again"
    assert [record.recipe for record in find_records(tmp_path / "runs")] == ["WRN 28-2 cutout"]


def test_an_interrupted_reproduction_takes_its_jobs_out_of_the_queue(tmp_path, top, queue):
    call = command(top, "ONLY=WRN 16-2 cutout", *options(tmp_path)[1:], "ENGINE=slurm")
    process = subprocess.Popen(call, env=queue, stdout=subprocess.PIPE, text=True)
    until(lambda: numbers(queue, "run-wrn-16-2"))
    process.terminate()
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and "the same command goes on where it was" in output
    until(lambda: not asked(queue, "squeue", "--noheader").strip(), 60)
