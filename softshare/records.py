"""Records of runs: what was trained, on what, with what, and what came out.

A record is one JSON file, ``<recipe>-<profile>-s<seed>-<hash>.json``, with the similarity snapshots in an ``.npz`` of the
same name beside it. The hash is of what decides the outcome: recipe, its version, profile, seed, configuration and the
data's fingerprint. Figures and tables are made from records alone.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import distributed
from .files import written_whole
from .processor import processor_name
from .similarity import SimilarityRecorder

PROFILES = ("fast", "gpu", "paper")
RECIPE_VERSION = 1
"""Raised only when the meaning of training changes, so that older records are not taken for new ones."""

_BROUGHT = Path(__file__).resolve().parent / "runs"  # the committed records, where the package was installed as a wheel

_FORMAT = "softshare record 2"
_FIELDS = {
    "format": str,
    "recipe": str,
    "recipe_version": int,
    "profile": str,
    "seed": int,
    "hash": str,
    "config": dict,
    "data": dict,
    "metrics": dict,
    "history": list,
    "environment": dict,
    "snapshots": str,
    "content": str,
}


@dataclass(frozen=True)
class Record:
    """One run, as it stands in its file.

    Attributes:
        recipe: what was run, by name.
        recipe_version: see `RECIPE_VERSION`.
        profile: "fast", "gpu" or "paper".
        seed: of the run.
        hash: of recipe, version, profile, seed, config and data.
        config: everything that was chosen: model, settings, sizes.
        data: source in words and fingerprint.
        metrics: what came out, flat, by name.
        history: one dict an epoch, from `softshare.training.fit`; [] where nothing was trained.
        environment: device, precision, versions, git revision (and whether the package was changed), wall time, date at
            the start; of a run that was interrupted the last process's, the others' as "earlier".
        snapshots: SHA-256 of the file of coefficients beside it, "" if there is none.
        path: of the JSON file.
    """

    recipe: str
    recipe_version: int
    profile: str
    seed: int
    hash: str
    config: dict[str, Any]
    data: dict[str, str]
    metrics: dict[str, Any]
    history: list[dict[str, float]]
    environment: dict[str, Any]
    snapshots: str
    path: Path

    def similarity(self) -> SimilarityRecorder:
        """The snapshots of coefficients. Raises FileNotFoundError if there are none, ValueError for another run's."""
        path = self.path.with_suffix(".npz")
        if path.exists() and _sha256(path) != self.snapshots:
            raise ValueError(f"{path} is not the file that belongs to {self.path.name}: its checksum is another")
        return SimilarityRecorder.load(path)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def runs_folder(runs: str | Path = "", profile: str = "fast") -> Path:
    """Where records go: the given folder, or by default data/runs of a checkout, ./runs without one.

    Records of profile "fast" go to a subfolder, fast, that git ignores.
    """
    if runs:
        return Path(runs)
    checkout = Path(__file__).resolve().parent.parent
    folder = checkout / "data" / "runs" if (checkout / "pyproject.toml").is_file() else Path.cwd() / "runs"
    return folder / "fast" if profile == "fast" else folder


def run_hash(recipe: str, profile: str, seed: int, config: Mapping[str, Any], data: Mapping[str, str]) -> str:
    """Twelve hexadecimal digits of what decides a run's outcome. Package version and git revision do not count."""
    parts = [recipe, RECIPE_VERSION, profile, seed, config, data]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def slug(recipe: str) -> str:
    """A recipe's name as it stands in file names: "SWRN 28-10*" is swrn-28-10-dropout."""
    return re.sub(r"[^a-z0-9]+", "-", recipe.lower().replace("*", " dropout")).strip("-")


def record_path(
    recipe: str, profile: str, seed: int, config: Mapping[str, Any], data: Mapping[str, str], runs: str | Path = ""
) -> Path:
    """Where the record of a run stands, or will stand. Raises ValueError for an unknown profile."""
    _check_profile(profile)
    name = f"{slug(recipe)}-{profile}-s{seed}-{run_hash(recipe, profile, seed, config, data)}.json"
    return runs_folder(runs, profile) / name


def write_record(
    recipe: str,
    *,
    profile: str,
    seed: int,
    config: Mapping[str, Any],
    metrics: Mapping[str, Any],
    data: Mapping[str, str] | None = None,
    history: list[dict[str, float]] | None = None,
    similarity: SimilarityRecorder | None = None,
    seconds: float = 0.0,
    device: str = "cpu",
    where: Mapping[str, Any] | None = None,
    runs: str | Path = "",
) -> Record:
    """Write a record, whole or not at all, and return it; `where` is an `environment`, by default that of now on `device`.

    Raises ValueError for an unknown profile.
    """
    data = dict(data or {})
    path = record_path(recipe, profile, seed, config, data, runs)
    record = {
        "format": _FORMAT,
        "recipe": recipe,
        "recipe_version": RECIPE_VERSION,
        "profile": profile,
        "seed": seed,
        "hash": run_hash(recipe, profile, seed, config, data),
        "config": dict(config),
        "data": data,
        "metrics": dict(metrics),
        "history": history or [],
        "environment": dict(where or environment(device)) | {"seconds": round(seconds, 3)},
        "snapshots": "",
    }
    if similarity is not None and similarity.coefficients:
        similarity.save(path.with_suffix(".npz"))
        record["snapshots"] = _sha256(path.with_suffix(".npz"))
    record["content"] = content_checksum(record)
    with written_whole(path) as file:
        file.write((json.dumps(record, indent=1) + "\n").encode())
    return read_record(path)


def _check_profile(profile: str) -> None:
    if profile not in PROFILES:
        raise ValueError(f"unknown profile {profile!r}; known: {', '.join(PROFILES)}")


def read_record(path: str | Path) -> Record:
    """Read and check a record.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a record, a field missing or of the wrong type, or content that does not fit its hash or checksum.
    """
    path = Path(path)
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a record: {error}") from error
    if not isinstance(fields, dict) or fields.get("format") != _FORMAT:
        raise ValueError(f"{path} is not a record of format {_FORMAT!r}")
    for name, kind in _FIELDS.items():
        if not isinstance(fields.get(name), kind):
            raise ValueError(f"{path}: the field {name!r} is missing or no {kind.__name__}")
    expected = run_hash(fields["recipe"], fields["profile"], fields["seed"], fields["config"], fields["data"])
    if fields["recipe_version"] == RECIPE_VERSION and fields["hash"] != expected:
        raise ValueError(f"{path}: its hash is {fields['hash']}, its content's {expected}; it was changed by hand")
    if fields["content"] != content_checksum(fields):
        raise ValueError(f"{path}: its content does not have the checksum that stands in it; it was changed by hand")
    return Record(path=path, **{name: fields[name] for name in _FIELDS if name not in ("format", "content")})


def content_checksum(fields: Mapping[str, Any]) -> str:
    """A checksum of everything in a record but itself."""
    rest = {name: value for name, value in fields.items() if name != "content"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()[:16]


def find_records(
    folder: str | Path, recipe: str | None = None, profile: str | None = None, brought: bool = False
) -> list[Record]:
    """All records directly in a folder, by file name, optionally of one recipe or profile; [] without the folder.

    With `brought` the committed records count too, which an installed package brings with it; of two files with one name
    that in the folder is taken.

    Raises ValueError for an unknown profile, or a file that is no record (see `read_record`).
    """
    if profile is not None:
        _check_profile(profile)
    pattern = "*.json" if recipe is None else f"{slug(recipe)}-*.json"
    places = [_BROUGHT, Path(folder)] if brought else [Path(folder)]
    paths = {path.name: path for place in places for path in place.glob(pattern)}
    records = [read_record(paths[name]) for name in sorted(paths)]
    return [r for r in records if recipe in (None, r.recipe) and profile in (None, r.profile)]


def environment(device: str = "cpu", precision: str = "") -> dict[str, Any]:
    """Where a run took place: device, versions, git revision or None, and the date (UTC)."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else processor_name()
    return {
        "device": device,
        "precision": precision,
        "hardware": name,
        "processes": distributed.world_size(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "softshare": _version(),
        **_revision(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _version() -> str:
    from . import __version__

    return __version__


def _revision() -> dict[str, Any]:
    """The checkout's commit and whether it has uncommitted changes; None where there is no checkout."""
    top = Path(__file__).resolve().parent.parent
    if not (top / "pyproject.toml").is_file():
        return {"revision": None, "dirty": None}
    try:
        run = ("git", "-C", str(top))
        revision = subprocess.run([*run, "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10)
        status = subprocess.run(
            [*run, "status", "--porcelain", "--", "softshare", "pyproject.toml"],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return {"revision": None, "dirty": None}
    return {"revision": revision.stdout.strip(), "dirty": bool(status.stdout.strip())}
