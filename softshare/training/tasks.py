"""What `softshare.training.fit` trains on: images to classify, grids to solve, a curriculum of grids."""

from __future__ import annotations

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..images import Augmentation, ImageSet
from ..shortest_path import Grids, scores_beside_the_rule

Predict = Callable[[Tensor], Tensor]


class Task(ABC):
    """Examples, their loss and an evaluation; the base class for any kind of data.

    Attributes:
        size: number of training examples per epoch.
    """

    size: int

    def to(self, device: torch.device) -> Task:
        """The same task with its data on a device."""
        return self

    def at(self, epoch: int) -> Task:
        """The task of an epoch (from 1); overridden where the data changes during training."""
        return self

    def identity(self) -> str:
        """A text that differs for other training examples or other augmentation; "" if the task cannot tell.

        A run resumes only from checkpoints with the same identity. Without one it cannot notice that the data have changed,
        and warns when it resumes.
        """
        return str(getattr(self, "fingerprint", ""))

    def prepare(self, seed: int, epoch: int) -> Sequence[Tensor] | None:
        """Called before each epoch's first batch, for work that is better done once for all batches.

        Returns the tensors that `batch` and `loss` read, if they read nothing else and these stay where they are from epoch
        to epoch, so that a step can be captured in a CUDA graph; otherwise None. A class that changes how batches or losses
        are made must override this too, or its steps are not captured.
        """
        return None

    @abstractmethod
    def batch(self, indices: Tensor, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of some training examples; they depend on seed, epoch and index, not on the batch."""

    def batches(self, order: Sequence[Tensor], seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch, each given by the indices of its examples, in turn."""
        for indices in order:
            yield self.batch(indices, seed, epoch)

    @abstractmethod
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean loss over a batch, a scalar; `outputs` are in float32, or float64 from a float64 model."""

    def evaluate(self, predict: Predict) -> dict[str, float]:
        """Metrics on held-out examples, given a function from inputs to float32 outputs; {} if none are held out."""
        return {}


ON_A_GPU = 2_000
"""Examples that are evaluated at once on a GPU, so that it computes for longer than Python launches."""

AUXILIARY_WEIGHT = 0.4
"""The weight of an auxiliary head's loss, as in the sources of NASNet-A, DARTS, SNAS and ENAS."""


class Classification(Task):
    """Images and labels, with cross-entropy; evaluation gives loss, accuracy and error (both in %).

    Outputs are logits (N, classes) or, in training, from a network with auxiliary heads, (heads, N, classes): the loss of
    every head but the first is added with weight `AUXILIARY_WEIGHT`.

    Args:
        train: the images to train on.
        held_out: the images to evaluate on; None: no evaluation.
        augmentation: of training images; default: the authors' (flip, 4 pixels of padding and crop), no cutout.
    """

    def __init__(
        self, train: ImageSet, held_out: ImageSet | None = None, augmentation: Augmentation | None = None
    ) -> None:
        if held_out is not None and train.classes != held_out.classes:
            raise ValueError(f"the two splits have different classes: {train.classes} and {held_out.classes}")
        self.augmentation = augmentation or Augmentation(*train.statistics())
        self.images, self.labels = train.images, train.labels
        self.held_out = None if held_out is None else (held_out.images, held_out.labels)
        self.size, self.fingerprint = len(train.labels), train.fingerprint
        self._prepared: tuple[Any, Tensor, Tensor] | None = None  # for what, draws, moved images
        self._drawn: tuple[Any, Tensor] | None = None  # for what, draws: of single batches

    def to(self, device: torch.device) -> Classification:
        moved = copy.copy(self)
        moved.images, moved.labels = self.images.to(device), self.labels.to(device)
        if self.held_out is not None:
            moved.held_out = self.held_out[0].to(device), self.held_out[1].to(device)
        moved._prepared = moved._drawn = None
        return moved

    def _key(self, seed: int, epoch: int) -> tuple[Any, ...]:
        return seed, epoch, self.augmentation, self.images.shape, self.images.device

    def _draw(self, seed: int, epoch: int) -> Tensor:
        return self.augmentation.draw(len(self.images), seed, epoch, self.images.shape[-1]).to(self.images.device)

    @torch.inference_mode(False)
    def prepare(self, seed: int, epoch: int) -> Sequence[Tensor]:
        """Flip and crop all images for an epoch, in the memory that the epoch before has used."""
        key, images = self._key(seed, epoch), self.images
        if self._prepared is None or self._prepared[0] != key:
            drawn = self._draw(seed, epoch)
            if self._prepared is None or self._prepared[0][3:] != key[3:]:
                self._prepared = key, drawn, torch.empty_like(images)
            _, draws, moved = self._prepared
            draws.copy_(drawn)
            part = 10_000 if images.is_cuda else 1_000  # few launches on a GPU, parts that fit into a processor's cache
            for start in range(0, len(images), part):
                some = slice(start, start + part)
                moved[some] = self.augmentation.moved(images[some], draws[some])
            self._prepared = key, draws, moved
        return [*self._prepared[1:], self.labels, *self.augmentation.statistics(images.device)]

    def batch(self, indices: Tensor, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
        key = self._key(seed, epoch)
        if self._prepared is not None and self._prepared[0] == key:
            _, draws, moved = self._prepared
            return self.augmentation.finished(moved[indices], draws[indices]), self.labels[indices]
        if self._drawn is None or self._drawn[0] != key:
            self._drawn = key, self._draw(seed, epoch)
        return self.augmentation(self.images[indices], self._drawn[1][indices]), self.labels[indices]

    def identity(self) -> str:
        return f"{self.fingerprint} {self.augmentation}"

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if outputs.dim() == 2:
            return F.cross_entropy(outputs, targets)
        first, *others = (F.cross_entropy(logits, targets) for logits in outputs)
        return first + AUXILIARY_WEIGHT * torch.stack(others).sum()

    def evaluate(self, predict: Predict) -> dict[str, float]:
        if self.held_out is None:
            return {}
        images, labels = self.held_out
        loss, right = (torch.zeros((), device=images.device, dtype=torch.float32) for _ in range(2))
        size = ON_A_GPU if images.is_cuda else 500
        for some, chunk in zip(images.split(size), labels.split(size), strict=True):
            logits = predict(self.augmentation.normalise(some))
            loss += F.cross_entropy(logits, chunk, reduction="sum")
            right += (logits.argmax(1) == chunk).sum()
        accuracy = 100.0 * float(right) / len(labels)
        return {"loss": float(loss) / len(labels), "accuracy": accuracy, "error": 100.0 - accuracy}


class ShortestPaths(Task):
    """Grids and their path pixels, with binary cross-entropy per pixel.

    Evaluation gives the loss and the scores of `softshare.shortest_path.scores_beside_the_rule`.

    Args:
        train, held_out: from `softshare.shortest_path.generate`; None: no evaluation.
    """

    def __init__(self, train: Grids, held_out: Grids | None = None) -> None:
        self.train, self.held_out = train, held_out
        self.size = len(train.distances)

    def to(self, device: torch.device) -> ShortestPaths:
        moved = copy.copy(self)
        moved.train = Grids(*(t.to(device) for t in self.train))
        moved.held_out = None if self.held_out is None else Grids(*(t.to(device) for t in self.held_out))
        return moved

    def identity(self) -> str:
        digest = hashlib.sha256(self.train.inputs.cpu().numpy())  # type: ignore[arg-type]
        digest.update(self.train.targets.cpu().numpy())  # type: ignore[arg-type]
        return digest.hexdigest()

    def prepare(self, seed: int, epoch: int) -> Sequence[Tensor]:
        """The grids stay the same in all epochs."""
        return [self.train.inputs, self.train.targets]

    def batch(self, indices: Tensor, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
        return self.train.inputs[indices].float(), self.train.targets[indices].float()

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(outputs, targets.to(outputs.dtype))

    def evaluate(self, predict: Predict) -> dict[str, float]:
        if self.held_out is None:
            return {}
        size = ON_A_GPU if self.held_out.inputs.is_cuda else 250
        logits = torch.cat([predict(inputs.float()) for inputs in self.held_out.inputs.split(size)])
        loss = F.binary_cross_entropy_with_logits(logits, self.held_out.targets.to(logits.dtype))
        return {"loss": float(loss), **scores_beside_the_rule(logits > 0, self.held_out)}


class Curriculum(Task):
    """`ShortestPaths` tasks in turn, each for the same number of epochs; the last one stays after that.

    Args:
        phases: tasks of equal size.
        epochs: epochs per phase.

    Raises ValueError without phases or with phases of different sizes.
    """

    def __init__(self, phases: Sequence[ShortestPaths], epochs: int) -> None:
        if len({phase.size for phase in phases}) != 1:
            raise ValueError(f"a curriculum needs phases of one size, got {[phase.size for phase in phases]}")
        self.phases, self.epochs = list(phases), epochs
        self.size = self.phases[0].size

    def to(self, device: torch.device) -> Curriculum:
        moved = copy.copy(self)
        moved.phases = [phase.to(device) for phase in self.phases]
        return moved

    def identity(self) -> str:
        return " ".join([str(self.epochs), *(phase.identity() for phase in self.phases)])

    def batch(self, indices: Tensor, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
        return self.at(epoch).batch(indices, seed, epoch)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.phases[0].loss(outputs, targets)

    def at(self, epoch: int) -> ShortestPaths:
        return self.phases[min(max(0, epoch - 1) // self.epochs, len(self.phases) - 1)]

    def evaluate(self, predict: Predict) -> dict[str, float]:
        return self.phases[-1].evaluate(predict)
