"""CIFAR-10 and CIFAR-100 wherever a copy is found: by its classes, in the binary edition, from the web."""

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
from PIL import Image

import softshare
from softshare import images
from softshare.images import CIFAR10_CLASSES, load
from softshare.images.cifar import EDITIONS


@pytest.mark.parametrize("where", ["folder", "wrapped", "beside", "archive", "file", "environment"])
def test_ten_classes_by_name_count_as_cifar10(
    tmp_path, monkeypatch, where, assert_drawn, pet_files, cifar_files, write_folder, write_archive, listing
):
    root = tmp_path / "data"
    write_archive(root / "another.tar", pet_files())
    write_folder(root / "pictures", pet_files())
    if where in ("archive", "file", "environment"):
        write_archive(root / "ten.tar.xz", {f"ten/{name}": data for name, data in cifar_files().items()})
    else:
        write_folder(root / {"folder": "", "wrapped": "w/x", "beside": "ten"}[where], cifar_files())
    given_ = {"file": root / "ten.tar.xz", "wrapped": root / "w", "environment": None}.get(where, root)
    if where == "environment":
        monkeypatch.setenv("SOFTSHARE_DATA", str(root))
    before = listing(root)
    for split, n in (("train", 2), ("test", 1)):
        found = load("cifar10", split, root=given_)
        assert_drawn(found, split, n, CIFAR10_CLASSES)
        assert found.source == "CIFAR-10 (PNG)"
    assert found.statistics() == ((125.3, 123.0, 113.9), (63.0, 62.1, 66.7))
    assert listing(root) == before, "root is never written to"


def test_jpeg_copies_are_named_as_such(tmp_path, cifar_files, write_folder):
    path = write_folder(tmp_path / "ten", cifar_files(kind="JPEG"))
    found = load("cifar10", "test", root=str(path))
    assert found.source == load(str(path), "test").source == "CIFAR-10 (JPEG)"
    with Image.open(path / "test/bird/0000.jpg") as image:
        np.testing.assert_array_equal(found.images[2].permute(1, 2, 0).numpy(), np.asarray(image))
    assert found.statistics()[0][0] == 125.3


def test_root_comes_before_the_environment_and_both_before_the_cache(tmp_path, monkeypatch, cifar_files, write_folder):
    places = [
        write_folder(tmp_path / name / "ten", cifar_files(counts=(("test", n),))).parent
        for n, name in enumerate("rec", 1)
    ]
    monkeypatch.setattr(softshare.files, "cache_folder", lambda: places[2])
    assert len(load("cifar10", "test").labels) == 30
    monkeypatch.setenv("SOFTSHARE_DATA", str(places[1]))
    assert len(load("cifar10", "test").labels) == 20
    assert len(load("cifar10", "test", root=places[0]).labels) == 10
    monkeypatch.setenv("SOFTSHARE_DATA", "")
    monkeypatch.chdir(places[1])
    assert len(load("cifar10", "test").labels) == 30, "empty means unset, not the current folder"


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("environment", [None, "", "folder"])
def test_without_a_copy_the_message_says_which_file_to_put_where(
    tmp_path, monkeypatch, name, environment, pet_files, write_folder, write_archive
):
    write_archive(tmp_path / "data/pets.tar", pet_files())  # something else
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


def test_a_file_of_other_classes_is_not_cifar(tmp_path):
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


# ----------------------------------------------------------------------------------------------------- the binary edition


@pytest.fixture
def binary(monkeypatch, write_archive):
    """A function that makes a small official edition, and patches the table to expect it.

    It returns the edition's files, path to bytes; pixels and labels by split; a function that writes its archive somewhere.
    """

    def make(name="cifar10", records=4, change=None):
        edition, rng = EDITIONS[name], np.random.default_rng(1)
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
            monkeypatch.setitem(EDITIONS, name, dataclasses.replace(edition, hash=f"{algorithm}:{found}"))
            return path

        monkeypatch.setitem(EDITIONS, name, edition)
        return contents, truth, install

    return make


@pytest.mark.parametrize("unpacked", [False, True])
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_the_binary_edition(tmp_path, binary, name, unpacked, write_folder):
    contents, truth, install = binary(name)
    path = install(tmp_path / "data")
    if unpacked:
        path.unlink()
        write_folder(tmp_path / "data", contents)
        path = tmp_path / "data" / EDITIONS[name].folder
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
    editions = EDITIONS
    assert editions["cifar10"].hash == "sha256:c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
    assert editions["cifar100"].hash == "md5:03b5dce01913d631647c71ecec9e9cb8"
    assert {n for f in editions.values() for _, e in f.files.items() for _, n in e} == {10_000, 50_000}


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "other"])
def test_a_checksum_is_verified_before_a_byte_is_parsed(
    tmp_path, binary, monkeypatch, damage, pet_files, write_archive
):
    path = binary()[2](tmp_path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    other = write_archive(tmp_path / "other.tar.gz", pet_files()).read_bytes()
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
def test_wrong_contents_of_a_binary_edition(tmp_path, binary, monkeypatch, change, says, unpacked, write_folder):
    monkeypatch.chdir(tmp_path)
    contents, _, install = binary(change=change)
    if unpacked:
        write_folder(tmp_path, contents)
    else:
        install(tmp_path)
    with pytest.raises(ValueError, match=says):
        load("cifar10", "train", root=tmp_path)
    assert not (tmp_path / "exploded").exists()


def test_pickles_are_never_read(tmp_path, monkeypatch, write_folder, write_archive):
    """The edition for Python, which consists of pickles, does not count as a copy."""
    monkeypatch.chdir(tmp_path)
    bomb = {f"cifar-10-batches-py/data_batch_{n}": pickle.dumps(Bomb()) for n in range(1, 6)}
    write_archive(tmp_path / "data/cifar-10-python.tar.gz", bomb)
    write_folder(tmp_path / "data", bomb)
    with pytest.raises(FileNotFoundError):
        load("cifar10", "train", root=tmp_path / "data")
    with pytest.raises(ValueError, match="no images"):
        load(str(tmp_path / "data/cifar-10-python.tar.gz"), "train")
    assert not (tmp_path / "exploded").exists()


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
    edition = dataclasses.replace(EDITIONS[name], url=address + EDITIONS[name].archive, **changes)
    monkeypatch.setitem(EDITIONS, name, edition)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_a_download_is_verified_kept_and_read(tmp_path, binary, monkeypatch, site, name):
    folder, address = site
    _, truth, install = binary(name)
    path = install(folder)
    served(monkeypatch, address, name)
    with pytest.raises(FileNotFoundError):
        load(name, "test")  # nothing is fetched unasked
    found = load(name, "test", download=True)
    np.testing.assert_array_equal(found.images.numpy(), truth["test"][0])
    path.unlink()
    assert load(name, "test").fingerprint == load(name, "test", download=True).fingerprint == found.fingerprint
    assert [file.name for file in (tmp_path / "cache").iterdir()] == [path.name]


def test_a_download_with_a_wrong_checksum_is_refused(tmp_path, binary, monkeypatch, site):
    folder, address = site
    binary()[2](folder)
    served(monkeypatch, address, hash="sha256:" + "0" * 64)
    with pytest.raises(ValueError, match="checksum"):
        load("cifar10", "test", download=True)
    assert not list((tmp_path / "cache").glob("*")), "nothing of it is kept"


def test_a_failed_download_says_which_file_to_put_where(tmp_path, monkeypatch, site):
    for address in (site[1], "http://127.0.0.1:9/"):  # not found; nothing listens there
        served(monkeypatch, address)
        with pytest.raises(ConnectionError) as caught:
            load("cifar10", "test", download=True)
        assert "cifar-10-binary.tar.gz" in str(caught.value) and str(tmp_path / "cache") in str(caught.value)


# ------------------------------------------------------------------------------------------------------------ real images


@pytest.mark.long
def test_the_real_images(monkeypatch):
    monkeypatch.undo()  # the real environment and the real cache
    try:
        sets = {split: load("cifar10", split) for split in ("train", "test")}
    except FileNotFoundError as error:
        pytest.skip(f"no CIFAR-10 available: {error}")
    for split, n in (("train", 5000), ("test", 1000)):
        found = sets[split]
        assert found.images.shape == (10 * n, 3, 32, 32) and found.classes == CIFAR10_CLASSES
        assert found.labels.bincount().tolist() == [n] * 10
        assert found.source in ("CIFAR-10", "CIFAR-10 (JPEG)", "CIFAR-10 (PNG)")
        assert load("cifar10", split).fingerprint == found.fingerprint
    pixels = sets["train"].images.float()
    assert pixels.mean((0, 2, 3)).tolist() == pytest.approx([125.3, 123.0, 113.9], abs=1.0)
    assert pixels.flatten(2).transpose(0, 1).flatten(1).std(1).tolist() == pytest.approx([63.0, 62.1, 66.7], abs=1.0)


# -------------------------------------------------------------------------------------------- unreadable neighbouring files


@pytest.mark.parametrize("neighbour", ["holiday.zip", "backup.tar.gz"])
def test_a_damaged_unrelated_archive_is_named_and_skipped(
    tmp_path, monkeypatch, assert_drawn, cifar_files, write_archive, neighbour
):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / neighbour).write_bytes(bytes(range(1, 256)) * 8)
    with pytest.warns(UserWarning, match=f"passed over while looking for CIFAR: .*{neighbour} is truncated"):
        with pytest.raises(FileNotFoundError, match="no copy of CIFAR-10"):
            load("cifar10", "train", root=tmp_path / "data")
    write_archive(tmp_path / "cache" / "cifar10.tar", cifar_files())  # a good copy in the next place searched
    with pytest.warns(UserWarning, match=neighbour):
        assert_drawn(load("cifar10", "train", root=tmp_path / "data"), "train", 2, CIFAR10_CLASSES)


@pytest.mark.parametrize("name", ["my-cifar.tar", "ten.tar"])
def test_a_damaged_copy_of_cifar_itself_is_an_error(tmp_path, cifar_files, write_archive, name):
    path = write_archive(tmp_path / "data" / name, cifar_files())
    path.write_bytes(path.read_bytes()[:-12_000])  # recognised by its name, or by its first classes
    with pytest.raises(ValueError, match=f"{name} is truncated"):
        load("cifar10", "train", root=tmp_path / "data")


@pytest.mark.parametrize(
    ("proxy", "reason"), [("socks5://127.0.0.1:9", "SOCKS"), ("http://", "proxy"), ("http://127.0.0.1:9", "")]
)
def test_a_connection_error_is_reported_as_one(tmp_path, monkeypatch, proxy, reason):
    """Some errors of requests are also ValueErrors, like that of a checksum."""
    monkeypatch.setenv("HTTPS_PROXY", proxy)
    monkeypatch.setenv("https_proxy", proxy)
    with pytest.raises(ConnectionError, match=f"could not download https://.*{reason}.*Without network, put cifar-100"):
        load("cifar100", "train", root=tmp_path, download=True)


def test_a_half_unpacked_folder_does_not_hide_the_archive_next_to_it(tmp_path, binary):
    contents, truth, install = binary()
    path = install(tmp_path / "data")
    folder = path.with_name(EDITIONS["cifar10"].folder)
    folder.mkdir()
    (folder / "data_batch_1.bin").write_bytes(b"half")
    with pytest.warns(UserWarning, match=f"passed over while looking for CIFAR: {folder} lacks"):
        found = load("cifar10", "train", root=tmp_path / "data")
    np.testing.assert_array_equal(found.images.numpy(), truth["train"][0])
    path.unlink()
    with pytest.raises(ValueError, match=f"{folder} lacks"):
        load("cifar10", "train", root=tmp_path / "data")
