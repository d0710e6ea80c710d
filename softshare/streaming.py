"""Images that do not fit into memory, such as ImageNet: decoded from a folder by other processes while a model trains."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import math
import os
import re
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .arguments import count
from .images import _IMAGE_SUFFIXES
from .tasks import Predict, Task

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of each channel over ImageNet's training images, on the scale 0 to 1: the values in common use."""


class StreamedImages(Task):
    """Labelled images in folders ``train/class/file`` and ``val/class/file``, decoded when they are needed.

    Training images are cropped (8 to 100% of the area, aspect 3/4 to 4/3), resized and mirrored at random, as is usual for
    ImageNet; what is drawn depends on seed, epoch and the image's index alone, not on batches or workers. Held-out images
    are resized to a shorter side of side * 256 / 224, and their centre is used. Evaluation gives loss, accuracy, error,
    top1_error and top5_error (of 5 guesses, or as many as there are classes), all but the loss in %. Besides the list
    of files, memory holds no more than 2 batches a worker and the one in use.

    Attributes:
        size: number of training images.
        classes: names, sorted; a label is an index into them.
        source: "ImageNet" where the classes are 1,000 numbers of the form n01440764, else the folder's name.
        fingerprint: SHA-256 of the names and sizes of all files used; copies of a folder have the same.

    Args:
        path: the folder.
        side: of the square images that the model gets, in pixels.
        workers: processes that decode; 0: decode in this process; default: the number of cores less 1, at most 8.
        held_out: "test", or "val", for which a folder "test" stands in where there is no "val"; None: no evaluation.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no such split, no images, a class without images in one split; while reading, a damaged image.
        TypeError: side or workers that are not whole numbers.
        RuntimeError: while reading, a worker died.
    """

    def __init__(
        self, path: str | Path, side: int = 224, workers: int | None = None, held_out: str | None = "val"
    ) -> None:
        self.path, self.device, self.workers = Path(path).expanduser(), torch.device("cpu"), _workers(workers)
        if held_out not in ("val", "test", None):
            raise ValueError(f'held_out must be "val", "test" or None, got {held_out!r}')
        if not self.path.exists():
            raise FileNotFoundError(f"no image folder at {self.path}")
        if held_out == "val" and not (self.path / "val").is_dir() and (self.path / "test").is_dir():
            held_out = "test"
        digest = hashlib.sha256()
        found = {split: _listed(self.path, split, digest) for split in ("train", held_out) if split}
        self.classes = tuple(sorted(set().union(*found.values())))
        readers = []
        for split, files in found.items():
            if absent := [name for name in self.classes if not len(files.get(name, ()))]:
                more = f" and {len(absent) - 10} more" if len(absent) > 10 else ""
                raise ValueError(f"{self.path}: split {split!r} has no images of {', '.join(absent[:10])}{more}")
            names = [files[name] for name in self.classes]
            labels = np.repeat(np.arange(len(names)), [len(files) for files in names])
            readers.append(_Reader(self.path / split, self.classes, np.concatenate(names), labels, count("side", side)))
        self._train, self._held_out = readers[0], readers[1] if held_out else None
        self._statistics = 255 * torch.tensor([MEAN, DEVIATION]).view(2, 3, 1, 1)
        self.size = len(self._train.labels)
        imagenet = len(self.classes) == 1000 and all(re.fullmatch(r"n\d{8}", name) for name in self.classes)
        self.source = "ImageNet" if imagenet else self.path.resolve().name
        self.fingerprint = digest.hexdigest()

    def to(self, device: torch.device) -> StreamedImages:
        moved = copy.copy(self)
        moved.device, moved._statistics = torch.device(device), self._statistics.to(device)
        return moved

    def batch(self, indices: Tensor, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
        return self._received(replace(self._train, draw=(seed, epoch))[indices.tolist()])

    def batches(self, order: Sequence[Tensor], seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        return self._stream(replace(self._train, draw=(seed, epoch)), [indices.cpu() for indices in order])

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets)

    def evaluate(self, predict: Predict) -> dict[str, float]:
        if self._held_out is None:
            return {}
        size, guesses = len(self._held_out.labels), min(5, len(self.classes))
        loss, first, five = (torch.zeros((), device=self.device) for _ in range(3))
        for images, labels in self._stream(self._held_out, torch.arange(size).split(128)):
            logits = predict(images)
            hits = logits.topk(guesses).indices == labels[:, None]  # (N, guesses)
            loss += F.cross_entropy(logits, labels, reduction="sum")
            first += hits[:, 0].sum()
            five += hits.sum()
        error, error5 = 100.0 - 100.0 * float(first) / size, 100.0 - 100.0 * float(five) / size
        metrics = {"loss": float(loss) / size, "accuracy": 100.0 - error, "error": error}
        return metrics | {"top1_error": error, "top5_error": error5}

    def _stream(self, reader: _Reader, order: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        loader: DataLoader[Any] = DataLoader(
            reader,
            batch_size=None,  # what the reader returns is a batch already
            sampler=(indices.tolist() for indices in order),  # type: ignore[arg-type]
            num_workers=self.workers,
            prefetch_factor=2 if self.workers else None,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # so that nothing is drawn from the one that dropout uses
        )
        try:
            for found in loader:
                batch = self._received(found)
                with _deaths_kept():
                    yield batch
        except RuntimeError as error:
            if "DataLoader worker (pid" not in str(error):
                raise
            raise RuntimeError(
                f"one of {self.workers} workers that decode images of {self.path} died, often because memory ran out; use "
                f"fewer workers or smaller batches ({str(error).strip()})"
            ) from error

    def _received(self, found: Any) -> tuple[Tensor, Tensor]:
        if isinstance(found, str):
            raise ValueError(found)
        images, labels = (part.to(self.device, non_blocking=True) for part in found)
        return (images.float() - self._statistics[0]) / self._statistics[1], labels


@dataclass(frozen=True, eq=False)
class _Reader(Dataset[Any]):
    """Batches of one split, in whatever process; with `draw`, (seed, epoch), cropped and mirrored at random."""

    folder: Path
    classes: tuple[str, ...]
    names: np.ndarray  # (n,) bytes: a million strings would take several times the room, and again in each worker
    labels: np.ndarray  # (n,) int64
    side: int
    draw: tuple[int, int] | None = None

    def __getitem__(self, indices: list[int]) -> tuple[Tensor, Tensor] | str:
        """(N, 3, side, side) uint8 and (N,) labels; or what is wrong: an exception would come with a worker's traceback."""
        pixels = np.empty((len(indices), self.side, self.side, 3), np.uint8)
        for place, index in enumerate(indices):
            path = self.folder / self.classes[self.labels[index]] / os.fsdecode(self.names[index])
            try:
                pixels[place] = self._decoded(path.read_bytes(), index)
            except Exception as error:  # of many kinds, depending on the format
                return f"{path} is not a readable image: {error!r}; replace or delete it"
        return torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.from_numpy(self.labels[indices])

    def _decoded(self, data: bytes, index: int) -> Any:
        from PIL import Image

        if data.startswith(b"\x89PNG"):  # its checksums are not looked at otherwise
            Image.open(io.BytesIO(data)).verify()
        with Image.open(io.BytesIO(data)) as image:
            if image.mode[0] in "IF":
                raise ValueError(f"its pixels are not of 8 bits a channel but of mode {image.mode}")
            width, height = image.size
            if self.draw is None:
                short = round(self.side * 256 / 224)
                wide, high = (max(short, int(short * length / min(width, height))) for length in (width, height))
                left, top = round((wide - self.side) / 2), round((high - self.side) / 2)
                whole = image.convert("RGB").resize((wide, high), Image.Resampling.BILINEAR)
                return np.asarray(whole.crop((left, top, left + self.side, top + self.side)))
            random = np.random.default_rng([number % 2**64 for number in (*self.draw, index)])
            mirrored = random.random() < 0.5
            left, top, wide, high = _crop(width, height, random)
            shrink = max(1, min(wide, high) // self.side)
            image.draft(None, (width // shrink, height // shrink))  # JPEG is decoded at 1/2, 1/4 or 1/8 where enough
            across, down = image.size
            (x, right), (y, bottom) = (left * across, (left + wide) * across), (top * down, (top + high) * down)
            box = x / width, y / height, right / width, bottom / height
            pixels = np.asarray(image.convert("RGB").resize((self.side, self.side), Image.Resampling.BILINEAR, box))
            return pixels[:, ::-1] if mirrored else pixels


def _crop(width: int, height: int, random: np.random.Generator) -> tuple[int, int, int, int]:
    """Left, top, width and height of a random part of an image; where ten draws do not fit, its middle."""
    for _ in range(10):
        area, ratio = width * height * random.uniform(0.08, 1), (4 / 3) ** random.uniform(-1, 1)
        wide, high = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < wide <= width and 0 < high <= height:
            return int(random.integers(width - wide + 1)), int(random.integers(height - high + 1)), wide, high
    wide, high = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return (width - wide) // 2, (height - high) // 2, wide, high


def _listed(path: Path, split: str, digest: Any) -> dict[str, np.ndarray]:
    """The names of each class's files as bytes, sorted; names and sizes are added to the digest."""
    found = {}
    for folder in sorted(each.name for each in (path / split).glob("[!.]*") if each.is_dir()):
        with os.scandir(path / split / folder) as entries:
            files = sorted(
                (os.fsencode(entry.name), entry.stat().st_size)
                for entry in entries
                if entry.name.lower().endswith(_IMAGE_SUFFIXES) and not entry.name.startswith(".") and entry.is_file()
            )
        for name, size in files:
            digest.update(os.fsencode(f"{split}/{folder}/") + name + f"\0{size}\n".encode())
        found[folder] = np.array([name for name, _ in files], dtype=np.bytes_)
    if not any(map(len, found.values())):
        raise ValueError(f"{path} holds no images as {split}/<class>/<file>; an archive must be unpacked first")
    return found


def _workers(given: int | None) -> int:
    if given is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return min(8, cores - 1)
    return 0 if given == 0 and not isinstance(given, bool) else count("workers, unless 0,", given)


@contextlib.contextmanager
def _deaths_kept() -> Iterator[None]:
    """Raise a worker's death with the next batch; PyTorch's signal handler would raise it amid the caller's code."""
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
