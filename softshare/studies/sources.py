"""How the networks that the poster compares with were trained by those who published them.

The schedules are those of profile "paper"; shorter profiles keep their shape, with shorter and fewer cycles. Rates
are per epoch here, even if a source changes them at every step. Notes mark what a source does not say, or what differs here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Source(NamedTuple):
    """One source's way to train a network.

    Attributes:
        schedule: fields of `softshare.training.Schedule` that differ from our defaults.
        options: of `softshare.models.build`: drop-path, auxiliary head, dropout.
        note: where this was read, and what was not stated.
    """

    schedule: Mapping[str, Any]
    options: Mapping[str, Any]
    note: str


_DENSE = {
    "epochs": 300,
    "batch_size": 64,
    "milestones": (0.5, 0.75),
    "factor": 0.1,
    "weight_decay": 1e-4,
}
_IMAGENET = {"epochs": 90, "batch_size": 256, "milestones": (1 / 3, 2 / 3), "factor": 0.1, "weight_decay": 1e-4}
_DARTS = {
    "epochs": 600,
    "batch_size": 96,
    "rate": 0.025,
    "annealing": "cosine",
    "weight_decay": 3e-4,
    "nesterov": False,
    "clip": 5.0,
}
_DARTS_OPTIONS = {"auxiliary": True, "drop_path": 0.2}
_NASNET = Source(
    {"epochs": 600, "batch_size": 32, "rate": 0.025, "annealing": "cosine", "weight_decay": 5e-4, "clip": 5.0},
    {"auxiliary": True, "drop_path": 0.4},
    "tensorflow/models@research/slim/nets/nasnet/nasnet.py; the kind of momentum is not stated",
)
_AMOEBA = Source(
    {"epochs": 600, "batch_size": 128, "rate": 0.024, "annealing": "cosine", "weight_decay": 5e-4},
    {"auxiliary": True, "drop_path": 0.3, "dropout": 0.3},
    "not published for CIFAR-10 by its authors: this is what reimplementations use",
)

SOURCES: dict[str, Source] = {
    "ResNeXt-29 16x64": Source(
        {"epochs": 300, "milestones": (0.49, 0.74), "factor": 0.1},
        {},
        "facebookresearch/ResNeXt@README.md, opts.lua; the paper's figures are of another block order and batch 256",
    ),
    "DenseNet 100-24": Source(_DENSE, {}, "liuzhuang13/DenseNet@README.md, opts.lua"),
    "DenseNet 190-40": Source(_DENSE, {}, "liuzhuang13/DenseNet@README.md, opts.lua"),
    "NASNet-A": _NASNET,
    "NASNet-A 27.6M": _NASNET._replace(options={**_NASNET.options, "cell": "NASNet-A figure"}),
    "AmoebaNet-B": _AMOEBA,
    "AmoebaNet-B 13.7M": _AMOEBA,
    "AmoebaNet-B 34.9M": _AMOEBA,
    "DARTS": Source(_DARTS, _DARTS_OPTIONS, "quark0/darts@cnn/train.py"),
    "SNAS": Source(_DARTS, _DARTS_OPTIONS, "SNAS-Series/SNAS-Series@SNAS/train.py"),
    "ENAS": Source(
        {
            "epochs": 630,
            "batch_size": 144,
            "rate": 0.05,
            "annealing": "cosine",
            "least_rate": 1e-4,
            "cycle": 10,
            "growth": 2,
            "weight_decay": 4e-4,
        },
        {"auxiliary": True, "drop_path": 0.4, "dropout": 0.2},
        "melodyguan/enas@scripts/cifar10_micro_final.sh, without clipping, which has no effect there; its 2e-4 of L2 is not "
        "halved, so the decay is 4e-4; cutout, as for the quoted error, is off in the script",
    ),
    "DenseNet-264": Source(_IMAGENET, {}, "liuzhuang13/DenseNet@opts.lua; the recipe of this depth is not stated"),
    "ResNet-200": Source(
        _IMAGENET,
        {},
        "facebookarchive/fb.resnet.torch@opts.lua, without its colour jitter; whether this depth trained longer is not "
        "stated",
    ),
}
"""By the network's name on the poster.

:meta hide-value:
"""
