"""Decides whether a result is still current, that is, whether everything it depends on is unchanged."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from places import READERS, Book


def data_folder() -> Path | None:
    """$SOFTSHARE_DATA as an absolute path; empty means unset."""
    given = os.environ.get("SOFTSHARE_DATA", "")
    return Path(given).expanduser().resolve() if given else None


def installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def packages() -> dict[str, str]:
    """The installed versions of what the package and its book require, which may not be the pinned ones."""
    try:
        lines = requires("softshare") or []
    except PackageNotFoundError:
        lines = []
    lines = [line for line in lines if not re.search(r"""extra == ['"](test|dev|pipeline)['"]""", line)]
    names = {re.split(r"[^A-Za-z0-9._-]", line, maxsplit=1)[0].lower() for line in lines} | {"torch"}
    return {name: installed(name) for name in sorted(names)}


def file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "none"


def tree_digest(folder: Path) -> list[list[str]]:
    """Path and content of every file in a folder, except compiled files."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    return [[p.relative_to(folder).as_posix(), file_digest(p)] for p in files]


def record_digest(book: Book) -> list[list[str]]:
    """Digests of the published figures, the timings and the records, without those of profile fast.

    What chapters write themselves does not count either: it is written anew whenever they run.
    """
    data = book.top / "data"
    runs = [path for path in (data / "runs").glob("*") if "-fast-" not in path.name and not by_a_chapter(path)]
    files = [*(data / "paper").glob("*"), *(data / "benchmarks").glob("*"), *runs]
    return [[p.relative_to(book.top).as_posix(), file_digest(p)] for p in sorted(files) if p.is_file()]


def by_a_chapter(path: Path) -> bool:
    """Whether a chapter wrote a record, not a job of the pipeline."""
    if path.suffix != ".json":
        return False
    try:
        return json.loads(path.read_text(encoding="utf8")).get("study") in ("findings", "transfer")
    except (ValueError, AttributeError):
        return False


def data_listing(book: Book) -> list[Any]:
    """Names, sizes and times of all files that chapters may train on, which are too large to read for this.

    They are in $SOFTSHARE_DATA and in the project's cache, where softshare's own copies of them do not count.
    """
    folder, cache = data_folder(), book.top / "data" / "cache"
    found: list[Any] = [str(folder or "")]
    for place in filter(None, (folder, cache)):
        seen = set()
        for base, folders, names in os.walk(place, followlinks=True):
            if os.path.realpath(base) in seen:  # a link to a folder above
                folders.clear()
                continue
            seen.add(os.path.realpath(base))
            for path in (Path(base, name) for name in sorted(names)):
                own = place == cache and re.fullmatch(r"images-.*\.npz|amx-.*\.txt|.*\.part", path.name)
                if not own and path.exists():
                    state = path.stat()
                    found.append([path.relative_to(place).as_posix(), state.st_size, state.st_mtime_ns])
    return sorted(found, key=str)


def chapter_key(book: Book, name: str, parameters: Mapping[str, Any]) -> str:
    """Everything that a chapter's result depends on, as one hash."""
    parts: dict[str, Any] = {
        "chapter": file_digest(book.folder / f"{name}.md"),
        "package": tree_digest(book.package),
        "constraints": file_digest(book.top / "constraints.txt"),
        "parameters": book.parameters_of(name, parameters),
        "python": sys.version,
        "installed": packages(),
        "data": data_listing(book),
        "records": record_digest(book),
    }
    if name in READERS:
        parts["others"] = {n: chapter_key(book, n, parameters) for n in book.chapters() if n not in READERS}
    return digest_of(parts)


def digest_of(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def is_current(book: Book, name: str, parameters: Mapping[str, Any]) -> bool:
    """Whether the executed notebook is what a run with these parameters would give now."""
    stamp, notebook = book.output / f"{name}.key", book.output / f"{name}.ipynb"
    if not (stamp.is_file() and notebook.is_file()):
        return False
    said = json.loads(stamp.read_text(encoding="utf8"))
    return said["key"] == chapter_key(book, name, parameters) and said["notebook"] == file_digest(notebook)


def remember(book: Book, name: str, key: str, seconds: float) -> None:
    """Write next to the executed notebook what it was made from and how long that took."""
    said = {"key": key, "notebook": file_digest(book.output / f"{name}.ipynb")}
    (book.output / f"{name}.key").write_text(json.dumps(said), encoding="utf8")
    (book.output / f"{name}.seconds").write_text(f"{seconds:.1f}", encoding="utf8")


def last_time(book: Book, name: str) -> float:
    """Seconds that the chapter took when it last ran here; 0 if it never did."""
    kept = book.output / f"{name}.seconds"
    return float(kept.read_text(encoding="utf8")) if kept.is_file() else 0.0
