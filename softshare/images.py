"""Labelled images: CIFAR-10 and CIFAR-100, any image folder or archive of one, embedded digits; and their augmentation.

Everything is read from local files into one uint8 tensor. Nothing is ever unpickled (CIFAR has a binary edition of
fixed-size records), archives are never unpacked to disk, and checksums are verified before a byte is parsed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .archives import ARCHIVE_SUFFIXES, OtherClasses, content_key, label_images, open_image, read_files, verify
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

_CACHED_FROM = 2000  # images; fewer are read again faster than a copy is found


@dataclass(frozen=True)
class _Edition:
    """The binary edition of a CIFAR data set, as its web page gives it."""

    title: str
    url: str
    hash: str
    folder: str
    files: dict[str, Sequence[tuple[str, int]]]  # split -> (file, records)
    label_bytes: int  # of which the last is the label
    class_file: str
    num_classes: int

    @property
    def archive(self) -> str:
        return self.url.rpartition("/")[2]


_EDITIONS = {
    "cifar10": _Edition(
        title="CIFAR-10",
        url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        hash="sha256:c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        folder="cifar-10-batches-bin",
        files={"train": [(f"data_batch_{n}.bin", 10_000) for n in range(1, 6)], "test": [("test_batch.bin", 10_000)]},
        label_bytes=1,
        class_file="batches.meta.txt",
        num_classes=10,
    ),
    "cifar100": _Edition(
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
        first, second = (self._with(self.images[part], self.labels[part]) for part in (order[:n], order[n:]))
        return first, second

    def shrunk(self, factor: int = 2) -> ImageSet:
        """The same images, smaller: each pixel the mean of factor x factor pixels, (n, 3, H / factor, W / factor)."""
        side = self.images.shape[-1]
        if side % count("factor", factor):
            raise ValueError(f"factor must divide the side of the images, {side}, got {factor}")
        return self._with(F.avg_pool2d(self.images.float(), factor).round().to(torch.uint8), self.labels)

    def _with(self, images: Tensor, labels: Tensor) -> ImageSet:
        return _image_set(images.numpy(), labels.numpy(), self.classes, self.source)


def cache_folder() -> Path:
    """Where downloads and decoded copies are kept: data/cache of a checkout, else ~/.cache/softshare."""
    checkout = Path(__file__).resolve().parent.parent
    if (checkout / "pyproject.toml").is_file():
        return checkout / "data" / "cache"
    return Path.home() / ".cache" / "softshare"


def load(name: str, split: str, root: str | Path | None = None, download: bool = False) -> ImageSet:
    """Read one split, "train" or "test", of a data set. Large sets are decoded once and kept in the cache folder.

    ``"cifar10"`` and ``"cifar100"`` are looked for in `root`, then in `cache_folder`: the official binary edition
    (archive or unpacked), and for CIFAR-10 also an image folder or an archive of one that has its ten classes by name.
    ``"digits"`` is embedded in the package: 1,797 handwritten digits of 8 x 8 pixels (Alpaydin and Kaynak, 1998, UCI,
    CC BY 4.0; the edition that scikit-learn ships), enlarged to 32 x 32; the first 1,437 train, the others test. Any other
    name is the path of an image folder ``split/class/file`` or of an archive of one; its images must be 32 x 32.

    Args:
        root: a folder with copies, or a copy; default $SOFTSHARE_DATA (empty means unset). Never written to.
        download: fetch the official edition to the cache folder if no copy is found, and verify it.

    Raises FileNotFoundError without a copy (the message says which file to put where), ValueError for an unknown name or
    split and for a file that is truncated, damaged, mislabelled or climbs out of its archive, TypeError for a name or split
    that is not a string, ConnectionError for a download that failed.
    """
    if not isinstance(name, (str, Path)) or not isinstance(split, str):
        raise TypeError(f"name and split must be strings, got {name!r} and {split!r}")
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    if name == "digits":
        return _digits(split)
    if name in _EDITIONS:
        return _load_cifar(name, split, root, download)
    path = Path(name).expanduser()
    if str(name) and path.exists():
        return _load_folder(path, split)
    if path.name == str(name) and not path.name.lower().endswith(ARCHIVE_SUFFIXES):
        raise ValueError(f"unknown data set {name!r}; known: {', '.join(NAMES)}, or the path of an image folder")
    raise FileNotFoundError(f"no image folder or archive at {path}")


def _load_cifar(name: str, split: str, root: str | Path | None, download: bool) -> ImageSet:
    edition = _EDITIONS[name]
    places = [cache_folder()]
    if given := root or os.environ.get("SOFTSHARE_DATA"):
        places.insert(0, Path(given).expanduser())
        if not places[0].exists():
            raise FileNotFoundError(f"root or $SOFTSHARE_DATA names {places[0]}, which does not exist")
    for place in places:
        for path in (place, place / edition.folder, place / edition.archive):
            if path.name in (edition.folder, edition.archive) and path.exists():
                return _load_binary(path, edition, split)
        if name == "cifar10" and (found := _load_ten_classes(place, split)):
            return found
    if download:
        return _load_binary(_download(edition), edition, split)
    raise FileNotFoundError(
        f"no copy of {edition.title} in {' and '.join(map(str, places))}. Put {edition.archive} (of CIFAR-10 also an image "
        f"folder train/<class>/<file>, test/<class>/<file> or archive of one) into one of them (the archive is at "
        f"{edition.url}), or set SOFTSHARE_DATA to a folder that holds a copy, or call load(..., download=True)"
    )


def _load_ten_classes(place: Path, split: str) -> ImageSet | None:
    """CIFAR-10 from the first image folder, or else archive of one, at a place that has its ten classes by name."""
    if place.is_file():
        return _load_folder(place, split, CIFAR10_CLASSES)
    airplanes = [path for top in ("", "*/", "*/*/") for each in SPLITS for path in place.glob(f"{top}{each}/airplane")]
    official = [edition.archive for edition in _EDITIONS.values()]
    archives = [path for path in place.glob("*") if path.name.lower().endswith(ARCHIVE_SUFFIXES) and path.is_file()]
    archives = [path for path in archives if path.name not in official]
    archives.sort(key=lambda path: ("cifar" not in path.name.lower(), path.name))  # the likely ones first
    refused = []
    for path in [*sorted({path.parents[1] for path in airplanes}), *archives]:
        try:
            return _load_folder(path, split, CIFAR10_CLASSES)
        except OtherClasses:
            continue
        except ValueError as error:  # perhaps nothing of ours: it counts only if nothing better is found
            refused.append(error)
    if refused:
        raise refused[0]
    return None


def _download(edition: _Edition) -> Path:
    import pooch

    folder, archive = cache_folder(), edition.archive
    try:
        return Path(pooch.retrieve(edition.url, edition.hash, archive, folder, progressbar=True))
    except ValueError as error:
        raise ValueError(f"{edition.url}: the download does not have the published checksum: {error}") from error
    except OSError as error:
        told = f"could not download {edition.url}: {error}. Without network, put {archive} into {folder}"
        raise ConnectionError(told) from error


def _load_binary(path: Path, edition: _Edition, split: str) -> ImageSet:
    if path.is_file():
        verify(path, edition.hash)
    inside = "" if path.is_dir() else f"{edition.folder}/"
    files = {inside + file: file for file in (edition.class_file, *dict(edition.files[split]))}
    contents = {files[name]: data for name, data in read_files(path, files) if name in files}
    if missing := [file for file in files.values() if file not in contents]:
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
            raise ValueError(f"{path}: {file} holds the label {last}, the last class is {edition.num_classes - 1}")
        parts.append(rows)
    rows = np.concatenate(parts)
    images = rows[:, edition.label_bytes :].reshape(-1, 3, SIDE, SIDE)
    return _image_set(images, rows[:, edition.label_bytes - 1], classes, edition.title)


def _load_folder(path: Path, split: str, only: Sequence[str] = ()) -> ImageSet:
    """Read an image folder or an archive of one, or its decoded copy."""
    key = content_key(path)
    copies = {name: cache_folder() / f"images-{key}-{name}.npz" for name in SPLITS}
    kept = _read_copy(copies[split])
    if kept and (not only or kept.classes == only):
        return kept
    splits = _decode(path, split, only)
    for name, found in splits.items():
        if len(found.labels) >= _CACHED_FROM:
            _write_copy(copies[name], found)
    return splits[split]


def _decode(path: Path, needed: str, only: Sequence[str]) -> dict[str, ImageSet]:
    """Read all splits of an image folder or archive in one pass."""
    from tqdm import tqdm

    classes, splits = label_images(path, SPLITS, [needed], only)
    wanted = {name for labels in splits.values() for name in labels}
    pixels: dict[str, np.ndarray] = {}
    formats = set()
    files = ((name, data) for name, data in read_files(path, wanted) if name in wanted)
    for name, data in tqdm(files, f"reading {path.name}", len(wanted), unit=" files", delay=2.0, mininterval=1.0):
        try:
            image = open_image(data)
            if image.size == (SIDE, SIDE):
                pixels[name] = np.asarray(image.convert("RGB"))
        except Exception as error:  # of many kinds, depending on the format
            raise ValueError(f"{path}: {name} is not a readable image: {error}") from error
        if name not in pixels:
            raise ValueError(f"{path}: {name} is {image.width} x {image.height}, expected {SIDE} x {SIDE} pixels")
        formats.add(image.format)
    source = path.name
    if classes == CIFAR10_CLASSES:
        source = "CIFAR-10 (JPEG)" if "JPEG" in formats else "CIFAR-10 (PNG)"
    found = {}
    for split, labels in splits.items():
        images = np.stack([pixels[name] for name in labels]).transpose(0, 3, 1, 2)
        found[split] = _image_set(images, np.array(list(labels.values())), classes, source)
    return found


def _image_set(images: np.ndarray, labels: np.ndarray, classes: tuple[str, ...], source: str) -> ImageSet:
    images, labels = np.ascontiguousarray(images), np.ascontiguousarray(labels, dtype=np.int64)
    digest = hashlib.sha256(json.dumps([list(classes), images.shape]).encode())
    digest.update(images)  # type: ignore[arg-type]
    digest.update(labels)  # type: ignore[arg-type]
    return ImageSet(torch.from_numpy(images), torch.from_numpy(labels), classes, source, digest.hexdigest())


def _write_copy(path: Path, found: ImageSet) -> None:
    meta = json.dumps({"classes": found.classes, "source": found.source, "fingerprint": found.fingerprint})
    # No room, or a read-only place: the next reading decodes again.
    with contextlib.suppress(OSError), written_whole(path) as file:
        np.savez(file, images=found.images.numpy(), labels=found.labels.numpy(), meta=np.array(meta))


def _read_copy(path: Path) -> ImageSet | None:
    try:
        with np.load(path, allow_pickle=False) as kept:
            meta = json.loads(str(kept["meta"]))
            found = _image_set(kept["images"], kept["labels"], tuple(meta["classes"]), meta["source"])
            return found if found.fingerprint == meta["fingerprint"] else None
    except Exception:  # there is none, or it is damaged, which shows in many kinds of errors
        return None


def _digits(split: str) -> ImageSet:
    with np.load(Path(__file__).with_name("digits.npz"), allow_pickle=False) as arrays:
        pixels, labels = arrays["images"], arrays["labels"]  # (1797, 8, 8), 0 to 16
    chosen = slice(0, 1437) if split == "train" else slice(1437, None)
    grey = np.round(pixels[chosen, None] * (255 / 16)).astype(np.uint8)
    large = grey.repeat(SIDE // 8, axis=2).repeat(SIDE // 8, axis=3)
    return _image_set(large.repeat(3, axis=1), labels[chosen], tuple("0123456789"), "digits")
