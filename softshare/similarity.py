"""How similar the layers of a group are, by coefficients or by weights, and a penalty that makes them more similar."""

from __future__ import annotations

from collections.abc import Mapping

import torch
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


def off_diagonal(matrices: Mapping[str, Tensor]) -> dict[str, float]:
    """The mean off-diagonal similarity of each matrix (L, L); 0 for a single layer."""
    means = {}
    for name, matrix in matrices.items():
        pairs = matrix.shape[0] * (matrix.shape[0] - 1)
        means[name] = float((matrix.sum() - matrix.diagonal().sum()) / pairs) if pairs else 0.0
    return means
