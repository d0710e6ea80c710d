"""Image folders and archives of them, decoded once; the decoded images of large ones are kept in the cache folder."""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .. import files
from .archives import (
    Labels,
    OtherClasses,
    content_key,
    first_classes,
    label_images,
    open_image,
    read_files,
    refuse_reserved,
)
from .sets import CIFAR10_CLASSES, SIDE, ImageSet, image_set

SPLITS = ("train", "test")
_CACHED_FROM = 2000  # images; reading fewer again is faster than finding a copy


def load_folder(path: Path, split: str, only: Sequence[str] = ()) -> ImageSet:
    """Read an image folder or an archive of one, or its decoded copy; warns of files that are left out.

    Raises OtherClasses if `only` is given and the classes are others.
    """
    if path.is_file():
        refuse_reserved(path)  # before all of it is read for its checksum
    if path.is_dir():
        labelled = label_images(path, SPLITS, [split], only)
        names = [name for labels in labelled[1].values() for name in labels]
    else:
        labelled, names = None, []
        if only and (foreign := first_classes(path, SPLITS).difference(only)):
            raise OtherClasses(f"{path} holds the class {min(foreign)!r}")  # so a large archive need not be read
    key = content_key(path, names)
    copies = {name: files.cache_folder() / f"images-{key}-{name}.npz" for name in SPLITS}
    kept = _read_copy(copies[split])
    if kept and (not only or kept[0].classes == only):
        found, left_out = kept
        left_out = labelled[2] if labelled else left_out  # a folder may have got others since
        if found.classes != CIFAR10_CLASSES:
            found = replace(found, source=path.name)  # the copy may be of the same archive under another name
    else:
        classes, labels, left_out = labelled or label_images(path, SPLITS, [split], only)
        splits = _decode(path, classes, labels)
        for name, each in splits.items():
            if len(each.labels) >= _CACHED_FROM:
                _write_copy(copies[name], each, left_out)
        found = splits[split]
    if left_out:
        warnings.warn(f"{path}: {left_out}", stacklevel=3)
    return found


def _decode(path: Path, classes: tuple[str, ...], splits: Labels) -> dict[str, ImageSet]:
    """Read all splits of an image folder or archive in one pass."""
    from tqdm import tqdm

    wanted = {name for labels in splits.values() for name in labels}
    pixels: dict[str, np.ndarray] = {}
    formats = set()
    members = ((name, data) for name, data in read_files(path, wanted) if name in wanted)
    shown: dict[str, Any] = {"unit": " files", "delay": 2.0, "mininterval": 1.0, "disable": sys.stderr is None}
    for name, data in tqdm(members, f"reading {path.name}", len(wanted), **shown):
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
        found[split] = image_set(images, np.array(list(labels.values())), classes, source)
    return found


def _write_copy(path: Path, found: ImageSet, left_out: str) -> None:
    facts = {"classes": found.classes, "source": found.source, "fingerprint": found.fingerprint, "left out": left_out}
    meta = json.dumps(facts)
    # On a full disk or in a read-only folder no copy is kept, and the next reading decodes again.
    with contextlib.suppress(OSError), files.atomic_file(path) as file:
        np.savez(file, images=found.images.numpy(), labels=found.labels.numpy(), meta=np.array(meta))


def _read_copy(path: Path) -> tuple[ImageSet, str] | None:
    """The images of a decoded copy, and the text about files that were left out; None without an intact copy."""
    try:
        with np.load(path, allow_pickle=False) as kept:
            meta = json.loads(str(kept["meta"]))
            found = image_set(kept["images"], kept["labels"], tuple(meta["classes"]), meta["source"])
            return (found, meta["left out"]) if found.fingerprint == meta["fingerprint"] else None
    except Exception:  # there is none, or it is damaged, which causes errors of many kinds
        return None
