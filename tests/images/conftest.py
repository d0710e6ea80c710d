"""Image folders and archives of made-up pictures, and what reading them must return."""

from __future__ import annotations

import functools
import io
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import softshare
from softshare.images import CIFAR10_CLASSES

PETS = ("cat", "dog", "eel")


@pytest.fixture(autouse=True)
def isolated(tmp_path, monkeypatch):
    """Each test has its own cache and sees no data sets from outside."""
    monkeypatch.setattr(softshare.files, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.delenv("SOFTSHARE_DATA", raising=False)


def _drawing(split, label, number):
    seed = list(f"{split}/{label}/{number}".encode())
    return np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)


def _encoded(pixels, kind="PNG"):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


@functools.cache
def _files(classes, counts=(("train", 2), ("test", 1)), kind="PNG"):
    suffix = "jpg" if kind == "JPEG" else "png"
    return {
        f"{split}/{label}/{number:04}.{suffix}": _encoded(_drawing(split, label, number), kind)
        for split, n in counts
        for label in classes
        for number in range(n)
    }


@pytest.fixture(scope="session")
def drawing():
    """A function from split, class and number to made-up pixels (32, 32, 3), different for every image."""
    return _drawing


@pytest.fixture(scope="session")
def encoded():
    """A function from pixels and a kind such as "JPEG" to the bytes of an image file."""
    return _encoded


@pytest.fixture(scope="session")
def pet_files():
    """A function that returns an image folder of three classes as a dict, path to bytes; counts: images per class."""
    return functools.partial(_files, PETS)


@pytest.fixture(scope="session")
def cifar_files():
    """Like `pet_files`, with the ten classes of CIFAR-10."""
    return functools.partial(_files, CIFAR10_CLASSES)


@pytest.fixture(scope="session")
def write_folder():
    """A function that writes files, path to bytes, below a folder, and returns the folder."""

    def write(path, contents):
        for name, data in contents.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
        return path

    return write


@pytest.fixture(scope="session")
def write_archive():
    """A function that writes files, path to bytes, into an archive of the kind its name implies, and returns its path."""

    def write(path, contents):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.name.endswith(".zip"):
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
                for name, data in contents.items():
                    archive.writestr(name, data)
            return path
        form = {"gz": "gz", "tgz": "gz", "xz": "xz", "txz": "xz", "bz2": "bz2"}.get(path.name.rpartition(".")[2], "")
        with tarfile.open(path, f"w:{form}") as archive:
            for name, data in contents.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        return path

    return write


@pytest.fixture(scope="session")
def assert_drawn():
    """A function that asserts that a set holds the first n drawings of each class of a split, sorted."""

    def check(found, split, n, classes=PETS):
        assert found.classes == tuple(classes)
        assert found.images.dtype == torch.uint8 and found.labels.dtype == torch.int64
        assert found.labels.tolist() == [label for label in range(len(classes)) for _ in range(n)]
        expected = np.stack([_drawing(split, label, number) for label in classes for number in range(n)])
        np.testing.assert_array_equal(found.images.permute(0, 2, 3, 1).numpy(), expected)

    return check


@pytest.fixture(scope="session")
def listing():
    """A function that lists everything below a folder with times and sizes, to check that nothing has changed."""
    return lambda path: {(str(p), p.stat().st_mtime_ns, p.stat().st_size) for p in path.rglob("*")}
