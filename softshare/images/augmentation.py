"""Normalisation and random changes of training images."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@functools.lru_cache(maxsize=8)
def _statistics(mean: tuple[float, ...], deviation: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    # Kept on the device: copying them there for every batch would make the host wait. Made outside inference mode,
    # since a training step may need them later.
    with torch.inference_mode(False):
        both = (torch.tensor(each, device=device, dtype=torch.float32) for each in (mean, deviation))
        return tuple(each.view(1, -1, 1, 1) for each in both)  # type: ignore[return-value]


@dataclass(frozen=True)
class Augmentation:
    """Normalisation and random changes of training images, for a whole batch on the device that holds it.

    The order is that of the authors' code: flip, black padding and crop, normalisation, then cutout, one square hole of
    zeros whose centre is uniform over the image, clipped at the border (DeVries and Taylor, 2017).

    Attributes:
        mean, deviation: per channel, on the scale 0 to 255.
        flip: whether to mirror images with probability 1/2.
        pad: pixels of padding before the crop; 0: none.
        cutout: side of the hole in pixels; 0: none.
    """

    mean: Sequence[float]
    deviation: Sequence[float]
    flip: bool = True
    pad: int = 4
    cutout: int = 0

    def statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and deviation as float32 tensors (1, 3, 1, 1) on a device, which `normalise` uses; kept for later calls."""
        return _statistics(tuple(self.mean), tuple(self.deviation), device)

    def normalise(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) uint8 to float32 with mean 0 and deviation 1 per channel over the data set; for evaluation."""
        mean, deviation = self.statistics(images.device)
        return (images.float() - mean) / deviation

    def draw(self, n: int, seed: int, epoch: int, side: int = 32) -> Tensor:
        """The random draws for n images in one epoch, (n, 5) int64: flip, crop row and column, hole row and column.

        They depend only on seed, epoch and the image's index, not on batch size or device.
        """
        generator = torch.Generator("cpu").manual_seed((seed * 1_000_003 + epoch) % 2**63)
        numbers = (2, 2 * self.pad + 1, 2 * self.pad + 1, side, side)
        drawn = [
            torch.randint(number, (n,), generator=generator, device="cpu", dtype=torch.int64) for number in numbers
        ]
        return torch.stack(drawn, dim=1)

    def moved(self, images: Tensor, draws: Tensor) -> Tensor:
        """Flip and crop by the rows of `draw` that belong to these images: (N, 3, H, W) uint8 to the same."""
        n, channels, _, side = images.shape
        pixels = torch.arange(side, device=images.device)
        rows, columns = draws[:, 1:2] + pixels, draws[:, 2:3] + pixels  # (N, side), in the padded image
        if self.flip:
            # Mirroring the cropped column order is a flip of the padded image with the crop mirrored as well.
            columns = torch.where(draws[:, :1].bool(), columns.flip(1), columns)
        batch = torch.arange(n, device=images.device)[:, None, None, None]
        channel = torch.arange(channels, device=images.device)[:, None, None]
        padded = F.pad(images, (self.pad,) * 4)
        return padded[batch, channel, rows[:, None, :, None], columns[:, None, None]]

    def finished(self, moved: Tensor, draws: Tensor) -> Tensor:
        """Normalise images that `moved` returned, and cut out their holes: (N, 3, H, W) uint8 to float32."""
        out = self.normalise(moved)
        if self.cutout:
            pixels = torch.arange(moved.shape[-1], device=moved.device)
            start = draws[:, 3:, None] - self.cutout // 2
            inside = (pixels >= start) & (pixels < start + self.cutout)  # (N, 2, side): along rows, along columns
            out = out * ~(inside[:, 0, :, None] & inside[:, 1, None])[:, None]
        return out

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        """Apply the rows of `draw` that belong to these images: (N, 3, H, W) uint8 and (N, 5) to (N, 3, H, W) float32."""
        return self.finished(self.moved(images, draws), draws)
