"""Random changes of training images, for a whole batch on whatever device holds it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@functools.lru_cache(maxsize=8)
def _statistics(mean: tuple[float, ...], deviation: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    # Kept on the device: copying them there for every batch would make the host wait for it. Made outside inference
    # mode, since a training step may need them later.
    with torch.inference_mode(False):
        return tuple(torch.tensor(each, device=device).view(1, -1, 1, 1) for each in (mean, deviation))  # type: ignore


@dataclass(frozen=True)
class Augmentation:
    """Normalisation and random changes of training images, for a whole batch on whatever device holds it.

    In the order of the authors' code: flip, black padding and crop, normalisation, then cutout: one square hole of zeros
    whose centre is uniform over the image, clipped at the border (DeVries and Taylor, 2017).

    Attributes:
        mean, deviation: of each channel, 0 to 255.
        flip: whether to mirror images with probability 1/2.
        pad: pixels of padding before the crop; 0: none.
        cutout: side of the hole; 0: none.
    """

    mean: Sequence[float]
    deviation: Sequence[float]
    flip: bool = True
    pad: int = 4
    cutout: int = 0

    def normalise(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) uint8 to float32, mean 0 and deviation 1 a channel over the data set; for evaluation."""
        mean, deviation = _statistics(tuple(self.mean), tuple(self.deviation), images.device)
        return (images.float() - mean) / deviation

    def draw(self, n: int, seed: int, epoch: int, side: int = 32) -> Tensor:
        """What happens to each of n images in one epoch, (n, 5) int64: flip, crop row and column, hole row and column.

        Depends on seed, epoch and the image's index alone, not on batch size or device.
        """
        generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
        return torch.stack(
            [
                torch.randint(2, (n,), generator=generator),
                torch.randint(2 * self.pad + 1, (n,), generator=generator),
                torch.randint(2 * self.pad + 1, (n,), generator=generator),
                torch.randint(side, (n,), generator=generator),
                torch.randint(side, (n,), generator=generator),
            ],
            dim=1,
        )

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        """Apply the rows of `draw` that belong to these images: (N, 3, H, W) uint8 and (N, 5) to (N, 3, H, W) float32."""
        n, channels, height, width = images.shape
        pixels = torch.arange(height, device=images.device)
        flipped = (draws[:, 0] * self.flip).bool().unsqueeze(1)
        rows = draws[:, 1:2] + pixels  # (N, H), in the padded image
        columns = draws[:, 2:3] + pixels
        # Mirroring the cropped column order is a flip of the padded image with the crop mirrored as well.
        columns = torch.where(flipped, columns.flip(1), columns)
        if self.pad:
            images = F.pad(images, (self.pad,) * 4)
        batch = torch.arange(n, device=images.device)
        channel = torch.arange(channels, device=images.device)
        picked = images[
            batch[:, None, None, None], channel[:, None, None], rows[:, None, :, None], columns[:, None, None]
        ]
        out = self.normalise(picked)
        if self.cutout:
            out = (
                out
                * ~(self._hole(draws[:, 3:4], pixels)[:, :, None] & self._hole(draws[:, 4:5], pixels)[:, None])[:, None]
            )
        return out

    def _hole(self, centre: Tensor, pixels: Tensor) -> Tensor:
        """(N, 1) centres to (N, side) bool: pixels within the hole along one axis."""
        start = centre - self.cutout // 2
        return (pixels >= start) & (pixels < start + self.cutout)
