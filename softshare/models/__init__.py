"""The networks of the poster, by function (`wrn`, `swrn`, `gridnet`) or by the poster's names (`build`)."""

from .bottleneck import swrn50, wrn50
from .building import build
from .counts import multiply_adds, parameters
from .grid import gridnet
from .names import Network
from .wide_resnet import swrn, wrn

__all__ = ["Network", "build", "gridnet", "multiply_adds", "parameters", "swrn", "swrn50", "wrn", "wrn50"]
