"""Soft parameter sharing: the layers of a group draw their weights from one bank of templates.

The weight of layer *i* is a linear combination of k templates with its own, learned coefficients,
``W(i) = sum_j alpha(i)_j T(j)`` (Savarese and Maire, ICLR 2019), so a group of L layers whose weights have d elements
each holds ``k (L + d)`` parameters in place of ``L d``.

Letters: L layers in a group, k templates, d elements of one layer's weight.
"""

from __future__ import annotations

import copy
import functools
import math
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from .arguments import count

COEFFICIENT_INITS = ("orthogonal", "sparse", "identity", "normal")

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def _require_module(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a model, a torch.nn.Module, got {type(model).__name__}")


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which a device's autocast, if it has one, is off; the meta device has none."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def initial_coefficients(num_layers: int, num_templates: int, init: str = "orthogonal") -> Tensor:
    """Draw the coefficients of a fresh bank, (L, k), from PyTorch's default generator.

    - ``"orthogonal"``: `torch.nn.init.orthogonal_` on the whole matrix, as in the authors' code. For k < L the columns
      are orthonormal and the rows are not unit vectors: their mean squared norm is k/L.
    - ``"sparse"``: normal, with a random half of the entries zero and no row all zero (so at k = 1 none is zero).
    - ``"identity"``: layer i starts as template i; needs k = L.
    - ``"normal"``: normal.

    The two normal ones are scaled so that a row's expected squared norm is 1.

    Raises ValueError for an unknown `init`, or ``"identity"`` with k other than L.
    """
    if init not in COEFFICIENT_INITS:
        raise ValueError(f"unknown init {init!r}; known: {', '.join(COEFFICIENT_INITS)}")
    if init == "identity" and num_templates != num_layers:
        raise ValueError(
            f'init="identity" needs one template a layer, got {num_templates} templates for {num_layers} layers; '
            'use "orthogonal" or "sparse", or as many templates as layers'
        )
    if init == "identity":
        return torch.eye(num_layers)
    exact = torch.promote_types(torch.get_default_dtype(), torch.float32)
    coefficients = torch.empty(num_layers, num_templates, dtype=exact)
    if init == "orthogonal":
        return nn.init.orthogonal_(coefficients)
    coefficients.normal_()
    zeros = 0
    if init == "sparse":
        zeros = min(num_layers * num_templates // 2, num_layers * (num_templates - 1))
        scores = torch.rand(num_layers, num_templates)
        scores += 2.0 * (scores == scores.amax(dim=1, keepdim=True))  # one entry of each row is out of reach
        coefficients.view(-1)[scores.view(-1).argsort()[:zeros]] = 0.0
    return coefficients / math.sqrt((num_layers * num_templates - zeros) / num_layers)


class TemplateBank(nn.Module):
    """k templates and the coefficients with which L layers mix their weights from them.

    ``bank()`` returns all L weights, ``bank.mix(i)`` that of layer i (from 0).

    Attributes:
        templates: Parameter (k, d). A row holds one template in the order (first dimension, kernel dimensions, second
            dimension) of the weight, so a convolution's mixed weight (O, I, h, w) is stored as (O, h, w, I): one matrix
            product mixes a whole group, and channels_last weights come without a copy.
        coefficients: Parameter (L, k). Row i is the layer's alpha(i).
        weight_shape: the shape of one layer's weight.
        channels_last: whether mixed weights come in channels_last memory format. It follows
            ``model.to(memory_format=...)``, as the weights of a plain convolution do.
        name: what the group is called in plans, plots and `banks`.

    Each template starts from a normal distribution of variance 2 / fan_in (He et al. 2015), as in the authors' code.

    Args:
        num_layers: L.
        num_templates: k.
        weight_shape: shape of one layer's weight, such as (O, I, h, w).
        init: "orthogonal", "sparse", "identity" or "normal"; see `initial_coefficients`.

    Raises:
        ValueError: a number below 1, an empty shape, an unknown init.
        TypeError: something other than whole numbers.
    """

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
        self.name = name
        self.init = init
        self.channels_last = False
        size = self.weight_shape.numel()
        self.templates = nn.Parameter(torch.empty(num_templates, size, device=device, dtype=dtype))
        self.coefficients = nn.Parameter(torch.empty(num_layers, num_templates, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw templates and coefficients anew, as a fresh bank does."""
        size = self.weight_shape.numel()
        fan_in = size // self.weight_shape[0] if len(self.weight_shape) > 1 else size
        # Drawn in full precision and then converted: QR does not exist in half precision.
        exact = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.coefficients.copy_(initial_coefficients(self.num_layers, self.num_templates, self.init))
        self.templates.copy_(torch.randn(self.num_templates, size, dtype=exact) * math.sqrt(2.0 / fan_in))

    @property
    def num_layers(self) -> int:
        return self.coefficients.shape[0]

    @property
    def num_templates(self) -> int:
        return self.templates.shape[0]

    def stored(self, weight: Tensor) -> Tensor:
        """A weight (..., *weight_shape) in the order in which templates are stored, (..., d)."""
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
        return self.shaped(self._product(self.coefficients[index]))

    def forward(self) -> Tensor:
        """The weights of all layers, (L, *weight_shape)."""
        return self.shaped(self._product(self.coefficients))

    def _product(self, coefficients: Tensor) -> Tensor:
        # Outside autocast: in half precision the gradients of up to L uses of a template would be added up with 8 bits.
        with without_autocast(self.templates.device):
            return coefficients @ self.templates

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TemplateBank:
        # `model.to(memory_format=...)` changes 4-D and 5-D parameters alone; ours are matrices, so ask `fn` what it
        # would have done to a convolution's weight.
        form = _CHANNELS_LAST.get(len(self.weight_shape))
        if form is not None:
            probe = torch.empty((2,) * len(self.weight_shape), dtype=self.templates.dtype)
            probe = probe.contiguous(memory_format=form if self.channels_last else torch.contiguous_format)
            self.channels_last = fn(probe).is_contiguous(memory_format=form)
        return super()._apply(fn, recurse)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return (
            f"{self.name!r}, layers={self.num_layers}, templates={self.num_templates}, shape={tuple(self.weight_shape)}"
        )


class SharedLayer(nn.Module):
    """Mixed into the class of a layer whose weight is made by a bank each time that it is read.

    `source` is the module that makes the weight (it has a ``mix(index)``) and the layer's index in it. It is kept in a
    tuple, which `nn.Module` does not register: the bank is a child of the group's first layer alone, so its parameters
    stand in the state dict once, no `nn.Sequential` executes it, and a deep copy of the model follows its own bank.
    """

    plain_class: type[nn.Module]
    source: tuple[Any, int]

    @property
    def weight(self) -> Tensor:
        module, index = self.source
        return module.mix(index)  # type: ignore[no-any-return]

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise AttributeError(
                "the weight of a shared layer is mixed from its template bank and cannot be assigned: change the bank's "
                "templates or coefficients, or work on softshare.unshare(model)"
            )
        super().__setattr__(name, value)

    def reset_parameters(self) -> None:
        """Draw the whole bank anew: a shared layer has no weight of its own to reset. Its bias stays as it is."""
        self.source[0].reset_parameters()

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made at run time; copies and pickles make it again from the plain one.
        custom: Any = getattr(self.plain_class, "__getstate__", None)
        usual = custom is None or custom is getattr(object, "__getstate__", None)
        return _empty_layer, (self.plain_class,), self.__dict__ if usual else custom(self)

    def _replicate_for_data_parallel(self) -> Any:
        raise RuntimeError(_DATA_PARALLEL)

    def extra_repr(self) -> str:
        module, index = self.source
        return f"{super().extra_repr()}, shared: layer {index + 1} of {module.name!r}"


_DATA_PARALLEL = (
    "nn.DataParallel copies layers without their template bank, so a softly shared model cannot run in it; "
    "use torch.nn.parallel.DistributedDataParallel"
)


@functools.cache
def _shared_class(plain: type[nn.Module]) -> type[SharedLayer]:
    return type(f"Shared{plain.__name__}", (SharedLayer, plain), {"plain_class": plain, "__module__": plain.__module__})


def _empty_layer(plain: type[nn.Module]) -> SharedLayer:
    shared = _shared_class(plain)  # type: ignore[arg-type]
    return shared.__new__(shared)


def draw_weight_from(layer: nn.Module, module: nn.Module, index: int) -> None:
    """From now on `layer.weight` is ``module.mix(index)``; `layer` may be plain or draw from elsewhere already."""
    if not isinstance(layer, SharedLayer):
        del layer._parameters["weight"]
        layer.__class__ = _shared_class(type(layer))  # type: ignore[arg-type]
    layer.source = (module, index)  # type: ignore[assignment]


def give_plain_weight(layer: nn.Module, weight: Tensor, learns: bool) -> None:
    """Turn a shared layer back into one of its plain class that holds a copy of `weight`, contiguous, as its parameter."""
    assert isinstance(layer, SharedLayer)
    layer._modules.pop("bank", None)
    del layer.source
    layer.__class__ = layer.plain_class  # type: ignore[assignment]
    others = dict(layer._parameters)
    layer._parameters.clear()  # so that the weight comes first again, as in a layer that never was shared
    plain = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format), requires_grad=learns)
    layer.register_parameter("weight", plain)
    layer._parameters.update(others)


def share_(
    model: nn.Module,
    templates: int,
    select: Callable[[str, nn.Module], Hashable | None] | None = None,
    init: str = "orthogonal",
) -> dict[str, TemplateBank]:
    """Make the layers of a model share parameters softly, in place.

    Convolutions (1-D to 3-D, also transposed) and linear layers of one class, weight shape, `groups`, dtype and device
    form a group; stride, padding, dilation and bias may differ, and biases stay with their layer. Each group of two or
    more layers gets a bank of ``min(templates, layers)`` templates; its layers are numbered in the order in which the
    model registers them. ``layer.weight`` is the mixed weight wherever it is read; assigning it raises AttributeError.

    Templates are scaled so that the mixed weights of a group keep the mean square of the weights that they replace.
    A bank is a child module of its group's first layer, so that no container executes it: do not cut that layer off.
    Changing a shared weight's data in place (``nn.init`` on it, ``weight.data``) changes a mixture that is thrown away;
    change the bank.
    Layers that are frozen, lazy, parametrized or normalised by a hook, or whose weight another module also holds, are
    left alone and named in one warning.

    Args:
        model: any module; make optimizers after this call, since the parameters change.
        templates: k, the most templates that a group gets.
        select: called with the name and module of each layer that could be shared; layers for which it returns the same
            key form a group named after the key, those for which it returns None are left alone.
        init: of the coefficients, see `initial_coefficients`; or "svd": coefficients and templates start as the best
            approximation of the present weights, which is exact for as many templates as layers.

    Returns:
        The new banks by group name, as `banks` names them.

    Raises:
        TypeError: `model` is not a module, `templates` not a whole number.
        ValueError: fewer than one template, an unknown init, a key that mixes weight shapes, dtypes or devices, or
            nothing (more) to share. The model is unchanged then.
        RuntimeError: the model is an `nn.DataParallel`.
    """
    new = _share(model, templates, select, init, keep_scale=True)
    return {name: bank for name, bank in banks(model).items() if any(bank is other for other in new)}


def _share(
    model: nn.Module,
    templates: int,
    select: Callable[[str, nn.Module], Hashable | None] | None,
    init: str,
    keep_scale: bool,
) -> list[TemplateBank]:
    _require_module(model)
    count("templates", templates)
    if select is not None and not callable(select):
        raise TypeError(f"select must be a function of a layer's name and module, got {select!r}")
    if init not in (*COEFFICIENT_INITS, "svd"):
        raise ValueError(f"unknown init {init!r}; known: {', '.join(COEFFICIENT_INITS)}, svd")
    if any(isinstance(module, nn.DataParallel) for module in model.modules()):
        raise RuntimeError(_DATA_PARALLEL)
    groups, left_alone = _groups(model, select)
    if left_alone:
        listed = ", ".join(f"{name} ({reason})" for name, reason in left_alone.items())
        warnings.warn(f"share_ leaves these layers alone: {listed}", stacklevel=3)
    if not groups:
        already = sum(isinstance(module, SharedLayer) for module in model.modules())
        raise ValueError(
            "nothing to share: no two layers that could be shared have the same class, weight shape, groups, dtype and "
            f"device, or the same key of select ({already} layers are shared already, {len(left_alone)} left alone)"
        )
    made = [(_bank_for(layers, min(templates, len(layers)), init, name, keep_scale), layers) for name, layers in groups]
    _guard_data_parallel()
    for bank, layers in made:
        for index, layer in enumerate(layers):
            draw_weight_from(layer, bank, index)
        owner = owner_of_bank(model, layers)
        owner.add_module("bank", bank.train(owner.training))
    return [bank for bank, _ in made]


def owner_of_bank(model: nn.Module, layers: Sequence[nn.Module]) -> nn.Module:
    """The layer that registers the bank: the first that stands in one place, so that the state dict holds it once."""
    places = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    return next((layer for layer in layers if places[id(layer)] == 1), layers[0])


def _groups(
    model: nn.Module, select: Callable[[str, nn.Module], Hashable | None] | None
) -> tuple[list[tuple[str, list[nn.Module]]], dict[str, str]]:
    """Groups of at least two layers with their names, and the layers left alone with the reason for each."""
    holders = Counter(id(weight) for module in model.modules() for weight in set(module._parameters.values()))
    grouped: dict[Hashable, list[nn.Module]] = {}
    left_alone = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, (*_CONVOLUTIONS, nn.Linear)) or isinstance(layer, SharedLayer):
            continue
        key: Hashable = _kind(layer)
        if select is not None:
            key = select(name, layer)
            if key is None:
                continue
            if not isinstance(key, Hashable):
                raise TypeError(f"select must return something hashable, such as a string, got {key!r} for {name!r}")
        if reason := _reason_against(layer, holders):
            left_alone[name or type(layer).__name__] = reason
            continue
        grouped.setdefault(key, []).append(layer)
    groups = []
    for key, layers in grouped.items():
        kinds = {_kind(layer)[1:4] for layer in layers}  # what a bank cannot mix: shape, dtype, device
        if len(kinds) > 1:
            raise ValueError(
                f"select puts layers with different weights under the key {key!r}: "
                + "; ".join(f"shape {shape}, {dtype}, {device}" for shape, dtype, device in sorted(kinds, key=str))
                + "; layers of one group need the same shape, dtype and device"
            )
        if len(layers) > 1:
            groups.append((_label(layers[0]) if select is None else str(key), layers))
    return groups, left_alone


def _kind(layer: nn.Module) -> tuple[Any, ...]:
    if "weight" not in layer._parameters or isinstance(layer, LazyModuleMixin):
        return (type(layer),)
    weight = layer.weight
    return type(layer), tuple(weight.shape), weight.dtype, weight.device, getattr(layer, "groups", 1)  # type: ignore


def _label(layer: nn.Module) -> str:
    shape = "x".join(str(size) for size in layer.weight.shape)  # type: ignore[union-attr, misc]
    groups = getattr(layer, "groups", 1)
    kind = type(layer).__name__.removeprefix("NonDynamicallyQuantizable")  # PyTorch's name for attention's own layers
    return f"{kind} {shape}" + (f" groups={groups}" if groups != 1 else "")


def _reason_against(layer: nn.Module, holders: Counter[int]) -> str | None:
    weight = layer._parameters.get("weight")
    if isinstance(layer, LazyModuleMixin):
        return "lazy: run the model once first"
    if parametrize.is_parametrized(layer):
        return "parametrized"
    if weight is None:
        return "normalised or pruned by a hook"
    if not weight.requires_grad:
        return "frozen"
    if hasattr(layer, "bank"):
        return "it has an attribute named bank already"
    if holders[id(weight)] > 1:
        return "another module holds the same weight"
    return None


@torch.no_grad()
def _bank_for(layers: Sequence[nn.Module], k: int, init: str, name: str, keep_scale: bool) -> TemplateBank:
    weights = [layer.weight.detach() for layer in layers]  # type: ignore[operator, union-attr]
    first = weights[0]
    start = "orthogonal" if init == "svd" else init
    bank = TemplateBank(len(layers), k, first.shape, start, name=name, device=first.device, dtype=first.dtype)
    form = _CHANNELS_LAST.get(first.dim())
    bank.channels_last = form is not None and not first.is_contiguous() and first.is_contiguous(memory_format=form)
    if first.is_meta:
        return bank
    exact = torch.promote_types(first.dtype, torch.float32)
    replaced = torch.stack([bank.stored(weight) for weight in weights]).to(exact)  # (L, d)
    if init == "svd":
        u, s, vh = torch.linalg.svd(replaced, full_matrices=False)
        rank = min(k, s.numel())  # fewer than k where a weight has fewer elements than the bank has templates
        bank.templates.zero_()[:rank] = s[:rank, None] * vh[:rank]
        bank.coefficients.zero_()[:, :rank] = u[:, :rank]
    elif keep_scale:
        mixed = bank.coefficients.to(exact) @ bank.templates.to(exact)
        bank.templates.mul_((replaced.square().mean() / mixed.square().mean()).sqrt())
    return bank


@functools.cache
def _guard_data_parallel() -> None:
    """From now on, putting a softly shared model into `nn.DataParallel` raises, also where only one device would be used.

    Without it the failure would come only on a machine with several GPUs, at the first batch.
    """

    def check(parent: nn.Module, name: str, child: nn.Module | None) -> None:
        if isinstance(parent, nn.DataParallel) and child is not None:
            if any(isinstance(module, SharedLayer) for module in child.modules()):
                raise RuntimeError(_DATA_PARALLEL)

    nn.modules.module.register_module_module_registration_hook(check)


def banks(model: nn.Module) -> dict[str, TemplateBank]:
    """All template banks of a model by group name, in registration order; {} if it has none.

    A name that occurs twice is numbered: "stage1", "stage1 (2)".
    """
    _require_module(model)
    found: dict[str, TemplateBank] = {}
    for module in model.modules():
        if isinstance(module, TemplateBank):
            name, number = module.name, 1
            while name in found:
                number += 1
                name = f"{module.name} ({number})"
            found[name] = module
    return found


def shared_layers(model: nn.Module) -> Iterator[tuple[str, SharedLayer]]:
    """Names and modules of all layers whose weight is made when it is read, in registration order."""
    _require_module(model)
    for name, module in model.named_modules():
        if isinstance(module, SharedLayer):
            yield name, module


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: weight decay on everything but the coefficients of banks.

    That is what the authors' code does; they report that decaying the coefficients hurt. Coefficients are told apart by
    identity, not by name. A model without banks gets one group.

    Raises ValueError for a negative `weight_decay`.
    """
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay must not be negative, got {weight_decay}")
    present = set(model.modules()) if isinstance(model, nn.Module) else set()
    for name, layer in shared_layers(model):
        if layer.source[0] not in present:
            raise ValueError(
                f"the layer {name!r} draws its weight from a bank that is not part of this model, so the bank would not be "
                "trained; it belongs to the first layer of its group, which was cut off or replaced"
            )
    coefficients = {id(bank.coefficients) for bank in banks(model).values()}
    decayed = [parameter for parameter in model.parameters() if id(parameter) not in coefficients]
    undecayed = [parameter for parameter in model.parameters() if id(parameter) in coefficients]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": undecayed, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def unshare(model: nn.Module) -> nn.Module:
    """A copy of the model in which every layer holds its own plain weight; same outputs, the original is untouched.

    An unshared SWRN has the state dict of the WRN of its size. Use it to export a model, or to save it for code that
    does not know softshare. On a model without shared layers it is a plain copy.
    """
    _require_module(model)
    model = copy.deepcopy(model)
    with torch.enable_grad():  # so that a mixed weight tells whether it learns
        weights = [(layer, layer.weight) for _, layer in shared_layers(model)]  # all are read before any bank goes
    for layer, weight in weights:
        give_plain_weight(layer, weight, weight.requires_grad)
    return model
