"""Archives of image folders: never unpacked, and refused if truncated, damaged, unsafe or not archives."""

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

from softshare.images import CIFAR10_CLASSES, archives, folders, load

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


def test_the_content_decides_what_an_archive_is(tmp_path, assert_drawn, pet_files, write_archive):
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
def test_files_that_are_not_archives(tmp_path, content, suffix):
    path = tmp_path / f"pets{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=path.name):
        load(str(path), "train")


@pytest.mark.parametrize("listed", ["wrong", "right", "binary mode", "other"])
def test_an_archive_is_checked_against_sha256sums_next_to_it(
    tmp_path, listed, assert_drawn, cifar_files, write_archive
):
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


# --------------------------------------------------------------------------------------------------- names found in practice


def test_a_zip_made_on_windows_is_read(tmp_path, assert_drawn, pet_files):
    path = tmp_path / "pets.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in pet_files().items():
            member = zipfile.ZipInfo()
            member.filename = "pets\\" + name.replace("/", "\\")
            archive.writestr(member, data)
    assert_drawn(load(str(path), "train"), "train", 2)


@pytest.mark.parametrize("name", ["..\\train\\a\\0.png", "C:\\train\\a\\0.png", "\\train\\a\\0.png"])
def test_a_windows_path_that_leads_out_is_refused(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        member = zipfile.ZipInfo()
        member.filename = name
        archive.writestr(member, b"x")
    with pytest.raises(ValueError, match="leads out of it"):
        load(str(tmp_path / "x.zip"), "train")


@pytest.mark.parametrize("suffix", ["", ".tar", ".zip"])
def test_files_left_out_are_counted_and_named(
    tmp_path, suffix, assert_drawn, pet_files, write_folder, write_archive, encoded
):
    png = pet_files()["train/cat/0000.png"]
    more = {f"train/cat/{n}.tif": b"II" for n in range(3)} | {"test/dog/more/1.PNG": png, "train/stray.png": png}
    more |= {"train/cat/noend": b"x", "train/cat/.DS_Store": b"x", "train/.cache/1.png": png, "README.md": b"x"}
    contents = {**pet_files(), **more}
    path = write_archive(tmp_path / f"p{suffix}", contents) if suffix else write_folder(tmp_path / "p", contents)
    for _ in range(2):  # the second time, it may come from the decoded copy
        with pytest.warns(UserWarning) as caught:
            found = load(str(path), "train")
        assert_drawn(found, "train", 2)
        (said,) = (str(each.message) for each in caught)
        for part in (
            "6 files are left out",
            "3 *.tif, such as train/cat/0.tif",
            "1 without an ending, such as train/cat/",
        ):
            assert part in said
        assert "2 in another place, such as t" in said and "endings .jpg .jpeg" in said
        assert caught[0].filename.endswith("loading.py") or caught[0].filename == __file__


def test_the_copy_in_the_cache_remembers_what_was_left_out(tmp_path, monkeypatch, pet_files, write_archive):
    monkeypatch.setattr(folders, "_CACHED_FROM", 1)
    path = write_archive(tmp_path / "p.tar", {**pet_files(), "train/cat/a.tif": b"II"})
    with pytest.warns(UserWarning, match="1 file is left out"):
        load(str(path), "train")
    monkeypatch.setattr(folders, "_decode", lambda *_: pytest.fail("decoded again"))
    with pytest.warns(UserWarning, match="1 file is left out"):
        load(str(path), "test")


def test_no_warning_about_a_folder_that_is_read_completely(tmp_path, recwarn, pet_files, write_folder):
    load(write_folder(tmp_path / "p", pet_files()), "train")
    assert len(recwarn) == 0


# ------------------------------------------------------------------------------------------------------------ quick refusals


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz", "x.zip"])
def test_a_download_with_only_its_space_reserved_is_refused_at_its_first_block(tmp_path, monkeypatch, name):
    with open(tmp_path / name, "wb") as file:
        file.truncate(2**33)  # 8 GiB: reading it would take a while
    monkeypatch.setattr(folders, "content_key", lambda *_: pytest.fail("read in full"))
    with pytest.raises(ValueError, match="begins with zeros, as a download"):
        load(str(tmp_path / name), "train")


def test_a_large_unrelated_archive_is_skipped_unread(tmp_path, monkeypatch, pet_files, write_archive):
    write_archive(tmp_path / "pets.tar", pet_files())
    monkeypatch.setattr(folders, "content_key", lambda *_: pytest.fail("read to its end"))
    with pytest.raises(FileNotFoundError, match="no copy of CIFAR-10"):
        load("cifar10", "train", root=tmp_path)


def test_a_read_error_is_not_blamed_on_the_archive(tmp_path, monkeypatch, pet_files, write_archive):
    path = write_archive(tmp_path / "pets.tar", pet_files())

    def failing(*_, **__):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(archives.tarfile, "open", failing)
    with pytest.raises(OSError, match="Input/output error") as caught:
        load(str(path), "train")
    assert not isinstance(caught.value, ValueError) and "damaged" not in str(caught.value)


def test_a_download_that_filled_a_part_of_its_reserved_space_is_refused(tmp_path, pet_files, write_archive):
    """A plain tar that is cut between two files and goes on with zeros would pass for a whole one."""
    path = write_archive(tmp_path / "pets.tar", pet_files())
    with tarfile.open(path) as archive:
        cut = archive.getmembers()[-1].offset
    with open(path, "r+b") as file:
        file.truncate(cut)
        file.truncate(cut + 3 * 2**20)
    with pytest.raises(
        ValueError, match="ends with zeros, as a download does if its space was reserved but only partly"
    ):
        load(str(path), "train")


def test_folders_of_images_next_to_the_splits_are_named(tmp_path, pet_files, write_folder):
    path = write_folder(tmp_path / "p", {**pet_files(), "val/cat/0.png": b"x", "docs/a.txt": b"x", ".git/a.png": b"x"})
    with pytest.warns(UserWarning, match=f"{path}: not read: val$"):
        load(path, "train")


def test_a_link_to_a_folder_above_has_an_end(tmp_path, assert_drawn, pet_files, write_folder):
    path = write_folder(tmp_path / "p", pet_files())
    (path / "train/cat/up").symlink_to(path)
    assert_drawn(load(path, "train"), "train", 2)


def test_what_is_left_out_of_a_large_folder_is_looked_up_each_time(
    tmp_path, monkeypatch, pet_files, write_folder, recwarn
):
    monkeypatch.setattr(folders, "_CACHED_FROM", 1)
    path = write_folder(tmp_path / "p", pet_files())
    load(path, "train")
    assert len(recwarn) == 0
    (path / "train/cat/a.tif").write_bytes(b"II")
    with pytest.warns(UserWarning, match="1 file is left out"):
        load(path, "train")
    (path / "train/cat/a.tif").unlink()
    recwarn.clear()
    load(path, "train")
    assert len(recwarn) == 0


def test_a_renamed_archive_has_its_new_name_though_a_copy_of_it_is_kept(
    tmp_path, monkeypatch, pet_files, write_archive
):
    monkeypatch.setattr(folders, "_CACHED_FROM", 1)
    path = write_archive(tmp_path / "first.tar", pet_files())
    assert load(path, "train").source == "first.tar"
    assert load(path.rename(tmp_path / "second.tar"), "train").source == "second.tar"
