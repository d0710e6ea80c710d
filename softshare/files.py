"""Files that are whole or not there."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def writable(folder: Path) -> Path:
    """The folder, made if it is not there, once a file could be written to it. Raises OSError naming it otherwise."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise OSError(f"nothing can be written to the folder {folder}: {error}") from error


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Any]:
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
