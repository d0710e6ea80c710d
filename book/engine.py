"""Calls Snakemake with a plan, tells how far it is, and finds out why jobs failed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from build import say

BOOK = Path(__file__).resolve().parent
TOLD_EVERY = 60.0  # seconds

LIMITS = {
    r"DUE TO TIME LIMIT": "over its time limit",
    r"exceeded memory limit|oom.kill|out of memory": "over its memory limit",
    r"\*\*\* JOB \d+ ON \S+ CANCELLED AT": "cancelled",
}
"""What Slurm writes into a job's log when it ends the job, and what that means; the first that fits."""


@dataclass(frozen=True)
class Engine:
    """Where jobs are carried out.

    Attributes:
        slurm: whether a cluster's queue does it, or this machine.
        pages: folder of plans, logs and executed chapters.
        jobs: how many at a time; None: on this machine as many as it has cores or GPUs for, on a cluster 100.
        gpus: how many this machine has that may be used.
        sbatch: further options of sbatch.
    """

    slurm: bool
    pages: Path
    jobs: int | None = None
    gpus: int = 0
    sbatch: str = ""

    def command(self, plan: Path, target: str, retries: int, threads: int = 1, again: Sequence[str] = ()) -> list[str]:
        """The call of Snakemake that carries out a plan up to a target; no job has more than so many threads."""
        command = [sys.executable, "-m", "snakemake", target, "--snakefile", str(BOOK.parent / "Snakefile")]
        command += [
            "--directory",
            str(self.pages),
            "--configfile",
            str(plan),
            "--keep-going",
            "--retries",
            str(retries),
        ]
        # Records are written completely or not at all, and their names say whether they are current; a clone has no file
        # times.
        command += [
            "--ignore-incomplete",
            "--rerun-triggers",
            "input",
            "--scheduler",
            "greedy",
            "--nolock",
            "--nocolor",
        ]
        command += ["--forcerun", *again] if again else []
        return command + (self._slurm() if self.slurm else self._here(threads))

    def _slurm(self) -> list[str]:
        queue = shlex.join([sys.executable, str(BOOK / "slurm_queue.py")])
        submit = [
            f"{queue} submit --no-requeue --open-mode=append --job-name={{rule}}-{{wildcards.name}}",
            "--cpus-per-task={threads} --mem={resources.mem_mb} --time={resources.runtime}",
            "--output={params.logs:q}/{wildcards.name}.slurm {resources.devices}",
            self.sbatch,
        ]
        command = ["--executor", "cluster-generic", "--jobs", str(self.jobs or 100), "--latency-wait", "60"]
        command += ["--cluster-generic-submit-cmd", " ".join(submit), "--cluster-generic-status-cmd", f"{queue} status"]
        return [*command, "--cluster-generic-cancel-cmd", "scancel", "--seconds-between-status-checks", "5"]

    def _here(self, threads: int) -> list[str]:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        memory = 0.9 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e6
        slots = self.jobs or 1000
        cores = self.jobs * threads if self.jobs else max(cores, threads)
        return ["--cores", str(cores), "--resources", f"slot={slots}", f"gpu={self.gpus}", f"mem_mb={memory:.0f}"]


def carry_out(plan: Mapping[str, Any], target: str, engine: Engine, lock: int | None = None) -> list[str]:
    """Carry out a plan and return what failed, one line each; Ctrl-C and the like end the jobs too.

    Snakemake holds the open file `lock` too, so that what is locked with it stays so until both have ended.
    """
    steps = [*plan["runs"], *plan["folds"], *plan["chapters"]]
    steps += [plan["verdicts"], plan["site"]] if target == "site" else []
    text, log = json.dumps(plan, indent=1), engine.pages / "snakemake.log"
    # Jobs of an earlier call that still wait in a queue must find the plan that they were sent with.
    path = engine.pages / f"{target}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"
    path.parent.joinpath("logs").mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf8")
    retries, threads = (max((step.get(name, 1) for step in steps), default=1) for name in ("attempts", "threads"))
    watch = Watch(steps, plan["again"])
    begin = log.stat().st_size if log.exists() else 0
    with log.open("a", encoding="utf8") as output:
        command = engine.command(path, target, retries, threads, plan["again"])
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            cwd=BOOK.parent,
            start_new_session=True,
            pass_fds=() if lock is None else (lock,),
        )
        try:
            while (status := process.poll()) is None:
                watch.look()
                time.sleep(1)
        except KeyboardInterrupt:
            say("\nstopping the jobs ...")
            os.killpg(process.pid, signal.SIGINT)
            process.wait()
            raise
    watch.look(last=True)
    told = since(log, begin)
    failures = watch.failures(failed_outputs(told))
    if status and not failures:
        tail = "\n".join(told.strip().splitlines()[-15:])
        failures = [f"{target}: Snakemake ended with status {status}; log: {log}\n{tail}"]
    return failures


def failed_outputs(log: str) -> dict[str, str]:
    """The outputs of the jobs that Snakemake's log names as failed, each with what sbatch said if it refused the job."""
    parts, found = re.split(r"^Error in rule .*$", log, flags=re.M), {}
    for before, part in zip(parts, parts[1:], strict=False):
        if output := re.search(r"^    output: (.*)$", part, re.M):
            said = re.findall(r"^sbatch: (?:error: )?(.*)$", before, re.M)
            found[output[1].strip()] = said[-1] if said else ""
    return found


@contextlib.contextmanager
def terminated_like_ctrl_c() -> Iterator[None]:
    """Let SIGTERM, and SIGHUP of a closed terminal, end what was started, as Ctrl-C does."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Watch:
    """Tells which jobs are done and how much time is left."""

    def __init__(self, steps: Sequence[Mapping[str, Any]], again: Sequence[str] = ()) -> None:
        self.started = self.told = time.monotonic()
        self.steps = [step for step in steps if step["output"] in again or not Path(step["output"]).exists()]
        self.open = list(self.steps)
        self.before = {step["name"]: (mtime(Path(step["output"])), sizes(step), share(step)) for step in steps}
        self.first = self.work()

    def work(self) -> float:
        """Expected seconds of work left; what the plan says is what was left when this began."""
        return sum(
            step.get("seconds", 60.0) * (1 - share(step)) / max(1e-9, 1 - self.before[step["name"]][2])
            for step in self.open
        )

    def look(self, last: bool = False) -> None:
        now = time.monotonic()
        for step in list(self.open):
            if mtime(Path(step["output"])) != self.before[step["name"]][0]:
                self.open.remove(step)
                say(f"done: {step['title']} ({self.count()})")
        if self.open and not last and now - self.told >= TOLD_EVERY:
            self.told, left, elapsed = now, self.work(), now - self.started
            done = self.first - left
            told = f", about {timedelta(seconds=round(elapsed * left / done))} left" if done > 0.02 * self.first else ""
            say(f"{self.count()} done after {timedelta(seconds=round(elapsed))}{told}")

    def count(self) -> str:
        return f"{len(self.steps) - len(self.open)} of {len(self.steps)}"

    def failures(self, named: Mapping[str, str]) -> list[str]:
        """The jobs that failed, by their outputs, each with the reason and the log that tells it."""
        found = []
        for step in self.open:
            if step["output"] in named:
                logs = logs_of(step)
                texts = [since(log, size) for log, size in zip(logs, self.before[step["name"]][1], strict=True)]
                why, place = reason(texts)
                found.append(f"{step['title']}: {named[step['output']] or why}; log: {logs[place]}")
        return found


def logs_of(step: Mapping[str, Any]) -> list[Path]:
    """The log of a job's command, and that of the engine."""
    return [Path(step["log"]), Path(step["log"]).with_suffix(".slurm")]


def sizes(step: Mapping[str, Any]) -> list[int]:
    return [log.stat().st_size if log.exists() else 0 for log in logs_of(step)]


def mtime(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


def since(log: Path, size: int) -> str:
    """What was written into a log after its first `size` bytes."""
    return log.read_bytes()[size:].decode("utf8", "replace") if log.exists() else ""


def reason(texts: Sequence[str]) -> tuple[str, int]:
    """Why a job failed, and which of its two logs tells it: the limit that it went over, if Slurm says so at its last
    attempt, or the last line."""
    last = texts[1].strip().splitlines()[-20:]
    for pattern, told in LIMITS.items():
        if any(re.search(pattern, line, re.IGNORECASE) for line in last):
            return told, 1
    place = 0 if texts[0].strip() or not texts[1].strip() else 1
    return (texts[place].strip().splitlines() or ["nothing is in its log"])[-1].strip(), place


def share(step: Mapping[str, Any]) -> float:
    """The share of a run's steps that its newest checkpoint has done."""
    if not step.get("steps"):
        return 0.0
    names = [path.name[5:13] for path in Path(step["checkpoints"]).glob("step-*.safetensors")]
    return min(1.0, max((int(name) for name in names if name.isdecimal()), default=0) / step["steps"])
