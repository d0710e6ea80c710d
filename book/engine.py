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
        threads: CPU threads of a job.
        device: "cuda" or "cpu".
        sbatch: further options of sbatch.
    """

    slurm: bool
    pages: Path
    jobs: int | None = None
    threads: int = 1
    device: str = "cpu"
    sbatch: str = ""

    def command(self, plan: Path, target: str, retries: int, again: Sequence[str] = ()) -> list[str]:
        """The call of Snakemake that carries out a plan up to a target."""
        command = [sys.executable, "-m", "snakemake", target, "--snakefile", str(BOOK.parent / "Snakefile")]
        command += [
            "--directory",
            str(self.pages),
            "--config",
            f"plan={plan}",
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
        return command + (self._slurm() if self.slurm else self._here())

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

    def _here(self) -> list[str]:
        import torch

        gpus = torch.cuda.device_count() if self.device.startswith("cuda") else 0
        here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        cores = self.jobs * self.threads if self.jobs else here
        memory = 0.9 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e6
        resources = [f"gpu={gpus}", f"mem_mb={memory:.0f}"]
        return ["--cores", str(max(cores, self.threads)), "--resources", *resources]


def carry_out(plan: Mapping[str, Any], target: str, engine: Engine) -> list[str]:
    """Carry out a plan and return what failed, one line each; Ctrl-C and SIGTERM end the jobs too."""
    steps = [*plan["runs"], *plan["folds"], *plan["chapters"]]
    steps += [plan["verdicts"], plan["site"]] if target == "site" else []
    text, log = json.dumps(plan, indent=1), engine.pages / "snakemake.log"
    # Jobs of an earlier call that still wait in a queue must find the plan that they were sent with.
    path = engine.pages / f"{target}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"
    path.write_text(text, encoding="utf8")
    retries = max((step.get("attempts", 1) for step in steps), default=1)
    watch = Watch(steps, plan["again"])
    begin = log.stat().st_size if log.exists() else 0
    with log.open("a", encoding="utf8") as output:
        command = engine.command(path, target, retries, plan["again"])
        process = subprocess.Popen(command, stdout=output, stderr=output, cwd=BOOK.parent, start_new_session=True)
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
    failures = watch.failures()
    if status and not failures:
        tail = "\n".join(since(log, begin).strip().splitlines()[-15:])
        failures = [f"{target}: Snakemake ended with status {status}: see {log}\n{tail}"]
    return failures


@contextlib.contextmanager
def terminated_like_ctrl_c() -> Iterator[None]:
    """Let SIGTERM end what was started, as Ctrl-C does."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Watch:
    """Tells which jobs are done and how much time is left."""

    def __init__(self, steps: Sequence[Mapping[str, Any]], again: Sequence[str] = ()) -> None:
        self.started = self.told = time.monotonic()
        self.steps = [step for step in steps if step["output"] in again or not Path(step["output"]).exists()]
        self.open = list(self.steps)
        self.before = {step["name"]: (mtime(Path(step["output"])), sizes(step)) for step in steps}
        self.first = self.work()

    def work(self) -> float:
        """Expected seconds of work left."""
        return sum(step.get("seconds", 60.0) * (1 - share(step)) for step in self.open)

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

    def failures(self) -> list[str]:
        """The jobs that were tried in vain, each with the reason and its log; what waited for them is not among them."""
        found = []
        for step in self.open:
            logs = logs_of(step)
            texts = [since(log, size) for log, size in zip(logs, self.before[step["name"]][1], strict=True)]
            if any(text.strip() for text in texts):
                found.append(f"{step['title']}: {reason(texts)}; log: {logs[0]}")
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


def reason(texts: Sequence[str]) -> str:
    """Why a job failed: the limit that it went over, if Slurm says so at its last attempt, or the last line of its log."""
    last = texts[1].strip().splitlines()[-20:]
    for pattern, told in LIMITS.items():
        if any(re.search(pattern, line, re.IGNORECASE) for line in last):
            return told
    lines = next((text.strip().splitlines() for text in texts if text.strip()), [""])
    return lines[-1].strip()


def share(step: Mapping[str, Any]) -> float:
    """The share of a run's steps that its newest checkpoint has done."""
    if not step.get("steps"):
        return 0.0
    names = [path.name[5:13] for path in Path(step["checkpoints"]).glob("step-*.safetensors")]
    return min(1.0, max((int(name) for name in names if name.isdecimal()), default=0) / step["steps"])
