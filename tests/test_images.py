"""Image readers on real files, whole and damaged; the cache; the download; augmentation."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import http.server
import io
import os
import pickle
import tarfile
import threading
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from softshare import images
from softshare.images import CIFAR10_CLASSES, Augmentation, load

PETS = ("cat", "dog", "eel")
ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".zip")


@pytest.fixture(autouse=True)
def apart(tmp_path, monkeypatch):
    """A cache of the test's own, and no copies from outside."""
    monkeypatch.setattr(images, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.delenv("SOFTSHARE_DATA", raising=False)


def drawing(split, label, number):
    """Made-up pixels (32, 32, 3), different for every image."""
    seed = list(f"{split}/{label}/{number}".encode())
    return np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)


def encoded(pixels, kind="PNG"):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


@functools.cache
def files(classes=PETS, counts=(("train", 2), ("test", 1)), kind="PNG"):
    """The files of an image folder, path to bytes."""
    return {
        f"{split}/{label}/{number:04}.{'jpg' if kind == 'JPEG' else 'png'}": encoded(
            drawing(split, label, number), kind
        )
        for split, n in counts
        for label in classes
        for number in range(n)
    }


def write_folder(path, contents):
    for name, data in contents.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def write_archive(path, contents):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.name.endswith(".zip"):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in contents.items():
                archive.writestr(name, data)
        return path
    form = {"gz": "gz", "tgz": "gz", "xz": "xz", "bz2": "bz2"}.get(path.name.rpartition(".")[2], "")
    with tarfile.open(path, f"w:{form}") as archive:
        for name, data in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def assert_pets(found, split, n, classes=PETS):
    assert found.classes == tuple(classes)
    assert found.images.dtype == torch.uint8 and found.labels.dtype == torch.int64
    assert found.labels.tolist() == [label for label in range(len(classes)) for _ in range(n)]
    expected = np.stack([drawing(split, label, number) for label in classes for number in range(n)])
    np.testing.assert_array_equal(found.images.permute(0, 2, 3, 1).numpy(), expected)


def listing(path):
    return {(str(p), p.stat().st_mtime_ns, p.stat().st_size) for p in path.rglob("*")}


# ---------------------------------------------------------------------------------------------------------------- digits


def test_the_embedded_digits(monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("digits need no network"))
    sets = {split: load("digits", split) for split in ("train", "test")}
    assert [len(found.labels) for found in sets.values()] == [1437, 360]
    for found in sets.values():
        assert found.images.shape == (len(found.labels), 3, 32, 32) and found.images.dtype == torch.uint8
        assert found.labels.dtype == torch.int64 and found.classes == tuple("0123456789") and found.source == "digits"
        assert (found.images == found.images[:, :1]).all(), "three equal channels"
        small = found.images[:, :, ::4, ::4]
        assert torch.equal(small.repeat_interleave(4, 2).repeat_interleave(4, 3), found.images), "8 x 8, enlarged"
        counts = found.labels.bincount(minlength=10)
        assert counts.min() > 0.08 * len(found.labels) and counts.max() < 0.12 * len(found.labels)
        assert found.images.min() == 0 and found.images.max() == 255
    assert load("digits", "train").fingerprint == sets["train"].fingerprint != sets["test"].fingerprint


def test_digits_look_like_their_labels():
    """The nearest mean image of the training part names most of the test part."""
    train, test = load("digits", "train"), load("digits", "test")
    means = torch.stack([train.images[train.labels == label].float().mean(0) for label in range(10)])
    nearest = torch.cdist(test.images.float().flatten(1), means.flatten(1)).argmin(1)
    assert (nearest == test.labels).float().mean() > 0.8


# -------------------------------------------------------------------------------------------- folders and archives of one


def test_an_image_folder(tmp_path):
    path = write_folder(tmp_path / "pets", {**files(), "train/cat/notes.txt": b"x", "train/cat/.hidden.png": b"x"})
    assert_pets(load(str(path), "train"), "train", 2)
    found = load(path, "test")
    assert_pets(found, "test", 1)
    assert found.source == "pets"


@pytest.mark.parametrize("wrapping", ["", "pets-1.0/"])
@pytest.mark.parametrize("suffix", ARCHIVES)
def test_archives_of_an_image_folder(tmp_path, suffix, wrapping):
    folder = write_folder(tmp_path / "pets", files())
    contents = {"LICENSE": b"free", **{wrapping + name: data for name, data in reversed(files().items())}}
    path = write_archive(tmp_path / f"pets{suffix}", contents)
    for split, n in (("train", 2), ("test", 1)):
        found = load(str(path), split)
        assert_pets(found, split, n)
        assert found.fingerprint == load(str(folder), split).fingerprint


def test_the_content_says_what_an_archive_is(tmp_path):
    path = write_archive(tmp_path / "pets.zip", files())
    assert_pets(load(str(path.rename(tmp_path / "pets.tar.gz")), "test"), "test", 1)


def test_one_image_folder_of_several_must_be_named(tmp_path):
    both = {f"{top}/{name}": data for top in "ab" for name, data in files().items()}
    for path in (write_folder(tmp_path / "two", both), write_archive(tmp_path / "two.tar", both)):
        with pytest.raises(ValueError, match="two.*several image folders: a, b"):
            load(str(path), "train")
    assert_pets(load(str(tmp_path / "two/b"), "train"), "train", 2)
    write_folder(tmp_path / "two", files())  # split folders at the root come first
    assert_pets(load(str(tmp_path / "two"), "train"), "train", 2)


def test_grey_and_palette_images_become_three_channels(tmp_path):
    grey = np.arange(32 * 32, dtype=np.uint32).reshape(32, 32).astype(np.uint8)
    palette, file = Image.fromarray(drawing("a", "b", 0)).convert("P"), io.BytesIO()
    palette.save(file, "PNG")
    path = write_folder(tmp_path / "x", {"train/a/0.png": encoded(grey), "train/b/0.bmp": encoded(grey, "BMP")})
    (path / "train/a/1.png").write_bytes(file.getvalue())
    found = load(str(path), "train")
    np.testing.assert_array_equal(found.images[0].numpy(), np.stack([grey] * 3))
    np.testing.assert_array_equal(found.images[1].permute(1, 2, 0).numpy(), np.asarray(palette.convert("RGB")))
    np.testing.assert_array_equal(found.images[2].numpy(), np.stack([grey] * 3))


def test_fingerprints_tell_contents_apart(tmp_path):
    base = load(write_folder(tmp_path / "a", files()), "train").fingerprint
    renamed = {name.replace("eel", "fox"): data for name, data in files().items()}
    changed = {**files(), "train/cat/0000.png": encoded(drawing("other", "cat", 0))}
    prints = [
        load(write_folder(tmp_path / name, c), "train").fingerprint for name, c in (("b", renamed), ("c", changed))
    ]
    assert len({base, *prints}) == 3
    assert load(write_folder(tmp_path / "d", files()), "train").fingerprint == base


# ---------------------------------------------------------------------------------------------------------------- CIFAR-10


CIFAR = functools.partial(files, CIFAR10_CLASSES)


@pytest.mark.parametrize("where", ["folder", "wrapped", "beside", "archive", "file", "environment"])
def test_ten_classes_by_name_count_as_cifar10(tmp_path, monkeypatch, where):
    root = tmp_path / "data"
    write_archive(root / "another.tar", files())
    write_folder(root / "pictures", files())
    if where in ("archive", "file", "environment"):
        write_archive(root / "ten.tar.xz", {f"ten/{name}": data for name, data in CIFAR().items()})
    else:
        write_folder(root / {"folder": "", "wrapped": "w/x", "beside": "ten"}[where], CIFAR())
    given_ = {"file": root / "ten.tar.xz", "wrapped": root / "w", "environment": None}.get(where, root)
    if where == "environment":
        monkeypatch.setenv("SOFTSHARE_DATA", str(root))
    before = listing(root)
    for split, n in (("train", 2), ("test", 1)):
        found = load("cifar10", split, root=given_)
        assert_pets(found, split, n, CIFAR10_CLASSES)
        assert found.source == "CIFAR-10 (PNG)"
    assert found.statistics() == ((125.3, 123.0, 113.9), (63.0, 62.1, 66.7))
    assert listing(root) == before, "root is never written to"


def test_jpeg_is_named_so(tmp_path):
    path = write_folder(tmp_path / "ten", CIFAR(kind="JPEG"))
    found = load("cifar10", "test", root=str(path))
    assert found.source == load(str(path), "test").source == "CIFAR-10 (JPEG)"
    with Image.open(path / "test/bird/0000.jpg") as image:
        np.testing.assert_array_equal(found.images[2].permute(1, 2, 0).numpy(), np.asarray(image))
    assert found.statistics()[0][0] == 125.3


def test_root_comes_before_the_environment_and_both_before_the_cache(tmp_path, monkeypatch):
    places = [
        write_folder(tmp_path / name / "ten", CIFAR(counts=(("test", n),))).parent for n, name in enumerate("rec", 1)
    ]
    monkeypatch.setattr(images, "cache_folder", lambda: places[2])
    assert len(load("cifar10", "test").labels) == 30
    monkeypatch.setenv("SOFTSHARE_DATA", str(places[1]))
    assert len(load("cifar10", "test").labels) == 20
    assert len(load("cifar10", "test", root=places[0]).labels) == 10
    monkeypatch.setenv("SOFTSHARE_DATA", "")
    monkeypatch.chdir(places[1])
    assert len(load("cifar10", "test").labels) == 30, "empty means unset, not the current folder"


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("environment", [None, "", "folder"])
def test_without_a_copy_the_message_says_which_file_to_put_where(tmp_path, monkeypatch, name, environment):
    write_archive(tmp_path / "data/pets.tar", files())  # something else
    write_folder(tmp_path / "data/cifar-10-python", {"batch": b"x"})
    places = ["cache"]
    if environment is not None:
        monkeypatch.setenv("SOFTSHARE_DATA", environment and str(tmp_path / "data"))
        places += ["data"] if environment else []
    with pytest.raises(FileNotFoundError) as caught:
        load(name, "train")
    text = str(caught.value)
    assert f"{name.replace('cifar', 'cifar-')}-binary.tar.gz" in text and "SOFTSHARE_DATA" in text
    assert "https://www.cs.toronto.edu/~kriz/" in text and "download=True" in text
    assert all(str(tmp_path / place) in text for place in places)


def test_places_that_do_not_exist_are_named(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load("cifar10", "train", root=tmp_path / "nowhere")
    monkeypatch.setenv("SOFTSHARE_DATA", str(tmp_path / "gone"))
    with pytest.raises(FileNotFoundError, match="SOFTSHARE_DATA.*gone"):
        load("cifar10", "train")
    for path in ("no/such/folder", "missing.tar"):
        with pytest.raises(FileNotFoundError, match=path):
            load(path, "train")


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        (("cifar11", "train"), ValueError, "cifar11.*cifar10, cifar100, digits"),
        (("", "train"), ValueError, "known"),
        (("digits", "validation"), ValueError, "validation.*train, test"),
        (("cifar10", ""), ValueError, "train, test"),
        ((10, "train"), TypeError, "10"),
        (("digits", None), TypeError, "None"),
    ],
)
def test_unknown_names_and_splits(arguments, error, says):
    with pytest.raises(error, match=says):
        load(*arguments)


# ----------------------------------------------------------------------------------------------------- the binary edition


def binary(monkeypatch, name="cifar10", records=4, change=None, wrapping=True):
    """Make a small official edition: its files as bytes, and the table changed to expect them."""
    edition, rng = images._EDITIONS[name], np.random.default_rng(1)
    table = {split: tuple((file, records) for file, _ in entries) for split, entries in edition.files.items()}
    edition = dataclasses.replace(edition, files=table)
    contents, truth = {}, {}
    for split, entries in table.items():
        labels = rng.integers(0, edition.num_classes, (len(entries), records), dtype=np.uint8)
        pixels = rng.integers(0, 256, (len(entries), records, 3, 32, 32), dtype=np.uint8)
        truth[split] = pixels.reshape(-1, 3, 32, 32), labels.reshape(-1)
        for (file, _), label, pixel in zip(entries, labels, pixels, strict=True):
            coarse = np.full((records, edition.label_bytes - 1), 7, dtype=np.uint8)
            contents[file] = np.hstack([coarse, label[:, None], pixel.reshape(records, -1)]).tobytes()
    contents[edition.class_file] = "".join(f"class{n}\n" for n in range(edition.num_classes)).encode() + b"\n"
    if change:
        change(contents)
    contents = {f"{edition.folder}/{file}": data for file, data in contents.items()}

    def install(folder):
        path = write_archive(folder / edition.archive, contents)
        algorithm = edition.hash.partition(":")[0]
        found = hashlib.new(algorithm, path.read_bytes()).hexdigest()
        monkeypatch.setitem(images._EDITIONS, name, dataclasses.replace(edition, hash=f"{algorithm}:{found}"))
        return path

    monkeypatch.setitem(images._EDITIONS, name, edition)
    return contents, truth, install


@pytest.mark.parametrize("unpacked", [False, True])
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_the_binary_edition(tmp_path, monkeypatch, name, unpacked):
    contents, truth, install = binary(monkeypatch, name)
    path = install(tmp_path / "data")
    if unpacked:
        path.unlink()
        write_folder(tmp_path / "data", contents)
        path = tmp_path / "data" / images._EDITIONS[name].folder
    for root in (tmp_path / "data", path):
        for split, (pixels, labels) in truth.items():
            found = load(name, split, root=root)
            np.testing.assert_array_equal(found.images.numpy(), pixels)
            np.testing.assert_array_equal(found.labels.numpy(), labels)
            number = {"cifar10": 10, "cifar100": 100}[name]
            assert found.classes == tuple(f"class{n}" for n in range(number))
            assert found.source == {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}[name]
            assert found.statistics() == images.STATISTICS[found.source]


def test_the_published_checksums_are_what_a_user_reads():
    editions = images._EDITIONS
    assert editions["cifar10"].hash == "sha256:c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
    assert editions["cifar100"].hash == "md5:03b5dce01913d631647c71ecec9e9cb8"
    assert {n for f in editions.values() for _, e in f.files.items() for _, n in e} == {10_000, 50_000}


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "other"])
def test_a_checksum_is_verified_before_a_byte_is_parsed(tmp_path, monkeypatch, damage):
    path = binary(monkeypatch)[2](tmp_path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    other = write_archive(tmp_path / "other.tar.gz", files()).read_bytes()
    path.write_bytes({"flip": data, "cut": data[:-9], "empty": b"", "other": other}[damage])
    monkeypatch.setattr(tarfile, "open", lambda *_, **__: pytest.fail("parsed before it was verified"))
    with pytest.raises(ValueError, match=r"cifar-10-binary\.tar\.gz.*checksum"):
        load("cifar10", "train", root=tmp_path)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.update({"data_batch_3.bin": c["data_batch_3.bin"][:-1]}), r"data_batch_3\.bin.*bytes"),
        (lambda c: c.update({"data_batch_3.bin": c["data_batch_3.bin"] + b"x"}), r"data_batch_3\.bin.*bytes"),
        (lambda c: c.update({"data_batch_2.bin": b"\x0a" + c["data_batch_2.bin"][1:]}), r"data_batch_2\.bin.*label 10"),
        (lambda c: c.update({"data_batch_1.bin": pickle.dumps(Bomb())}), r"data_batch_1\.bin"),
        (lambda c: c.pop("data_batch_5.bin"), r"lacks data_batch_5\.bin"),
        (lambda c: c.pop("batches.meta.txt"), r"lacks batches\.meta\.txt"),
        (lambda c: c.update({"batches.meta.txt": b"cat dog"}), r"batches\.meta\.txt names 2"),
    ],
)
@pytest.mark.parametrize("unpacked", [False, True])
def test_wrong_contents_of_a_binary_edition(tmp_path, monkeypatch, change, says, unpacked):
    monkeypatch.chdir(tmp_path)
    contents, _, install = binary(monkeypatch, change=change)
    if unpacked:
        write_folder(tmp_path, contents)
    else:
        install(tmp_path)
    with pytest.raises(ValueError, match=says):
        load("cifar10", "train", root=tmp_path)
    assert not (tmp_path / "exploded").exists()


def test_pickles_are_never_read(tmp_path, monkeypatch):
    """The edition for Python, which is made of pickles, is not taken for a copy."""
    monkeypatch.chdir(tmp_path)
    bomb = {f"cifar-10-batches-py/data_batch_{n}": pickle.dumps(Bomb()) for n in range(1, 6)}
    write_archive(tmp_path / "data/cifar-10-python.tar.gz", bomb)
    write_folder(tmp_path / "data", bomb)
    with pytest.raises(FileNotFoundError):
        load("cifar10", "train", root=tmp_path / "data")
    with pytest.raises(ValueError, match="no images"):
        load(str(tmp_path / "data/cifar-10-python.tar.gz"), "train")
    assert not (tmp_path / "exploded").exists()


# -------------------------------------------------------------------------------------------------- damaged and unsafe files


@pytest.mark.parametrize("suffix", ARCHIVES)
@given(st.data())
def test_a_truncated_archive_is_refused(suffix, data):
    with fresh_archive(suffix) as path:
        whole = path.read_bytes()
        # The zeros that pad a plain tar hold nothing; one end mark of 512 of them must be there.
        end = len(whole.rstrip(b"\0")) + 500 if suffix == ".tar" else len(whole) - 1
        path.write_bytes(whole[: data.draw(st.integers(0, end))])
        with pytest.raises(ValueError, match=path.name):
            load(str(path), "train")


@pytest.mark.parametrize("suffix", ARCHIVES)
@given(st.data())
def test_a_flipped_bit_is_noticed_or_without_effect(suffix, data):
    with fresh_archive(suffix) as path:
        whole = bytearray(path.read_bytes())
        truth = load(str(path), "train")
        for place in data.draw(st.lists(st.integers(0, len(whole) - 1), min_size=8, max_size=8)):
            bit = data.draw(st.integers(0, 7))
            whole[place] ^= 1 << bit
            path.write_bytes(whole)
            whole[place] ^= 1 << bit
            try:
                found = load(str(path), "train")
            except ValueError as error:
                assert path.name in str(error)
            else:
                assert torch.equal(found.images, truth.images) and torch.equal(found.labels, truth.labels)
                assert found.classes == truth.classes


def test_a_zip_whose_list_hides_a_file_is_refused(tmp_path):
    """The length of the first entry's comment covers the second entry."""
    path = write_archive(tmp_path / "pets.zip", files())
    data = bytearray(path.read_bytes())
    first, second = data.find(b"PK\1\2"), data.find(b"PK\1\2", data.find(b"PK\1\2") + 4)
    third = data.find(b"PK\1\2", second + 4)
    data[first + 32 : first + 34] = (third - second).to_bytes(2, "little")
    path.write_bytes(data)
    with zipfile.ZipFile(path) as archive:
        assert len(archive.namelist()) == len(files()) - 1
    with pytest.raises(ValueError, match=r"pets\.zip"):
        load(str(path), "train")


def fresh_archive(suffix):
    """A small archive in a folder of its own, for tests that run many times."""
    import contextlib
    import pathlib
    import tempfile

    @contextlib.contextmanager
    def make():
        with tempfile.TemporaryDirectory() as folder:
            yield write_archive(pathlib.Path(folder, f"pets{suffix}"), files())

    return make()


@pytest.mark.parametrize(
    "name", ["../evil.png", "train/../../evil.png", "/tmp/evil.png", "train/cat/..", "C:/evil.png", "..\\evil.png"]
)
@pytest.mark.parametrize("suffix", [".tar", ".tar.xz", ".zip"])
@pytest.mark.parametrize("first", [True, False])
def test_an_archive_with_paths_that_climb_out_is_refused(tmp_path, name, suffix, first):
    evil = {name: encoded(drawing("a", "b", 0))}
    path = write_archive(tmp_path / "in" / f"pets{suffix}", {**evil, **files()} if first else {**files(), **evil})
    before = listing(tmp_path)
    with pytest.raises(ValueError, match=f"pets{suffix}.*evil|leads out"):
        load(str(path), "train")
    assert listing(tmp_path) == before, "nothing is unpacked"


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_refused(tmp_path, kind):
    path = tmp_path / "pets.tar"
    with tarfile.open(path, "w") as archive:
        member = tarfile.TarInfo("train/cat/0000.png")
        member.type, member.linkname = kind, "/etc/passwd"
        archive.addfile(member)
        for name, data in files().items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    with pytest.raises(ValueError, match=r"pets\.tar.*0000\.png.*link or a device"):
        load(str(path), "train")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"train/cat/0001.png": encoded(np.zeros((32, 31, 3), np.uint8))}, r"train/cat/0001\.png is 31 x 32"),
        ({"train/cat/0001.png": encoded(np.zeros((64, 64, 3), np.uint8))}, r"train/cat/0001\.png is 64 x 64"),
        ({"train/cat/0001.png": b"text"}, r"train/cat/0001\.png is not a readable image"),
        ({"train/cat/0001.png": b""}, r"train/cat/0001\.png is not a readable image"),
        ({"train/cat/0001.png": files()["train/cat/0001.png"][:-40]}, r"train/cat/0001\.png is not a readable image"),
        ({"train/eel/0000.jpg": encoded(drawing("a", "b", 0), "JPEG")[:300]}, r"0000\.jpg is not a readable image"),
        ({"test/fox/0000.png": encoded(drawing("a", "b", 0))}, "'train' has no images of fox"),
    ],
)
@pytest.mark.parametrize("suffix", ["", ".tar", ".zip"])
def test_wrong_images_are_named(tmp_path, changes, says, suffix):
    contents = {**files(), **changes}
    path = write_archive(tmp_path / f"pets{suffix}", contents) if suffix else write_folder(tmp_path / "pets", contents)
    with pytest.raises(ValueError, match=f"pets.*{says}"):
        load(str(path), "test")


@pytest.mark.parametrize("content", [b"", b"not an archive", b"PK\x03\x04broken", os.urandom(4000)])
@pytest.mark.parametrize("suffix", [".tar", ".tar.xz", ".zip"])
def test_files_that_are_no_archives(tmp_path, content, suffix):
    path = tmp_path / f"pets{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=path.name):
        load(str(path), "train")


def test_folders_without_images_or_the_split(tmp_path):
    with pytest.raises(ValueError, match="empty.*no images"):
        load(write_folder(tmp_path / "empty", {"a.txt": b""}), "train")
    with pytest.raises(ValueError, match="half.*no split 'test'.*train"):
        load(write_folder(tmp_path / "half", files(counts=(("train", 1),))), "test")


@pytest.mark.parametrize("listed", ["wrong", "right", "binary mode", "other"])
def test_an_archive_is_checked_against_sha256sums_beside_it(tmp_path, listed):
    path = write_archive(tmp_path / "ten.tar", CIFAR())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    line = {
        "wrong": f"{'0' * 64}  ten.tar",
        "right": f"{digest.upper()}  ten.tar",
        "binary mode": f"{digest} *ten.tar",
        "other": f"{'0' * 64}  eleven.tar",
    }[listed]
    (tmp_path / "SHA256SUMS").write_text(f"{'1' * 64}  readme\n{line}\n")
    if listed == "wrong":
        for name in ("cifar10", str(path)):
            with pytest.raises(ValueError, match=r"ten\.tar.*checksum"):
                load(name, "train", root=tmp_path)
    else:
        assert_pets(load("cifar10", "train", root=tmp_path), "train", 2, CIFAR10_CLASSES)


# ----------------------------------------------------------------------------------------------------------------- cache


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """An archive that has been read into the cache, and the files there by split."""
    monkeypatch.setattr(images, "_CACHED_FROM", 1)
    path = write_archive(tmp_path / "data" / "ten.tar.xz", CIFAR())
    load("cifar10", "train", root=path.parent)
    kept = {split: next((tmp_path / "cache").glob(f"*{split}.npz")) for split in ("train", "test")}
    assert len(list((tmp_path / "cache").iterdir())) == 2, "both splits from one pass, and no half-written files"
    return path, kept


def test_a_second_reading_comes_from_the_cache(cached, monkeypatch):
    path, _ = cached
    monkeypatch.setattr(images, "_decode", lambda *_: pytest.fail("decoded again"))
    for split, n in (("train", 2), ("test", 1)):
        found = load("cifar10", split, root=path.parent)
        assert_pets(found, split, n, CIFAR10_CLASSES)
        assert found.source == "CIFAR-10 (PNG)"


def test_the_cache_gives_what_decoding_gives(cached, monkeypatch):
    path, kept = cached
    first = load(str(path), "train")
    kept["train"].unlink()
    again = load(str(path), "train")
    assert first.fingerprint == again.fingerprint and first.source == again.source and first.classes == again.classes


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "text", "pickle", "swapped"])
def test_a_damaged_cache_is_not_used(cached, damage, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    path, kept = cached
    file = kept["train"]
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
    if damage == "pickle":
        with open(file, "wb") as out:
            np.savez(out, images=np.array([Bomb()], dtype=object), labels=np.zeros(1), meta=np.array("{}"))
        data = file.read_bytes()
    if damage == "swapped":  # whole, but its fingerprint is not that of its images
        with np.load(file) as arrays:
            changed = {**arrays, "images": 255 - arrays["images"]}
        np.savez(file, **changed)
        data = file.read_bytes()
    file.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "text": b"hello"}.get(damage, data))
    assert_pets(load("cifar10", "train", root=path.parent), "train", 2, CIFAR10_CLASSES)
    monkeypatch.setattr(images, "_decode", lambda *_: pytest.fail("the cache was not mended"))
    assert_pets(load("cifar10", "train", root=path.parent), "train", 2, CIFAR10_CLASSES)
    assert not (tmp_path / "exploded").exists()


def test_a_changed_archive_is_read_again(cached):
    path, _ = cached
    write_archive(path, CIFAR(counts=(("train", 1), ("test", 1))))
    assert_pets(load("cifar10", "train", root=path.parent), "train", 1, CIFAR10_CLASSES)


def test_a_changed_folder_is_read_again(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "_CACHED_FROM", 1)
    path = write_folder(tmp_path / "pets", files())
    before = load(path, "train")
    write_folder(path, {"train/cat/0002.png": encoded(drawing("train", "cat", 2))})
    assert len(load(path, "train").labels) == len(before.labels) + 1


def test_small_sets_are_not_cached_and_a_cache_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    path = write_folder(tmp_path / "pets", files())
    load(path, "train")
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(images, "_CACHED_FROM", 1)
    (tmp_path / "cache").write_text("a file in the way")
    assert_pets(load(path, "train"), "train", 2)


# -------------------------------------------------------------------------------------------------------------- download


@pytest.fixture
def site(tmp_path):
    """A web server on this machine; yields its folder and address."""
    folder = tmp_path / "site"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    thread.join()
    server.server_close()


def served(monkeypatch, address, name="cifar10", **changes):
    edition = dataclasses.replace(images._EDITIONS[name], url=address + images._EDITIONS[name].archive, **changes)
    monkeypatch.setitem(images._EDITIONS, name, edition)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_a_download_is_verified_kept_and_read(tmp_path, monkeypatch, site, name):
    folder, address = site
    _, truth, install = binary(monkeypatch, name)
    path = install(folder)
    served(monkeypatch, address, name)
    with pytest.raises(FileNotFoundError):
        load(name, "test")  # nothing is fetched unasked
    found = load(name, "test", download=True)
    np.testing.assert_array_equal(found.images.numpy(), truth["test"][0])
    path.unlink()
    assert load(name, "test").fingerprint == load(name, "test", download=True).fingerprint == found.fingerprint
    assert [file.name for file in (tmp_path / "cache").iterdir()] == [path.name]


def test_a_download_with_another_checksum_is_refused(tmp_path, monkeypatch, site):
    folder, address = site
    binary(monkeypatch)[2](folder)
    served(monkeypatch, address, hash="sha256:" + "0" * 64)
    with pytest.raises(ValueError, match="checksum"):
        load("cifar10", "test", download=True)
    assert not list((tmp_path / "cache").glob("*")), "nothing of it is kept"


def test_a_failed_download_says_which_file_to_put_where(tmp_path, monkeypatch, site):
    for address in (site[1], "http://127.0.0.1:9/"):  # not found; nobody listens
        served(monkeypatch, address)
        with pytest.raises(ConnectionError) as caught:
            load("cifar10", "test", download=True)
        assert "cifar-10-binary.tar.gz" in str(caught.value) and str(tmp_path / "cache") in str(caught.value)


# ---------------------------------------------------------------------------------------------------------- augmentation


def augmented_by_loop(pixels, draw, mean, deviation, flip, pad, cutout):
    """One image (3, 32, 32), step by step: padding, crop, flip of the crop, normalisation, hole."""
    flipped, row, column, hole_row, hole_column = draw
    padded = np.zeros((3, 32 + 2 * pad, 32 + 2 * pad))
    padded[:, pad : pad + 32, pad : pad + 32] = pixels
    out = padded[:, row : row + 32, column : column + 32].copy()
    if flip and flipped:
        out = out[:, :, ::-1].copy()
    for channel in range(3):
        out[channel] = (out[channel] - mean[channel]) / deviation[channel]
    for r in range(32):
        for c in range(32):
            if hole_row - cutout // 2 <= r < hole_row - cutout // 2 + cutout:
                if hole_column - cutout // 2 <= c < hole_column - cutout // 2 + cutout:
                    out[:, r, c] = 0
    return out


@pytest.mark.parametrize(
    ("flip", "pad", "cutout"), [(True, 4, 0), (True, 4, 16), (False, 2, 5), (True, 0, 8), (False, 0, 0)]
)
def test_augmentation_equals_a_loop_over_images(flip, pad, cutout):
    pixels = torch.randint(0, 256, (12, 3, 32, 32), dtype=torch.uint8)
    mean, deviation = (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)
    augment = Augmentation(mean, deviation, flip, pad, cutout)
    draws = augment.draw(12, seed=1, epoch=2)
    found = augment(pixels, draws)
    assert found.dtype == torch.float32
    for image, draw, out in zip(pixels, draws, found, strict=True):
        expected = augmented_by_loop(image.numpy(), draw.tolist(), mean, deviation, flip, pad, cutout)
        np.testing.assert_allclose(out.numpy(), expected, atol=1e-5)


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 2**40), st.integers(0, 500))
def test_draws_do_not_depend_on_the_batch_size(n, batch, seed, epoch):
    augment = Augmentation((100.0,) * 3, (50.0,) * 3, cutout=6)
    pixels = torch.arange(n * 3 * 1024).view(n, 3, 32, 32).to(torch.uint8)
    draws = augment.draw(n, seed, epoch)
    assert torch.equal(draws, augment.draw(n, seed, epoch))
    parts = [augment(a, b) for a, b in zip(pixels.split(batch), draws.split(batch), strict=True)]
    assert torch.equal(torch.cat(parts), augment(pixels, draws))


def test_draws_are_uniform_and_change_with_seed_and_epoch():
    augment = Augmentation((0.0,) * 3, (1.0,) * 3, cutout=16)
    state = torch.get_rng_state()
    draws = augment.draw(20_000, seed=0, epoch=0)
    assert torch.equal(torch.get_rng_state(), state)
    for column, size in zip(draws.T, (2, 9, 9, 32, 32), strict=True):
        share = column.bincount(minlength=size) / 20_000
        assert len(share) == size and (share * size - 1).abs().max() < 0.2
    assert not torch.equal(draws, augment.draw(20_000, seed=0, epoch=1))
    assert not torch.equal(draws, augment.draw(20_000, seed=1, epoch=0))


def test_normalisation_and_statistics():
    found = load("digits", "train")
    mean, deviation = found.statistics()
    pixels = found.images.numpy().astype(float)
    np.testing.assert_allclose(mean, pixels.mean((0, 2, 3)), rtol=1e-9)
    np.testing.assert_allclose(deviation, pixels.std((0, 2, 3)), rtol=1e-5)
    out = Augmentation(mean, deviation).normalise(found.images)
    assert out.mean().abs() < 1e-4 and out.std().item() == pytest.approx(1, abs=1e-3)


# ------------------------------------------------------------------------------------------------------------ real images


@pytest.mark.long
def test_the_real_images(monkeypatch, request):
    monkeypatch.undo()  # the real environment and the real cache
    try:
        sets = {split: load("cifar10", split) for split in ("train", "test")}
    except FileNotFoundError as error:
        pytest.skip(f"no CIFAR-10 at hand: {error}")
    for split, n in (("train", 5000), ("test", 1000)):
        found = sets[split]
        assert found.images.shape == (10 * n, 3, 32, 32) and found.classes == CIFAR10_CLASSES
        assert found.labels.bincount().tolist() == [n] * 10
        assert found.source in ("CIFAR-10", "CIFAR-10 (JPEG)", "CIFAR-10 (PNG)")
        assert load("cifar10", split).fingerprint == found.fingerprint
    pixels = sets["train"].images.float()
    assert pixels.mean((0, 2, 3)).tolist() == pytest.approx([125.3, 123.0, 113.9], abs=1.0)
    assert pixels.flatten(2).transpose(0, 1).flatten(1).std(1).tolist() == pytest.approx([63.0, 62.1, 66.7], abs=1.0)


def test_a_file_of_other_classes_is_no_cifar(tmp_path):
    path = tmp_path / "pets.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for split in ("train", "test"):
            for label in ("cat", "dog"):
                buffer = io.BytesIO()
                Image.new("RGB", (32, 32)).save(buffer, "PNG")
                archive.writestr(f"{split}/{label}/0.png", buffer.getvalue())
    assert images.load(str(path), "train").classes == ("cat", "dog")
    with pytest.raises(ValueError, match="ten classes"):
        images.load("cifar10", "train", root=path)
    with pytest.raises(FileNotFoundError, match="CIFAR-100"):
        images.load("cifar100", "train", root=path)
