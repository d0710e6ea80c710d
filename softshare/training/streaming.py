"""Images that do not fit into memory, such as ImageNet: decoded from a folder by other processes during training."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import math
import os
import re
import signal
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..arguments import count
from ..files import user_path
from ..images.archives import label_images, open_image
from ..images.augmentation import Augmentation
from .tasks import Predict, Task

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of each channel over ImageNet's training images, on the scale 0 to 1; these are the values in common use."""
_NORMALISATION = Augmentation([255 * value for value in MEAN], [255 * value for value in DEVIATION])


class WorkerDied(RuntimeError):
    """A process that decodes images has died."""


class StreamedImages(Task):
    """Labelled images in folders ``train/class/file`` and ``val/class/file``, decoded when they are needed.

    Training images are cropped (8 to 100% of the area, aspect 3/4 to 4/3), resized and mirrored at random, as is usual for
    ImageNet; the random draws depend only on seed, epoch and the image's index, not on batches or workers. Held-out images
    are resized to a shorter side of side * 256 / 224, and their centre is used. Evaluation gives loss, accuracy, error,
    top1_error and top5_error (of 5 guesses, or of all classes if there are fewer), all but the loss in %. Besides the list
    of files, memory holds at most 2 batches per worker and the one in use.

    Attributes:
        size: number of training images.
        classes: names, sorted; a label is an index into them.
        source: "ImageNet" if the classes are 1,000 names of the form n01440764, else the folder's name.
        fingerprint: SHA-256 of the names and sizes of all files used; copies of a folder have the same.

    Args:
        path: the folder.
        side: of the model's square input images, in pixels.
        workers: processes that decode; 0: decode in this process; default: the number of cores minus 1, at most 8.
        held_out: "test", or "val", for which a folder "test" is used if there is no "val"; None: no evaluation.

    Raises FileNotFoundError without the folder, ValueError without a split or without images of a class in it, TypeError
    for a side or workers that are not whole numbers; while reading, ValueError for a damaged image and WorkerDied, a
    RuntimeError, if a worker dies. A warning counts the files that are left out because of their ending or place.
    """

    def __init__(
        self, path: str | Path, side: int = 224, workers: int | None = None, held_out: str | None = "val"
    ) -> None:
        self.path, self.device, self.workers = user_path(path), torch.device("cpu"), _workers(workers)
        if held_out not in ("val", "test", None):
            raise ValueError(f'held_out must be "val", "test" or None, got {held_out!r}')
        if not self.path.exists():
            raise FileNotFoundError(f"no image folder at {self.path}")
        if self.path.is_file():
            raise ValueError(f"{self.path} is not a folder; an archive must be unpacked first")
        if held_out == "val" and not (self.path / "val").is_dir() and (self.path / "test").is_dir():
            held_out = "test"
        splits = [split for split in ("train", held_out) if split]
        self.classes, found, left_out = label_images(self.path, splits, splits)
        if left_out:
            warnings.warn(f"{self.path}: {left_out}", stacklevel=2)
        images = {name: label for split in splits for name, label in found[split].items()}
        names, labels = np.array([os.fsencode(name) for name in images]), np.array(list(images.values()))
        self._reader = _Reader(self.path, names, labels, count("side", side))
        self.size = len(found["train"])
        imagenet = len(self.classes) == 1000 and all(re.fullmatch(r"n\d{8}", name) for name in self.classes)
        self.source = "ImageNet" if imagenet else self.path.resolve().name
        sizes = "".join(f"{name}\0{os.stat(self.path / name).st_size}\n" for name in images)
        self.fingerprint = hashlib.sha256(os.fsencode(sizes)).hexdigest()

    @property
    def held_out_size(self) -> int:
        """Number of held-out images."""
        return len(self._reader.labels) - self.size

    def to(self, device: torch.device) -> StreamedImages:
        moved = copy.copy(self)
        moved.device = torch.device(device)
        return moved

    def batch(self, indices: Tensor, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
        return self._received(replace(self._reader, draw=(seed, epoch))[indices.tolist()])

    def batches(self, order: Sequence[Tensor], seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        return self._stream(replace(self._reader, draw=(seed, epoch)), [indices.cpu() for indices in order])

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets)

    def evaluate(self, predict: Predict) -> dict[str, float]:
        held_out = torch.arange(self.size, len(self._reader.labels), device="cpu")
        if not len(held_out):
            return {}
        guesses = min(5, len(self.classes))
        sums = torch.zeros(3, device=self.device, dtype=torch.float32)  # loss, right first guesses, right guesses
        for images, labels in self._stream(self._reader, held_out.split(128)):
            logits = predict(images)
            hits = logits.topk(guesses).indices == labels[:, None]  # (N, guesses)
            sums += torch.stack([F.cross_entropy(logits, labels, reduction="sum"), hits[:, 0].sum(), hits.sum()])
        loss, *right = sums.tolist()
        error, error5 = (100.0 - 100.0 * hits / len(held_out) for hits in right)
        metrics = {"loss": loss / len(held_out), "accuracy": 100.0 - error, "error": error}
        return metrics | {"top1_error": error, "top5_error": error5}

    def _stream(self, reader: _Reader, order: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        loader: DataLoader[Any] = DataLoader(
            reader,
            batch_size=None,  # what the reader returns is a batch already
            sampler=(indices.tolist() for indices in order),  # type: ignore[arg-type]
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator("cpu"),  # so that nothing is drawn from the generator that dropout uses
        )
        try:
            for found in loader:
                batch = self._received(found)
                with _worker_deaths_deferred():
                    yield batch
        except RuntimeError as error:
            if "DataLoader worker (pid" not in str(error):
                raise
            cause = (
                f"one of {self.workers} workers that decode images of {self.path} died, often because memory ran out"
            )
            raise WorkerDied(f"{cause}; use fewer workers or smaller batches ({str(error).strip()})") from error

    def _received(self, found: Any) -> tuple[Tensor, Tensor]:
        if isinstance(found, str):
            raise ValueError(found)
        images, labels = (part.to(self.device, non_blocking=True) for part in found)
        return _NORMALISATION.normalise(images), labels


@dataclass(frozen=True, eq=False)
class _Reader(Dataset[Any]):
    """Reads batches of images, in any process; with `draw`, (seed, epoch), they are cropped and mirrored at random."""

    folder: Path
    names: np.ndarray  # (n,) bytes: a million strings would take several times the memory, again in each worker
    labels: np.ndarray  # (n,) int64
    side: int
    draw: tuple[int, int] | None = None

    def __getitem__(self, indices: list[int]) -> tuple[Tensor, Tensor] | str:
        """(N, 3, side, side) uint8 and (N,) labels, or an error message: an exception would show a worker's traceback."""
        pixels = np.empty((len(indices), self.side, self.side, 3), np.uint8)
        for place, index in enumerate(indices):
            path = self.folder / os.fsdecode(self.names[index])
            try:
                image = open_image(path.read_bytes())
                part = self._centre(image) if self.draw is None else self._random_part(image, (*self.draw, index))
                pixels[place] = np.asarray(part)
            except Exception as error:  # of many kinds, depending on the format
                return f"{path} is not a readable image: {error!r}; replace or delete it"
        return torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.from_numpy(self.labels[indices])

    def _centre(self, image: Image.Image) -> Image.Image:
        short = round(self.side * 256 / 224)
        wide, high = (max(short, int(short * length / min(image.size))) for length in image.size)
        left, top = round((wide - self.side) / 2), round((high - self.side) / 2)
        whole = image.convert("RGB").resize((wide, high), Image.Resampling.BILINEAR)
        return whole.crop((left, top, left + self.side, top + self.side))

    def _random_part(self, image: Image.Image, seeds: Sequence[int]) -> Image.Image:
        random = np.random.default_rng([number % 2**64 for number in seeds])
        mirrored = random.random() < 0.5
        width, height = image.size
        left, top, wide, high = _crop(width, height, random)
        shrink = max(1, min(wide, high) // self.side)
        image.draft(None, (width // shrink, height // shrink))  # JPEG is decoded at 1/2, 1/4 or 1/8 if enough
        across, down = image.size
        (x, right), (y, bottom) = (left * across, (left + wide) * across), (top * down, (top + high) * down)
        box = x / width, y / height, right / width, bottom / height
        part = image.convert("RGB").resize((self.side, self.side), Image.Resampling.BILINEAR, box)
        return ImageOps.mirror(part) if mirrored else part


def _crop(width: int, height: int, random: np.random.Generator) -> tuple[int, int, int, int]:
    """Left, top, width and height of a random part of an image; if ten draws do not fit, of its middle."""
    for _ in range(10):
        area, ratio = width * height * random.uniform(0.08, 1), (4 / 3) ** random.uniform(-1, 1)
        wide, high = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < wide <= width and 0 < high <= height:
            return int(random.integers(width - wide + 1)), int(random.integers(height - high + 1)), wide, high
    wide, high = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return (width - wide) // 2, (height - high) // 2, wide, high


def _workers(given: int | None) -> int:
    if given is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return min(8, cores - 1)
    return 0 if given == 0 and not isinstance(given, bool) else count("workers, unless 0,", given)


@contextlib.contextmanager
def _worker_deaths_deferred() -> Iterator[None]:
    """Report a worker's death with the next batch; PyTorch's signal handler would raise it inside the caller's code."""
    handler = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        yield
        return
    kept: list[Any] = []
    signal.signal(signal.SIGCHLD, lambda *arguments: kept.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, handler)
    if kept:
        handler(*kept[-1])
