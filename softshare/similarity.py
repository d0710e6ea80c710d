"""How similar the layers of a group are, by coefficients or by weights, and a penalty that makes them more similar."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .arguments import count
from .bank import TemplateBank, initial_coefficients, without_autocast
from .sharing import banks


def layer_similarity(coefficients: Tensor) -> Tensor:
    """Layer similarity matrix ``LSM_ij = |cos(alpha(i), alpha(j))|`` (from the poster's folding section).

    Args:
        coefficients: (L, k), any floating dtype; computed in at least float32.

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
    # The cosine does not depend on a row's length, so each row is first divided by its largest entry, as a constant:
    # squares neither overflow nor vanish, and the gradient stays that of the plain formula.
    largest = rows.detach().abs().amax(dim=1, keepdim=True)
    rows = rows / torch.where(largest > 0, largest, 1.0)
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    rows = rows / torch.where(norms > 0, norms, 1.0)
    with without_autocast(rows.device):
        cosines = rows @ rows.T
    # Some CPUs round a product and its mirror image differently; the mean of both is exactly symmetric.
    return ((cosines + cosines.T) / 2).abs().clamp(max=1.0)


def similarity_matrices(model: nn.Module) -> dict[str, Tensor]:
    """The layer similarity matrix (L, L) of each bank, detached, by group name."""
    return {name: layer_similarity(bank.coefficients.detach()) for name, bank in banks(model).items()}


def in_double(tensor: Tensor) -> Tensor:
    """A detached copy in float64, on the CPU if the device does not support it (Apple's MPS)."""
    tensor = tensor.detach()
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def weight_similarity(bank: TemplateBank) -> Tensor:
    """|cos| between the mixed weights themselves, (L, L), detached.

    Unlike the similarity of coefficients, it does not depend on the basis: for any invertible M, coefficients times M and
    templates times its inverse give the same weights but other coefficient similarities, unless these are exactly 1.
    Computed from the Gram matrix of the templates, (k, k), as ``alpha(i) T T' alpha(j)'``.
    """
    templates = in_double(bank.templates)  # (k, d)
    values, vectors = torch.linalg.eigh(templates @ templates.T)
    root = vectors * values.clamp(min=0.0).sqrt()  # (k, k) with root @ root.T = T T'
    return layer_similarity(in_double(bank.coefficients) @ root)


def recurrence_penalty(model: nn.Module) -> Tensor:
    """Minus the sum of all entries of all layer similarity matrices: a scalar to add, times lambda, to the loss.

    It rewards layers for becoming similar ("regularizing the LSM" on the poster; lambda = 0.01 in the authors' rebuttal;
    the form of the sum is our reading). 0 for a model without banks.
    """
    sums = [layer_similarity(bank.coefficients).sum() for bank in banks(model).values()]
    if sums:
        return -torch.stack(sums).sum()
    parameter = next(model.parameters(), None)
    return torch.zeros((), device=None if parameter is None else parameter.device, dtype=torch.float32)


def initial_similarity(
    num_layers: int, num_templates: int, init: str = "orthogonal", draws: int = 1000, seed: int = 0
) -> Tensor:
    """The largest off-diagonal similarity of each of `draws` fresh coefficient matrices, (draws,).

    For k < L even a fresh bank has similar layers. A similarity after training means something only if it is beyond the
    usual range of this statistic, for example its 95th percentile. The default random generator is left as it was.
    """
    count("draws", draws)
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):  # the same whatever PyTorch's defaults
        largest = torch.zeros(draws, dtype=torch.float32)
        torch.default_generator.manual_seed(seed)  # the CPU's only
        for draw in range(draws):
            similarity = layer_similarity(initial_coefficients(num_layers, num_templates, init, torch.float32))
            largest[draw] = similarity.fill_diagonal_(0.0).max()
    return largest


class Beyond(NamedTuple):
    """A statistic beside what chance gives.

    Attributes:
        observed: its value.
        chance: the 95th percentile by chance.
        p: how often chance gives at least the observed value, never below 1 / (draws + 1).
    """

    observed: float
    chance: float
    p: float


def beyond_chance(
    end: Mapping[str, Tensor], start: Mapping[str, Tensor] | None = None, draws: int = 1000, seed: int = 0
) -> dict[str, Beyond]:
    """Whether the layers of a network are more alike than training without any structure would make them.

    Training moves coefficients even if it learns nothing about layers, and coefficients that have moved far point in random
    directions, which are not orthogonal: 20 directions in 20 dimensions have a mean similarity of 0.18. So the null
    hypothesis is that each layer has moved as far as observed, but in a random direction.

    Args:
        end: the coefficients (L, k) of each group after training.
        start: those before; None if they are not known, for directions that are random altogether.
        draws: of the null hypothesis.
        seed: of the draws; PyTorch's generators are left as they were.

    Returns:
        Three statistics of the pairs of layers in all groups together: "mean" and "largest" similarity, and "chessboard",
        the mean over even lags (layers i and i + 2, i + 4, ...) minus that over odd ones; NaN if there are no even lags.

    Raises:
        ValueError: no group with at least 2 layers and 3 templates (with 2 templates, directions lie in a plane, where some
            pair is nearly always alike), or groups that differ between start and end.
    """
    count("draws", draws)
    groups = {name: in_double(rows).cpu() for name, rows in end.items() if rows.shape[0] > 1 and rows.shape[1] > 2}
    if not groups:
        shapes = {name: tuple(rows.shape) for name, rows in end.items()}
        raise ValueError(f"structure can be told from chance only with 2 layers and 3 templates or more, got {shapes}")
    moved = {}
    for name, rows in groups.items():
        before = torch.zeros_like(rows) if start is None else in_double(start[name]).cpu() if name in start else None
        if before is None or before.shape != rows.shape:
            raise ValueError(f"group {name!r} is {tuple(rows.shape)} after training, but not before")
        moved[name] = (before, torch.linalg.vector_norm(rows - before, dim=1, keepdim=True))
    generator = torch.Generator("cpu").manual_seed(seed)
    random = []
    for before, lengths in moved.values():
        directions = torch.randn((draws, *before.shape), generator=generator, dtype=torch.float64, device="cpu")
        random.append(before + lengths * F.normalize(directions, dim=-1))
    observed, chance = _statistics(list(groups.values())), _statistics(random)
    return {
        name: Beyond(
            float(value),
            float(chance[name].quantile(0.95)),
            math.nan if value.isnan() else (1 + int((chance[name] >= value - 1e-12).sum())) / (draws + 1),
        )
        for name, value in observed.items()
    }


def _statistics(groups: Sequence[Tensor]) -> dict[str, Tensor]:
    """Those of `beyond_chance` for coefficients (..., L, k) of each group, over the pairs of all groups together."""
    pairs, lags = [], []
    for rows in groups:
        unit = F.normalize(rows, dim=-1)
        first, second = torch.triu_indices(rows.shape[-2], rows.shape[-2], 1, device=rows.device)
        pairs.append((unit @ unit.mT)[..., first, second].abs())
        lags.append(second - first)
    similar, even = torch.cat(pairs, dim=-1), torch.cat(lags) % 2 == 0
    return {
        "mean": similar.mean(dim=-1),
        "largest": similar.amax(dim=-1),
        "chessboard": similar[..., even].mean(dim=-1) - similar[..., ~even].mean(dim=-1),
    }


def off_diagonal(matrices: Mapping[str, Tensor]) -> dict[str, float]:
    """The mean off-diagonal similarity of each matrix (L, L); 0 for a single layer."""
    means = {}
    for name, matrix in matrices.items():
        pairs = matrix.shape[0] * (matrix.shape[0] - 1)
        means[name] = float((matrix.sum() - matrix.diagonal().sum()) / pairs) if pairs else 0.0
    return means
