"""Carries out the reproduction with Snakemake: ``make reproduce PROFILE=short ENGINE=slurm`` and so on.

Writes the plan, hands it to the Snakefile, tells how far it is, and names what failed. Records come first, then the book,
with whatever records there are.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import shlex
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from build import BuildError, say
from engine import Engine, carry_out, terminated_like_ctrl_c
from freshness import chapter_key, digest_of, is_current, last_time, record_digest
from places import READERS, SHOWN, TRAINED, Book

from softshare.files import user_path
from softshare.speed.benchmark import default_output, load_benchmark
from softshare.studies import RECIPES, costs, pipeline, runs_folder
from softshare.studies.jobs import Job, Places, has_weights, recorded
from softshare.studies.pipeline import Listed, Machine
from softshare.training.devices import pick_device

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
        for name, known in (("ENGINE", ("local", "slurm")), ("UNTIL", ("records", "site"))):
            if getattr(self, name) not in known:
                raise BuildError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.RUNS and self.UNTIL != "records":
            raise BuildError("RUNS needs UNTIL=records: the chapters read data/runs")
        for name in ("JOBS", "THREADS", "GPUS", "HOURS"):
            given = getattr(self, name)
            if given and not (given.replace(".", "", name == "HOURS").isdecimal() and float(given) > 0):
                raise BuildError(f"{name} must be a number above 0, got {given!r}")

    @property
    def slurm(self) -> bool:
        return self.ENGINE == "slurm"

    @property
    def device(self) -> str:
        if self.slurm:
            return self.DEVICE or ("cpu" if self.PROFILE == "fast" else "cuda")
        return str(pick_device(self.DEVICE or None))

    @property
    def pages(self) -> Path:
        """Where the plan, logs and executed chapters of this profile go; with records elsewhere, beside these."""
        if self.RUNS:
            return user_path(self.RUNS).resolve() / "pipeline"
        return TOP / "book" / "_build" / (self.PROFILE if self.PROFILE != "fast" else "executed")

    @cached_property
    def places(self) -> Places:
        elsewhere = ""
        if self.slurm:
            elsewhere = load_benchmark(self.benchmark)["versions"]["hardware"] if self.benchmark else "?"
        return Places(self.device, self.RUNS, self.CHECKPOINTS, bool(self.DOWNLOAD), elsewhere=elsewhere)

    @cached_property
    def benchmark(self) -> Path | None:
        """The record whose speed to plan with, if one is named."""
        folder = TOP / "data" / "benchmarks"
        path = folder / f"{self.HARDWARE}.json"
        if self.HARDWARE and not path.is_file():
            raise BuildError(f"no {path}; there are: {', '.join(sorted(path.stem for path in folder.glob('*.json')))}")
        return path if self.HARDWARE else None

    @cached_property
    def machine(self) -> Machine:
        path = self.benchmark or (None if self.slurm else default_output(self.places.hardware))
        return Machine(
            int(self.THREADS) if self.THREADS else None,
            int(self.GPUS or 1) if self.device.startswith("cuda") else 0,
            float(self.HOURS) if self.HOURS else math.inf,
            costs.measured_speed(path) if path else None,
        )

    @property
    def hardware(self) -> str:
        return self.HARDWARE or (f"{self.device} of the cluster" if self.slurm else self.places.hardware)


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
        split(options.DATA),
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
            "gpus": min(1, options.machine.gpus),
            "priority": 1,
        }
        steps.append(dressed(step, options))
    digest = digest_of(record_digest(book))[:12]
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
    logs = options.pages / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    return {
        "folder": str(runs_folder(options.RUNS, options.PROFILE).resolve()),
        "logs": str(logs),
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
    gpus, slurm = step["gpus"], options.slurm
    command = step["command"]
    if gpus and not slurm:
        command = shlex.join([sys.executable, str(TOP / "book" / "with_gpus.py"), str(gpus)]) + " " + command
    log = str(options.pages / "logs" / f"{step['name']}.log")
    return step | {"command": command, "log": log, "devices": f"--gres=gpu:{gpus}" if gpus and slurm else ""}


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def engine(options: Options) -> Engine:
    machine = options.machine
    return Engine(
        options.slurm,
        options.pages,
        int(float(options.JOBS)) if options.JOBS else None,
        machine.threads or (4 if machine.gpus else 1),
        options.device,
        options.SLURM,
    )


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Refuse a second call beside a first one; the lock ends with its process, however that ends."""
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BuildError(f"another `make reproduce` is at work in {folder}; wait for it or stop it") from error
        yield


def reproduce(options: Options) -> int:
    """Carry out the options; returns 0, or 1 if a job failed."""
    say(f"profile {options.PROFILE}: looking at what there is to do ...")
    rows, plan = records_plan(options)
    pipeline.print_list(rows, options.machine, options.hardware)
    if options.DRY:
        return 0
    failures: list[str] = []
    with alone(options.pages):
        if any(row.step and not row.done for row in rows):
            failures += carry_out(plan, "records", engine(options))
        if options.UNTIL == "site":
            plan, why = book_plan(options)
            for name, reason in why.items():
                say(f"chapter {name} in profile fast, since it cannot show {options.PROFILE}: {reason}")
            failures += carry_out(plan, "site", engine(options))
    for failure in failures:
        say(f"FAILED: {failure}")
    if not failures:
        where = TOP / "book" / "_build" / "html" / "index.html" if options.UNTIL == "site" else plan["folder"]
        say(f"all done: {where}")
    return int(bool(failures))


def main(arguments: Iterable[str] | None = None) -> int:
    try:
        with terminated_like_ctrl_c():
            return reproduce(parse_options(sys.argv[1:] if arguments is None else arguments))
    except (BuildError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        say("stopped; the same command goes on where it was")
        return 130


if __name__ == "__main__":
    sys.exit(main())
