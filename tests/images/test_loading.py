"""`load` by name and path, the embedded digits, and one split in memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from softshare.images import load


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


def test_places_that_do_not_exist_are_named(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load("cifar10", "train", root=tmp_path / "nowhere")
    monkeypatch.setenv("SOFTSHARE_DATA", str(tmp_path / "gone"))
    with pytest.raises(FileNotFoundError, match="SOFTSHARE_DATA.*gone"):
        load("cifar10", "train")
    for path in ("no/such/folder", "missing.tar"):
        with pytest.raises(FileNotFoundError, match=path):
            load(path, "train")


# --------------------------------------------------------------------------------------------------------- split and shrunk


@given(st.integers(1, 359), st.integers(0, 2**31))
def test_a_split_is_two_disjoint_sets_of_everything(n, seed):
    whole = load("digits", "test")
    first, second = whole.split(n, seed)
    assert (len(first.labels), len(second.labels)) == (n, 360 - n)
    pixels = [image.numpy().tobytes() for part in (first, second) for image in part.images]
    assert sorted(pixels) == sorted(image.numpy().tobytes() for image in whole.images)
    assert first.classes == whole.classes and first.source == whole.source
    assert len({whole.fingerprint, first.fingerprint, second.fingerprint}) == 3
    again = whole.split(n, seed)[0]
    assert torch.equal(again.labels, first.labels) and again.fingerprint == first.fingerprint


def test_a_split_pairs_images_with_their_labels():
    whole = load("digits", "test")
    labels = {image.numpy().tobytes(): int(label) for image, label in zip(whole.images, whole.labels, strict=True)}
    for part in whole.split(100, seed=1):
        for image, label in zip(part.images, part.labels, strict=True):
            assert labels[image.numpy().tobytes()] == int(label)
    assert not torch.equal(whole.split(100, 0)[0].labels, whole.split(100, 1)[0].labels)


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
def test_shrunk_images_are_means_of_pixels(factor):
    whole = load("digits", "test")
    small = whole.shrunk(factor)
    side = 32 // factor
    assert small.images.shape == (360, 3, side, side) and small.images.dtype == torch.uint8
    expected = whole.images[7].numpy().reshape(3, side, factor, side, factor).astype(float).mean((2, 4)).round()
    assert small.images[7].numpy().tolist() == expected.tolist()
    assert torch.equal(small.labels, whole.labels) and small.classes == whole.classes
    assert (small.fingerprint == whole.fingerprint) == (factor == 1)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda found: found.split(0), ValueError, "n must be at least 1.*0"),
        (lambda found: found.split(360), ValueError, r"below the number of images \(360\), got 360"),
        (lambda found: found.split(1.5), TypeError, "n must be"),
        (lambda found: found.shrunk(3), ValueError, "divide the side of the images, 32, got 3"),
        (lambda found: found.shrunk(0), ValueError, "factor.*0"),
        (lambda found: found.shrunk(2.0), TypeError, "factor"),
    ],
)
def test_splits_and_sides_that_do_not_fit(call, error, says):
    with pytest.raises(error, match=says):
        call(load("digits", "test"))


def test_shuffled_labels_keep_their_frequencies_and_images():
    found = load("digits", "train")
    shuffled = found.shuffled(seed=1)
    assert torch.equal(shuffled.images, found.images) and torch.equal(shuffled.labels, found.shuffled(1).labels)
    assert torch.equal(shuffled.labels.bincount(), found.labels.bincount())
    assert (shuffled.labels == found.labels).float().mean() < 0.2 and shuffled.fingerprint != found.fingerprint
    assert not torch.equal(shuffled.labels, found.shuffled(seed=2).labels)
