"""What can go wrong with a model that nobody here has seen: what `share_` leaves alone, what it refuses, what it warns of.

The method can be read without this file.
"""

from __future__ import annotations

import functools
import warnings
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

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
    """The parameters of a shared layer: whoever looks for "weight" among them, as weight_norm does, is told why it is gone.

    Raises RuntimeError for reading, setting or deleting "weight".
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
    """What a shared layer refuses: a weight of its own, whoever would give it one, and what it cannot be run by."""

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
        if f"{prefix}weight" in state_dict:  # an error with strict=False as well: the weight would be lost in silence
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
            "a layer reads its weight from a template bank that is sharded over processes at this moment. With "
            "fully_shard on each block, a bank is gathered only while the block that holds it runs; call fully_shard "
            "once, on the whole model, or use DistributedDataParallel. Elsewhere than in the model's forward pass, gather "
            "the parameters first"
        )


def refuse_inference(model: nn.Module) -> None:
    """Raise ValueError for a model whose parameters were made under torch.inference_mode, and so can never learn."""
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, nn.UninitializedParameter) and parameter.is_inference():
            raise ValueError(
                f"the parameter {name!r} was made under torch.inference_mode, so it can take no gradient; build or load the "
                "model outside inference_mode"
            )


def overlapping_weights(model: nn.Module) -> set[int]:
    """The id of every parameter whose memory another parameter of the model uses too, as after ``a.weight = b.weight.T``."""
    places: dict[int, list[tuple[int, int, int]]] = defaultdict(
        list
    )  # storage -> (first byte, byte after the last, id)
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
    """The id of every parameter that is tied to another place of the model, with the reason."""
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
        return "it has an attribute named bank already"
    return tied.get(id(weight))


@functools.cache
def guard_data_parallel(shared: type[nn.Module]) -> None:
    """From now on, putting a model with layers of class `shared` into `nn.DataParallel` raises RuntimeError.

    It does so even on a machine where only one device would be used; without it the failure would come only on a machine
    with several GPUs, at the first batch.
    """

    def check(parent: nn.Module, name: str, child: nn.Module | None) -> None:
        if isinstance(parent, nn.DataParallel) and child is not None:
            if any(isinstance(module, shared) for module in child.modules()):
                raise RuntimeError(DATA_PARALLEL)

    nn.modules.module.register_module_module_registration_hook(check)


def warn_of_partial_freezing(model: nn.Module, source: nn.Module, users: Sequence[tuple[str, nn.Module]]) -> None:
    """Warn where the parameters of one shared layer were frozen: that freezes the whole group, or nothing but a bias.

    Args:
        model: that the layers belong to.
        source: the bank that they draw from; one that was frozen by its own ``requires_grad_(False)`` is fine.
        users: the layers with their names in the model.
    """
    of_source = {id(parameter) for parameter in source.parameters()}
    own = {name: [p for p in layer.parameters() if id(p) not in of_source] for name, layer in users}
    bank = getattr(source, "name", "bank")
    if any(parameter.requires_grad for parameter in source.parameters()):
        frozen = [name for name, mine in own.items() if mine and not any(p.requires_grad for p in mine)]
        if frozen and any(p.requires_grad for mine in own.values() for p in mine):
            warnings.warn(
                f"only the biases of {', '.join(frozen)} are frozen: their weights are mixed from the bank {bank!r} and "
                "keep learning. To freeze a single layer, freeze it before share_, which leaves frozen layers alone",
                stacklevel=3,
            )
    elif not getattr(source, "frozen_on_purpose", False):
        # What would be frozen too if the whole group had been meant: the layers' biases, or whatever else is beside them.
        beside = [parameter for mine in own.values() for parameter in mine] or [
            parameter for name in own for parameter in model.get_submodule(name.rpartition(".")[0]).parameters()
        ]
        if any(parameter.requires_grad for parameter in beside):
            warnings.warn(
                f"the bank {bank!r} is frozen, and with it the weights of all layers that draw from it: "
                f"{', '.join(own)}. To freeze a single layer, freeze it before share_, which leaves frozen layers alone; to "
                f"freeze the group without this warning, call softshare.banks(model)[{bank!r}].requires_grad_(False)",
                stacklevel=3,
            )
