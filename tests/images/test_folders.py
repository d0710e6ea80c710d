"""Image folders: what is read from them, the decoded copy in the cache, and what is refused."""

from __future__ import annotations

import io
import os

import numpy as np
import pytest
from PIL import Image

from softshare.images import CIFAR10_CLASSES, folders, load

GREY = np.arange(32 * 32, dtype=np.uint32).reshape(32, 32).astype(np.uint8)


def test_an_image_folder(tmp_path, assert_drawn, pet_files, write_folder):
    path = write_folder(tmp_path / "pets", {**pet_files(), "train/cat/.hidden.png": b"x"})
    assert_drawn(load(str(path), "train"), "train", 2)
    found = load(path, "test")
    assert_drawn(found, "test", 1)
    assert found.source == "pets"


def test_one_image_folder_of_several_must_be_named(tmp_path, assert_drawn, pet_files, write_folder, write_archive):
    both = {f"{top}/{name}": data for top in "ab" for name, data in pet_files().items()}
    for path in (write_folder(tmp_path / "two", both), write_archive(tmp_path / "two.tar", both)):
        with pytest.raises(ValueError, match="two.*several image folders: a, b"):
            load(str(path), "train")
    assert_drawn(load(str(tmp_path / "two/b"), "train"), "train", 2)
    write_folder(tmp_path / "two", pet_files())  # split folders at the root come first
    assert_drawn(load(str(tmp_path / "two"), "train"), "train", 2)


def test_grey_and_palette_images_become_three_channels(tmp_path, drawing, encoded, write_folder):
    palette, file = Image.fromarray(drawing("a", "b", 0)).convert("P"), io.BytesIO()
    palette.save(file, "PNG")
    path = write_folder(tmp_path / "x", {"train/a/0.png": encoded(GREY), "train/b/0.bmp": encoded(GREY, "BMP")})
    (path / "train/a/1.png").write_bytes(file.getvalue())
    found = load(str(path), "train")
    np.testing.assert_array_equal(found.images[0].numpy(), np.stack([GREY] * 3))
    np.testing.assert_array_equal(found.images[1].permute(1, 2, 0).numpy(), np.asarray(palette.convert("RGB")))
    np.testing.assert_array_equal(found.images[2].numpy(), np.stack([GREY] * 3))


def test_fingerprints_tell_contents_apart(tmp_path, drawing, encoded, pet_files, write_folder):
    base = load(write_folder(tmp_path / "a", pet_files()), "train").fingerprint
    renamed = {name.replace("eel", "fox"): data for name, data in pet_files().items()}
    changed = {**pet_files(), "train/cat/0000.png": encoded(drawing("other", "cat", 0))}
    prints = [
        load(write_folder(tmp_path / name, c), "train").fingerprint for name, c in (("b", renamed), ("c", changed))
    ]
    assert len({base, *prints}) == 3
    assert load(write_folder(tmp_path / "d", pet_files()), "train").fingerprint == base


@pytest.mark.parametrize(
    ("name", "make", "says"),
    [
        ("train/cat/0001.png", lambda encoded, good: encoded(np.zeros((32, 31, 3), np.uint8)), "is 31 x 32"),
        ("train/cat/0001.png", lambda encoded, good: encoded(np.zeros((64, 64, 3), np.uint8)), "is 64 x 64"),
        ("train/cat/0001.png", lambda encoded, good: b"text", "is not a readable image"),
        ("train/cat/0001.png", lambda encoded, good: b"", "is not a readable image"),
        ("train/cat/0001.png", lambda encoded, good: good[:-40], "is not a readable image"),
        ("train/eel/0000.jpg", lambda encoded, good: encoded(GREY, "JPEG")[:300], "is not a readable image"),
        ("test/fox/0000.png", lambda encoded, good: good, None),
    ],
)
@pytest.mark.parametrize("suffix", ["", ".tar", ".zip"])
def test_wrong_images_are_named(tmp_path, encoded, pet_files, write_folder, write_archive, name, make, says, suffix):
    contents = {**pet_files(), name: make(encoded, pet_files()["train/cat/0001.png"])}
    path = write_archive(tmp_path / f"pets{suffix}", contents) if suffix else write_folder(tmp_path / "pets", contents)
    with pytest.raises(ValueError, match=f"pets.*{name} {says}" if says else "pets.*'train' has no images of fox"):
        load(str(path), "test")


def test_folders_without_images_or_the_split(tmp_path, pet_files, write_folder):
    with pytest.raises(ValueError, match="empty.*no images"):
        load(write_folder(tmp_path / "empty", {"a.txt": b""}), "train")
    with pytest.raises(ValueError, match="half.*no split 'test'.*train"):
        load(write_folder(tmp_path / "half", pet_files(counts=(("train", 1),))), "test")


# ----------------------------------------------------------------------------------------------------------------- cache


@pytest.fixture
def cached(tmp_path, monkeypatch, cifar_files, write_archive):
    """An archive that has been read into the cache, and the files there by split."""
    monkeypatch.setattr(folders, "_CACHED_FROM", 1)
    path = write_archive(tmp_path / "data" / "ten.tar.xz", cifar_files())
    load("cifar10", "train", root=path.parent)
    kept = {split: next((tmp_path / "cache").glob(f"*{split}.npz")) for split in ("train", "test")}
    assert len(list((tmp_path / "cache").iterdir())) == 2, "both splits from one pass, and no half-written files"
    return path, kept


def test_a_second_reading_comes_from_the_cache(cached, monkeypatch, assert_drawn):
    path, _ = cached
    monkeypatch.setattr(folders, "_decode", lambda *_: pytest.fail("decoded again"))
    for split, n in (("train", 2), ("test", 1)):
        found = load("cifar10", split, root=path.parent)
        assert_drawn(found, split, n, CIFAR10_CLASSES)
        assert found.source == "CIFAR-10 (PNG)"


def test_the_cache_gives_what_decoding_gives(cached, monkeypatch):
    path, kept = cached
    first = load(str(path), "train")
    kept["train"].unlink()
    again = load(str(path), "train")
    assert first.fingerprint == again.fingerprint and first.source == again.source and first.classes == again.classes


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "text", "pickle", "swapped"])
def test_a_damaged_cache_is_not_used(cached, damage, monkeypatch, tmp_path, assert_drawn):
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
    if damage == "swapped":  # complete, but its fingerprint is not that of its images
        with np.load(file) as arrays:
            changed = {**arrays, "images": 255 - arrays["images"]}
        np.savez(file, **changed)
        data = file.read_bytes()
    file.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "text": b"hello"}.get(damage, data))
    assert_drawn(load("cifar10", "train", root=path.parent), "train", 2, CIFAR10_CLASSES)
    monkeypatch.setattr(folders, "_decode", lambda *_: pytest.fail("the cache was not repaired"))
    assert_drawn(load("cifar10", "train", root=path.parent), "train", 2, CIFAR10_CLASSES)
    assert not (tmp_path / "exploded").exists()


def test_a_changed_archive_is_read_again(cached, assert_drawn, cifar_files, write_archive):
    path, _ = cached
    write_archive(path, cifar_files(counts=(("train", 1), ("test", 1))))
    assert_drawn(load("cifar10", "train", root=path.parent), "train", 1, CIFAR10_CLASSES)


def test_a_changed_folder_is_read_again(tmp_path, monkeypatch, drawing, encoded, pet_files, write_folder):
    monkeypatch.setattr(folders, "_CACHED_FROM", 1)
    path = write_folder(tmp_path / "pets", pet_files())
    before = load(path, "train")
    write_folder(path, {"train/cat/0002.png": encoded(drawing("train", "cat", 2))})
    assert len(load(path, "train").labels) == len(before.labels) + 1


def test_small_sets_are_not_cached_and_an_unwritable_cache_is_not_an_error(
    tmp_path, monkeypatch, assert_drawn, pet_files, write_folder
):
    path = write_folder(tmp_path / "pets", pet_files())
    load(path, "train")
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(folders, "_CACHED_FROM", 1)
    (tmp_path / "cache").write_text("a file in the way")
    assert_drawn(load(path, "train"), "train", 2)


def key(path):
    classes, labels, _ = folders.label_images(path, folders.SPLITS, ["train"])
    return folders.content_key(path, [name for found in labels.values() for name in found])


def test_the_key_of_a_folder_notices_a_change_that_keeps_size_and_time(tmp_path, pet_files, write_folder):
    """As after a copy that preserves times."""
    path = write_folder(tmp_path / "pets", pet_files())
    image, before = path / "train/cat/0000.png", key(path)
    state = image.stat()
    image.write_bytes(bytes(reversed(image.read_bytes())))
    os.utime(image, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert image.stat().st_size == state.st_size and image.stat().st_mtime_ns == state.st_mtime_ns
    assert key(path) != before


def test_the_key_of_a_folder_covers_linked_folders(tmp_path, pet_files, write_folder):
    path = write_folder(tmp_path / "pets", pet_files())
    (path / "train/cat").rename(tmp_path / "cats")
    (path / "train/cat").symlink_to(tmp_path / "cats")
    before = key(path)
    assert key(path) == before
    (tmp_path / "cats/0000.png").write_bytes(b"another")
    assert key(path) != before


def test_another_pillow_version_decodes_again(tmp_path, monkeypatch, pet_files, write_archive):
    path = write_archive(tmp_path / "pets.tar", pet_files())
    before = folders.content_key(path)
    assert folders.content_key(path) == before
    monkeypatch.setattr(Image, "__version__", "99")
    assert folders.content_key(path) != before


def test_broken_links_and_folders_named_like_images(tmp_path, assert_drawn, pet_files, write_folder):
    path = write_folder(tmp_path / "pets", pet_files())
    (path / ".#notes").symlink_to("user@host.1:2")  # an editor's lock
    (path / "train/cat/.#0000.png").symlink_to("user@host.1:2")
    (path / "train/cat/1.png").mkdir()
    assert_drawn(load(str(path), "train"), "train", 2)
    (path / "train/cat/2.png").symlink_to("../nowhere")  # perhaps an image that was not fetched
    with pytest.raises(
        ValueError, match="1 of its images are links to files that are not there, such as train/cat/2.png; fetch"
    ):
        load(str(path), "train")


def test_an_unreadable_folder_is_an_error_and_does_not_count_as_empty(tmp_path, monkeypatch, pet_files, write_folder):
    path = write_folder(tmp_path / "pets", pet_files())
    scandir = os.scandir

    def closed(folder):
        if str(folder).endswith("train/cat"):  # chmod would not stop root, who may run the tests
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(PermissionError, match="train/cat"):
        load(str(path), "train")
