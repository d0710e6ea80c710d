"""One split of a data set in memory: images, labels, and a fingerprint that identifies it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..arguments import count

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

SIDE = 32
"""The side, in pixels, of the square images that `softshare.images.load` returns."""

STATISTICS = {
    "CIFAR-10": ((125.3, 123.0, 113.9), (63.0, 62.1, 66.7)),
    "CIFAR-100": ((129.3, 124.1, 112.4), (68.2, 65.4, 70.4)),
}
"""Mean and standard deviation of each channel, on the scale 0 to 255, as in the authors' code."""


@dataclass(frozen=True)
class ImageSet:
    """One split of a data set.

    Attributes:
        images: (n, 3, 32, 32) uint8; smaller after `shrunk`.
        labels: (n,) int64.
        classes: name of each class.
        source: what the images are, in words: "CIFAR-10", "CIFAR-10 (JPEG)", "digits".
        fingerprint: SHA-256 of images, labels and classes.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    source: str
    fingerprint: str

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel, 0 to 255: the authors' values for CIFAR, otherwise computed."""
        known = STATISTICS.get(self.source.removesuffix(" (JPEG)").removesuffix(" (PNG)"))
        if known:
            return known
        pixels = self.images.transpose(0, 1).reshape(3, -1).double()
        return tuple(pixels.mean(1).tolist()), tuple(pixels.std(1).clamp(min=1.0).tolist())

    def split(self, n: int, seed: int = 0) -> tuple[ImageSet, ImageSet]:
        """Two disjoint sets: n images drawn at random, and the rest. Raises ValueError unless 0 < n < their number."""
        if not 0 < count("n", n) < len(self.labels):
            raise ValueError(f"n must be above 0 and below the number of images ({len(self.labels)}), got {n}")
        order = torch.randperm(len(self.labels), generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
        first, second = (self._with(self.images[part], self.labels[part]) for part in (order[:n], order[n:]))
        return first, second

    def shuffled(self, seed: int = 0) -> ImageSet:
        """The same images with their labels in random order: each class stays as frequent, but nothing tells it."""
        order = torch.randperm(len(self.labels), generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
        return self._with(self.images, self.labels[order])

    def shrunk(self, factor: int = 2) -> ImageSet:
        """The same images, smaller: each pixel the mean of factor x factor pixels, (n, 3, H / factor, W / factor)."""
        side = self.images.shape[-1]
        if side % count("factor", factor):
            raise ValueError(f"factor must divide the side of the images, {side}, got {factor}")
        return self._with(F.avg_pool2d(self.images.float(), factor).round().to(torch.uint8), self.labels)

    def _with(self, images: Tensor, labels: Tensor) -> ImageSet:
        return image_set(images.numpy(), labels.numpy(), self.classes, self.source)


def image_set(images: np.ndarray, labels: np.ndarray, classes: tuple[str, ...], source: str) -> ImageSet:
    images, labels = np.ascontiguousarray(images), np.ascontiguousarray(labels, dtype=np.int64)
    digest = hashlib.sha256(json.dumps([list(classes), images.shape]).encode())
    digest.update(images)  # type: ignore[arg-type]
    digest.update(labels)  # type: ignore[arg-type]
    return ImageSet(torch.from_numpy(images), torch.from_numpy(labels), classes, source, digest.hexdigest())
