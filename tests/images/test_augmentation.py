"""Normalisation and random changes of training images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from softshare.images import Augmentation, load


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
