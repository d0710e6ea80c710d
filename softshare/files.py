"""Files that are written completely or not at all, their checksums, and the folders that the project uses."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).resolve().parent


def checkout() -> Path | None:
    """The top folder of the checkout that this package is part of; None for an installed package."""
    top = _PACKAGE.parent
    try:
        ours = 'name = "softshare"' in (top / "pyproject.toml").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    # The file alone proves nothing: some wheels leave theirs next to the packages. A checkout also has its data.
    return top if ours and (top / "data" / "paper").is_dir() else None


def user_path(path: str | Path) -> Path:
    """A path from a user, with ``~`` replaced by the home folder; every path from outside goes through here.

    Raises FileNotFoundError for ``~`` if this process has no home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise FileNotFoundError(
            f"{str(path)!r} begins with ~, but the home folder that it names is not known; set HOME, give the path in "
            "full, or begin it with ./"
        ) from error


def data_folder(name: str) -> Path:
    """Where the project keeps a kind of data: data/<name> in a checkout, ./<name> without one."""
    top = checkout()
    return Path.cwd() / name if top is None else top / "data" / name


def bundled_folder(name: str) -> Path:
    """A committed folder: data/<name> in a checkout; without one, the copy in the installed package."""
    top = checkout()
    return _PACKAGE / name if top is None else top / "data" / name


def cache_folder() -> Path:
    """Where downloads and decoded copies are kept.

    This is data/cache in a checkout, else softshare in $XDG_CACHE_HOME or ~/.cache. A process without a home folder, as in
    some containers, uses a temporary folder that belongs to its user.
    """
    top = checkout()
    if top is not None:
        return top / "data" / "cache"
    given = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(given):  # the XDG specification says to ignore any other
        return Path(given) / "softshare"
    with contextlib.suppress(RuntimeError):
        return Path.home() / ".cache" / "softshare"
    try:
        return _temporary_cache()
    except OSError:  # nothing can be written anywhere: a folder that cannot be made, so nothing is kept
        return Path(os.devnull) / "softshare"


@functools.cache
def _temporary_cache() -> Path:
    owner = os.getuid() if hasattr(os, "getuid") else 0
    folder = Path(tempfile.gettempdir()) / f"softshare-{owner}"
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
        state = folder.lstat()
        if state.st_uid == owner and state.st_mode & 0o170077 == 0o040000:  # a folder, closed to all other users
            return folder
    return Path(tempfile.mkdtemp(prefix="softshare-"))


def writable(folder: Path) -> Path:
    """Make the folder if necessary, check that it can be written to, and return it. Raises OSError naming it if not."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise OSError(f"nothing can be written to the folder {folder}: {error}") from error


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Any]:
    """A binary file to write to, which replaces the one at `path` when the block ends without an error.

    It is written under a temporary name, flushed to the disk, and renamed. After an error, such as a full disk, the old
    file is still there; after a kill, at most a file ``*.part`` is left next to it. OSErrors name `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.part")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and error.errno and error.filename in (None, str(temporary)):
            raise type(error)(error.errno, error.strerror, str(path)) from error
        raise
    with contextlib.suppress(OSError):  # so that the new name is on the disk too; not every file system supports it
        entry = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(entry)
        finally:
            os.close(entry)


def write_together(contents: Sequence[tuple[Path, bytes]]) -> None:
    """Write files that belong together: all are on the disk before the first of them replaces an older one.

    After an error, such as a full disk, all old files are still there. Only a kill in the instant between the renamings can
    leave a mixture of old and new files.
    """
    for path, _ in contents:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "a folder has the name of a file to be written", str(path))
    with contextlib.ExitStack() as stack:
        for path, content in contents:
            file = stack.enter_context(atomic_file(path))
            file.write(content)
            file.flush()
            os.fsync(file.fileno())


def json_bytes(fields: Mapping[str, Any]) -> bytes:
    """Fields as JSON text, with their checksum in the field "content"."""
    return (json.dumps({**fields, "content": content_checksum(fields)}, indent=1) + "\n").encode()


def write_json(path: Path, fields: Mapping[str, Any]) -> None:
    """Write fields as `json_bytes` makes them, completely or not at all."""
    write_together([(path, json_bytes(fields))])


def content_checksum(fields: Mapping[str, Any]) -> str:
    """A checksum, 16 hexadecimal digits, of all fields except "content", which holds it."""
    rest = {name: value for name, value in fields.items() if name != "content"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()[:16]


def file_checksum(path: Path, algorithm: str = "sha256") -> str:
    """A file's checksum in hexadecimal digits, read block by block."""
    digest = hashlib.new(algorithm)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
