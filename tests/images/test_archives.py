"""Archives of image folders: never unpacked, and refused where they are cut, damaged, unsafe or none."""

from __future__ import annotations

import contextlib
import hashlib
import io
import tarfile
import tempfile
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from softshare.images import CIFAR10_CLASSES, load

ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".zip")


@pytest.mark.parametrize("wrapping", ["", "pets-1.0/"])
@pytest.mark.parametrize("suffix", ARCHIVES)
def test_archives_of_an_image_folder(tmp_path, suffix, wrapping, assert_drawn, pet_files, write_folder, write_archive):
    folder = write_folder(tmp_path / "pets", pet_files())
    contents = {"LICENSE": b"free", **{wrapping + name: data for name, data in reversed(pet_files().items())}}
    path = write_archive(tmp_path / f"pets{suffix}", contents)
    for split, n in (("train", 2), ("test", 1)):
        found = load(str(path), split)
        assert_drawn(found, split, n)
        assert found.fingerprint == load(str(folder), split).fingerprint


def test_the_content_says_what_an_archive_is(tmp_path, assert_drawn, pet_files, write_archive):
    path = write_archive(tmp_path / "pets.zip", pet_files())
    assert_drawn(load(str(path.rename(tmp_path / "pets.tar.gz")), "test"), "test", 1)


@pytest.fixture(scope="module")
def fresh_archive(pet_files, write_archive):
    """A function that makes a small archive in a folder of its own, for tests that run many times."""

    @contextlib.contextmanager
    def make(suffix):
        with tempfile.TemporaryDirectory() as folder:
            yield write_archive(Path(folder, f"pets{suffix}"), pet_files())

    return make


@pytest.mark.parametrize("suffix", ARCHIVES)
@given(st.data())
def test_a_truncated_archive_is_refused(fresh_archive, suffix, data):
    with fresh_archive(suffix) as path:
        whole = path.read_bytes()
        # The zeros that pad a plain tar hold nothing; one end mark of 512 of them must be there.
        end = len(whole.rstrip(b"\0")) + 500 if suffix == ".tar" else len(whole) - 1
        path.write_bytes(whole[: data.draw(st.integers(0, end))])
        with pytest.raises(ValueError, match=path.name):
            load(str(path), "train")


@pytest.mark.parametrize("suffix", ARCHIVES)
@given(st.data())
def test_a_flipped_bit_is_noticed_or_without_effect(fresh_archive, suffix, data):
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


def test_a_zip_whose_list_hides_a_file_is_refused(tmp_path, pet_files, write_archive):
    """The length of the first entry's comment covers the second entry."""
    path = write_archive(tmp_path / "pets.zip", pet_files())
    data = bytearray(path.read_bytes())
    first, second = data.find(b"PK\1\2"), data.find(b"PK\1\2", data.find(b"PK\1\2") + 4)
    third = data.find(b"PK\1\2", second + 4)
    data[first + 32 : first + 34] = (third - second).to_bytes(2, "little")
    path.write_bytes(data)
    with zipfile.ZipFile(path) as archive:
        assert len(archive.namelist()) == len(pet_files()) - 1
    with pytest.raises(ValueError, match=r"pets\.zip"):
        load(str(path), "train")


@pytest.mark.parametrize(
    "name", ["../evil.png", "train/../../evil.png", "/tmp/evil.png", "train/cat/..", "C:/evil.png", "..\\evil.png"]
)
@pytest.mark.parametrize("suffix", [".tar", ".tar.xz", ".zip"])
@pytest.mark.parametrize("first", [True, False])
def test_an_archive_with_paths_that_climb_out_is_refused(
    tmp_path, name, suffix, first, drawing, encoded, pet_files, write_archive, listing
):
    evil = {name: encoded(drawing("a", "b", 0))}
    path = write_archive(
        tmp_path / "in" / f"pets{suffix}", {**evil, **pet_files()} if first else {**pet_files(), **evil}
    )
    before = listing(tmp_path)
    with pytest.raises(ValueError, match=f"pets{suffix}.*evil|leads out"):
        load(str(path), "train")
    assert listing(tmp_path) == before, "nothing is unpacked"


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_refused(tmp_path, kind, pet_files):
    path = tmp_path / "pets.tar"
    with tarfile.open(path, "w") as archive:
        member = tarfile.TarInfo("train/cat/0000.png")
        member.type, member.linkname = kind, "/etc/passwd"
        archive.addfile(member)
        for name, data in pet_files().items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    with pytest.raises(ValueError, match=r"pets\.tar.*0000\.png.*link or a device"):
        load(str(path), "train")


@pytest.mark.parametrize("content", [b"", b"not an archive", b"PK\x03\x04broken", bytes(range(1, 256)) * 16])
@pytest.mark.parametrize("suffix", [".tar", ".tar.xz", ".zip"])
def test_files_that_are_no_archives(tmp_path, content, suffix):
    path = tmp_path / f"pets{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=path.name):
        load(str(path), "train")


@pytest.mark.parametrize("listed", ["wrong", "right", "binary mode", "other"])
def test_an_archive_is_checked_against_sha256sums_beside_it(tmp_path, listed, assert_drawn, cifar_files, write_archive):
    path = write_archive(tmp_path / "ten.tar", cifar_files())
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
        assert_drawn(load("cifar10", "train", root=tmp_path), "train", 2, CIFAR10_CLASSES)
