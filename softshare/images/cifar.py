"""CIFAR-10 and CIFAR-100 from a local copy: the binary edition, or CIFAR-10 as an image folder or archive."""

from __future__ import annotations

import errno
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .. import files
from .archives import ARCHIVE_SUFFIXES, OtherClasses, first_classes, read_files, verify
from .folders import SPLITS, load_folder
from .sets import CIFAR10_CLASSES, SIDE, ImageSet, image_set


@dataclass(frozen=True)
class Edition:
    """The binary edition of a CIFAR data set, as its web page describes it."""

    title: str
    url: str
    hash: str
    folder: str
    files: dict[str, Sequence[tuple[str, int]]]  # split -> (file, records)
    label_bytes: int  # the last one is the label
    class_file: str
    num_classes: int

    @property
    def archive(self) -> str:
        return self.url.rpartition("/")[2]


EDITIONS = {
    "cifar10": Edition(
        title="CIFAR-10",
        url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        hash="sha256:c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        folder="cifar-10-batches-bin",
        files={"train": [(f"data_batch_{n}.bin", 10_000) for n in range(1, 6)], "test": [("test_batch.bin", 10_000)]},
        label_bytes=1,
        class_file="batches.meta.txt",
        num_classes=10,
    ),
    "cifar100": Edition(
        title="CIFAR-100",
        url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
        hash="md5:03b5dce01913d631647c71ecec9e9cb8",
        folder="cifar-100-binary",
        files={"train": [("train.bin", 50_000)], "test": [("test.bin", 10_000)]},
        label_bytes=2,
        class_file="fine_label_names.txt",
        num_classes=100,
    ),
}


def load_cifar(name: str, split: str, root: str | Path | None, download: bool) -> ImageSet:
    edition = EDITIONS[name]
    places = [files.cache_folder()]
    if given := root or os.environ.get("SOFTSHARE_DATA"):
        places.insert(0, files.user_path(given))
        if not places[0].exists():
            raise FileNotFoundError(f"root or $SOFTSHARE_DATA names {places[0]}, which does not exist")
    refused: list[tuple[Path, Exception]] = []
    for place in places:
        for path in (place, place / edition.folder, place / edition.archive):
            if path.name in (edition.folder, edition.archive) and path.exists():
                try:
                    found = _load_binary(path, edition, split)
                except (ValueError, OSError) as error:
                    if path.is_file():
                        raise
                    refused.append((path, error))  # a folder may be half unpacked, with the archive next to it
                else:
                    _warn_of(refused)
                    return found
        if name == "cifar10" and (ten := _load_ten_classes(place, split, refused)):
            _warn_of(refused)
            return ten
    for path, reason in refused:
        # Was this most likely the intended copy?
        if path.is_dir() or "cifar" in path.name.lower() or first_classes(path, SPLITS):
            raise reason
    _warn_of(refused)
    if download:
        return _load_binary(_download(edition), edition, split)
    raise FileNotFoundError(
        f"no copy of {edition.title} in {' and '.join(map(str, places))}. Put {edition.archive} from {edition.url} into "
        "one of them (for CIFAR-10, an image folder train/<class>/<file>, test/<class>/<file> or an archive of one works as "
        "well), or set SOFTSHARE_DATA to a folder that contains a copy, or call load(..., download=True)"
    )


def _warn_of(refused: Sequence[tuple[Path, Exception]]) -> None:
    for _, error in refused:
        warnings.warn(f"passed over while looking for CIFAR: {error}", stacklevel=4)


def _load_ten_classes(place: Path, split: str, refused: list[tuple[Path, Exception]]) -> ImageSet | None:
    """CIFAR-10 from the first image folder, or else archive of one, at a place that has its ten classes by name.

    Whatever cannot be read goes to `refused`, since it may have nothing to do with CIFAR-10.
    """
    if place.is_file():
        return load_folder(place, split, CIFAR10_CLASSES)
    airplanes = [path for top in ("", "*/", "*/*/") for each in SPLITS for path in place.glob(f"{top}{each}/airplane")]
    official = [edition.archive for edition in EDITIONS.values()]
    archives = [path for path in place.glob("*") if path.name.lower().endswith(ARCHIVE_SUFFIXES) and path.is_file()]
    archives = [path for path in archives if path.name not in official]
    archives.sort(key=lambda path: ("cifar" not in path.name.lower(), path.name))  # the likely ones first
    for path in [*sorted({path.parents[1] for path in airplanes}), *archives]:
        try:
            return load_folder(path, split, CIFAR10_CLASSES)
        except OtherClasses:
            continue
        except (ValueError, OSError) as error:
            refused.append((path, error))
    return None


def _download(edition: Edition) -> Path:
    import pooch

    folder, archive = files.cache_folder(), edition.archive
    try:
        return Path(pooch.retrieve(edition.url, edition.hash, archive, folder, progressbar=True))
    except OSError as error:  # errors of requests, such as a proxy's, are OSErrors, and some are ValueErrors too
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            raise  # that is the disk's fault
        message = f"could not download {edition.url}: {error}. Without network, put {archive} into {folder}"
        raise ConnectionError(message) from error
    except ValueError as error:
        if "hash" not in str(error):
            raise
        raise ValueError(f"{edition.url}: the download does not have the published checksum: {error}") from error


def _load_binary(path: Path, edition: Edition, split: str) -> ImageSet:
    if path.is_file():
        verify(path, edition.hash)
    inside = "" if path.is_dir() else f"{edition.folder}/"
    wanted = {inside + file: file for file in (edition.class_file, *dict(edition.files[split]))}
    contents = {wanted[name]: data for name, data in read_files(path, wanted) if name in wanted}
    if missing := [file for file in wanted.values() if file not in contents]:
        raise ValueError(f"{path} lacks {', '.join(missing)}; it is not the binary edition of {edition.title}")
    classes = tuple(contents[edition.class_file].decode("utf-8", "replace").split())
    if len(classes) != edition.num_classes:
        raise ValueError(f"{path}: {edition.class_file} names {len(classes)} classes, expected {edition.num_classes}")
    size = edition.label_bytes + 3 * SIDE * SIDE
    parts = []
    for file, records in edition.files[split]:
        if len(contents[file]) != records * size:
            raise ValueError(f"{path}: {file} has {len(contents[file]):,} bytes, expected {records * size:,}")
        rows = np.frombuffer(contents[file], dtype=np.uint8).reshape(records, size)
        last = rows[:, edition.label_bytes - 1].max()
        if last >= edition.num_classes:
            raise ValueError(f"{path}: {file} holds the label {last}, but the last class is {edition.num_classes - 1}")
        parts.append(rows)
    rows = np.concatenate(parts)
    images = rows[:, edition.label_bytes :].reshape(-1, 3, SIDE, SIDE)
    return image_set(images, rows[:, edition.label_bytes - 1], classes, edition.title)
