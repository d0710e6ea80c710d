"""Labelled images: CIFAR-10 and CIFAR-100, any image folder or archive of one, embedded digits; and their augmentation.

Everything is read from local files into one uint8 tensor. Nothing is ever unpickled (CIFAR has a binary edition of
fixed-size records), archives are read member by member and never unpacked to disk, and checksums are verified before a
byte is parsed.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .archives import ARCHIVE_SUFFIXES, content_key, list_files, read_files, verify, verify_listed
from .arguments import count
from .augmentation import Augmentation as Augmentation
from .files import written_whole

NAMES = ("cifar10", "cifar100", "digits")
SPLITS = ("train", "test")
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIDE = 32

STATISTICS = {
    "CIFAR-10": ((125.3, 123.0, 113.9), (63.0, 62.1, 66.7)),
    "CIFAR-100": ((129.3, 124.1, 112.4), (68.2, 65.4, 70.4)),
}
"""Mean and standard deviation of each channel, on the scale 0 to 255, as in the authors' code."""

_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".webp")
_CACHED_FROM = 2000  # images; fewer are read again faster than a copy is found


@dataclass(frozen=True)
class _Edition:
    """The binary edition of a CIFAR data set, as its web page gives it."""

    title: str
    archive: str
    url: str
    hash: str
    folder: str
    files: dict[str, tuple[tuple[str, int], ...]]  # split -> (file, records)
    label_bytes: int  # of which the last is the label
    class_file: str
    num_classes: int


_PAGE = "https://www.cs.toronto.edu/~kriz/"
_EDITIONS = {
    "cifar10": _Edition(
        title="CIFAR-10",
        archive="cifar-10-binary.tar.gz",
        url=_PAGE + "cifar-10-binary.tar.gz",
        hash="sha256:c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        folder="cifar-10-batches-bin",
        files={
            "train": tuple((f"data_batch_{number}.bin", 10_000) for number in range(1, 6)),
            "test": (("test_batch.bin", 10_000),),
        },
        label_bytes=1,
        class_file="batches.meta.txt",
        num_classes=10,
    ),
    "cifar100": _Edition(
        title="CIFAR-100",
        archive="cifar-100-binary.tar.gz",
        url=_PAGE + "cifar-100-binary.tar.gz",
        hash="md5:03b5dce01913d631647c71ecec9e9cb8",
        folder="cifar-100-binary",
        files={"train": (("train.bin", 50_000),), "test": (("test.bin", 10_000),)},
        label_bytes=2,
        class_file="fine_label_names.txt",
        num_classes=100,
    ),
}


@dataclass(frozen=True)
class ImageSet:
    """One split of a data set.

    Attributes:
        images: (n, 3, 32, 32) uint8; smaller after `shrunk`.
        labels: (n,) int64.
        classes: name of each class.
        source: what the images are, in words: "CIFAR-10", "CIFAR-10 (JPEG)", "digits".
        fingerprint: SHA-256 of images, labels and classes.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    source: str
    fingerprint: str

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel, 0 to 255: the authors' for CIFAR, otherwise computed."""
        known = STATISTICS.get(self.source.removesuffix(" (JPEG)").removesuffix(" (PNG)"))
        if known:
            return known
        pixels = self.images.transpose(0, 1).reshape(3, -1).double()
        return tuple(pixels.mean(1).tolist()), tuple(pixels.std(1).clamp(min=1.0).tolist())

    def split(self, n: int, seed: int = 0) -> tuple[ImageSet, ImageSet]:
        """Two disjoint sets: n images drawn at random, and the rest. Raises ValueError unless 0 < n < all."""
        if not 0 < count("n", n) < len(self.labels):
            raise ValueError(f"n must be above 0 and below the number of images ({len(self.labels)}), got {n}")
        order = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(seed))
        first, second = (
            _image_set(self.images[part].numpy(), self.labels[part].numpy(), self.classes, self.source)
            for part in (order[:n], order[n:])
        )
        return first, second

    def shrunk(self, factor: int = 2) -> ImageSet:
        """The same images, smaller: each pixel the mean of factor x factor pixels, (n, 3, H / factor, W / factor)."""
        count("factor", factor)
        side = self.images.shape[-1]
        if side % factor:
            raise ValueError(f"factor must divide the side of the images, {side}, got {factor}")
        small = F.avg_pool2d(self.images.float(), factor).round().to(torch.uint8)
        return _image_set(small.numpy(), self.labels.numpy(), self.classes, self.source)


def cache_folder() -> Path:
    """Where downloads and decoded copies are kept: data/cache of a checkout, else ~/.cache/softshare."""
    checkout = Path(__file__).resolve().parent.parent
    if (checkout / "pyproject.toml").is_file():
        return checkout / "data" / "cache"
    return Path.home() / ".cache" / "softshare"


def load(name: str, split: str, root: str | Path | None = None, download: bool = False) -> ImageSet:
    """Read one split of a data set.

    ``"cifar10"`` and ``"cifar100"`` are looked for in `root`, then in `cache_folder`: the official binary edition
    (archive or unpacked), and for CIFAR-10 also an image folder or an archive of one that has its ten classes by name.
    ``"digits"`` is embedded in the package: 1,797 handwritten digits of 8 x 8 pixels (Alpaydin and Kaynak, 1998, UCI,
    CC BY 4.0; the edition that scikit-learn ships), enlarged to 32 x 32; the first 1,437 train, the others test. Any other
    name is the path of an image folder ``split/class/file`` or of an archive of one; its images must be 32 x 32.

    Large sets are decoded once and kept in the cache folder.

    Args:
        name: "cifar10", "cifar100", "digits", or a path.
        split: "train" or "test".
        root: a folder with copies, or a copy; default $SOFTSHARE_DATA (empty means unset). Never written to.
        download: fetch the official edition to the cache folder if no copy is found, and verify it.

    Raises:
        FileNotFoundError: no copy; the message says which file to put where.
        ValueError: an unknown name or split; a file that is truncated, damaged, mislabelled or climbs out of its archive.
        TypeError: a name or split that is not a string.
        ConnectionError: a download failed.
    """
    if not isinstance(name, (str, Path)) or not isinstance(split, str):
        raise TypeError(f"name and split must be strings, got {name!r} and {split!r}")
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    if name == "digits":
        return _digits(split)
    if name in _EDITIONS:
        return _load_cifar(str(name), split, root, download)
    path = Path(name).expanduser()
    if not str(name) or not path.exists():
        if path.name == str(name) and not str(name).lower().endswith(ARCHIVE_SUFFIXES):
            raise ValueError(f"unknown data set {name!r}; known: {', '.join(NAMES)}, or the path of an image folder")
        raise FileNotFoundError(f"no image folder or archive at {path}")
    return _load_folder(path, split)


def _load_cifar(name: str, split: str, root: str | Path | None, download: bool) -> ImageSet:
    edition = _EDITIONS[name]
    given = root if root is not None else os.environ.get("SOFTSHARE_DATA") or None
    places = [Path(place).expanduser() for place in (given,) if place is not None]
    if places and not places[0].exists():
        origin = "root" if root is not None else "$SOFTSHARE_DATA"
        raise FileNotFoundError(f"{origin} names {places[0]}, which does not exist")
    places.append(cache_folder())
    for place in places:
        if found := _find(place, edition):
            kind, path = found
            return _load_binary(path, edition, split) if kind == "binary" else _load_folder(path, split)
    if download:
        return _load_binary(_download(edition), edition, split)
    looked = " and ".join(str(place) for place in places)
    folder = (
        "" if name != "cifar10" else ", or an image folder train/<class>/<file>, test/<class>/<file> or archive of one,"
    )
    raise FileNotFoundError(
        f"no copy of {edition.title} in {looked}. Put {edition.archive}{folder} into one of them (the archive is at "
        f"{edition.url}), or set SOFTSHARE_DATA to a folder that holds a copy, or call load(..., download=True)"
    )


def _find(place: Path, edition: _Edition) -> tuple[str, Path] | None:
    """The first copy of a CIFAR edition at a place: ("binary" or "folder", path)."""
    if place.is_file():
        if place.name == edition.archive:
            return "binary", place
        if edition.title == "CIFAR-10" and _class_names(place) != CIFAR10_CLASSES:
            found = ", ".join(_class_names(place)[:12]) or "none"
            raise ValueError(
                f"{place} does not hold the ten classes of {edition.title} (found: {found}); to load it as it is, give its "
                "path as the name"
            )
        return ("folder", place) if edition.title == "CIFAR-10" else None
    if not place.is_dir():
        return None
    for path in (place if place.name == edition.folder else place / edition.folder, place / edition.archive):
        if path.exists():
            return "binary", path
    if edition.title == "CIFAR-10":
        archives = [path for path in place.iterdir() if path.is_file() and path.name.lower().endswith(ARCHIVE_SUFFIXES)]
        official = {other.archive for other in _EDITIONS.values()}
        archives = [path for path in archives if path.name not in official]
        archives.sort(key=lambda path: ("cifar" not in path.name.lower(), path.name))  # the likely ones first
        refused: ValueError | None = None
        for path in [place, *sorted(path for path in place.iterdir() if path.is_dir()), *archives]:
            try:
                if _class_names(path) == CIFAR10_CLASSES:
                    return "folder", path
            except ValueError as error:  # perhaps nothing of ours: it counts only if nothing better is found
                refused = refused or error
        if refused:
            raise refused
    return None


def _download(edition: _Edition) -> Path:
    try:
        import pooch
    except ImportError as error:
        raise ImportError("downloading needs the package pooch: pip install pooch") from error
    folder = cache_folder()
    try:
        path = pooch.retrieve(edition.url, edition.hash, fname=edition.archive, path=folder, progressbar=True)
    except ValueError as error:
        raise ValueError(f"{edition.url}: the download does not have the published checksum: {error}") from error
    except OSError as error:
        raise ConnectionError(
            f"could not download {edition.url}: {error}. Without network, put {edition.archive} into {folder}"
        ) from error
    return Path(path)


def _load_binary(path: Path, edition: _Edition, split: str) -> ImageSet:
    if path.is_file():
        verify(path, edition.hash)
    wanted = [edition.class_file, *(file for file, _ in edition.files[split])]
    contents: dict[str, bytes] = {}
    for member, read in read_files(path):
        if PurePosixPath(member).name in wanted:
            contents[PurePosixPath(member).name] = read()
    if missing := [file for file in wanted if file not in contents]:
        raise ValueError(f"{path} lacks {', '.join(missing)}; it is not the binary edition of {edition.title}")
    classes = tuple(contents[edition.class_file].decode("utf-8", "replace").split())
    if len(classes) != edition.num_classes:
        raise ValueError(f"{path}: {edition.class_file} names {len(classes)} classes, expected {edition.num_classes}")
    record = edition.label_bytes + 3 * SIDE * SIDE
    images, labels = [], []
    for file, records in edition.files[split]:
        data = contents[file]
        if len(data) != records * record:
            raise ValueError(f"{path}: {file} has {len(data):,} bytes, expected {records * record:,}; it is damaged")
        rows = np.frombuffer(data, dtype=np.uint8).reshape(records, record)
        label = rows[:, edition.label_bytes - 1]
        if label.max() >= edition.num_classes:
            raise ValueError(
                f"{path}: {file} holds the label {label.max()}, the last class is {edition.num_classes - 1}"
            )
        labels.append(label)
        images.append(rows[:, edition.label_bytes :].reshape(records, 3, SIDE, SIDE))
    return _image_set(np.concatenate(images), np.concatenate(labels), classes, edition.title)


def _load_folder(path: Path, split: str) -> ImageSet:
    key = content_key(path)
    cached = cache_folder() / f"images-{key}-{split}.npz"
    if (kept := _read_cached(cached)) is not None:
        return kept
    if path.is_file():
        verify_listed(path)
    splits = _decode(path)
    if split not in splits:
        raise ValueError(
            f"{path} has no split {split!r} (split/class/file), only {', '.join(sorted(splits)) or 'none'}"
        )
    for name, found in splits.items():
        if len(found.labels) >= _CACHED_FROM:
            _write_cached(cached.with_name(f"images-{key}-{name}.npz"), found)
    return splits[split]


def _decode(path: Path) -> dict[str, ImageSet]:
    """Read all splits of an image folder or archive in one pass."""
    from PIL import Image

    pixels: dict[str, list[np.ndarray]] = {}
    names: dict[str, list[tuple[str, str]]] = {}
    formats: set[str | None] = set()
    from tqdm import tqdm

    listing = list_files(path)
    tops = _tops(listing)
    if len(tops) > 1:
        raise ValueError(f"{path} holds several image folders: {', '.join(sorted(tops))}; give the path of one of them")
    bar = tqdm(read_files(path), f"reading {path.name}", len(listing), unit=" files", delay=2.0, mininterval=1.0)
    for member, read in bar:
        place = _place(member)
        if place is None or place[0] not in tops:
            continue
        _, split, label, file = place
        data = read()
        try:
            if data.startswith(b"\x89PNG"):  # its checksums are not looked at otherwise
                Image.open(io.BytesIO(data)).verify()
            with Image.open(io.BytesIO(data)) as image:
                (width, height), kind = image.size, image.format
                decoded = np.asarray(image.convert("RGB")) if (width, height) == (SIDE, SIDE) else None
        except Exception as error:  # of many kinds, depending on the format
            raise ValueError(f"{path}: {member} is not a readable image: {error}") from error
        if decoded is None:
            raise ValueError(f"{path}: {member} is {width} x {height}, expected {SIDE} x {SIDE} pixels")
        pixels.setdefault(split, []).append(decoded)
        names.setdefault(split, []).append((label, file))
        formats.add(kind)
    if not names:
        raise ValueError(f"{path} holds no images as train/<class>/<file> or test/<class>/<file>")
    classes = tuple(sorted({label for files in names.values() for label, _ in files}))
    found = {}
    for split, files in names.items():
        if absent := set(classes) - {label for label, _ in files}:
            raise ValueError(f"{path}: split {split!r} has no images of {', '.join(sorted(absent))}")
        order = sorted(range(len(files)), key=files.__getitem__)
        images = np.stack(pixels[split])[order].transpose(0, 3, 1, 2)
        labels = np.array([classes.index(files[index][0]) for index in order])
        found[split] = _image_set(np.ascontiguousarray(images), labels, classes, _title(path, classes, formats))
    return found


def _title(path: Path, classes: tuple[str, ...], formats: set[str | None]) -> str:
    if classes != CIFAR10_CLASSES:
        return path.name
    return "CIFAR-10 (JPEG)" if "JPEG" in formats else "CIFAR-10 (PNG)"


def _place(member: str) -> tuple[str, str, str, str] | None:
    """(wrapping folder or "", split, class, file) of an image's path; split folders may stand in one wrapping folder."""
    parts = PurePosixPath(member).parts
    if parts and parts[0] in SPLITS:
        parts = ("", *parts)
    if len(parts) != 4 or parts[1] not in SPLITS or parts[3].startswith("."):
        return None
    top, split, label, file = parts
    return (top, split, label, file) if file.lower().endswith(_IMAGE_SUFFIXES) else None


def _tops(listing: Iterable[str]) -> set[str]:
    """The folders in which split folders stand: "" alone where some stand at the root, else the wrapping ones."""
    tops = {place[0] for member in listing if (place := _place(member))}
    return {""} if "" in tops else tops


def _class_names(path: Path) -> tuple[str, ...]:
    if path.is_dir():  # two levels are enough, and the files themselves need no look
        candidates = [path, *sorted(child for child in path.iterdir() if child.is_dir())]
        found = [top for top in candidates if any((top / split).is_dir() for split in SPLITS)]
        if len(found) > 1 and found[0] != path:
            return ()
        folders = [top / split for top in found[:1] for split in SPLITS if (top / split).is_dir()]
        return tuple(sorted({child.name for folder in folders for child in folder.iterdir() if child.is_dir()}))
    if _cached_any(path):  # decoded before
        return _cached_any(path)
    listing = list_files(path)
    tops = _tops(listing)
    places = [place for member in listing if (place := _place(member)) and place[0] in tops]
    return tuple(sorted({place[2] for place in places})) if len(tops) == 1 else ()


def _cached_any(path: Path) -> tuple[str, ...]:
    for split in SPLITS:
        if (kept := _read_meta(cache_folder() / f"images-{content_key(path)}-{split}.npz")) is not None:
            return tuple(kept["classes"])
    return ()


def _image_set(images: np.ndarray, labels: np.ndarray, classes: tuple[str, ...], source: str) -> ImageSet:
    images, labels = np.ascontiguousarray(images), np.ascontiguousarray(labels.astype(np.int64))
    digest = hashlib.sha256(json.dumps([list(classes), images.shape]).encode())
    digest.update(images)  # type: ignore[arg-type]
    digest.update(labels.astype("<i8"))  # type: ignore[arg-type]
    return ImageSet(torch.from_numpy(images), torch.from_numpy(labels), classes, source, digest.hexdigest())


def _write_cached(path: Path, found: ImageSet) -> None:
    meta = json.dumps({"classes": found.classes, "source": found.source, "fingerprint": found.fingerprint})
    # No room, or a read-only place: the next reading decodes again.
    with contextlib.suppress(OSError), written_whole(path) as file:
        np.savez(file, images=found.images.numpy(), labels=found.labels.numpy(), meta=np.array(meta))


def _read_meta(path: Path) -> dict[str, Any] | None:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            meta = json.loads(str(arrays["meta"]))
            return {key: meta[key] for key in ("classes", "source", "fingerprint")}
    except (OSError, ValueError, TypeError, KeyError, zipfile.BadZipFile, EOFError):
        return None


def _read_cached(path: Path) -> ImageSet | None:
    meta = _read_meta(path)
    if meta is None:
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = _image_set(arrays["images"], arrays["labels"], tuple(meta["classes"]), str(meta["source"]))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError, zlib.error):
        return None
    return found if found.fingerprint == meta["fingerprint"] else None


def _digits(split: str) -> ImageSet:
    with np.load(Path(__file__).with_name("digits.npz"), allow_pickle=False) as arrays:
        pixels, labels = arrays["images"], arrays["labels"]  # (1797, 8, 8), 0 to 16
    chosen = slice(0, 1437) if split == "train" else slice(1437, None)
    grey = np.round(pixels[chosen].astype(np.float32) * (255 / 16)).astype(np.uint8)
    large = grey.repeat(SIDE // 8, axis=1).repeat(SIDE // 8, axis=2)[:, None]
    return _image_set(large.repeat(3, axis=1), labels[chosen], tuple("0123456789"), "digits")
