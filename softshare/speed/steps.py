"""The training steps that the benchmark compares, each a function with its own model and stream of batches."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import cast

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from .. import models
from ..bank import TemplateBank
from ..images import STATISTICS, Augmentation, ImageSet
from ..sharing import banks
from ..training.devices import pick_precision
from ..training.graphed import Steps
from ..training.settings import Settings
from ..training.step import make_optimizer, train_step
from ..training.tasks import Classification

Call = Callable[[], object]


def noise(images: int, device: torch.device, side: int = 32) -> Classification:
    """Random images of `side` x `side` pixels with labels of ten classes, on the device."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (images, 3, side, side), dtype=torch.uint8, generator=generator)
    data = ImageSet(pixels, torch.randint(10, (images,), generator=generator), tuple("0123456789"), "noise", "")
    return Classification(data, None, Augmentation(*STATISTICS["CIFAR-10"])).to(device)


def batches(task: Classification, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Our data path as an endless stream of full batches: inputs (N, 3, H, W) in channels_last, targets (N,)."""
    task = task.to(task.images.device)  # a copy, since a task keeps the images of one epoch
    for epoch, parts in _orders(task, batch):
        task.prepare(0, epoch)
        for inputs, targets in task.batches(parts, 0, epoch):
            yield inputs.contiguous(memory_format=torch.channels_last), targets


def _orders(task: Classification, batch: int) -> Iterator[tuple[int, Sequence[Tensor]]]:
    """Epochs without an end: their numbers, and the indices of their full batches."""
    order = torch.Generator().manual_seed(0)
    for epoch in itertools.count(1):
        indices = torch.randperm(task.size, generator=order).to(task.images.device).split(batch)
        yield epoch, indices[: task.size // batch]


def ours(task: Classification, name: str, batch: int, compile: bool = False) -> Call:
    """A training step of the named model as `fit` makes it, captured on CUDA; warns if capturing or torch.compile fails.

    It returns whether steps are captured, as `softshare.training.graphed.Steps` puts it.
    """
    stream = _as_in_fit(task, name, batch, compile)
    return lambda: next(stream)


def _as_in_fit(task: Classification, name: str, batch: int, compile: bool) -> Iterator[bool | str]:
    device, task = task.images.device, task.to(task.images.device)
    torch.backends.cudnn.benchmark = device.type == "cuda"
    model = models.build(name).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    settings = Settings(epochs=1000, batch_size=batch, rate=1e-3, compile=compile)
    run, losses = Steps(model, task, settings, device, pick_precision("auto", device)), None
    for epoch, parts in _orders(task, batch):
        losses = torch.zeros(len(parts), device=device) if losses is None else losses
        for _ in run.epoch(task, parts, [1.0] * len(parts), epoch, losses):
            if compile and run.stepper.outcome is not True:
                warnings.warn(f"{name} runs without torch.compile", stacklevel=2)
                compile = False
            yield run.captured


def authors(task: Classification, name: str, batch: int, workers: int, tf32: bool) -> Call:
    """A training step of the named model, the authors' way; `tf32` allows it for convolutions on CUDA."""
    device, load = task.images.device, partial(one_by_one, task.to(torch.device("cpu")))
    ids, cuda = cast(Dataset[int], range(task.size)), device.type == "cuda"
    loader = DataLoader(ids, batch, shuffle=True, drop_last=True, num_workers=workers, pin_memory=cuda, collate_fn=load)
    data = itertools.chain.from_iterable(itertools.repeat(loader))
    step = _step(layerwise(models.build(name)).to(device), task, data)
    return torch.backends.cudnn.flags(enabled=True, benchmark=cuda, allow_tf32=tf32)(step)  # type: ignore


def _step(model: nn.Module, task: Classification, data: Iterator[Sequence[Tensor]]) -> Call:
    device = task.images.device
    torch.backends.cudnn.benchmark = device.type == "cuda"  # as in the authors' code and in `fit`
    optimizer = make_optimizer(model, Settings(epochs=1, rate=1e-3))
    scaler = torch.amp.GradScaler(device.type, enabled=False)

    def step() -> None:
        inputs, targets = (each.to(device, non_blocking=True) for each in next(data))
        train_step(model, task, inputs, targets, optimizer, scaler, torch.float32)

    return step


class LayerwiseBank(TemplateBank):
    """A bank whose layers mix their weights separately, element by element, as in the authors' code."""

    def mix(self, index: int) -> Tensor:
        return (self.templates * self.coefficients[index].view(-1, 1, 1, 1, 1)).sum(0)


def layerwise(model: nn.Module) -> nn.Module:
    """Turn each bank of a model, in place, into a `LayerwiseBank` of the same weights, templates (k, O, I, h, w)."""
    for bank in banks(model).values():
        bank.templates = nn.Parameter(bank.shaped(bank.templates.detach()).contiguous())
        bank.__class__ = LayerwiseBank
    return model


def augment_one(pixels: np.ndarray, augmentation: Augmentation, flip: int, row: int, column: int) -> Tensor:
    """An image (32, 32, 3) after the authors' transforms: flip, 4 black pixels around, crop; (1, 3, 32, 32)."""
    image = Image.fromarray(pixels)
    image = ImageOps.expand(ImageOps.mirror(image) if flip else image, border=4, fill=0)
    image = image.crop((column, row, column + 32, row + 32))
    return augmentation.normalise(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].contiguous())


def one_by_one(task: Classification, indices: list[int]) -> tuple[Tensor, Tensor]:
    """A batch as a worker of the authors' loader makes it: images (N, 3, 32, 32), labels (N,)."""
    draws = task.augmentation.draw(len(indices), seed=int(torch.randint(2**31, ())), epoch=1).tolist()
    pixels = task.images[indices].permute(0, 2, 3, 1).contiguous().numpy()
    images = [augment_one(each, task.augmentation, *draw[:3]) for each, draw in zip(pixels, draws, strict=True)]
    return torch.cat(images), task.labels[indices]
