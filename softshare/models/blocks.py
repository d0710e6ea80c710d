"""What a network's blocks have in common, so that repeats of them can run as a loop."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..bank import without_autocast


class RecurrentBlock(nn.Module):
    """A block that maps a tensor to one of the same shape and can be a step of a loop.

    Subclasses list, in order of use, their convolutions (`layer_names`, which repeats of a block share) and their
    normalisations (`norm_names`, of which each step of a loop keeps its own), and implement `step`.
    """

    layer_names: tuple[str, ...]
    norm_names: tuple[str, ...]

    def norms(self) -> list[nn.Module]:
        return [getattr(self, name) for name in self.norm_names]

    def step(self, x: Tensor, norms: Sequence[nn.Module], scales: Sequence[Tensor | float]) -> Tensor:
        """Run the block with the given normalisations; the output of convolution j is multiplied by ``scales[j]``."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.step(x, self.norms(), [1.0] * len(self.layer_names))

    def __prepare_scriptable__(self) -> nn.Module:
        raise RuntimeError(
            "this network cannot be scripted; use torch.compile, torch.export, torch.fx or torch.jit.trace"
        )


def scaled(x: Tensor, scale: Tensor | float) -> Tensor:
    """``x * scale``, without multiplying if the scale is the number 1."""
    return x if isinstance(scale, float) and scale == 1.0 else x * scale


@torch.fx.wrap  # a single step of a traced network, since it asks for the dtype
def mean_over_pixels(x: Tensor) -> Tensor:
    """(N, C, H, W) to (N, C), in float32 or, if x is more precise, in its own dtype."""
    return x.mean(dim=(2, 3), dtype=torch.promote_types(x.dtype, torch.float32))


def logits(x: Tensor, classifier: nn.Module) -> Tensor:
    """``classifier(x)`` in the precision of the classifier's parameters, also under autocast; (N, C) to (N, classes).

    This costs nothing, and bfloat16 matrix products crash on some virtual machines that report matrix units they do not
    have.
    """
    with without_autocast(x.device):
        return classifier(x.to(getattr(classifier, "weight", x).dtype))  # type: ignore[no-any-return]
