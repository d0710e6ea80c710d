"""The pipeline's plan: the recipes, seeds and data sets of a profile as jobs, and what each needs of a machine.

`make reproduce` writes it, and the Snakefile at the top of the checkout carries it out, on one machine or through a
cluster's queue. What has its record is up to date: a record's name stands for everything that decides its outcome, so
nothing else has to be compared.
"""

from __future__ import annotations

import heapq
import itertools
import math
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from .. import images
from ..files import user_path
from . import costs
from .costs import duration
from .gpu_list import entries
from .jobs import Job, Places, expected, has_weights, path_of, plan_of_job, recorded, still_needs, total_steps
from .recipes import RECIPES
from .records import check_profile
from .running import checkpoints_folder
from .study import Recipe

SEEDS = {"fast": 1, "gpu": 1, "short": 3, "paper": 5}
"""How many seeds a profile has unless asked otherwise."""

SLACK = 3.0
"""A job's time limit on a cluster is this multiple of its expected time, and five minutes: most runs so far took
1.2 to 2.6 times as long as expected, see the page From one GPU to a cluster."""


@dataclass(frozen=True)
class Machine:
    """What one job may use.

    Attributes:
        threads: CPU threads per job; None: 1 on the CPU, 4 on a GPU, 8 per GPU where images are streamed.
        gpus: the most GPUs of one job; 0 on the CPU.
        hours: the longest that a job may take. A longer one gets more GPUs if `gpus` allows, and at its limit, it is
            started again and goes on from its checkpoint.
        speed: measured in training; None: assumed, see `softshare.studies.costs`.
    """

    threads: int | None = None
    gpus: int = 0
    hours: float = math.inf
    speed: costs.Speed | None = None


@dataclass(frozen=True)
class Listed:
    """A job of the list and what is to be done about it.

    Attributes:
        job: the job.
        why_not: why it is left out; "" if it is not.
        damaged: whether that is a damaged record.
        done: whether it has its record.
        seconds: still expected on one GPU, or on the CPU.
        gpus: how many it gets.
        memory: main memory that it needs, in bytes.
        step: what the Snakefile needs to know; None if it is left out.
    """

    job: Job
    why_not: str = ""
    damaged: bool = False
    done: bool = False
    seconds: float = 0.0
    gpus: int = 0
    memory: float = 0.0
    step: dict[str, Any] | None = None

    @property
    def waiting(self) -> bool:
        return self.step is not None and not self.done


def parse_seeds(text: str) -> list[int] | int | None:
    """ "0,3" or "10-14": these seeds; "x3": the first three that count, see `jobs_of`; "": as many as the profile has.

    Raises ValueError for anything else.
    """
    if not text.strip():
        return None
    parts = [re.fullmatch(r"(x)?(\d+)(?:-(\d+))?", part.strip()) for part in text.split(",")]
    found = [match for match in parts if match]
    if len(found) == len(parts):
        if len(found) == 1 and found[0][1] and not found[0][3] and int(found[0][2]) > 0:
            return int(found[0][2])
        ranges = [range(int(match[2]), int(match[3] or match[2]) + 1) for match in found if not match[1]]
        if len(ranges) == len(found) and all(ranges):
            return list(dict.fromkeys(itertools.chain(*ranges)))
    raise ValueError(f'seeds must be numbers such as "0,3" or "10-14", or a count such as "x3", got {text!r}')


def jobs_of(
    profile: str,
    seeds: Sequence[int] | int | None = None,
    only: Sequence[str] = (),
    data: Sequence[str] = (),
    shown: Sequence[Job] = (),
) -> list[Job]:
    """The jobs of a profile, the most valuable first, in the order of ``softshare gpu``.

    Args:
        profile: one of `softshare.studies.records.PROFILES`.
        seeds: these, or so many per recipe, from the first that the rules in data/paper/claims.csv count; None: `SEEDS`.
        only: recipes by name, patterns of names ("SWRN 28-*"), names of studies ("paths"), or where on the poster they are
            ("table*"); (): all.
        data: names of image sets, and the path of a folder for ImageNet; (): each recipe's own, where profile "fast" takes
            the first, or the embedded digits if it is not found.
        shown: further jobs, which a chapter shows; unless `only` is given.

    Raises ValueError for an unknown profile, or if nothing is left.
    """
    check_profile(profile)
    known = [name for name in data if name in images.NAMES]
    folders = [str(user_path(path)) for path in data if path not in images.NAMES]
    found = [] if only else list(shown)
    for recipe in _chosen(only):
        numbers = (
            seeds if isinstance(seeds, Sequence) else _first_seeds(recipe, SEEDS[profile] if seeds is None else seeds)
        )
        if recipe.study == "imagenet":
            sets: list[str | None] = [*folders] or [None]
        elif recipe.data:
            sets = [name for name in recipe.data if not known or name in known]
            sets = [None] if profile == "fast" and not known else sets
        else:
            sets = [None]
        for where, seed in itertools.product(sets, numbers):
            job = Job(recipe.name, seed, profile, where)
            found += [job, job._replace(folds=True)] if folded(recipe) else [job]
    if not found:
        raise ValueError(f"no recipe of those asked for is run on {', '.join(data)}")
    order = _order()
    return sorted(dict.fromkeys(found), key=lambda job: (order.get(job.recipe, len(order)), job.seed))


def folded(recipe: Recipe) -> bool:
    """Whether folds belong to a recipe: to those of the poster's figures of similarity and folding."""
    return recipe.shows.startswith("figures of similarity and folding")


def _chosen(only: Sequence[str]) -> list[Recipe]:
    """The recipes that are asked for. Raises ValueError for a pattern that fits none."""
    if not only:
        return list(RECIPES.values())
    names: dict[str, None] = {}
    for pattern in only:
        # A name may end with an asterisk, which stands for dropout.
        fits = [pattern] if pattern in RECIPES else [
            name for name, recipe in RECIPES.items()
            if any(fnmatchcase(text, pattern) for text in (name, recipe.study, recipe.shows))
        ]  # fmt: skip
        if not fits:
            raise ValueError(
                f"no recipe fits {pattern!r}: give names (`softshare list`), patterns such as 'SWRN 28-*', a study (cifar, "
                "paths, imagenet) or 'table*' for the rows of the poster's tables"
            )
        names |= dict.fromkeys(fits)
    return [recipe for name, recipe in RECIPES.items() if name in names]


def _first_seeds(recipe: Recipe, count: int) -> range:
    from .verdicts import read_claims  # here, since it needs scipy

    def compared(name: str) -> bool:
        """Whether a claim about that recipe is about this one, too, or one that it is compared with."""
        other = RECIPES.get(name)
        # Grid networks are compared among themselves, on the same grids.
        alike = other is not None and (other.network == recipe.network or not recipe.data)
        return alike and other is not None and other.study == recipe.study

    named = [(name, claim.seeds) for claim in read_claims() for name in (claim.recipe, claim.against)]
    least = max((seed for name, seed in named if compared(name)), default=0)
    return range(least, least + count)


def _order() -> dict[str, int]:
    """The recipes' place in the GPU list."""
    found: dict[str, int] = {}
    for place, entry in enumerate(entries()):
        for job in entry.jobs:
            found.setdefault(job.recipe, place)
    return found


def listed(jobs: Iterable[Job], places: Places, machine: Machine) -> list[Listed]:
    """What is to be done about each job. A missing data set or a damaged record leaves out the jobs that need it."""
    jobs = list(jobs)
    return [_listed(job, places, machine, len(jobs) - number) for number, job in enumerate(jobs)]


def _listed(job: Job, places: Places, machine: Machine, priority: int) -> Listed:
    plan, why_not, damaged, done = plan_of_job(job, places), "", False, False
    try:
        path_of(job, places)
    except (OSError, ValueError) as error:
        why_not = str(error)
        if plan.recipe.study == "imagenet" and job.data is None:
            why_not = "no folder with ImageNet's images (train/<class>/<file>, val/<class>/<file>) is named as data"
    else:
        try:
            done = recorded(job, places)
            if job.folds and not done and recorded(job.run, places) and not has_weights(job, places):
                why_not = "their networks were trained elsewhere, so the weights are not here"
        except (OSError, ValueError) as error:
            why_not, damaged = str(error), True
    if done:
        seconds = 0.0
    elif why_not:
        seconds = expected(job, places, machine.speed)
    else:
        seconds = still_needs(job, places, machine.speed)
    gpus = 0 if machine.gpus == 0 else 1 if job.folds else gpus_for(seconds, machine.gpus, machine.hours)
    memory = costs.memory_bytes(plan, places.on_cuda) * max(1, gpus)
    found = Listed(job, why_not, damaged, done, seconds, gpus, memory)
    return found if why_not else replace(found, step=_step(found, places, machine, priority))


def _step(found: Listed, places: Places, machine: Machine, priority: int) -> dict[str, Any]:
    job, gpus = found.job, found.gpus
    plan, path = plan_of_job(job, places), path_of(job, places)
    seconds = found.seconds / max(1, gpus)
    streamed = plan.recipe.study == "imagenet"
    # What an interruption costs stays below a twentieth of the run, and two minutes.
    often = min(120.0, max(2.0, math.floor(seconds / 20)))
    limit = min(SLACK * seconds + 300, 3600 * machine.hours)
    return {
        "name": path.stem,
        "title": str(job),
        "output": str(path),
        "needs": [str(path_of(job.run, places))] if job.folds else [],
        "command": shlex.join(places.command(job, often, gpus)),
        "checkpoints": str(checkpoints_folder(path, places.checkpoints)),
        "steps": 0 if job.folds else total_steps(plan),
        "seconds": round(seconds, 1),
        "minutes": math.ceil(limit / 60),
        "attempts": 1 + math.floor(SLACK * seconds / limit),
        "memory": math.ceil(found.memory / 1e6),
        "threads": machine.threads or (1 if not gpus else 8 * gpus if streamed else 4),
        "gpus": gpus,
        "priority": priority,
    }


def gpus_for(seconds: float, most: int, hours: float) -> int:
    """The fewest GPUs, a power of two and at most `most`, with which a job of so many seconds takes at most `hours`.

    It is assumed that n GPUs are n times as fast.
    """
    gpus = 1
    while 2 * gpus <= most and seconds / gpus > 3600 * hours:
        gpus *= 2
    return gpus


def _what(job: Job) -> str:
    return f"{'folds of ' * job.folds}{job.recipe}" + (f", {job.data}" if job.data else "")


def _ranges(numbers: Iterable[int]) -> str:
    """ "0-2, 10" for 0, 1, 2 and 10."""
    found: list[list[int]] = []
    for number in sorted(set(numbers)):
        if found and number == found[-1][-1] + 1:
            found[-1].append(number)
        else:
            found.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in found)


def print_list(rows: Sequence[Listed], machine: Machine, hardware: str) -> float:
    """Print the jobs by recipe and data set with their time, memory and GPUs, and the sums; returns hours to do."""
    groups: dict[str, list[Listed]] = {}
    for row in rows:
        groups.setdefault(_what(row.job), []).append(row)
    width = max(map(len, groups))
    print(f"{'jobs':{width}}  {'seeds':12} {'to do':>9} {'each':>8} {'in all':>8} {'memory':>8} {'GPUs':>4}")
    for what, each in groups.items():
        told = f"{sum(row.waiting for row in each)} of {len(each)}"
        told = f"{what:{width}}  {_ranges(row.job.seed for row in each):12} {told:>9}"
        if left := [row for row in each if not row.done]:
            seconds = sum(row.seconds for row in left)
            memory, gpus = (max(getattr(row, name) for row in left) for name in ("memory", "gpus"))
            told += (
                f" {duration(seconds / len(left)):>8} {duration(seconds):>8} {f'{memory / 1e9:.1f} GB':>8} {gpus:>4}"
            )
        print(told)
    reasons: dict[str, list[Listed]] = {}
    for row in rows:
        if row.why_not:
            reasons.setdefault(row.why_not, []).append(row)
    for reason, each in reasons.items():
        some = f"{len(each)} job{'s' * (len(each) > 1)} ({duration(sum(row.seconds for row in each))})"
        print(f"left out, {some}: {reason}")
    waiting = [row for row in rows if row.waiting]
    seconds = sum(row.seconds for row in waiting)
    how = "at the speed measured on it" if machine.speed else "at an assumed speed, not measured"
    print(f"{len(waiting)} of {len(rows)} jobs to do: {duration(seconds)} one after another on one {hardware}, {how}")
    return seconds / 3600


def makespan(seconds: Iterable[float], machines: int) -> float:
    """Seconds until all jobs are done on so many machines, if the longest that is left always goes to the next free one.

    At most 4/3 of the shortest possible time (Graham, 1969). Raises ValueError without machines.
    """
    if machines < 1:
        raise ValueError(f"machines must be at least 1, got {machines}")
    free = [0.0] * machines
    for each in sorted(seconds, reverse=True):
        heapq.heapreplace(free, free[0] + each)
    return max(free)
