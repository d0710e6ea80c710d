"""Precautions for any model: what `share_` leaves alone, what it refuses, and what it warns of.

You can follow the method without reading this file.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize
from torch.optim.optimizer import register_optimizer_step_pre_hook

DATA_PARALLEL = (
    "nn.DataParallel copies layers without their template bank, so a softly shared model cannot run in it; "
    "use torch.nn.parallel.DistributedDataParallel"
)
MIXED = (
    "the weight of a shared layer is mixed from its template bank and cannot be replaced, normalised or pruned: change the "
    "bank's templates or coefficients, or work on softshare.unshare(model)"
)
_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class WithoutWeight(dict[str, Any]):
    """The parameters of a shared layer, with an error for code that looks for "weight" among them, as weight_norm does.

    Raises RuntimeError, which explains why there is none, for reading, setting or deleting "weight".
    """

    def __missing__(self, name: str) -> Any:
        raise RuntimeError(MIXED) if name == "weight" else KeyError(name)

    def __setitem__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise RuntimeError(MIXED)
        super().__setitem__(name, value)

    def __delitem__(self, name: str) -> None:
        if name == "weight":
            raise RuntimeError(MIXED)
        super().__delitem__(name)


class RefusesPlainWeights(nn.Module):
    """What a shared layer refuses: a weight of its own, however it is given, and ways of running that cannot work."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise AttributeError(MIXED)
        super().__setattr__(name, value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name in ("weight", "weight_orig"):  # the second is pruning's
            raise RuntimeError(MIXED)
        super().register_parameter(name, param)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing: Any,
        unexpected: Any,
        errors: Any,
    ) -> None:
        if f"{prefix}weight" in state_dict:  # an error even with strict=False: the weight would be lost silently
            errors.append(
                f"{prefix}weight is a plain weight, but this layer mixes its weight from a bank. Load plain weights before "
                'share_(..., init="svd"), which starts from them'
            )
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)

    def __prepare_scriptable__(self) -> Any:
        raise RuntimeError(
            "a softly shared model cannot be scripted; use torch.compile, torch.export, or softshare.unshare"
        )

    def _replicate_for_data_parallel(self) -> Any:
        raise RuntimeError(DATA_PARALLEL)


def refuse_sharded(parameter: Tensor) -> None:
    """Raise RuntimeError for a bank's parameter of which this process holds only a part (a DTensor)."""
    if getattr(parameter, "placements", None) is not None:
        raise RuntimeError(
            "a layer reads its weight from a template bank that is currently sharded over processes. With fully_shard on "
            "each block, a bank is gathered only while the block that holds it runs; call fully_shard once, on the whole "
            "model, or use DistributedDataParallel. Outside the model's forward pass, gather the parameters first"
        )


def refuse_inference(model: nn.Module) -> None:
    """Raise ValueError for a model whose parameters were made under torch.inference_mode and so can never learn."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        lazy = isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer))
        if not lazy and tensor.is_inference():
            raise ValueError(
                f"{name!r} of the model was made under torch.inference_mode, so it cannot be trained; build or load the "
                "model outside inference_mode"
            )


def overlapping_weights(model: nn.Module) -> set[int]:
    """The ids of all parameters that share memory with another one of the model, as after ``a.weight = b.weight.T``."""
    # storage -> (first byte, byte after the last, id)
    places: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
    for parameter in {id(parameter): parameter for parameter in model.parameters()}.values():
        lazy, sharded = isinstance(parameter, nn.UninitializedParameter), hasattr(parameter, "placements")
        if lazy or sharded or parameter.layout is not torch.strided or not parameter.numel():
            continue
        reach = 1 + sum(int((size - 1) * step) for size, step in zip(parameter.shape, parameter.stride(), strict=True))
        first, width = int(parameter.storage_offset()), parameter.element_size()
        storage = parameter.untyped_storage()._cdata
        places[storage].append((first * width, (first + reach) * width, id(parameter)))
    found = set()
    for spans in places.values():
        end, last = -1, 0
        for first, after, number in sorted(spans):
            if first < end:
                found |= {number, last}
            if after > end:
                end, last = after, number
    return found


def tied_weights(model: nn.Module) -> dict[int, str]:
    """The id of every parameter that is tied to another one or held by several modules, with the reason."""
    holders = Counter(id(weight) for module in model.modules() for weight in set(module._parameters.values()))
    found = dict.fromkeys(overlapping_weights(model), "its weight shares memory with another parameter")
    return found | {number: "another module holds the same weight" for number, n in holders.items() if n > 1}


def reason_against(layer: nn.Module, tied: Mapping[int, str]) -> str | None:
    """Why a layer's weight cannot come from a bank; None if it can. `tied` is from `tied_weights`."""
    weight = layer._parameters.get("weight")
    if isinstance(layer, LazyModuleMixin):
        return "lazy: run the model once first"
    if getattr(weight, "placements", None) is not None:
        return "sharded over processes: share first"
    if parametrize.is_parametrized(layer):
        return "parametrized"
    if weight is None:
        return "normalised or pruned by a hook"
    if weight.dtype not in _FLOATING:
        return f"its weight is of dtype {str(weight.dtype).removeprefix('torch.')}"
    if not weight.requires_grad:
        return "frozen"
    if hasattr(layer, "bank"):
        return "it already has an attribute named bank"
    return tied.get(id(weight))


def refuse_unfit(model: nn.Module) -> None:
    """Raise for a model that cannot be shared as it is.

    RuntimeError for one that is already wrapped for several devices: the wrapper knows only the parameters that sharing
    replaces, so the banks' gradients would not be averaged. ValueError as in `refuse_inference`.
    """
    for module in model.modules():
        if isinstance(module, nn.DataParallel):
            raise RuntimeError(DATA_PARALLEL)
        if type(module).__name__ in ("DistributedDataParallel", "FullyShardedDataParallel"):
            raise RuntimeError(
                f"share the model first, then wrap it in {type(module).__name__}, which keeps a list of its parameters"
            )
    refuse_inference(model)


_replaced: dict[int, weakref.ref[Tensor]] = {}  # weights that banks have replaced, while anything still holds them


def warn_old_optimizers(weights: Iterable[Tensor]) -> None:
    """Warn at the first step of an optimizer that still holds one of these weights: it does not train the banks."""
    _watch_optimizers()
    for weight in weights:
        _replaced[id(weight)] = weakref.ref(weight, functools.partial(_forget, id(weight)))


def _forget(number: int, _: Any) -> None:
    _replaced.pop(number, None)


@functools.cache
def _watch_optimizers() -> None:
    warned: weakref.WeakSet[Any] = weakref.WeakSet()

    def check(optimizer: Any, *_: Any) -> None:
        if not _replaced:  # the usual case: nothing holds a replaced weight
            return
        held = [id(weight) for group in optimizer.param_groups for weight in group["params"] if id(weight) in _replaced]
        if held and optimizer not in warned:
            warned.add(optimizer)
            warnings.warn(
                f"this optimizer was made before share_: {len(held)} of its parameters belong to no layer any more, and "
                "it does not train the template banks. Make a new one, such as torch.optim.SGD(softshare.decay_groups("
                "model, 5e-4), lr=0.1)",
                stacklevel=3,
            )

    register_optimizer_step_pre_hook(check)


@functools.cache
def guard_data_parallel(shared: type[nn.Module]) -> None:
    """Make `nn.DataParallel` raise RuntimeError from now on if it is given a model with layers of class `shared`.

    It does so even on a machine with a single device. Otherwise the failure would come only on a machine with several GPUs,
    at the first batch.
    """

    def check(parent: nn.Module, name: str, child: nn.Module | None) -> None:
        if isinstance(parent, nn.DataParallel) and child is not None:
            if any(isinstance(module, shared) for module in child.modules()):
                raise RuntimeError(DATA_PARALLEL)

    nn.modules.module.register_module_module_registration_hook(check)


def warn_of_partial_freezing(model: nn.Module, source: nn.Module, users: Sequence[tuple[str, nn.Module]]) -> None:
    """Warn if the parameters of one shared layer were frozen: that freezes the whole group, or nothing of its weight.

    The intention is inferred from the parameters around the weights: from biases, or else from the rest of the block.

    Args:
        model: the model that the layers belong to.
        source: the bank that they draw from; one that was frozen by its own ``requires_grad_(False)`` is fine.
        users: the layers, with their names in the model.
    """
    of_source = {id(parameter) for parameter in source.parameters()}
    clues = {name: _clues(model, name, layer, of_source, len(users)) for name, layer in users}
    bank = getattr(source, "name", "bank")
    if any(parameter.requires_grad for parameter in source.parameters()):
        frozen = [name for name, mine in clues.items() if mine and not any(p.requires_grad for p in mine)]
        if frozen and any(p.requires_grad for mine in clues.values() for p in mine):
            warnings.warn(
                f"the weights of {', '.join(frozen)} are not frozen, although the parameters around them are: they are "
                f"mixed from the bank {bank!r} and keep learning. To freeze a single layer, freeze it before share_, "
                "which leaves frozen layers alone",
                stacklevel=3,
            )
    elif not any(getattr(module, "frozen_on_purpose", False) for module in source.modules()):
        names = {id(module): name for name, module in model.named_modules()}
        if any(p.requires_grad for p in [p for mine in clues.values() for p in mine] or _between(model, users)):
            warnings.warn(
                f"the bank {bank!r} is frozen, and with it the weights of all layers that draw from it: "
                f"{', '.join(clues)}. To freeze a single layer, freeze it before share_, which leaves frozen layers "
                "alone; to freeze the group without this warning, call "
                f"model.get_submodule({names[id(source)]!r}).requires_grad_(False)",
                stacklevel=3,
            )


def _clues(model: nn.Module, name: str, layer: nn.Module, of_source: set[int], users: int) -> list[nn.Parameter]:
    """The layer's own parameters; for a layer without, those of its block, unless the whole group shares that block."""
    own = [parameter for parameter in layer.parameters() if id(parameter) not in of_source]
    block = model.get_submodule(name.rpartition(".")[0])
    shared = sum("softshare_source" in module.__dict__ for module in block.modules())
    if own or shared >= users:
        return own
    banks = {id(p) for module in block.modules() if hasattr(module, "frozen_on_purpose") for p in module.parameters()}
    return [parameter for parameter in block.parameters() if id(parameter) not in banks]


def _between(model: nn.Module, users: Sequence[tuple[str, nn.Module]]) -> list[nn.Parameter]:
    """Parameters of the modules between the first and the last layer of a group: a head behind them trains by itself."""
    names = [name for name, _ in model.named_modules()]
    first, last = names.index(users[0][0]), names.index(users[-1][0])
    return [p for name in names[first : last + 1] for p in model.get_submodule(name).parameters(recurse=False)]
