"""Images to train on, to hold out and to test on; profiles that need the poster's images refuse others."""

from __future__ import annotations

import pytest
import torch

from softshare import images
from softshare.studies import STUDIES, make_plan, study_of


@pytest.fixture
def fake_cifar(monkeypatch):
    """50,000 and 10,000 images whose first pixel tells them apart."""

    def load(name, split, root=None, download=False):
        n = 50_000 if split == "train" else 10_000
        pixels = torch.zeros(n, 3, 32, 32, dtype=torch.uint8)
        number = torch.arange(n)
        pixels[:, 0, 0, 0], pixels[:, 1, 0, 0] = number % 256, number // 256
        title = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}[name]
        return images.ImageSet(pixels, number % 10, tuple("0123456789"), title, f"{split} of {name}")

    monkeypatch.setattr(images, "load", load)


def numbers_of(pixels: torch.Tensor) -> set[int]:
    return set((pixels[:, 0, 0, 0].long() + 256 * pixels[:, 1, 0, 0].long()).tolist())


def tasks_of(name, profile, seed=0, data=None):
    plan = make_plan(name, profile, seed)
    return study_of(plan).tasks(plan, data)


def test_what_is_trained_on_held_out_and_tested_on(fake_cifar):
    found = tasks_of("WRN 28-10", "gpu", 3)
    train, held_out = numbers_of(found.train.images), numbers_of(found.train.held_out[0])
    assert len(train) == 45_000 and len(held_out) == 5_000 and not train & held_out
    assert len(found.test.held_out[1]) == 10_000 and found.classes == 10 and found.data["source"] == "CIFAR-10"
    assert numbers_of(tasks_of("WRN 28-10", "gpu", 4).train.images) != train  # the split is seeded
    assert torch.equal(tasks_of("WRN 28-10", "gpu", 3).train.images, found.train.images)
    paper = tasks_of("WRN 28-10 cutout", "paper", 0, "cifar100")
    assert paper.train.size == 50_000 and paper.train.held_out is None and paper.data["source"] == "CIFAR-100"
    augmentation = paper.train.augmentation
    assert augmentation.cutout == 16 and augmentation.pad == 4 and augmentation.flip
    assert tuple(augmentation.mean) == images.STATISTICS["CIFAR-100"][0]
    short = tasks_of("WRN 28-10", "short")
    assert short.train.size == 50_000 and short.train.held_out is None and len(short.test.held_out[1]) == 10_000


def test_the_toy_profile_uses_all_the_images_available(monkeypatch):
    monkeypatch.setenv("SOFTSHARE_DATA", "")
    found = tasks_of("WRN 28-10", "fast", 0, "digits")
    assert found.train.images.shape[1:] == (3, 16, 16) and found.train.size == round(0.9 * 1437)
    assert len(found.train.held_out[1]) == 1437 - found.train.size and len(found.test.held_out[1]) == 360
    assert not found.train.augmentation.flip and found.train.augmentation.pad == 2  # a mirrored 2 is not a 2


@pytest.fixture
def no_copy(tmp_path, monkeypatch):
    monkeypatch.setattr("softshare.files.cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setenv("SOFTSHARE_DATA", "")
    return tmp_path


@pytest.mark.parametrize("profile", ["gpu", "short", "paper"])
def test_larger_profiles_never_fall_back_to_digits(no_copy, profile):
    with pytest.raises(
        FileNotFoundError, match=f"profile {profile} needs the images of the poster: no copy of CIFAR-10"
    ):
        tasks_of("SWRN 28-10-2*", profile)


def test_the_toy_falls_back_to_digits_but_not_past_a_mistyped_name(no_copy, monkeypatch):
    assert tasks_of("SWRN 28-10-2*", "fast").data["source"] == "digits"
    monkeypatch.setenv("SOFTSHARE_DATA", str(no_copy / "mistyped"))
    with pytest.raises(FileNotFoundError, match="mistyped"):
        tasks_of("SWRN 28-10-2*", "fast")


def test_shuffled_labels_are_those_of_training_alone():
    plans = [make_plan(name, "fast") for name in ("SWRN 40-8-8", "SWRN 40-8-8 shuffled")]
    plain, shuffled = (STUDIES["cifar"].tasks(plan, "digits") for plan in plans)
    assert torch.equal(plain.train.images, shuffled.train.images)
    assert (plain.train.labels == shuffled.train.labels).float().mean() < 0.2
    for one, other in ((plain.train, shuffled.train), (plain.test, shuffled.test)):
        assert torch.equal(one.held_out[1], other.held_out[1])
    assert plain.train.identity() != shuffled.train.identity(), "so that no checkpoint is taken for the other's"
    identities = [STUDIES["cifar"].identity(plan, "x") for plan in plans]
    assert identities[1].chosen["sizes"]["shuffled"] is True and "shuffled" not in identities[0].chosen["sizes"]
