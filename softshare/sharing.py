"""Soft parameter sharing: the layers of any model draw their weights from template banks, one bank per group.

`share_` makes a model share, `banks` lists its banks, `decay_groups` sets what an optimizer decays, `unshare` undoes it,
`mixed_once` makes repeated reads of the weights cheaper.

Letters: L layers in a group, k templates, d elements of one layer's weight.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from .arguments import count, without_addresses
from .bank import CHANNELS_LAST, COEFFICIENT_INITS, Mixed, TemplateBank
from .precautions import (
    RefusesPlainWeights,
    WithoutWeight,
    guard_data_parallel,
    reason_against,
    refuse_unfit,
    tied_weights,
    warn_of_partial_freezing,
    warn_old_optimizers,
)

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def _require_module(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a model, a torch.nn.Module, got {type(model).__name__}")


class SharedLayer(RefusesPlainWeights):
    """Mixed into the class of a layer whose weight is made by a bank each time it is read.

    `softshare_source` is the module that makes the weight, by ``mix(index)``, and the layer's index in it. It is a tuple,
    which `nn.Module` does not register: only the group's first layer has the bank as a child. So the bank's parameters are
    in the state dict once, no `nn.Sequential` executes it, and a deep copy of the model uses its own bank. The names are
    long so that they do not clash with a layer's own attributes.
    """

    softshare_plain_class: type[nn.Module]
    softshare_source: tuple[Any, int]

    @property
    def weight(self) -> Tensor:
        module, index = self.softshare_source
        return module.mix(index)  # type: ignore[no-any-return]

    def reset_parameters(self) -> None:
        """Draw a fresh bank: a shared layer has no weight of its own to reset. Its bias stays as it is."""
        self.softshare_source[0].reset_parameters()

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made at run time, so copies and pickles rebuild it from the plain one.
        custom: Any = getattr(self.softshare_plain_class, "__getstate__", None)
        usual = custom is None or custom is getattr(object, "__getstate__", None)
        return _empty_layer, (self.softshare_plain_class,), self.__dict__ if usual else custom(self)

    def extra_repr(self) -> str:
        module, index = self.softshare_source
        return f"{super().extra_repr()}, shared: layer {index + 1} of {module.name!r}"


@functools.cache
def _shared_class(plain: type[nn.Module]) -> type[SharedLayer]:
    members = {"softshare_plain_class": plain, "__module__": plain.__module__}
    return type(f"Shared{plain.__name__}", (SharedLayer, plain), members)


def _empty_layer(plain: type[nn.Module]) -> SharedLayer:
    shared = _shared_class(plain)  # type: ignore[arg-type]
    return shared.__new__(shared)


def draw_weight_from(layer: nn.Module, module: nn.Module, index: int) -> None:
    """Make `layer.weight` be ``module.mix(index)`` from now on; `layer` may be plain or already draw from elsewhere."""
    if not isinstance(layer, SharedLayer):
        del layer._parameters["weight"]
        layer._parameters = WithoutWeight(layer._parameters)
        layer.__class__ = _shared_class(type(layer))  # type: ignore[arg-type]
    layer.softshare_source = (module, index)  # type: ignore[assignment]


def give_plain_weight(layer: nn.Module, weight: Tensor, learns: bool) -> None:
    """Turn a shared layer back into its plain class, with a contiguous copy of `weight` as its parameter."""
    assert isinstance(layer, SharedLayer)
    layer._modules.pop("bank", None)
    del layer.softshare_source
    layer.__class__ = layer.softshare_plain_class  # type: ignore[assignment]
    others = dict(layer._parameters)
    layer._parameters = {}  # so that the weight comes first again, as in a layer that was never shared
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

    **The weights of shared layers are drawn at random**, as for a new network: what a trained model has learned is lost.
    ``init="svd"`` keeps it: exactly if there are as many templates as layers, otherwise as well as k templates can.

    Convolutions (1-D to 3-D, also transposed) and linear layers with the same class, weight shape, `groups`, dtype and
    device form a group. Stride, padding, dilation and bias may differ; biases stay with their layers. Each group of two or
    more layers gets a bank of ``min(templates, layers)`` templates; its layers are numbered in the order in which the
    model registers them. ``layer.weight`` is the mixed weight wherever it is read. Templates are scaled so that the mixed
    weights of a group keep the mean square of the weights they replace.

    - **Writing into** ``layer.weight`` **has no effect**: each read makes a new mixture, so what is written into one
      (``nn.init``, clamping, renormalising, ``weight.data += ...``, merging LoRA adapters into it) is lost with it, and
      PyTorch offers no way to notice. Change the bank, or work on ``unshare(model)``. Assigning the weight, or loading a
      plain one with `load_state_dict`, raises an error.
    - **Freezing.** A bank belongs to all layers of its group. It is a child module of the first one, where no container
      executes it, so do not cut that layer off. Setting ``requires_grad`` on the parameters of one layer freezes the whole
      group, or only a bias; `decay_groups` warns of both. To freeze one layer, do so before sharing. To freeze a group,
      call ``banks(model)[name].requires_grad_(False)``. To freeze all but the coefficients, call
      ``model.requires_grad_(False)``, then ``bank.coefficients.requires_grad_(True)`` for each bank.
    - **Several devices.** DistributedDataParallel and ``fully_shard`` on the whole model work; ``fully_shard`` on single
      blocks and tensor parallelism do not.

    Layers are left alone, and named in one warning, if they are frozen, lazy, parametrized or normalised by a hook, or if
    their weights are not real floating-point numbers or also belong to another module or parameter.

    Args:
        model: any module; make optimizers after this call, since the parameters change.
        templates: k, the largest number of templates in a group.
        select: called with the name and module of each layer that could be shared; layers for which it returns the same
            key form a group named after the key; those for which it returns None are left alone.
        init: for the coefficients, see `initial_coefficients`; or "svd": coefficients and templates start as the best
            approximation of the current weights.

    Returns:
        The new banks by group name, as `banks` names them.

    Raises:
        TypeError: `model` is not a module, `templates` not a whole number.
        ValueError: fewer than one template, an unknown init, a key that mixes weight shapes, dtypes or devices, nothing
            (more) to share, or a model that was built under `torch.inference_mode`. The model is then unchanged.
        RuntimeError: the model is wrapped for several devices already.
    """
    new = share_groups(model, templates, select, init, keep_scale=True)
    return {name: bank for name, bank in banks(model).items() if any(bank is other for other in new)}


@torch.inference_mode(False)  # what is made here must be able to learn, wherever this is called
def share_groups(
    model: nn.Module,
    templates: int,
    select: Callable[[str, nn.Module], Hashable | None] | None,
    init: str,
    keep_scale: bool,
) -> list[TemplateBank]:
    """Do what `share_` does; our own networks call it with `keep_scale` False, to keep the scale of a fresh bank.

    Returns the new banks; arguments and errors are those of `share_`.
    """
    _require_module(model)
    count("templates", templates)
    if select is not None and not callable(select):
        raise TypeError(f"select must be a function of a layer's name and module, got {select!r}")
    if init not in (*COEFFICIENT_INITS, "svd"):
        raise ValueError(f"unknown init {init!r}; known: {', '.join(COEFFICIENT_INITS)}, svd")
    refuse_unfit(model)
    groups, left_alone = _groups(model, select)
    if left_alone:
        listed = ", ".join(f"{name} ({reason})" for name, reason in left_alone.items())
        warnings.warn(f"share_ leaves these layers alone: {listed}", stacklevel=4)  # share_'s caller
    if not groups:
        already = sum(isinstance(module, SharedLayer) for module in model.modules())
        raise ValueError(
            "nothing to share: no two layers that could be shared have the same class, weight shape, groups, dtype and "
            f"device, or the same key from select ({already} layers are shared already, {len(left_alone)} left alone)"
        )
    made = [(_bank_for(layers, min(templates, len(layers)), init, name, keep_scale), layers) for name, layers in groups]
    guard_data_parallel(SharedLayer)
    warn_old_optimizers(layer.weight for _, layers in made for layer in layers)  # type: ignore[misc]
    for bank, layers in made:
        for index, layer in enumerate(layers):
            draw_weight_from(layer, bank, index)
        owner = owner_of_bank(model, layers)
        owner.add_module("bank", bank.train(owner.training))
    return [bank for bank, _ in made]


def owner_of_bank(model: nn.Module, layers: Sequence[nn.Module]) -> nn.Module:
    """The layer to register the bank: the first that occurs only once in the model, so that the bank does too."""
    places = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    return next((layer for layer in layers if places[id(layer)] == 1), layers[0])


def _groups(
    model: nn.Module, select: Callable[[str, nn.Module], Hashable | None] | None
) -> tuple[list[tuple[str, list[nn.Module]]], dict[str, str]]:
    """Groups of at least two layers with their names, and the layers left alone with the reason for each."""
    tied = tied_weights(model)
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
        if reason := reason_against(layer, tied):
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
            groups.append((_label(layers[0]) if select is None else without_addresses(str(key)), layers))
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


@torch.no_grad()
def _bank_for(layers: Sequence[nn.Module], k: int, init: str, name: str, keep_scale: bool) -> TemplateBank:
    weights = [layer.weight.detach() for layer in layers]  # type: ignore[operator, union-attr]
    first = weights[0]
    start = "orthogonal" if init == "svd" else init
    bank = TemplateBank(len(layers), k, first.shape, start, name=name, device=first.device, dtype=first.dtype)
    form = CHANNELS_LAST.get(first.dim())
    bank.channels_last = form is not None and not first.is_contiguous() and first.is_contiguous(memory_format=form)
    if first.is_meta:
        return bank
    exact = torch.promote_types(first.dtype, torch.float32)
    replaced = torch.stack([bank.stored(weight) for weight in weights]).to(exact)  # (L, d)
    if init == "svd":
        u, s, vh = torch.linalg.svd(replaced, full_matrices=False)
        rank = min(k, s.numel())  # fewer than k if a weight has fewer elements than the bank has templates
        bank.templates.zero_()[:rank] = s[:rank, None] * vh[:rank]
        bank.coefficients.zero_()[:, :rank] = u[:, :rank]
    elif keep_scale:
        mixed = bank.coefficients.to(exact) @ bank.templates.to(exact)
        bank.templates.mul_((replaced.square().mean() / mixed.square().mean()).sqrt())
    return bank


def banks(model: nn.Module) -> dict[str, TemplateBank]:
    """All template banks of a model by group name, in registration order; {} if it has none.

    A name that occurs again is numbered: "stage1", "stage1 (2)".
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


@contextlib.contextmanager
def mixed_once(model: nn.Module) -> Iterator[None]:
    """Mix the weights of each bank by one matrix product for all reads in a ``with`` block, instead of one per read.

    Put a forward pass and its backward pass inside, as `fit` does, or a whole evaluation; parameters must not change inside
    the block. Each bank's gradients then take one product too. The weights equal those mixed separately, up to rounding, and
    are released when the block ends (or after the backward pass, if later).
    """
    found = [bank for bank in banks(model).values() if type(bank).mix is TemplateBank.mix]
    before = [bank.mixed for bank in found]
    try:
        for bank in found:
            bank.mixed = Mixed(bank)
        yield
    finally:
        for bank, mixed in zip(found, before, strict=True):
            bank.mixed = mixed


def shared_layers(model: nn.Module) -> Iterator[tuple[str, SharedLayer]]:
    """Names and modules of all layers whose weight is made when it is read, in registration order."""
    _require_module(model)
    for name, module in model.named_modules():
        if isinstance(module, SharedLayer):
            yield name, module


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: weight decay on everything but the coefficients of banks.

    The authors' code does the same; they report that decaying the coefficients hurt. Coefficients are recognised by
    identity, not by name. A model without banks gets one group. Warns if freezing the parameters of one shared layer has
    frozen its whole group, or only its bias; see `share_` on freezing.

    Raises ValueError for a negative `weight_decay`, or a layer whose bank is not part of the model.
    """
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay must not be negative, got {weight_decay}")
    present = set(model.modules()) if isinstance(model, nn.Module) else set()
    users: dict[nn.Module, list[tuple[str, nn.Module]]] = {}
    for name, layer in shared_layers(model):
        users.setdefault(layer.softshare_source[0], []).append((name, layer))
        if layer.softshare_source[0] not in present:
            raise ValueError(
                f"the layer {name!r} draws its weight from a bank that is not part of this model, so the bank would not be "
                "trained; it belongs to the first layer of its group, which was cut off or replaced"
            )
    for source, layers in users.items():
        warn_of_partial_freezing(model, source, layers)
    coefficients = {id(bank.coefficients) for bank in banks(model).values()}
    decayed = [parameter for parameter in model.parameters() if id(parameter) not in coefficients]
    undecayed = [parameter for parameter in model.parameters() if id(parameter) in coefficients]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": undecayed, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


@torch.inference_mode(False)
@torch.enable_grad()  # so that a mixed weight shows whether it learns
def unshare(model: nn.Module) -> nn.Module:
    """A copy of the model, with the same outputs, in which every layer has its own plain weight; the original is unchanged.

    An unshared SWRN has the state dict of the WRN of its size. Use this to export a model, to merge, clamp, prune or
    quantise weights, or to save a model for code that does not use softshare. Without shared layers it is a plain copy.
    """
    _require_module(model)
    model = copy.deepcopy(model)
    weights = [(layer, layer.weight) for _, layer in shared_layers(model)]  # all are read before any bank is removed
    for layer, weight in weights:
        give_plain_weight(layer, weight, weight.requires_grad)
    return model
