"""Folders and archives of files, read without being unpacked, checked before they are believed."""

from __future__ import annotations

import functools
import hashlib
import lzma
import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2", ".zip")


def list_files(path: Path) -> tuple[str, ...]:
    """The names of all files; lists an archive to its end, and so checks it, before anything in it is used."""
    if path.is_dir():
        return tuple(member for member, _ in read_files(path))
    status = path.stat()
    return _listed(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=4)
def _listed(path: Path, size: int, changed: int) -> tuple[str, ...]:
    return tuple(member for member, _ in read_files(path))


def read_files(path: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Names and readers of all files in a folder or archive. Raises ValueError for a damaged or unsafe archive."""
    if path.is_dir():
        for folder, subfolders, files in os.walk(path):
            subfolders.sort()
            for file in sorted(files):
                full = Path(folder, file)
                yield full.relative_to(path).as_posix(), full.read_bytes
        return
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if len(archive.infolist()) % 2**16 != _zip_entries(path):  # one damaged length hides the next entry
                    raise zipfile.BadZipFile("its list of files is damaged")
                for info in archive.infolist():
                    if not info.is_dir():
                        name = _safe(info.filename, path)
                        archive.open(info).close()  # compares the name here with that before the file's bytes
                        yield name, functools.partial(_read_zipped, path, archive, info)
            return
        with tarfile.open(path) as tar:
            for member in tar:
                name = _safe(member.name, path)
                if member.isfile():
                    yield name, functools.partial(_read_member, path, tar, member)
                elif not member.isdir():
                    raise ValueError(f"{path}: {name} is a link or a device; refused")
            # tarfile takes a damaged header for the end of the archive; the true end is a block of zeros. Reading on to
            # the end of the file verifies the checksum of a compressed one.
            assert tar.fileobj is not None
            tar.fileobj.seek(tar.offset)  # type: ignore[attr-defined]
            if tar.fileobj.read(512) != bytes(512):
                raise ValueError(f"{path} is truncated or damaged: it has no end mark")
            while tar.fileobj.read(1 << 20):
                pass
    except _DAMAGE as error:
        raise ValueError(f"{path} is truncated, damaged or not an archive: {error}") from error


# What the standard library raises for damaged archives; RuntimeError for unknown compression and encryption in a zip.
_DAMAGE = (tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error, EOFError, OSError, RuntimeError)


def _read_member(path: Path, tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    try:
        file = tar.extractfile(member)
        data = file.read() if file is not None else b""
    except _DAMAGE as error:
        raise ValueError(f"{path}: {member.name} is damaged: {error}") from error
    if len(data) != member.size:
        raise ValueError(f"{path}: {member.name} ends early")
    return data


def _read_zipped(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    try:
        return archive.read(info)
    except _DAMAGE as error:
        raise ValueError(f"{path}: {info.filename} is damaged: {error}") from error


def _zip_entries(path: Path) -> int:
    """How many files, modulo 2**16, a zip archive says that it holds, in its last record."""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 2**16 - 22))
        tail = file.read()
    return int.from_bytes(tail[tail.rfind(b"PK\5\6") :][10:12], "little")


def _safe(name: str, path: Path) -> str:
    parts = PurePosixPath(name).parts
    if name.startswith("/") or ".." in parts or "\\" in name or (parts and parts[0].endswith(":")):
        raise ValueError(f"{path}: the path {name!r} leads out of the archive; the whole archive is refused")
    return name


def verify(path: Path, expected: str) -> None:
    algorithm, _, digest = expected.partition(":")
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, algorithm).hexdigest() if hasattr(hashlib, "file_digest") else ""
        if not found:  # Python 3.10
            found = hashlib.new(algorithm, file.read()).hexdigest()
    if found != digest:
        raise ValueError(
            f"{path} does not have the published checksum ({algorithm} {digest}, found {found}): it is truncated, damaged "
            "or another file; delete it and fetch it again"
        )


def verify_listed(path: Path) -> None:
    """Check an archive against a SHA256SUMS beside it, where there is one that names it."""
    sums = path.with_name("SHA256SUMS")
    if sums.is_file():
        for line in sums.read_text(encoding="utf-8", errors="replace").splitlines():
            digest, _, name = line.partition(" ")
            if name.strip().lstrip("*") == path.name:
                verify(path, f"sha256:{digest.lower()}")


@functools.lru_cache(maxsize=64)
def _file_key(path: Path, size: int, changed: int) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:24]


def content_key(path: Path) -> str:
    """What a cached copy is found by: an archive's content; a folder's file names, sizes and times."""
    path = path.resolve()
    if path.is_file():
        status = path.stat()
        return _file_key(path, status.st_size, status.st_mtime_ns)
    digest = hashlib.sha256()
    for folder, subfolders, files in os.walk(path):
        subfolders.sort()
        for file in sorted(files):
            status = os.stat(os.path.join(folder, file))
            relative = os.path.relpath(os.path.join(folder, file), path)
            digest.update(f"{relative}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:24]
