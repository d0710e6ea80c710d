"""The recorder: snapshots of a model's coefficients over training, from which all pictures of similarity are drawn."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..arguments import count
from ..files import atomic_file
from ..sharing import banks
from ..similarity import layer_similarity


class SimilarityRecorder:
    """Snapshots of a model's layer similarity matrices over training.

    Call ``recorder.record(model, step)`` whenever a snapshot is wanted, with steps that increase; `fit` does so before the
    first epoch and after each when given one as a callback, and then counts in epochs.

    Args:
        dense_epochs: number of first epochs in which `fit` takes several snapshots.
        per_epoch: how many in each of those; their steps are fractions of epochs.

    Attributes:
        steps: numbers that increase, one per snapshot.
        coefficients: dict from group name to the list of coefficient matrices (L, k), numpy float32, one per snapshot.
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

    def largest(self) -> dict[str, np.ndarray]:
        """The largest similarity of a pair of layers over time by group name, (snapshots,)."""
        return {name: largest_pair(matrices) for name, matrices in self.matrices().items()}

    def every(self, step: float) -> SimilarityRecorder:
        """The snapshots at multiples of `step` alone, so equally far apart where some were taken more densely."""
        kept = SimilarityRecorder()
        places = [place for place, at in enumerate(self.steps) if abs(at / step - round(at / step)) < 1e-9]
        kept.steps = [self.steps[place] for place in places]
        kept.coefficients = {name: [found[place] for place in places] for name, found in self.coefficients.items()}
        return kept

    def state_dict(self) -> dict[str, Tensor]:
        """Everything, as checkpoints and files keep it: "steps", "names" (JSON as bytes), and as "coefficients_i" those of
        group i over time, (snapshots, L, k)."""
        names = torch.tensor(list(json.dumps(list(self.coefficients)).encode()), dtype=torch.uint8)
        state = {"steps": torch.tensor(self.steps, dtype=torch.float64), "names": names}
        for number, snapshots in enumerate(self.coefficients.values()):
            state[f"coefficients_{number}"] = torch.from_numpy(np.stack(snapshots))
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Become what `state_dict` described."""
        names = json.loads(bytes(state["names"].tolist()))
        self.steps = state["steps"].tolist()
        self.coefficients = {name: list(state[f"coefficients_{i}"].numpy()) for i, name in enumerate(names)}

    def save(self, path: str | Path) -> None:
        """Write everything to one .npz file (no pickle), whole or not at all."""
        with atomic_file(Path(path).expanduser()) as file:
            arrays: dict[str, Any] = {name: value.numpy() for name, value in self.state_dict().items()}
            np.savez_compressed(file, **arrays)

    @classmethod
    def load(cls, path: str | Path) -> SimilarityRecorder:
        """Read what `save` wrote. Raises FileNotFoundError, or ValueError naming a file that is not one of ours."""
        recorder = cls()
        try:
            with np.load(path, allow_pickle=False) as arrays:
                recorder.load_state_dict({name: torch.from_numpy(arrays[name]) for name in arrays.files})
        except FileNotFoundError:
            raise
        except Exception as error:
            raise ValueError(f"{path} is not a similarity record: {error}") from error
        return recorder


def largest_pair(matrices: np.ndarray) -> np.ndarray:
    """The largest similarity between two different layers, (snapshots, L, L) to (snapshots,); 0 for a single layer."""
    pairs = ~np.eye(matrices.shape[-1], dtype=bool)
    return np.asarray(matrices[:, pairs].max(axis=1, initial=0.0))
