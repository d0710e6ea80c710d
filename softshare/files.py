"""Files that are whole or not there, checksums of what they hold, and the folders where the project keeps things."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).resolve().parent


def checkout() -> Path | None:
    """The top folder of the checkout that this package lies in; None where it is installed without one."""
    project = _PACKAGE.parent / "pyproject.toml"
    try:
        return project.parent if 'name = "softshare"' in project.read_text(encoding="utf-8") else None
    except OSError:
        return None


def data_folder(name: str) -> Path:
    """Where the project keeps data of a kind: data/<name> of a checkout, ./<name> without one."""
    top = checkout()
    return Path.cwd() / name if top is None else top / "data" / name


def bundled_folder(name: str) -> Path:
    """A folder that is committed: data/<name> of a checkout; without one, the copy that the installed package holds."""
    top = checkout()
    return _PACKAGE / name if top is None else top / "data" / name


def cache_folder() -> Path:
    """Where downloads and decoded copies are kept: data/cache of a checkout, else ~/.cache/softshare."""
    top = checkout()
    return Path.home() / ".cache" / "softshare" if top is None else top / "data" / "cache"


def writable(folder: Path) -> Path:
    """The folder, made if it is not there, once a file could be written to it. Raises OSError naming it otherwise."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise OSError(f"nothing can be written to the folder {folder}: {error}") from error


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Any]:
    """A binary file to write to that stands at `path`, in place of what was there, once the block ends without an error.

    It is written under a temporary name, flushed to the disk, and renamed. After an error, such as a full disk, what was
    there is still there; after a kill, at most a file ``*.part`` is left beside it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    with contextlib.suppress(OSError):  # so that the new name is on the disk too; not every file system can
        entry = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(entry)
        finally:
            os.close(entry)


def write_json(path: Path, fields: Mapping[str, Any]) -> None:
    """Write fields as JSON, whole or not at all, with a checksum of them as the field "content"."""
    checked = {**fields, "content": content_checksum(fields)}
    with atomic_file(path) as file:
        file.write((json.dumps(checked, indent=1) + "\n").encode())


def content_checksum(fields: Mapping[str, Any]) -> str:
    """A checksum, 16 hexadecimal digits, of all fields but "content", where it stands."""
    rest = {name: value for name, value in fields.items() if name != "content"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()[:16]


def file_checksum(path: Path, algorithm: str = "sha256") -> str:
    """A file's checksum in hexadecimal digits, read a block at a time."""
    digest = hashlib.new(algorithm)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
