"""Image folders and archives of them: read without being unpacked, checked before they are trusted."""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import os
import tarfile
import zipfile
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from ..files import file_checksum

ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2", ".zip")
ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".webp")
"""File name endings of the images that are read, in upper or lower case."""

_PADDING = 2 << 20  # bytes; more than any program pads an archive with
_DECODING = 2  # increased when a change makes the same files give other images or labels

Labels = dict[str, dict[str, int]]  # split -> name of an image -> number of its class


class OtherClasses(ValueError):
    """An image folder or archive does not have the classes that were asked for."""


def label_images(
    path: Path, splits: Collection[str], needed: Collection[str], only: Sequence[str] = ()
) -> tuple[tuple[str, ...], Labels, str]:
    """The classes and the labels of the images in a folder or archive; classes, and images of a class, sorted by name.

    Images are in split/class/file, at the root or, if there are none, one folder deeper. A class folder without images
    counts as a class. The third value, for a warning, describes the files in these folders that are left out because of
    their ending or place, except hidden ones; "" if there are none.

    Raises OtherClasses if `only` is given and the classes are others, as soon as one with another name is found; ValueError
    for several image folders, a needed split that is missing, splits with different classes, and links to images that do
    not exist; OSError for folders that cannot be read.
    """
    found: dict[tuple[str, str, str], list[str]] = defaultdict(list)  # (wrapping folder or "", split, class) -> names
    others: dict[str, list[str]] = defaultdict(list)  # wrapping folder or "" -> files that are not images of a class
    foreign = OtherClasses(f"{path} does not hold the ten classes of CIFAR-10; to load it, give its path as the name")
    for name, is_folder in _folder_names(path, splits) if path.is_dir() else _archive_names(path):
        place = _place(name, splits)
        if place is None:
            continue
        top, split, label, *below = place
        if not below and not is_folder:  # a file next to the class folders
            others[top].append(name)
            continue
        if only and label not in only and not (top and any(not place[0] for place in found)):
            raise foreign
        images = found[top, split, label]
        if below and not is_folder:
            is_image = len(below) == 1 and name.lower().endswith(ENDINGS)
            (images if is_image else others[top]).append(name)
    at_root = [place for place in found if not place[0]]
    tops, present, classes = (sorted({place[part] for place in at_root or found}) for part in range(3))
    if only and classes != sorted(only):
        raise foreign
    if len(tops) > 1:
        raise ValueError(f"{path} holds several image folders: {', '.join(tops)}; give the path of one of them")
    for split in set(needed).difference(present):
        known = ", ".join(present) or "none"
        raise ValueError(f"{path} has no split {split!r}: no images as {split}/<class>/<file>; its splits: {known}")
    left_out = _describe(others[tops[0]]) if others[tops[0]] else ""
    if path.is_dir() and not only and (unread := _other_folders(path / tops[0], splits)):
        left_out = f"{left_out}; not read: {unread}".removeprefix("; ")
    labels: Labels = {split: {} for split in present}
    for split, (number, label) in itertools.product(present, enumerate(classes)):
        files = found[tops[0], split, label]
        if not files:
            raise ValueError(f"{path}: split {split!r} has no images of {label}; {left_out}".rstrip("; "))
        labels[split] |= dict.fromkeys(sorted(files), number)
    return tuple(classes), labels, left_out


def first_classes(path: Path, splits: Collection[str]) -> set[str]:
    """The classes among the first thousand entries of an archive; none if it cannot be read.

    They show what an archive is likely to be without reading all of it; nothing is verified yet.
    """
    shown = set()
    with contextlib.suppress(Exception):  # of many kinds; reading it in full will show what is wrong
        for name, _ in itertools.islice(_members(path), 1000):
            place = _place(name, splits)
            if place and (name.endswith("/") or len(place) > 3):
                shown.add(place[2])
    return shown


def _place(name: str, splits: Collection[str]) -> tuple[str, ...] | None:
    """The parts of a name: wrapping folder or "", split, class or file, and what is below; None if it is elsewhere."""
    parts = name.rstrip("/").split("/")
    top, rest = ("", parts) if parts[0] in splits else (parts[0], parts[1:])
    if len(rest) < 2 or rest[0] not in splits or any(part.startswith(".") for part in rest[1:]):
        return None
    return (top, *rest)


def _archive_names(path: Path) -> Iterator[tuple[str, bool]]:
    """The name of everything in an archive, and whether it is a folder."""
    return ((name, name.endswith("/")) for name, _ in read_files(path))


def _folder_names(path: Path, splits: Collection[str]) -> Iterator[tuple[str, bool]]:
    """The same for all files in the splits of an image folder, at its root or, if there are none, one folder deeper."""
    tops = (
        [""]
        if any((path / split).is_dir() for split in splits)
        else [f"{e.name}/" for e in _entries(path) if e.is_dir()]
    )
    absent: list[str] = []

    def below(folder: str) -> Iterator[tuple[str, bool]]:
        for entry in _entries(path / folder):
            if entry.name.startswith("."):
                continue
            name, is_folder = f"{folder}/{entry.name}", entry.is_dir()
            yield name, is_folder
            if is_folder and not _leads_up(entry, path / folder):  # a link to a folder above
                yield from below(name)
            elif entry.is_symlink() and name.lower().endswith(ENDINGS) and not os.path.exists(entry):
                absent.append(name)

    for folder in (f"{top}{split}" for top in tops for split in splits if (path / top / split).is_dir()):
        yield from below(folder)
    if absent:
        raise ValueError(
            f"{path}: {len(absent)} of its images are links to files that are not there, such as {absent[0]}; fetch the "
            "files, or delete the links"
        )


def _other_folders(top: Path, splits: Collection[str]) -> str:
    """Folders next to the splits that contain images somewhere, such as "val", by name; "" if there are none."""
    found = []
    for entry in _entries(top):
        if entry.is_dir() and entry.name not in splits and not entry.name.startswith("."):
            walk = (name for _, _, names in os.walk(entry.path) for name in names)
            if any(name.lower().endswith(ENDINGS) for name in walk):
                found.append(entry.name)
    return ", ".join(found)


def _leads_up(entry: os.DirEntry[str], folder: Path) -> bool:
    """Whether an entry of a folder is a link to that folder or one above it."""
    return entry.is_symlink() and Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(entry))


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def _describe(names: Sequence[str]) -> str:
    """How many files are left out, by reason, with an example of each."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for name in names:
        ending = PurePosixPath(name).suffix
        kind = "in another place" if ending.lower() in ENDINGS else f"*{ending}" if ending else "without an ending"
        kinds[kind].append(name)
    listed = "; ".join(f"{len(each)} {kind}, such as {each[0]}" for kind, each in sorted(kinds.items()))
    number = f"{len(names)} files are" if len(names) > 1 else "1 file is"
    return f"{number} left out ({listed}); images are read from <split>/<class>/<file> with the endings {' '.join(ENDINGS)}"


def refuse_reserved(path: Path) -> None:
    """Raise ValueError for a file that begins with zeros: no archive does, and reading all of them takes long."""
    with open(path, "rb") as file:
        if not any(file.read(512)):
            raise ValueError(f"{path} begins with zeros, as a download does if its space was reserved but not filled")


def read_files(path: Path, wanted: Collection[str] = ()) -> Iterator[tuple[str, bytes]]:
    """The name of everything in an archive (a folder's ends with a slash), with its content if wanted, else b"".

    Backslashes in names, as from Windows, become slashes. From a folder come only the wanted files. Raises ValueError for a
    damaged or unsafe archive, at its end at the latest; OSError for one that cannot be read.
    """
    if path.is_dir():
        yield from ((name, (path / name).read_bytes()) for name in wanted if (path / name).is_file())
        return
    _verify_listed(path)
    try:
        refuse_reserved(path)
        for name, member in _members(path):
            yield name, member.read() if name in wanted else b""
    except Exception as error:  # of many kinds, depending on the format and the damage
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno):
            raise  # that is not the archive's fault
        raise ValueError(f"{path} is truncated, damaged, unsafe or not an archive: {error}") from error


def _members(path: Path) -> Iterator[tuple[str, Any]]:
    """The name of everything in an archive, as `read_files` gives it, with its open file."""
    for given, member in _zipped(path) if zipfile.is_zipfile(path) else _tarred(path):
        name = given.replace("\\", "/")
        parts = name.split("/")
        if name.startswith("/") or parts[0].endswith(":") or ".." in parts:
            raise ValueError(f"the path {given!r} leads out of it")
        yield name.removeprefix("./"), member


def open_image(data: bytes) -> Image.Image:
    """An image, not yet decoded. Raises errors of many kinds for anything else, and for more than 8 bits per channel."""
    if data.startswith(b"\x89PNG"):  # otherwise its checksums are not verified
        Image.open(io.BytesIO(data)).verify()
    image = Image.open(io.BytesIO(data))
    if image.mode[0] in "IF":
        raise ValueError(f"its pixels have the mode {image.mode}, not 8 bits per channel")
    return image


def _zipped(path: Path) -> Iterator[tuple[str, Any]]:
    with zipfile.ZipFile(path) as archive, open(path, "rb") as raw:
        # One damaged length hides the next entry, but the last record of the file also holds the number of entries.
        raw.seek(-12 - len(archive.comment), os.SEEK_END)
        if int.from_bytes(raw.read(2), "little") != min(len(archive.infolist()), 0xFFFF):
            raise ValueError("its list of files is damaged")
        for member in archive.infolist():
            with archive.open(member) as file:  # compares the name in the list with the one before the file's bytes
                yield member.filename, file


def _tarred(path: Path) -> Iterator[tuple[str, Any]]:
    with tarfile.open(path) as tar:
        for member in tar:
            if not (member.isfile() or member.isdir()):
                raise ValueError(f"{member.name} is a link or a device")
            yield member.name + "/" * member.isdir(), tar.extractfile(member)
        # tarfile takes a damaged header for the end of the archive; the true end is a block of zeros. Reading to the end
        # of the file verifies the checksum of a compressed one.
        stream: Any = tar.fileobj
        stream.seek(tar.offset)
        if stream.read(512) != bytes(512):
            raise ValueError("it has no end mark")
        zeros = 0
        while block := stream.read(1 << 20):
            zeros = 0 if any(block) else zeros + len(block)
        if zeros > _PADDING:
            raise ValueError("it ends with zeros, as a download does if its space was reserved but only partly filled")


def verify(path: Path, expected: str) -> None:
    """Raise ValueError unless a file has the expected checksum, given as "algorithm:digest"."""
    algorithm, _, digest = expected.partition(":")
    found = file_checksum(path, algorithm)
    if found != digest:
        raise ValueError(
            f"{path} is damaged or a different file; fetch it again (its checksum is {found}, not {expected})"
        )


def _verify_listed(path: Path) -> None:
    """Check an archive against a SHA256SUMS file next to it, if there is one that lists it."""
    sums = path.with_name("SHA256SUMS")
    if sums.is_file():
        for line in sums.read_text(encoding="utf-8", errors="replace").splitlines():
            digest, _, name = line.partition(" ")
            if name.strip().lstrip("*") == path.name:
                verify(path, f"sha256:{digest.lower()}")


def content_key(path: Path, names: Collection[str] = ()) -> str:
    """The key of a decoded copy: from an archive's content, or the names, sizes, times and inodes of a folder's files.

    It includes the version of Pillow, since another one may decode other pixels. Raises OSError for a file that is gone.
    """
    made_by = f"{_DECODING} Pillow {Image.__version__}"
    if path.is_file():
        return hashlib.sha256(f"{made_by} {file_checksum(path)}".encode()).hexdigest()[:24]
    states = [made_by, os.fsencode(path.resolve())]
    for name in sorted(names):
        # After a change a file's old time can be set again, but not the time of the change itself (st_ctime).
        state = os.stat(path / name)
        states.append((name, state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino))
    return hashlib.sha256(repr(states).encode()).hexdigest()[:24]
