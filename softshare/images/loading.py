"""`load`: one split of a data set by its name or path."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..files import user_path
from .archives import ARCHIVE_SUFFIXES
from .cifar import EDITIONS, load_cifar
from .folders import SPLITS, load_folder
from .sets import SIDE, ImageSet, image_set

NAMES = ("cifar10", "cifar100", "digits")


def load(name: str, split: str, root: str | Path | None = None, download: bool = False) -> ImageSet:
    """Read one split, "train" or "test", of a data set. Large sets are decoded once and kept in the cache folder.

    ``"cifar10"`` and ``"cifar100"`` are looked for in `root`, then in `cache_folder`: the official binary edition
    (archive or unpacked), and for CIFAR-10 also an image folder or an archive of one that has its ten classes by name.
    ``"digits"`` is embedded in the package: 1,797 handwritten digits of 8 x 8 pixels (Alpaydin and Kaynak, 1998, UCI,
    CC BY 4.0; the edition that scikit-learn ships), enlarged to 32 x 32; the first 1,437 are for training, the others for
    testing. Any other name is the path of an image folder ``split/class/file`` or of an archive of one; its images must be
    32 x 32.

    Args:
        root: a folder with copies, or a copy; default $SOFTSHARE_DATA (empty means unset). Never written to.
        download: fetch the official edition to the cache folder if no copy is found, and verify it.

    Raises FileNotFoundError without a copy (the message explains which file to put where), ValueError for an unknown name
    or split and for a file that is truncated, damaged, mislabelled or leads out of its archive, TypeError for a name or
    split that is not a string, ConnectionError for a download that failed.
    """
    if not isinstance(name, (str, Path)) or not isinstance(split, str):
        raise TypeError(f"name and split must be strings, got {name!r} and {split!r}")
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    if name == "digits":
        return load_digits(split)
    if name in EDITIONS:
        return load_cifar(name, split, root, download)
    path = user_path(name)
    if str(name) and path.exists():
        return load_folder(path, split)
    if path.name == str(name) and not path.name.lower().endswith(ARCHIVE_SUFFIXES):
        raise ValueError(f"unknown data set {name!r}; known: {', '.join(NAMES)}, or the path of an image folder")
    raise FileNotFoundError(f"no image folder or archive at {path}")


def load_digits(split: str) -> ImageSet:
    with np.load(Path(__file__).with_name("digits.npz"), allow_pickle=False) as arrays:
        pixels, labels = arrays["images"], arrays["labels"]  # (1797, 8, 8), 0 to 16
    chosen = slice(0, 1437) if split == "train" else slice(1437, None)
    grey = np.round(pixels[chosen, None] * (255 / 16)).astype(np.uint8)
    large = grey.repeat(SIDE // 8, axis=2).repeat(SIDE // 8, axis=3)
    return image_set(large.repeat(3, axis=1), labels[chosen], tuple("0123456789"), "digits")
