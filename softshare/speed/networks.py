"""Timings of the poster's networks side by side: a training step of each, in turn, round after round, in one process.

A step is forward, loss, backward and SGD on noise, of the network as `softshare.models.build` makes it: without dropout,
auxiliary head or drop-path. Each network is built for its turn and takes one step to warm up before one is timed, so that
only one is in memory at a time. Command: ``softshare bench --networks`` (under 12 minutes on two CPU cores).
"""

from __future__ import annotations

import math
import os
import sys
import time
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from .. import files
from ..models import Network
from ..training.devices import pick_device, pick_precision, precision_name, standard_defaults
from ..training.environment import environment
from ..training.processor import processor_name
from ..training.tasks import Classification
from .records import check_content, check_seconds, default_output, in_six_digits, load, read_fields
from .steps import Call, noise, ours

FORMAT = "softshare network timings 1"
PATTERN = "networks-*.json"
"""The names of these records among those in data/benchmarks."""

_PARTS: dict[str, type] = {"groups": dict, "machine": dict, "versions": dict, "quick": bool, "threads": int}
_PARTS |= {"rounds": int, "device": str, "precision": str, "content": str}


class Group(NamedTuple):
    """Networks that take images of one size.

    Attributes:
        networks: their names.
        side: of their images, in pixels.
        share: how large their batch is, as a share of that of the CIFAR networks.
    """

    networks: tuple[str, ...]
    side: int
    share: float


_BY_HAND = ("ResNeXt-29 16x64", "DenseNet 100-24", "DenseNet 190-40")
_SEARCHED = (
    "NASNet-A",
    "NASNet-A 27.6M",
    "AmoebaNet-B",
    "AmoebaNet-B 13.7M",
    "AmoebaNet-B 34.9M",
    "DARTS",
    "SNAS",
    "ENAS",
)
_PLAIN = ("WRN 28-6", "WRN 28-10", "WRN 28-14", "WRN 28-18", "WRN 40-8")
_SHARED = (
    *("SWRN 28-6-2", "SWRN 28-10", "SWRN 28-10-4", "SWRN 28-10-2", "SWRN 28-14", "SWRN 28-14-2"),
    *("SWRN 28-18", "SWRN 28-18-2", "SWRN 40-8-8"),
)
_TWINS = ("WRN 16-6", "WRN 16-10", "WRN 16-14", "WRN 16-18", "WRN 22-10", "WRN 34-8")

GROUPS = {
    "CIFAR": Group((*_BY_HAND, *_SEARCHED, *_PLAIN, *_SHARED, *_TWINS), 32, 1.0),
    "ImageNet": Group(("WRN 50-2", "SWRN 50-2", "DenseNet-264", "ResNet-200"), 224, 0.25),
}
"""The poster's networks, with the plain network and the twin of equal parameters of each shared one."""


def in_groups(quick: bool) -> dict[str, Group]:
    """`GROUPS`; if `quick`, with networks as narrow as in profile fast, and small images for those of ImageNet."""
    if not quick:
        return GROUPS
    return {
        title: Group(
            tuple(dict.fromkeys(str(Network.parse(name).narrowed()) for name in group.networks)),
            min(group.side, 64),
            group.share,
        )
        for title, group in GROUPS.items()
    }


def seconds_of_a_step(name: str, task: Classification) -> float:
    """Seconds of a training step of a new network on all images of a task, after one step to warm up."""
    step = ours(task, name, task.size)
    _timed(step, 1, task.images.device)
    seconds = _timed(step, 1, task.images.device)
    return seconds if seconds >= 0.1 else _timed(step, math.ceil(0.1 / seconds), task.images.device)


def _timed(step: Call, calls: int, device: torch.device) -> float:
    settle: Call = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    settle()
    started = time.perf_counter()
    for _ in range(calls):
        step()
    settle()
    return (time.perf_counter() - started) / calls


@standard_defaults()
def measure(setup: Namespace) -> dict[str, Any]:
    """Time all networks, with progress and the time that is left on stderr. Sets the threads of this process."""
    torch.set_num_threads(setup.threads)
    groups, found, tasks = in_groups(setup.quick), {}, {}
    for title, (names, side, share) in groups.items():
        batch = max(1, round(share * setup.batch))
        found[title] = {"side": side, "batch": batch, "seconds": {name: [] for name in names}}
        tasks[title] = noise(batch, setup.device, side)
    turns = [(title, name) for title, group in groups.items() for name in group.networks]
    took: dict[str, float] = {}
    for turn in range(setup.rounds):
        order = turns[:: 1 if turn % 2 == 0 else -1]
        for place, (title, name) in enumerate(order, start=1):
            started = time.perf_counter()
            found[title]["seconds"][name].append(seconds_of_a_step(name, tasks[title]))
            took[name] = time.perf_counter() - started
            usual = sum(took.values()) / len(took)
            ahead = chain(order[place:], turns * (setup.rounds - turn - 1))
            left = sum(took.get(other, usual) for _, other in ahead)
            seconds = found[title]["seconds"][name][-1]
            print(
                f"round {turn + 1} of {setup.rounds}, {name}: {seconds:.3g} s; about {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )
    return {"precision": precision_name(pick_precision("auto", setup.device)), "groups": found}


def table(record: Mapping[str, Any]) -> str:
    """The record as a readable table, at most 100 columns wide."""
    machine, versions = record["machine"], record["versions"]
    lines = [
        f"{versions['hardware']}, {machine['cores']} cores{'; quick' * record['quick']}"[:100],
        f"{record['threads']} thread(s), load {machine['load before']:.2f} before, {machine['load after']:.2f} after",
        f"torch {versions['torch']}, {record['precision']}, {record['rounds']} rounds",
    ]
    for title, group in record["groups"].items():
        head = f"{title}, {group['side']} x {group['side']}, batch {group['batch']}: ms a step"
        lines.append("\n" + head.ljust(64) + "".join(f"{word:>12}" for word in ("median", "least", "most")))
        for name, each in group["seconds"].items():
            lines.append(
                name.ljust(64) + "".join(f"{1000 * value:12,.1f}" for value in (median(each), min(each), max(each)))
            )
    return "\n".join(lines)


def load_network_timings(path: str | Path) -> dict[str, Any]:
    """Read a record. Raises a ValueError that says what is wrong with it, FileNotFoundError if there is none."""
    record = read_fields(path, FORMAT, _PARTS)
    for title, group in record["groups"].items():
        if not isinstance(group, dict) or not all(isinstance(group.get(size), int) for size in ("side", "batch")):
            raise ValueError(f"{path}: {title!r} lacks the side of its images or its batch")
        check_seconds(path, record, group.get("seconds"), title)
        for name in group["seconds"]:
            try:
                Network.parse(name)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
    if not isinstance(record["versions"].get("hardware"), str):
        raise ValueError(f"{path}: 'versions' does not name the hardware")
    check_content(path, record)
    return record


def network_timings() -> list[dict[str, Any]]:
    """The user's own records and the project's, those of this hardware first; a bad one is left out with a warning."""
    here = {processor_name()} | ({torch.cuda.get_device_name()} if torch.cuda.is_available() else set())
    folders = dict.fromkeys((files.data_folder("benchmarks"), files.bundled_folder("benchmarks")))
    found: dict[str, dict[str, Any]] = {}
    for path in chain.from_iterable(sorted(folder.glob(PATTERN)) for folder in folders):
        try:
            found.setdefault(path.name, load_network_timings(path))
        except (ValueError, OSError) as error:
            warnings.warn(f"left out: {error}", stacklevel=2)
    return sorted(found.values(), key=lambda record: record["versions"]["hardware"] not in here)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table and write the record; returns the exit status."""
    about = "Timings of the poster's networks: a training step of each, in turn, round after round."
    parser = ArgumentParser(prog="softshare bench --networks", description=about)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1: the steadiest)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each network (default 3)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if available")
    parser.add_argument(
        "--batch",
        type=int,
        help="images per step, a quarter for ImageNet; default: 16 on a CPU, 128 on CUDA, 4 if quick",
    )
    parser.add_argument("--output", help="the record; default data/benchmarks/networks-<hardware>.json in a checkout")
    parser.add_argument("--quick", action="store_true", help="toy sizes, to try every step; no record without --output")
    setup = parser.parse_args(argv)
    try:
        setup.device = pick_device(setup.device)
        usual = 4 if setup.quick else 128 if setup.device.type == "cuda" else 16
        setup.batch = usual if setup.batch is None else setup.batch
        if min(setup.batch, setup.rounds, setup.threads) < 1:
            raise ValueError("needs at least one image, one round and one thread")
    except (RuntimeError, ValueError) as error:
        parser.error(str(error))
    machine = {"processor": processor_name(), "cores": os.cpu_count(), "load before": load()}
    record = {"format": FORMAT, "quick": setup.quick, "threads": setup.threads, "rounds": setup.rounds} | measure(setup)
    record |= {
        "device": str(setup.device),
        "versions": environment(setup.device),
        "machine": machine | {"load after": load()},
    }
    record = in_six_digits(record)
    print(table(record), flush=True)
    output = files.user_path(setup.output) if setup.output else None
    if output is None and not setup.quick:
        output = default_output(f"networks {record['versions']['hardware']}")
    if output:
        files.write_json(output, record)
        print(f"wrote {output}", file=sys.stderr)
    return 0
