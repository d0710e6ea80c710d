"""What a network's blocks have in common, so that repeats of them can run as a loop."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class RecurrentBlock(nn.Module):
    """A block that maps a tensor to one of the same shape and can be a step of a loop.

    Subclasses name, in the order of use, their convolutions (`layer_names`, what repeats of a block share) and their
    normalisations (`norm_names`, what each step of a loop keeps for itself), and implement `step`.
    """

    layer_names: tuple[str, ...]
    norm_names: tuple[str, ...]

    def norms(self) -> list[nn.Module]:
        return [getattr(self, name) for name in self.norm_names]

    def step(self, x: Tensor, norms: Sequence[nn.Module], scales: Sequence[Tensor | float]) -> Tensor:
        """Run the block with the given normalisations; output of convolution j is multiplied by ``scales[j]``."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.step(x, self.norms(), [1.0] * len(self.layer_names))


def scaled(x: Tensor, scale: Tensor | float) -> Tensor:
    """``x * scale``, without the product where the scale is the number 1."""
    return x if isinstance(scale, float) and scale == 1.0 else x * scale
