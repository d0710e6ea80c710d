"""The recorder: snapshots of a model's coefficients over training, from which all similarity plots are drawn."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..arguments import count
from ..files import atomic_file, user_path
from ..sharing import banks
from ..similarity import layer_similarity


class SimilarityRecorder:
    """Snapshots of a model's layer similarity matrices over training.

    Call ``recorder.record(model, step)`` whenever you want a snapshot, with increasing steps. If a recorder is one of its
    callbacks, `fit` does so before the first epoch and after each, and counts in epochs.

    Args:
        dense_epochs: `fit` takes several snapshots per epoch for the first `dense_epochs` epochs.
        per_epoch: how many in each of those epochs; their steps are fractions of epochs.

    Attributes:
        steps: increasing numbers, one per snapshot.
        coefficients: dict from group name to the list of coefficient matrices (L, k), numpy float32, one per snapshot.
    """

    def __init__(self, dense_epochs: int = 0, per_epoch: int = 1) -> None:
        self.dense_epochs, self.per_epoch = dense_epochs, count("per_epoch", per_epoch)
        self.steps: list[float] = []
        self.coefficients: dict[str, list[np.ndarray]] = {}

    def due(self, epoch: int, step: int, steps: int) -> bool:
        """Whether to take a snapshot after `step` of `steps` in an epoch (from 1), whose end is recorded in any case."""
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

    def largest(self) -> dict[str, np.ndarray]:
        """The largest similarity of a pair of layers over time by group name, (snapshots,)."""
        return {name: largest_pair(matrices) for name, matrices in self.matrices().items()}

    def every(self, step: float) -> SimilarityRecorder:
        """Only the snapshots at multiples of `step`, which are equally far apart even if some were taken more densely."""
        kept = SimilarityRecorder()
        places = [place for place, at in enumerate(self.steps) if abs(at / step - round(at / step)) < 1e-9]
        kept.steps = [self.steps[place] for place in places]
        kept.coefficients = {name: [found[place] for place in places] for name, found in self.coefficients.items()}
        return kept

    def state_dict(self) -> dict[str, Tensor]:
        """Everything, for checkpoints and files.

        The keys are "steps", "names" (JSON as bytes) and, for each group i over time, "coefficients_i", (snapshots, L, k).
        """
        names = torch.tensor(list(json.dumps(list(self.coefficients)).encode()), dtype=torch.uint8, device="cpu")
        state = {"steps": torch.tensor(self.steps, dtype=torch.float64, device="cpu"), "names": names}
        for number, snapshots in enumerate(self.coefficients.values()):
            state[f"coefficients_{number}"] = torch.from_numpy(np.stack(snapshots))
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""
        names = json.loads(bytes(state["names"].tolist()))
        self.steps = state["steps"].tolist()
        self.coefficients = {name: list(state[f"coefficients_{i}"].numpy()) for i, name in enumerate(names)}

    def save(self, path: str | Path) -> None:
        """Write everything to one .npz file (no pickle), completely or not at all."""
        with atomic_file(user_path(path)) as file:
            file.write(self.to_bytes())

    def to_bytes(self) -> bytes:
        """What `save` writes."""
        arrays: dict[str, Any] = {name: value.numpy() for name, value in self.state_dict().items()}
        file = io.BytesIO()
        np.savez_compressed(file, **arrays)
        return file.getvalue()

    @classmethod
    def load(cls, path: str | Path) -> SimilarityRecorder:
        """Read what `save` wrote. Raises OSError for a file that cannot be read, ValueError for any other file."""
        path, recorder = user_path(path), cls()
        data = path.read_bytes()  # errors of reading come first, as they show nothing about the content
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                recorder.load_state_dict({name: torch.from_numpy(arrays[name]) for name in arrays.files})
        except Exception as error:
            raise ValueError(f"{path} is not a similarity record: {error}") from error
        return recorder


def largest_pair(matrices: np.ndarray) -> np.ndarray:
    """The largest similarity between two different layers, (snapshots, L, L) to (snapshots,); 0 for a single layer."""
    pairs = ~np.eye(matrices.shape[-1], dtype=bool)
    return np.asarray(matrices[:, pairs].max(axis=1, initial=0.0))
