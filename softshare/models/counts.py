"""Counts a network's parameters and multiply-adds without allocating memory for it."""

from __future__ import annotations

import functools

import torch

from .building import build
from .names import Network


def _built(network: Network) -> torch.nn.Module:
    with torch.device("meta"):
        return build(network).eval()


def parameters(name: str | Network) -> int:
    """Number of parameters of a network, with its default number of classes. Raises ValueError as `build` does."""
    network = name if isinstance(name, Network) else Network.parse(name)
    return sum(parameter.numel() for parameter in _built(network).parameters())


def multiply_adds(name: str | Network, side: int | None = None) -> int:
    """Multiply-adds of one example's forward pass through the plain network; mixing templates is not counted.

    `side` is the side of the square input in pixels, by default 224 for ImageNet networks, else 32. Only convolutions
    and linear layers are counted. Raises ValueError as `build` does.
    """
    network = name if isinstance(name, Network) else Network.parse(name)
    return _multiply_adds(network.plain, side or (224 if network.imagenet else 32))


@functools.lru_cache(maxsize=128)
def _multiply_adds(network: Network, side: int) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    images = torch.zeros(1, 2 if network.grids else 3, side, side, device="meta")
    with FlopCounterMode(display=False) as counter:
        _built(network)(images)
    return counter.get_total_flops() // 2
