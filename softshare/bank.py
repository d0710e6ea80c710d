"""The template bank: k templates, and the coefficients with which L layers mix their weights from them.

The weight of layer *i* is a linear combination of k templates with its own, learned coefficients,
``W(i) = sum_j alpha(i)_j T(j)`` (Savarese and Maire, ICLR 2019), so a group of L layers whose weights have d elements
each holds ``k (L + d)`` parameters instead of ``L d``.

Letters: L layers in a group, k templates, d elements of one layer's weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .arguments import count
from .precautions import refuse_sharded

COEFFICIENT_INITS = ("orthogonal", "sparse", "identity", "normal")

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
"""The memory format that keeps channels together, by the number of dimensions of a weight."""


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A context with a device's autocast switched off, if it has one; the meta device and torch.fx's tracer have none."""
    none = isinstance(device, torch.fx.Proxy) or device.type == "meta"
    return nullcontext() if none else torch.autocast(device.type, enabled=False)


def _products_are_rounded() -> bool:
    """Whether the program lets PyTorch round the factors of float32 matrix products, to TF32 or bfloat16."""
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # the program uses PyTorch's newer switches, which this question does not cover
        return True


def initial_coefficients(
    num_layers: int, num_templates: int, init: str = "orthogonal", dtype: torch.dtype | None = None
) -> Tensor:
    """Draw the coefficients of a fresh bank, (L, k), from PyTorch's default generator.

    - ``"orthogonal"``: `torch.nn.init.orthogonal_` on the whole matrix, as in the authors' code. For k < L the columns
      are orthonormal and the rows are not unit vectors: their mean squared norm is k/L.
    - ``"sparse"``: normal, with a random half of the entries zero but no row all zero (so with k = 1 no entry is zero).
    - ``"identity"``: layer i starts as template i; needs k = L.
    - ``"normal"``: normal.

    ``"sparse"`` and ``"normal"`` are scaled so that a row's expected squared norm is 1. `dtype` is float32 or float64;
    default: PyTorch's default, or float32 if that is less precise.

    Raises ValueError for an unknown `init`, or ``"identity"`` with k other than L.
    """
    if init not in COEFFICIENT_INITS:
        raise ValueError(f"unknown init {init!r}; known: {', '.join(COEFFICIENT_INITS)}")
    if init == "identity" and num_templates != num_layers:
        raise ValueError(
            f'init="identity" needs one template per layer, got {num_templates} templates for {num_layers} layers; '
            'use "orthogonal" or "sparse", or as many templates as layers'
        )
    dtype = dtype or torch.promote_types(torch.get_default_dtype(), torch.float32)
    if init == "identity":
        return torch.eye(num_layers, dtype=dtype)
    coefficients = torch.empty(num_layers, num_templates, dtype=dtype)
    if init == "orthogonal":
        return nn.init.orthogonal_(coefficients)
    coefficients.normal_()
    zeros = 0
    if init == "sparse":
        zeros = min(num_layers * num_templates // 2, num_layers * (num_templates - 1))
        scores = torch.rand(num_layers, num_templates)
        scores += 2.0 * (scores == scores.amax(dim=1, keepdim=True))  # one entry of each row never becomes zero
        coefficients.view(-1)[scores.view(-1).argsort()[:zeros]] = 0.0
    return coefficients / math.sqrt((num_layers * num_templates - zeros) / num_layers)


class WeightSource(nn.Module):
    """What layers draw their weights from. It records whether it was frozen directly, not through a layer."""

    frozen_on_purpose = False

    def requires_grad_(self, requires_grad: bool = True) -> WeightSource:
        """As for any module; freezing by this call is deliberate."""
        self.frozen_on_purpose = not requires_grad
        return super().requires_grad_(requires_grad)

    def mix(self, index: int) -> Tensor:
        """Weight number `index` (from 0)."""
        raise NotImplementedError


class Mixed:
    """The weights of a bank, mixed by one matrix product, while a `softshare.sharing.mixed_once` block is active."""

    def __init__(self, bank: TemplateBank) -> None:
        self.made_from = bank.coefficients, bank.templates
        self.rows = bank.product(bank.coefficients).unbind()  # L times (d,)
        self.with_gradient = torch.is_grad_enabled()
        self.read_without: set[int] = set()  # the layers whose weights were read while gradients were off

    def row(self, bank: TemplateBank, index: int) -> Tensor | None:
        """The weight of a layer, (d,); None if this read needs a product of its own."""
        if bank.coefficients is not self.made_from[0] or bank.templates is not self.made_from[1]:
            return None  # torch.func.functional_call has replaced them
        if torch.is_grad_enabled() and not self.with_gradient:
            return None
        if torch.compiler.is_compiling():
            return self.rows[index]
        # Reentrant activation checkpointing runs each block first without gradients and again during the backward pass,
        # where each block has its own backward pass. The first of these would free the parts of a shared product that the
        # others still need.
        if not torch.is_grad_enabled():
            self.read_without.add(index)
        return None if torch.is_grad_enabled() and index in self.read_without else self.rows[index]

    def __deepcopy__(self, memo: Any) -> None:
        """A copy of the bank mixes weights of its own."""


class TemplateBank(WeightSource):
    """k templates and the coefficients with which L layers mix their weights from them.

    ``bank()`` returns all L weights, ``bank.mix(i)`` the weight of layer i (from 0).

    Attributes:
        templates: Parameter (k, d). Each row holds one template, in the order (first dimension, kernel dimensions, second
            dimension) of the weight, so a convolution's mixed weight (O, I, h, w) is stored as (O, h, w, I). One matrix
            product mixes a whole group, and channels_last weights need no copy.
        coefficients: Parameter (L, k). Row i holds alpha(i).
        weight_shape: the shape of one layer's weight.
        channels_last: whether mixed weights are in channels_last memory format. It follows
            ``model.to(memory_format=...)``, as the weights of a plain convolution do.
        name: the group's name in plans, plots and `banks`.

    Each weight is mixed when it is read, by a product of its own, unless a `softshare.sharing.mixed_once` block is active.
    Products are as exact as the bank's dtype, whatever autocast, TF32 or `torch.set_float32_matmul_precision` allow.

    Templates are drawn from a normal distribution with variance 2 / fan_in (He et al. 2015), as in the authors' code.

    Args:
        num_layers: L.
        num_templates: k.
        weight_shape: shape of one layer's weight, such as (O, I, h, w).
        init: "orthogonal", "sparse", "identity" or "normal"; see `initial_coefficients`.

    Raises:
        ValueError: a number below 1, an empty shape, an unknown init.
        TypeError: sizes that are not whole numbers, a dtype that is not floating-point.
    """

    mixed: Mixed | None = None

    @torch.inference_mode(False)  # so that the parameters can learn
    def __init__(
        self,
        num_layers: int,
        num_templates: int,
        weight_shape: Sequence[int],
        init: str = "orthogonal",
        *,
        name: str = "bank",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        count("num_layers", num_layers)
        count("num_templates", num_templates)
        try:
            self.weight_shape = torch.Size(weight_shape)
        except TypeError as error:
            raise TypeError(f"weight_shape must be a sequence of whole numbers, got {weight_shape!r}") from error
        if len(self.weight_shape) == 0 or min(self.weight_shape) < 1:
            raise ValueError(f"weight_shape must have at least one dimension, each at least 1, got {weight_shape!r}")
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"the dtype of a bank must be a floating-point one, got {dtype}")
        self.name = name
        self.init = init
        self.channels_last = False
        size = self.weight_shape.numel()
        self.templates = nn.Parameter(torch.empty(num_templates, size, device=device, dtype=dtype))
        self.coefficients = nn.Parameter(torch.empty(num_layers, num_templates, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw fresh templates and coefficients, always on the CPU, so that a seed gives the same ones on every device."""
        if self.templates.is_meta:
            return
        size = self.weight_shape.numel()
        fan_in = size // self.weight_shape[0] if len(self.weight_shape) > 1 else size
        # Drawn in full precision and then converted: QR does not exist in half precision.
        exact = torch.promote_types(torch.get_default_dtype(), torch.float32)
        with torch.device("cpu"):
            self.coefficients.copy_(initial_coefficients(self.num_layers, self.num_templates, self.init))
            self.templates.copy_(torch.randn(self.num_templates, size, dtype=exact) * math.sqrt(2.0 / fan_in))

    @property
    def num_layers(self) -> int:
        return self.coefficients.shape[0]

    @property
    def num_templates(self) -> int:
        return self.templates.shape[0]

    def stored(self, weight: Tensor) -> Tensor:
        """Rearrange a weight (..., *weight_shape) into the order of stored templates, (..., d)."""
        lead = weight.dim() - len(self.weight_shape)
        if tuple(weight.shape[lead:]) != tuple(self.weight_shape):
            raise ValueError(f"expected a weight of shape {tuple(self.weight_shape)}, got {tuple(weight.shape)}")
        if len(self.weight_shape) > 2:
            weight = weight.movedim(lead + 1, -1)
        return weight.reshape(*weight.shape[:lead], -1)

    def shaped(self, vectors: Tensor) -> Tensor:
        """The inverse of `stored`: (..., d) to (..., *weight_shape)."""
        lead = vectors.shape[:-1]
        if len(self.weight_shape) <= 2:
            return vectors.view(*lead, *self.weight_shape)
        first, second, *kernel = self.weight_shape
        weight = vectors.view(*lead, first, *kernel, second).movedim(-1, len(lead) + 1)
        return weight if self.channels_last else weight.contiguous()

    def mix(self, index: int) -> Tensor:
        """The weight of layer `index` (from 0), of shape `weight_shape`."""
        row = None if self.mixed is None else self.mixed.row(self, index)
        return self.shaped(self.product(self.coefficients[index]) if row is None else row)

    def forward(self) -> Tensor:
        """The weights of all layers, (L, *weight_shape)."""
        return self.shaped(self.product(self.coefficients))

    def product(self, coefficients: Tensor) -> Tensor:
        """Mix weights in stored order, (..., d), with these coefficients, (..., k)."""
        templates = self.templates
        refuse_sharded(templates)
        # Outside autocast: in half precision the gradients of up to L uses of a template would be summed with 8 bits.
        with without_autocast(templates.device):
            if torch.compiler.is_compiling():  # a compiler turns the sum into one pass over the templates
                return (coefficients.unsqueeze(-1) * templates).sum(-2)
            if (
                templates.dtype is torch.float32
                and templates.device.type in ("cpu", "cuda")
                and _products_are_rounded()
            ):
                return (coefficients.double() @ templates.double()).float()
            return coefficients @ templates

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TemplateBank:
        # `model.to(memory_format=...)` changes only 4-D and 5-D parameters. Ours are matrices, so ask `fn` what it
        # would have done to a convolution's weight.
        form = CHANNELS_LAST.get(len(self.weight_shape))
        if form is not None:
            probe = torch.empty((2,) * len(self.weight_shape), dtype=self.templates.dtype, device="cpu")
            probe = probe.contiguous(memory_format=form if self.channels_last else torch.contiguous_format)
            self.channels_last = fn(probe).is_contiguous(memory_format=form)
        return super()._apply(fn, recurse)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return (
            f"{self.name!r}, layers={self.num_layers}, templates={self.num_templates}, shape={tuple(self.weight_shape)}"
        )
