"""Counts a network's parameters and multiply-adds without allocating memory for it."""

from __future__ import annotations

import functools
from typing import Any

import torch

from .building import build
from .names import Network


@functools.lru_cache(maxsize=4)  # counts of one network are often asked for together
def _built(network: Network, options: tuple[tuple[str, Any], ...]) -> torch.nn.Module:
    """A network without memory, in eval mode; for counting only."""
    with torch.device("meta"):
        return build(network, **dict(options)).eval()


def parameters(name: str | Network, **options: Any) -> int:
    """Number of parameters of a network, with its default number of classes; options and errors as for `build`.

    An auxiliary head counts only if asked for (``parameters("DARTS", auxiliary=True)``).
    """
    network = name if isinstance(name, Network) else Network.parse(name)
    return sum(parameter.numel() for parameter in _built(network, tuple(sorted(options.items()))).parameters())


def convolutions(name: str | Network, **options: Any) -> int:
    """Number of convolutions that one forward pass runs, those of an auxiliary head aside. Errors as for `build`."""
    network = name if isinstance(name, Network) else Network.parse(name)
    return _convolutions(network.plain, tuple(sorted(options.items())))


@functools.lru_cache(maxsize=128)
def _convolutions(network: Network, options: tuple[tuple[str, Any], ...]) -> int:
    model = _built(network, options)
    return sum(
        isinstance(module, torch.nn.Conv2d)
        for name, module in model.named_modules()
        if not name.startswith("auxiliary")
    )


def multiply_adds(name: str | Network, side: int | None = None, **options: Any) -> int:
    """Multiply-adds of one example's forward pass through the plain network; mixing templates is not counted.

    `side` is the side of the square input in pixels, by default 224 for ImageNet networks, else 32. Only convolutions
    and linear layers are counted, no auxiliary head. Options and errors as for `build`.
    """
    network = name if isinstance(name, Network) else Network.parse(name)
    side = side or (224 if network.imagenet else 32)
    return _multiply_adds(network.plain, side, tuple(sorted(options.items())))


@functools.lru_cache(maxsize=128)
def _multiply_adds(network: Network, side: int, options: tuple[tuple[str, Any], ...]) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    images = torch.zeros(1, 2 if network.grids else 3, side, side, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        _built(network, options)(images)
    return counter.get_total_flops() // 2


def activations(name: str | Network, side: int | None = None, **options: Any) -> int:
    """Numbers that one example's forward pass keeps for its backward pass: about four bytes each in float32.

    Counted in the plain network in training mode, without an auxiliary head; `side`, options and errors as for
    `multiply_adds`.
    """
    network = name if isinstance(name, Network) else Network.parse(name)
    side = side or (224 if network.imagenet else 32)
    return _activations(network.plain, side, tuple(sorted(options.items())))


@functools.lru_cache(maxsize=128)
def _activations(network: Network, side: int, options: tuple[tuple[str, Any], ...]) -> int:
    model = _built.__wrapped__(network, options)  # one of its own, since it is put into training mode
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no storage takes the place of one that was counted

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    # Two examples: BatchNorm cannot normalise a single one whose feature maps have one pixel.
    images = torch.zeros(2, 2 if network.grids else 3, side, side, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.train()(images)
    return sum(storage.nbytes() for storage in kept.values()) // 8
