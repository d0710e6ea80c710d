"""The networks of the poster, by function (`wrn`, `swrn`, `gridnet`) or by the poster's names (`build`)."""

from .bottleneck import resnet200, swrn50, wrn50
from .building import build
from .counts import activations, convolutions, multiply_adds, parameters
from .densenet import densenet, densenet264
from .grid import gridnet
from .names import Network
from .resnext import resnext
from .searched import cell_network
from .wide_resnet import swrn, wrn

__all__ = [
    "Network",
    "activations",
    "build",
    "cell_network",
    "convolutions",
    "densenet",
    "densenet264",
    "gridnet",
    "multiply_adds",
    "parameters",
    "resnet200",
    "resnext",
    "swrn",
    "swrn50",
    "wrn",
    "wrn50",
]
