"""Records: what was run, on what, how, and what came out; each is one small JSON file, found by its identity.

The identity is everything that decides the outcome: the study and its version, the recipe, the network, profile, seed,
what was chosen (sizes, augmentation, schedule), and the fingerprint of the data. Values equal to the defaults of the
study's version are left out of it, so a setting that is added later changes no identity. How and where the run took place
is recorded, but not part of it. Figures, tables and verdicts are made from records alone.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .. import files
from ..training.environment import environment
from ..training.recorder import SimilarityRecorder

PROFILES = ("fast", "gpu", "short", "paper")
"""fast: seconds on two CPU cores, float32 everywhere; gpu: minutes on a T4, with narrower networks; short: the poster's
networks and data, 30 epochs (grids: ten per phase, ImageNet: ten); paper: the paper's schedule."""

_FORMAT = "softshare record 3"
_FIELDS = {
    "format": str,
    "study": str,
    "version": int,
    "recipe": str,
    "network": str,
    "profile": str,
    "seed": int,
    "chosen": dict,
    "hash": str,
    "config": dict,
    "data": dict,
    "metrics": dict,
    "history": list,
    "execution": dict,
    "snapshots": str,
    "content": str,
}


@dataclass(frozen=True)
class Identity:
    """What decides the outcome of a run.

    Attributes:
        study, version: the study and its version.
        recipe: what was run, by name.
        profile: one of `PROFILES`.
        seed: of the run.
        network: by the poster's names; "" if there is no single one.
        chosen: JSON; sizes, augmentation and schedule where they differ from the study's defaults; for an analysis, what it
            analyses and how.
        fingerprint: of the data; "" if there are none.
    """

    study: str
    version: int
    recipe: str
    profile: str
    seed: int
    network: str = ""
    chosen: Mapping[str, Any] = field(default_factory=dict)
    fingerprint: str = ""

    def __post_init__(self) -> None:
        check_profile(self.profile)

    @property
    def hash(self) -> str:
        """Twelve hexadecimal digits that stand for all of it."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]

    @property
    def stem(self) -> str:
        """The name of its file, without an ending."""
        return f"{slug(self.recipe)}-{self.profile}-s{self.seed}-{self.hash}"


@dataclass(frozen=True)
class Record:
    """One run, as its file describes it.

    Attributes:
        identity: see `Identity`.
        config: everything that was chosen, defaults included: sizes, augmentation, schedule.
        data: source in words and fingerprint.
        metrics: the results, flat, by name.
        history: one dict per epoch, from `softshare.training.fit`; an analysis may keep other rows here.
        execution: see `softshare.training.environment.Execution.record`, with the seconds that training took; for a run
            that was interrupted, the facts of its last process, with the others' as "earlier".
        snapshots: SHA-256 of the file of coefficients next to it, "" if there is none.
        path: of the JSON file.
    """

    identity: Identity
    config: dict[str, Any]
    data: dict[str, str]
    metrics: dict[str, Any]
    history: list[dict[str, Any]]
    execution: dict[str, Any]
    snapshots: str
    path: Path

    @property
    def recipe(self) -> str:
        return self.identity.recipe

    @property
    def profile(self) -> str:
        return self.identity.profile

    @property
    def seed(self) -> int:
        return self.identity.seed

    @property
    def network(self) -> str:
        return self.identity.network

    def similarity(self) -> SimilarityRecorder:
        """The snapshots of coefficients. Raises FileNotFoundError without any, ValueError for those of another run."""
        path = self.path.with_suffix(".npz")
        if path.exists() and files.file_checksum(path) != self.snapshots:
            raise ValueError(f"{path} is not the file that belongs to {self.path.name}: its checksum is different")
        return SimilarityRecorder.load(path)


def check_profile(profile: str) -> None:
    """Raise ValueError for an unknown profile."""
    if profile not in PROFILES:
        raise ValueError(f"unknown profile {profile!r}; known: {', '.join(PROFILES)}")


def slug(recipe: str) -> str:
    """A recipe's name in file names: "SWRN 28-10*" becomes swrn-28-10-dropout."""
    return re.sub(r"[^a-z0-9]+", "-", recipe.lower().replace("*", " dropout")).strip("-")


def runs_folder(runs: str | Path = "", profile: str = "fast") -> Path:
    """Where records go: the given folder, or by default data/runs of a checkout, ./runs without one.

    Records of profile "fast" go to a subfolder, fast, that git ignores.
    """
    if runs:
        return files.user_path(runs)
    folder = files.data_folder("runs")
    return folder / "fast" if profile == "fast" else folder


def record_path(identity: Identity, runs: str | Path = "") -> Path:
    """Where the record of a run is, or will be. Raises TypeError for a choice that is not JSON."""
    try:
        return runs_folder(runs, identity.profile) / f"{identity.stem}.json"
    except TypeError as error:
        raise TypeError(f"what was chosen for {identity.recipe} must be JSON: {error}") from error


def write_record(
    identity: Identity,
    metrics: Mapping[str, Any],
    *,
    data: Mapping[str, str] | None = None,
    config: Mapping[str, Any] | None = None,
    history: Sequence[Mapping[str, Any]] = (),
    execution: Mapping[str, Any] | None = None,
    similarity: SimilarityRecorder | None = None,
    runs: str | Path = "",
) -> Record:
    """Write a record and its snapshots, completely or not at all, and return it.

    Args:
        identity: see `Identity`; `data`, if given, must have its fingerprint.
        metrics, history, similarity: what came out.
        config: default: what the identity lists as chosen.
        execution: default: the current `environment`.
        runs: see `runs_folder`.

    Raises ValueError for data with another fingerprint, TypeError for what is not JSON.
    """
    data = dict(data or {})
    if data.get("fingerprint", "") != identity.fingerprint:
        raise ValueError(f"the data are {data}, but {identity.recipe} has the fingerprint {identity.fingerprint!r}")
    path = record_path(identity, runs)
    fields = asdict(identity)
    fields.pop("fingerprint")
    record = {
        "format": _FORMAT,
        **fields,
        "hash": identity.hash,
        "config": dict(identity.chosen if config is None else config),
        "data": data,
        "metrics": dict(metrics),
        "history": [dict(row) for row in history],
        "execution": dict(execution or environment()),
        "snapshots": "",
    }
    snapshots = []
    if similarity is not None and similarity.coefficients:
        data_of_snapshots = similarity.to_bytes()
        record["snapshots"] = hashlib.sha256(data_of_snapshots).hexdigest()
        snapshots = [(path.with_suffix(".npz"), data_of_snapshots)]
    files.write_together([(path, files.json_bytes(record)), *snapshots])
    return read_record(path)


def write_findings(
    name: str,
    profile: str,
    seed: int,
    metrics: Mapping[str, Any],
    of: Sequence[Record] = (),
    runs: str | Path = "",
    **chosen: Any,
) -> Record:
    """Write measurements made with the results of runs as a separate record; `of` are the records they are based on.

    Further keyword arguments, as JSON, become part of the record's identity.
    """
    chosen |= {"of": [record.identity.hash for record in of]} if of else {}
    data = of[0].data if of else {}
    identity = Identity("findings", 1, name, profile, seed, "", chosen, data.get("fingerprint", ""))
    return write_record(identity, metrics, data=data, runs=runs)


def read_record(path: str | Path) -> Record:
    """Read and check a record.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a record, a field missing or of the wrong type, or content that does not match its hash or checksum.
    """
    path = files.user_path(path)
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a record: {error}") from error
    if not isinstance(fields, dict) or fields.get("format") != _FORMAT:
        raise ValueError(f"{path} is not a record of format {_FORMAT!r}")
    for name, kind in _FIELDS.items():
        if not isinstance(fields.get(name), kind):
            raise ValueError(f"{path}: the field {name!r} is missing or not of type {kind.__name__}")
    named = ("study", "version", "recipe", "profile", "seed", "network", "chosen")
    identity = Identity(**{name: fields[name] for name in named}, fingerprint=fields["data"].get("fingerprint", ""))
    if fields["hash"] != identity.hash:
        raise ValueError(
            f"{path}: its hash is {fields['hash']}, but its content has {identity.hash}; it was changed by hand"
        )
    if fields["content"] != files.content_checksum(fields):
        raise ValueError(f"{path}: its content does not match the checksum in it; it was changed by hand")
    rest = ("config", "data", "metrics", "history", "execution", "snapshots")
    return Record(identity, **{name: fields[name] for name in rest}, path=path)


def find_records(
    folder: str | Path, recipe: str | None = None, profile: str | None = None, bundled: bool = False
) -> list[Record]:
    """All records directly in a folder, by file name, optionally of one recipe or profile; [] if there is no such folder.

    With `bundled` the committed records count too, which an installed package contains; of two files with the same name the
    one in the folder is used. A file that is not a record, or a damaged one, is named in a warning and does not hide the
    others.

    Raises ValueError for an unknown profile.
    """
    if profile is not None:
        check_profile(profile)
    pattern = "*.json" if recipe is None else f"{slug(recipe)}-*.json"
    places = [*([files.bundled_folder("runs")] if bundled else []), files.user_path(folder)]
    paths = {path.name: path for place in places for path in place.glob(pattern)}
    records = []
    for name in sorted(paths):
        try:
            records.append(read_record(paths[name]))
        except (ValueError, OSError) as error:
            warnings.warn(f"left out: {error}", stacklevel=2)
    return [r for r in records if recipe in (None, r.recipe) and profile in (None, r.profile)]
