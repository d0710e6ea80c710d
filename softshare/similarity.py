"""How alike the layers of a group are: similarity matrices, their record over training, and a penalty that raises them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .arguments import count
from .files import written_whole
from .sharing import TemplateBank, banks, initial_coefficients, without_autocast


def layer_similarity(coefficients: Tensor) -> Tensor:
    """Layer similarity matrix ``LSM_ij = |cos(alpha(i), alpha(j))|`` (the poster's folding section).

    Args:
        coefficients: (L, k), any floating dtype; worked on in at least float32.

    Returns:
        (L, L), symmetric, in [0, 1], differentiable. A row of zeros has similarity 0 with every row, itself included.

    Raises:
        TypeError: not a tensor of real numbers.
        ValueError: not a matrix.
    """
    if not isinstance(coefficients, Tensor):
        raise TypeError(f"coefficients must be a tensor (L, k), got {type(coefficients).__name__}")
    if coefficients.is_complex() or coefficients.dtype is torch.bool:
        raise TypeError(f"coefficients must be real numbers, got {coefficients.dtype}")
    if coefficients.dim() != 2 or 0 in coefficients.shape:
        raise ValueError(f"coefficients must be a matrix (L, k), got shape {tuple(coefficients.shape)}")
    rows = coefficients.to(torch.promote_types(coefficients.dtype, torch.float32))
    # The cosine does not depend on a row's length, so its largest entry is divided out first, as a constant: squares
    # neither overflow nor vanish, and the gradient is that of the plain formula.
    largest = rows.detach().abs().amax(dim=1, keepdim=True)
    rows = rows / torch.where(largest > 0, largest, 1.0)
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    rows = rows / torch.where(norms > 0, norms, 1.0)
    with without_autocast(rows.device):
        return (rows @ rows.T).abs().clamp(max=1.0)


def similarity_matrices(model: nn.Module) -> dict[str, Tensor]:
    """The layer similarity matrix (L, L) of each bank by group name, detached."""
    return {name: layer_similarity(bank.coefficients.detach()) for name, bank in banks(model).items()}


def in_double(tensor: Tensor) -> Tensor:
    """A detached copy in float64, on the CPU where the device has none (Apple's MPS)."""
    tensor = tensor.detach()
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def weight_similarity(bank: TemplateBank) -> Tensor:
    """|cos| between the mixed weights themselves, (L, L), detached.

    Unlike the similarity of coefficients it does not depend on the basis: for any invertible M, coefficients times M and
    templates times its inverse give the same weights but other coefficient similarities, unless these are exactly 1.
    Computed from the Gram matrix of the templates, (k, k), as ``alpha(i) T T' alpha(j)'``.
    """
    templates = in_double(bank.templates)  # (k, d)
    values, vectors = torch.linalg.eigh(templates @ templates.T)
    root = vectors * values.clamp(min=0.0).sqrt()  # (k, k) with root @ root.T = T T'
    return layer_similarity(in_double(bank.coefficients) @ root)


def recurrence_penalty(model: nn.Module) -> Tensor:
    """Minus the sum of all entries of all layer similarity matrices: a scalar to be added, times lambda, to the loss.

    It rewards layers for becoming alike ("regularizing the LSM" on the poster; lambda = 0.01 in the authors' rebuttal;
    the form of the sum is our reading). 0 for a model without banks.
    """
    sums = [layer_similarity(bank.coefficients).sum() for bank in banks(model).values()]
    if sums:
        return -torch.stack(sums).sum()
    parameter = next(model.parameters(), None)
    return torch.zeros((), device=None if parameter is None else parameter.device)


def initial_similarity(
    num_layers: int, num_templates: int, init: str = "orthogonal", draws: int = 1000, seed: int = 0
) -> Tensor:
    """The largest off-diagonal similarity of each of `draws` fresh coefficient matrices, (draws,).

    For k < L even a fresh bank has similar layers. A similarity after training says something about training only beyond
    the usual range of this statistic, say its 95th percentile. The default random generator is left as it was.
    """
    count("draws", draws)
    largest = torch.zeros(draws)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for draw in range(draws):
            similarity = layer_similarity(initial_coefficients(num_layers, num_templates, init))
            largest[draw] = similarity.fill_diagonal_(0.0).max()
    return largest


class SimilarityRecorder:
    """Snapshots of a model's layer similarity matrices over training.

    Call ``recorder.record(model, step)`` whenever a snapshot is wanted, with steps that increase; `fit` does so before the
    first epoch and after each when given one as a callback, and then counts in epochs.

    Args:
        dense_epochs: in so many of the first epochs `fit` takes several snapshots.
        per_epoch: how many, in those; their steps are fractions of epochs.

    Attributes:
        steps: numbers that increase, one a snapshot.
        coefficients: dict from group name to the list of coefficient matrices (L, k), numpy float32, one a snapshot.
    """

    def __init__(self, dense_epochs: int = 0, per_epoch: int = 1) -> None:
        self.dense_epochs, self.per_epoch = dense_epochs, count("per_epoch", per_epoch)
        self.steps: list[float] = []
        self.coefficients: dict[str, list[np.ndarray]] = {}

    def due(self, epoch: int, step: int, steps: int) -> bool:
        """Whether a snapshot is wanted after `step` of `steps` within an epoch (from 1); its end is always recorded."""
        passed = (step * self.per_epoch) // steps > ((step - 1) * self.per_epoch) // steps
        return epoch <= self.dense_epochs and step < steps and passed

    def record(self, model: nn.Module, step: float) -> None:
        """Append a snapshot. Raises ValueError if `step` does not follow the last one or the groups have changed."""
        if self.steps and step <= self.steps[-1]:
            raise ValueError(f"steps must increase: got {step} after {self.steps[-1]}")
        found = {name: bank.coefficients.detach().float().cpu().numpy().copy() for name, bank in banks(model).items()}
        before = {name: snapshots[0].shape for name, snapshots in self.coefficients.items()}
        now = {name: matrix.shape for name, matrix in found.items()}
        if self.steps and before != now:
            raise ValueError(f"groups have changed: {before} before, {now} now")
        self.steps.append(step)
        for name, matrix in found.items():
            self.coefficients.setdefault(name, []).append(matrix)

    def matrices(self) -> dict[str, np.ndarray]:
        """The similarity matrices over time by group name, (snapshots, L, L)."""
        return {
            name: np.stack([layer_similarity(torch.from_numpy(matrix)).numpy() for matrix in snapshots])
            for name, snapshots in self.coefficients.items()
        }

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint keeps: "steps", and the coefficients of group i over time, (snapshots, L, k), as "i.<name>"."""
        state = {"steps": torch.tensor(self.steps, dtype=torch.float64)}
        for number, (name, snapshots) in enumerate(self.coefficients.items()):
            state[f"{number}.{name}"] = torch.from_numpy(np.stack(snapshots))
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Become what `state_dict` described."""
        self.steps = state["steps"].tolist()
        groups = sorted((int(key.split(".", 1)[0]), key) for key in state if key != "steps")
        self.coefficients = {key.split(".", 1)[1]: list(state[key].numpy()) for _, key in groups}

    def save(self, path: str | Path) -> None:
        """Write everything to one .npz file (no pickle), by way of a temporary name."""
        names = list(self.coefficients)
        arrays: dict[str, Any] = {
            f"coefficients_{i}": np.stack(self.coefficients[name]) for i, name in enumerate(names)
        }
        with written_whole(Path(path)) as file:
            np.savez_compressed(file, steps=np.array(self.steps), names=np.array(json.dumps(names)), **arrays)

    @classmethod
    def load(cls, path: str | Path) -> SimilarityRecorder:
        """Read what `save` wrote. Raises FileNotFoundError, or ValueError naming a file that is not one of ours."""
        recorder = cls()
        try:
            with np.load(path, allow_pickle=False) as arrays:
                recorder.steps = arrays["steps"].tolist()
                for i, name in enumerate(json.loads(str(arrays["names"]))):
                    recorder.coefficients[name] = list(arrays[f"coefficients_{i}"])
        except FileNotFoundError:
            raise
        except Exception as error:
            raise ValueError(f"{path} is not a similarity record: {error}") from error
        return recorder


def off_diagonal(matrices: Mapping[str, Tensor]) -> dict[str, float]:
    """The mean off-diagonal similarity of each matrix (L, L); 0 for a single layer."""
    means = {}
    for name, matrix in matrices.items():
        pairs = matrix.shape[0] * (matrix.shape[0] - 1)
        means[name] = float((matrix.sum() - matrix.diagonal().sum()) / pairs) if pairs else 0.0
    return means
