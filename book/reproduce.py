"""Carries out the reproduction with Snakemake: ``make reproduce PROFILE=short ENGINE=slurm`` and so on.

Writes the plan, hands it to the Snakefile, tells how far it is, and names what failed. Records come first, then the book,
with whatever records there are.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import shlex
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from build import BuildError, say
from engine import Engine, carry_out, terminated_like_ctrl_c
from freshness import chapter_key, digest_of, is_current, last_time, record_digest, tree_digest
from places import READERS, SHOWN, TRAINED, Book

from softshare import images
from softshare.files import user_path
from softshare.speed import networks
from softshare.speed.benchmark import default_output, load_benchmark
from softshare.studies import RECIPES, costs, pipeline, runs_folder
from softshare.studies.jobs import Job, Places, has_weights, recorded
from softshare.studies.pipeline import Listed, Machine
from softshare.training.devices import NoSuchDevice, pick_device

TOP = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Options:
    """What can be asked for as NAME=VALUE; an empty value means the default."""

    PROFILE: str = "fast"  # fast, gpu, short or paper
    SEEDS: str = ""  # "0,3", "10-14", or "x3": the first three that the rules for the claims count
    ONLY: str = ""  # recipes, patterns ("SWRN 28-*"), studies ("paths") or "table*", separated by commas
    DATA: str = ""  # names of image sets, the path of a folder for ImageNet, separated by commas
    ENGINE: str = "local"  # local or slurm
    JOBS: str = ""  # how many at a time; default: as many as this machine has room for; slurm: 100
    THREADS: str = ""  # CPU threads of one job; on the CPU, results depend on them
    DEVICE: str = ""  # cpu or cuda; default: here, cuda if available; slurm: cuda, in profile fast cpu
    GPUS: str = ""  # the most GPUs of one job; default 1
    HOURS: str = ""  # the longest that a job may take, such as the limit of a partition
    HARDWARE: str = ""  # a record in data/benchmarks, such as nvidia-h100-80gb-hbm3, whose speed to plan with
    SLURM: str = ""  # further options of sbatch, such as "--partition=gpu --account=mine"
    DOWNLOAD: str = ""  # 1: fetch data sets if no copy is found
    UNTIL: str = "site"  # site, or records to stop before the book
    RUNS: str = ""  # folder of records, only with UNTIL=records
    CHECKPOINTS: str = ""  # folder of checkpoints
    DRY: str = ""  # 1: list the jobs and what they cost, start nothing

    def __post_init__(self) -> None:
        choices = {"ENGINE": ("local", "slurm"), "UNTIL": ("records", "site"), "DEVICE": ("", "cpu", "cuda"),
                   "DOWNLOAD": ("", "0", "1"), "DRY": ("", "0", "1")}  # fmt: skip
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise BuildError(f"{name} must be one of {', '.join(filter(None, known))}, got {getattr(self, name)!r}")
        if self.RUNS and self.UNTIL != "records":
            raise BuildError("RUNS needs UNTIL=records: the chapters read data/runs")
        for name in ("JOBS", "THREADS", "GPUS", "HOURS"):
            given = getattr(self, name)
            digits = given.replace(".", "", 1) if name == "HOURS" else given
            if given and not (digits.isdecimal() and float(given) > 0):
                raise BuildError(f"{name} must be a {'' if name == 'HOURS' else 'whole '}number above 0, got {given!r}")
        if not set("{}").isdisjoint(self.RUNS):
            raise BuildError(
                f"RUNS must not contain braces, which Snakemake would read as placeholders, got {self.RUNS!r}"
            )
        # Jobs run in another folder than this.
        for name in ("RUNS", "CHECKPOINTS"):
            if given := getattr(self, name):
                object.__setattr__(self, name, str(user_path(given).resolve()))

    @property
    def slurm(self) -> bool:
        return self.ENGINE == "slurm"

    @cached_property
    def device(self) -> str:
        if self.slurm:
            return self.DEVICE or ("cpu" if self.PROFILE == "fast" else "cuda")
        return pick_device(self.DEVICE or None).type

    @cached_property
    def data(self) -> list[str]:
        """The data sets by name or absolute path."""
        found = []
        for given in split(self.DATA):
            if given not in images.NAMES and not user_path(given).exists():
                known = ", ".join(images.NAMES)
                raise BuildError(f"DATA: {given!r} is neither a data set ({known}) nor a folder of ImageNet's images")
            found.append(given if given in images.NAMES else str(user_path(given).resolve()))
        return found

    @property
    def pages(self) -> Path:
        """Where plans, logs and executed chapters of this profile go; with records elsewhere, beside these."""
        if self.RUNS:
            return Path(self.RUNS) / "pipeline"
        return TOP / "book" / "_build" / (self.PROFILE if self.PROFILE != "fast" else "executed")

    @cached_property
    def places(self) -> Places:
        elsewhere = ""
        if self.slurm:
            elsewhere = load_benchmark(self.benchmark)["versions"]["hardware"] if self.benchmark else "?"
        return Places(self.device, self.RUNS, self.CHECKPOINTS, self.DOWNLOAD == "1", elsewhere=elsewhere)

    @cached_property
    def benchmark(self) -> Path | None:
        """The record whose speed to plan with, if one is named."""
        folder = TOP / "data" / "benchmarks"
        known = {path.stem: path for path in sorted(folder.glob("*.json")) if not path.match(networks.PATTERN)}
        if self.HARDWARE and self.HARDWARE not in known:
            raise BuildError(f"no record of HARDWARE={self.HARDWARE} in {folder}; there are: {', '.join(known)}")
        if self.HARDWARE and load_benchmark(known[self.HARDWARE])["versions"]["device"] != self.device:
            raise BuildError(f"HARDWARE={self.HARDWARE} is another kind of device than the jobs', {self.device}")
        return known.get(self.HARDWARE)

    @cached_property
    def machine(self) -> Machine:
        path = self.benchmark or (None if self.slurm else default_output(self.places.hardware))
        gpus = int(self.GPUS or 1) if self.device == "cuda" else 0
        if gpus and not self.slurm and gpus > torch.cuda.device_count():
            raise BuildError(f"GPUS={gpus}, but this machine has {torch.cuda.device_count()}")
        return Machine(
            int(self.THREADS) if self.THREADS else None,
            gpus,
            float(self.HOURS) if self.HOURS else math.inf,
            costs.measured_speed(path) if path else None,
        )

    @property
    def hardware(self) -> str:
        kind = "GPU" if self.device == "cuda" else "CPU core"
        return self.HARDWARE or (f"{kind} of the cluster" if self.slurm else self.places.hardware)


def parse_options(arguments: Iterable[str]) -> Options:
    """["PROFILE=short", "SEEDS=x3"] -> Options. Raises BuildError for what does not exist."""
    known, given = [field.name for field in fields(Options)], {}
    for text in arguments:
        name, equals, value = text.partition("=")
        if name not in known or not equals:
            raise BuildError(f"expected NAME=VALUE, where NAME is one of {', '.join(known)}, got {text!r}")
        if value.strip():
            given[name] = value.strip()
    return Options(**given)


def split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


# ---------------------------------------------------------------------------------------------------------------------
# Plans


def records_plan(options: Options) -> tuple[list[Listed], dict[str, Any]]:
    """The list of jobs, and the plan of the Snakefile's first part."""
    runs = [(shown_run(recipe, options), folds) for shown in SHOWN.values() for recipe, folds in shown.items()]
    shown = [job._replace(folds=each) for job, folds in runs for each in ((False, True) if folds else (False,))]
    jobs = pipeline.jobs_of(
        options.PROFILE,
        pipeline.parse_seeds(options.SEEDS),
        split(options.ONLY),
        options.data,
        () if options.PROFILE == "fast" else shown,
    )
    rows = pipeline.listed(jobs, options.places, options.machine)
    steps = [dressed(row.step, options) for row in rows if row.step]
    folds = {row.step["name"] for row in rows if row.step and row.job.folds}
    plan = frame(options) | {
        "runs": [step for step in steps if step["name"] not in folds],
        "folds": [step for step in steps if step["name"] in folds],
        # Folds of weights that were trained again since.
        "again": [
            row.step["output"] for row in rows if row.step and not row.done and Path(row.step["output"]).exists()
        ],
    }
    return rows, plan


def shown_run(recipe: str, options: Options) -> Job:
    """The run of a recipe that a chapter shows."""
    return Job(recipe, 0, options.PROFILE, next(iter(RECIPES[recipe].data), None))


def book_plan(options: Options) -> tuple[dict[str, Any], dict[str, str]]:
    """The plan of the second part; also tells which chapters show profile fast instead, and why."""
    why = {} if options.PROFILE == "fast" else in_fast(options)
    book = Book(TOP, options.pages, why)
    parameters = {"PROFILE": options.PROFILE}
    python, build = sys.executable, str(TOP / "book" / "build.py")
    tail = ["-p", f"PROFILE={options.PROFILE}", "--output", str(options.pages)]
    tail += ["--in-fast", ",".join(why)] if why else []
    steps: list[dict[str, Any]] = []
    for name in book.chapters():
        label = f"{name}-{chapter_key(book, name, parameters)[:12]}"
        output = options.pages / f"{label}.done"
        for old in options.pages.glob(f"{name}-*.done"):
            if old != output or not is_current(book, name, parameters):
                old.unlink()
        step = {
            "name": label,
            "title": f"chapter {name}",
            "output": str(output),
            "needs": [step["output"] for step in steps] if name in READERS else [],
            "command": shlex.join([python, build, "execute", *tail, name]),
            "seconds": last_time(book, name) or 60.0,
            "minutes": 60 if options.PROFILE == "fast" else 24 * 60,
            "memory": 6000,
            "threads": options.machine.threads or 1,
            "gpus": min(1, options.machine.gpus) if name in SHOWN and name not in why else 0,
            "priority": 1,
        }
        steps.append(dressed(step, options))
    digest = digest_of([record_digest(book), tree_digest(book.package)])[:12]
    report, render = shlex.join([python, "-m", "softshare", "report"]), shlex.join([python, build, "render", *tail])
    plan = frame(options) | {
        "chapters": steps,
        "verdicts": last_step("verdicts", options, f"verdicts-{digest}.txt", report),
        "site": last_step("site", options, "site.done", render),
    }
    options.pages.joinpath("site.done").unlink(missing_ok=True)  # whether the site is unchanged, `render` knows better
    return plan, why


def in_fast(options: Options) -> dict[str, str]:
    """The chapters whose runs have no record at the profile, or no weights here, with the run that is missing."""
    found: dict[str, str] = {}
    for name, recipe in ((name, recipe) for name, recipes in SHOWN.items() for recipe in recipes):
        job = shown_run(recipe, options)
        try:
            why = "" if recorded(job, options.places) else "no record"
            if not why and name in TRAINED and not has_weights(job, options.places):
                why = "its weights are not here"
        except (OSError, ValueError) as error:
            why = str(error)
        if why:
            found.setdefault(name, f"{job}: {why}")
    return found


def frame(options: Options) -> dict[str, Any]:
    """What every plan contains."""
    return {
        "folder": str(runs_folder(options.RUNS, options.PROFILE).resolve()),
        "logs": str(options.pages / "logs"),
        "longest": math.ceil(60 * float(options.HOURS)) if options.HOURS else 10**6,
        "pages": str(options.pages),
        **{kind: [] for kind in ("runs", "folds", "chapters", "again")},
        **{name: last_step(name, options, f"{name}.done", "false") for name in ("verdicts", "site")},
    }


def last_step(name: str, options: Options, output: str, command: str) -> dict[str, Any]:
    """What is made from all records, in a moment on this machine."""
    log = str(options.pages / "logs" / f"{name}.log")
    return {"name": name, "title": name, "output": str(options.pages / output), "log": log, "command": command}


def dressed(step: dict[str, Any], options: Options) -> dict[str, Any]:
    """A job with how it gets its GPUs: from Slurm, or here, one that no other job has."""
    gpus, command = step["gpus"], step["command"]
    if gpus > 1:  # torchrun leaves the number of threads as it is, and Snakemake sets it to that of all processes
        command = f"env OMP_NUM_THREADS={max(1, step['threads'] // gpus)} {command}"
    if gpus and not options.slurm:
        command = shlex.join([sys.executable, str(TOP / "book" / "with_gpus.py"), str(gpus)]) + " " + command
    log = str(options.pages / "logs" / f"{step['name']}.log")
    return step | {"command": command, "log": log, "devices": f"--gres=gpu:{gpus}" if gpus and options.slurm else ""}


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def engine(options: Options) -> Engine:
    gpus = torch.cuda.device_count() if options.device == "cuda" and not options.slurm else 0
    return Engine(options.slurm, options.pages, int(options.JOBS) if options.JOBS else None, gpus, options.SLURM)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[int]:
    """Refuse a second call beside a first one; the lock ends with the processes that hold it, however they end."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BuildError(f"another `make reproduce` is at work in {folder}; wait for it or stop it") from error
        yield lock.fileno()


def reproduce(options: Options) -> int:
    """Carry out the options; returns 0, or 1 if a job failed or its record is damaged."""
    if options.slurm and not shutil.which("sbatch") and options.DRY != "1":
        raise BuildError(
            "ENGINE=slurm needs Slurm's commands, but there is no sbatch here; log in where jobs are sent from"
        )
    say(f"profile {options.PROFILE}: looking at what there is to do ...")
    rows, plan = records_plan(options)
    pipeline.print_list(rows, options.machine, options.hardware)
    if options.DRY == "1":
        return 0
    failures = [f"{row.job}: {row.why_not}" for row in rows if row.damaged]
    with alone(options.pages) as lock:
        if any(row.waiting for row in rows):
            failures += carry_out(plan, "records", engine(options), lock)
        if options.UNTIL == "site":
            plan, why = book_plan(options)
            for name, reason in why.items():
                say(f"chapter {name} in profile fast, since it cannot show {options.PROFILE}: {reason}")
            failures += carry_out(plan, "site", engine(options), lock)
            say(f"verdicts: {plan['verdicts']['output']}")
            say(f"book: {TOP / 'book' / '_build' / 'html' / 'index.html'}")
    say(f"records: {plan['folder']}")
    left = sum(bool(row.why_not) for row in rows)
    say(f"{left} jobs left out, see the end of the list above" if left else "no job left out")
    for failure in failures:
        say(f"FAILED: {failure}")
    return int(bool(failures))


def main(arguments: Iterable[str] | None = None) -> int:
    if given := os.environ.get("SOFTSHARE_DATA"):  # jobs run in another folder than this
        os.environ["SOFTSHARE_DATA"] = str(user_path(given).resolve())
    try:
        with terminated_like_ctrl_c():
            return reproduce(parse_options(sys.argv[1:] if arguments is None else arguments))
    except (BuildError, ValueError, OSError, NoSuchDevice) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        say("stopped; the same command goes on where it was")
        return 130


if __name__ == "__main__":
    sys.exit(main())
