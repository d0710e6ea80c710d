"""Image folders and archives of them: read without being unpacked, checked before they are believed."""

from __future__ import annotations

import glob
import hashlib
import io
import itertools
import os
import re
import tarfile
import zipfile
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..files import file_checksum

ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2", ".zip")
# [wrapping folder/]split/class/[image]; hidden classes and images do not count
_PLACE = re.compile(r"(?:([^/]+)/)?([^/]+)/([^/.][^/]*)/([^/.][^/]*\.(?:jpe?g|png|bmp|ppm|webp))?", re.IGNORECASE)
Labels = dict[str, dict[str, int]]  # split -> name of an image -> number of its class


class OtherClasses(ValueError):
    """An image folder or archive of one does not have the classes that were asked for."""


def label_images(
    path: Path, splits: Collection[str], needed: Collection[str], only: Sequence[str] = ()
) -> tuple[tuple[str, ...], Labels]:
    """The classes and the labels of the images in a folder or archive; classes, and images of a class, sorted by name.

    They stand at its root as split/class/file or, if none do, one folder deeper; a class folder without images counts.
    Raises OtherClasses unless the classes are those of `only`, and ValueError for several image folders, a needed split
    that is missing, and splits of different classes.
    """
    if path.is_dir():
        patterns = [f"{top}{split}/*/{file}" for top in ("", "*/") for split in splits for file in ("", "*")]
        names = [name.replace(os.sep, "/") for pattern in patterns for name in glob.iglob(pattern, root_dir=path)]
    else:
        names = [name for name, _ in read_files(path)]
    found: dict[tuple[str, str, str], list[str]] = defaultdict(list)  # (wrapping folder or "", split, class) -> names
    for name in names:
        place = _PLACE.fullmatch(name)
        if place and place[2] in splits:
            top, split, label, file = place.groups("")
            found[top, split, label] += [name] if file else []
    at_root = [place for place in found if not place[0]]
    tops, present, classes = (sorted({place[part] for place in at_root or found}) for part in range(3))
    if only and classes != sorted(only):
        raise OtherClasses(f"{path} does not hold the ten classes of CIFAR-10; to load it, give its path as the name")
    if len(tops) > 1:
        raise ValueError(f"{path} holds several image folders: {', '.join(tops)}; give the path of one of them")
    for split in set(needed).difference(present):
        known = ", ".join(present) or "none"
        raise ValueError(f"{path} has no split {split!r}: no images as {split}/<class>/<file>; its splits: {known}")
    labels: Labels = {split: {} for split in present}
    for split, (number, label) in itertools.product(present, enumerate(classes)):
        files = found[tops[0], split, label]
        if not files:
            raise ValueError(f"{path}: split {split!r} has no images of {label}")
        labels[split] |= dict.fromkeys(sorted(files), number)
    return tuple(classes), labels


def read_files(path: Path, wanted: Collection[str] = ()) -> Iterator[tuple[str, bytes]]:
    """The name of everything in an archive (a folder's ends with a slash), with its content if wanted, else b"".

    Of a folder, the wanted files alone. Raises ValueError for a damaged or unsafe archive, at the latest at its end.
    """
    if path.is_dir():
        yield from ((name, (path / name).read_bytes()) for name in wanted if (path / name).is_file())
        return
    _verify_listed(path)
    try:
        for name, file in _zipped(path) if zipfile.is_zipfile(path) else _tarred(path):
            parts = name.split("/")
            if name.startswith("/") or parts[0].endswith(":") or ".." in parts or "\\" in name:
                raise ValueError(f"the path {name!r} leads out of it")
            name = name.removeprefix("./")
            yield name, file.read() if name in wanted else b""
    except Exception as error:  # of many kinds, depending on the format and the damage
        raise ValueError(f"{path} is truncated, damaged, unsafe or not an archive: {error}") from error


def open_image(data: bytes) -> Image.Image:
    """An image, not yet decoded. Raises errors of many kinds for what is none, and for more than 8 bits a channel."""
    if data.startswith(b"\x89PNG"):  # its checksums are not looked at otherwise
        Image.open(io.BytesIO(data)).verify()
    image = Image.open(io.BytesIO(data))
    if image.mode[0] in "IF":
        raise ValueError(f"its pixels are not of 8 bits a channel but of mode {image.mode}")
    return image


def _zipped(path: Path) -> Iterator[tuple[str, Any]]:
    with zipfile.ZipFile(path) as archive, open(path, "rb") as raw:
        # One damaged length hides the next entry, but the number of entries also stands in the last record of the file.
        raw.seek(-12 - len(archive.comment), os.SEEK_END)
        if int.from_bytes(raw.read(2), "little") != min(len(archive.infolist()), 0xFFFF):
            raise ValueError("its list of files is damaged")
        for member in archive.infolist():
            with archive.open(member) as file:  # compares the name in the list with that before the file's bytes
                yield member.filename, file


def _tarred(path: Path) -> Iterator[tuple[str, Any]]:
    with tarfile.open(path) as tar:
        for member in tar:
            if not (member.isfile() or member.isdir()):
                raise ValueError(f"{member.name} is a link or a device")
            yield member.name + "/" * member.isdir(), tar.extractfile(member)
        # tarfile takes a damaged header for the end of the archive; the true end is a block of zeros. Reading on to
        # the end of the file verifies the checksum of a compressed one.
        stream: Any = tar.fileobj
        stream.seek(tar.offset)
        if stream.read(512) != bytes(512):
            raise ValueError("it has no end mark")
        while stream.read(1 << 20):
            pass


def verify(path: Path, expected: str) -> None:
    """Raise ValueError unless a file has a checksum, given as "algorithm:digest"."""
    algorithm, _, digest = expected.partition(":")
    found = file_checksum(path, algorithm)
    if found != digest:
        raise ValueError(f"{path} is damaged or another file, fetch it again: its checksum is {found}, not {expected}")


def _verify_listed(path: Path) -> None:
    """Check an archive against a SHA256SUMS beside it, where there is one that names it."""
    sums = path.with_name("SHA256SUMS")
    if sums.is_file():
        for line in sums.read_text(encoding="utf-8", errors="replace").splitlines():
            digest, _, name = line.partition(" ")
            if name.strip().lstrip("*") == path.name:
                verify(path, f"sha256:{digest.lower()}")


def content_key(path: Path) -> str:
    """What a cached copy is found by: an archive's content; a folder's file names, sizes and times."""
    if path.is_file():
        return file_checksum(path)[:24]
    files = sorted(os.path.join(folder, file) for folder, _, files in os.walk(path.resolve()) for file in files)
    states = [(file, os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in files]
    return hashlib.sha256(repr(states).encode()).hexdigest()[:24]
