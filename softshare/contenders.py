"""What the benchmark compares: our training step, the plain network's, and the authors' scheme."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from . import models
from .augmentation import Augmentation
from .images import STATISTICS, ImageSet
from .sharing import SharedLayer, banks
from .tasks import Classification
from .training import Settings, make_optimizer, pick_precision, train_step

Call = Callable[[], Any]


class LayerwiseMixing(nn.Module):
    """A convolution that mixes its weight on its own, element by element: ``(templates * coefficients).sum(0)``.

    That is how the authors' code does it; it stands here only to be measured against.
    """

    def __init__(self, templates: nn.Parameter, coefficients: Tensor, layer: nn.Conv2d) -> None:
        super().__init__()
        self.templates = templates  # (k, O, I, h, w), the same parameter in all layers of a group
        self.coefficients = nn.Parameter(coefficients.detach().clone().view(-1, 1, 1, 1, 1))
        self.stride, self.padding = layer.stride, layer.padding

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, (self.templates * self.coefficients).sum(0), stride=self.stride, padding=self.padding)


def layerwise(model: nn.Module) -> nn.Module:
    """Replace the shared layers of a model, in place, by `LayerwiseMixing` with the same weights."""
    templates = {
        id(bank): nn.Parameter(bank.shaped(bank.templates.detach()).contiguous().clone())
        for bank in banks(model).values()
    }
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, SharedLayer):
                bank, index = layer.source
                setattr(parent, name, LayerwiseMixing(templates[id(bank)], bank.coefficients[index], layer))  # type: ignore
    return model


def augment_one(pixels: np.ndarray, flip: bool, row: int, column: int, mean: Tensor, deviation: Tensor) -> Tensor:
    """One image as the authors' transforms make it: flip, 4 black pixels around, crop, to float, normalise.

    (H, W, 3) uint8 to (3, H, W) float32; mean and deviation (3, 1, 1), of pixels from 0 to 1.
    """
    from PIL import Image, ImageOps

    image = Image.fromarray(pixels)
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image = ImageOps.expand(image, border=4, fill=0)
    image = image.crop((column, row, column + pixels.shape[1], row + pixels.shape[0]))
    values = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)
    return values.sub_(mean).div_(deviation)


class OneByOne(Dataset[tuple[Tensor, int]]):
    """Images that are augmented one by one, for the workers of a loader."""

    def __init__(self, images: ImageSet, augmentation: Augmentation) -> None:
        self.pixels = images.images.permute(0, 2, 3, 1).contiguous().numpy()  # (n, H, W, 3)
        self.labels = images.labels.tolist()
        self.mean = torch.tensor(augmentation.mean).view(3, 1, 1) / 255
        self.deviation = torch.tensor(augmentation.deviation).view(3, 1, 1) / 255

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        flip, (row, column) = bool(torch.randint(2, ())), torch.randint(9, (2,)).tolist()
        return augment_one(self.pixels[index], flip, row, column, self.mean, self.deviation), self.labels[index]


class Setup(NamedTuple):
    """What is measured and where: a model "SWRN d-w-k", images a step, and how many random images there are."""

    model: str
    batch: int
    images: int
    device: torch.device
    threads: int
    compile: bool
    workers: int


class Bench:
    """Makes training steps to be timed: functions without arguments, each with its own model and stream of batches.

    Sets the number of threads, and cudnn.benchmark on CUDA, as the authors' code does, for all candidates alike.

    Attributes:
        notes: what did not go as asked, in words.
    """

    def __init__(self, setup: Setup) -> None:
        torch.set_num_threads(setup.threads)
        torch.backends.cudnn.benchmark = setup.device.type == "cuda"
        self.setup, self.device, self.notes = setup, setup.device, list[str]()
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randint(256, (setup.images, 3, 32, 32), dtype=torch.uint8, generator=generator)
        labels = torch.randint(10, (setup.images,), generator=generator)
        self.images = ImageSet(pixels, labels, tuple("0123456789"), "noise", "")
        self.task = Classification(self.images, None, Augmentation(*STATISTICS["CIFAR-10"])).to(self.device)
        self.settings = Settings(epochs=1, batch_size=setup.batch, rate=1e-3)
        self.dtype = pick_precision("auto", self.device)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Our data path without end, whole batches alone: inputs (N, 3, 32, 32) in channels_last, targets (N,)."""
        task = self.task.to(self.device)  # of its own, since a task keeps the draws of one epoch
        order = torch.Generator().manual_seed(0)
        for epoch in itertools.count(1):
            indices = torch.randperm(self.setup.images, generator=order).to(self.device)
            for some in indices.split(self.setup.batch)[: self.setup.images // self.setup.batch]:
                inputs, targets = task.batch(some, 0, epoch)
                yield inputs.contiguous(memory_format=torch.channels_last), targets

    def ours(self, name: str, compile: bool = False) -> Call:
        """A training step of the named model in our way."""
        model = models.build(name).to(self.device)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = make_optimizer(model, self.settings)
        scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype is torch.float16)
        run: Any = torch.compile(model) if compile else model
        batches = self.batches()

        def step() -> None:
            inputs, targets = next(batches)
            train_step(run, self.task, inputs, targets, optimizer, scaler, self.dtype)

        try:
            step()
        except Exception as error:  # of many kinds: no compiler, no Triton, a graph that it refuses
            if not compile:
                raise
            run = model
            self.notes.append(f"{name} ran without torch.compile: {type(error).__name__}: {str(error)[:200]}")
        return step

    def authors(self, name: str, tf32: bool | None = None) -> Call:
        """A training step of the named model in the authors' way; tf32: allowed or not, None: as PyTorch has it."""
        model = layerwise(models.build(name)).to(self.device)
        groups: list[dict[str, Any]] = [{"params": [], "weight_decay": decay} for decay in (5e-4, 0.0)]
        for parameter_name, parameter in model.named_parameters():
            groups[parameter_name.endswith("coefficients")]["params"].append(parameter)
        optimizer = torch.optim.SGD(groups, lr=self.settings.rate, momentum=0.9, nesterov=True)
        scaler = torch.amp.GradScaler(self.device.type, enabled=False)
        loader = DataLoader(
            OneByOne(self.images, self.task.augmentation),
            self.setup.batch,
            shuffle=True,
            drop_last=True,
            num_workers=self.setup.workers,
            persistent_workers=True,
            pin_memory=self.device.type == "cuda",
        )
        batches = itertools.chain.from_iterable(itertools.repeat(loader))

        def step() -> None:
            inputs, targets = (each.to(self.device, non_blocking=True) for each in next(batches))
            with _tf32(tf32):
                train_step(model, self.task, inputs, targets, optimizer, scaler, torch.float32)

        return step

    def candidates(self) -> dict[str, Callable[[], Call]]:
        """How to make each step that is compared, by name."""
        model, compile = self.setup.model, self.setup.compile
        steps: dict[str, Callable[[], Call]] = {"ours": lambda: self.ours(model, compile)}
        steps["plain"] = lambda: self.ours(plain(model), compile)
        if self.device.type != "cuda":
            return steps | {"authors": lambda: self.authors(model)}
        off, on = (lambda: self.authors(model, False)), (lambda: self.authors(model, True))
        return steps | {"authors, TF32 off": off, "authors, TF32 on": on}


def plain(name: str) -> str:
    """The WRN of an SWRN's size: "WRN 28-10" of "SWRN 28-10-2"."""
    return re.sub(r"SWRN[ -](\d+-\d+)(-\d+)?", r"WRN \1", name.strip())


@contextmanager
def _tf32(allowed: bool | None) -> Iterator[None]:
    if allowed is None:
        yield
        return
    product, convolution = torch.backends.cuda.matmul, torch.backends.cudnn
    before = product.allow_tf32, convolution.allow_tf32
    product.allow_tf32 = convolution.allow_tf32 = allowed
    try:
        yield
    finally:
        product.allow_tf32, convolution.allow_tf32 = before
