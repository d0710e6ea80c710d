"""A small task on which real training takes seconds, and a network without batch statistics for it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from softshare import images
from softshare.training import Classification


@pytest.fixture(scope="session")
def digits():
    """200 images to train on and 100 to evaluate on, of 8 x 8 pixels."""
    train, test = (images.load("digits", split).shrunk(4) for split in ("train", "test"))
    return train.split(200)[0], test.split(100)[0]


@pytest.fixture
def task(digits):
    return Classification(*digits, images.Augmentation(*digits[0].statistics(), flip=False, pad=1))


@pytest.fixture(scope="session")
def small_net():
    """A function that makes the same small network each time, with four convolutions that can be shared."""

    def make() -> nn.Sequential:
        torch.manual_seed(0)
        convolutions = [nn.Conv2d(8, 8, 3, padding=1) for _ in range(4)]
        return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *convolutions, nn.Flatten(), nn.Linear(8 * 64, 10))

    return make
