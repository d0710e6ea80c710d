"""Profile gpu is laid out for 15 minutes a chapter on a T4 in float16. This is an estimate on paper: nothing is run.

Counted are the trainings, and in chapter 3 the folded networks that are evaluated: at a quarter of the T4's peak for
the multiply-adds, and after that, as if the two did not overlap, at its memory's bandwidth for what passes over
activations. A tenth of the time is left for the rest: scores on held-out examples, figures, the start. Grids of 32
channels are bound by the memory, and, a batch of 100 being small, by how fast kernels can be launched, for which
`softshare.recipes` has a guess.
"""

from __future__ import annotations

import ast
import math
from typing import Any

import pytest
import torch
from build import read_chapter
from torch import nn

from softshare import models, recipes

MINUTES, ROOM = 15, 0.9
OPERATIONS, BANDWIDTH = 65e12 / 4, 320e9  # floating-point operations and bytes a second
PASSES = 25  # over each convolution's output, ten of them forward: convolution, BatchNorm, ReLU, sum


def gpu_sizes(top, name) -> dict[str, Any]:
    """What a chapter's code assigns to SIZES["gpu"] or PLANS["gpu"]: an entry of a dictionary, or a line of its own."""
    for cell in read_chapter(top / "book" / f"{name}.md").cells:
        for node in ast.walk(ast.parse(cell.source if cell.cell_type == "code" else "")):
            target = ast.unparse(node.targets[0]) if isinstance(node, ast.Assign) else ""
            if target in ("SIZES", "PLANS", "SIZES['gpu']", "PLANS['gpu']"):
                value = eval(compile(ast.Expression(node.value), name, "eval"), {"__builtins__": {"dict": dict}})
                if "gpu" in target or "gpu" in value:
                    return value if "gpu" in target else value["gpu"]
    raise AssertionError(f"{name} has no sizes for profile gpu")


def trainings(top, name) -> tuple[list[str], int, int, int]:
    """Networks, examples that each is trained on, examples a batch, and side."""
    size = gpu_sizes(top, name)
    if name == "04-shortest-path":
        seen = size["examples"] * size["epochs"] * len(size["boxes"])
        return [f"CNN {size['layers']} {size['width']}"] * 2, seen, size["batch"], size["size"]
    networks = [size["plain"], size["shared"]] if name == "02-training" else [size["network"]] * 2
    seen = size["train"] * size["epochs"]
    if name == "03-similarity":  # before folding and at a dozen different plans, in two ways; a pass forward is a third
        seen += 2 * 13 * size["test"] // 3
    return networks, seen, size["batch"], 32 // size["shrink"]


def seconds(network: str, examples: int, batch: int, side: int) -> float:
    """The estimate for one training."""
    layers, width = map(int, network.split()[1:]) if network.startswith("CNN") else (0, 0)
    with torch.device("meta"):
        model = models.gridnet(layers, width) if layers else models.build(network)
        inputs = torch.zeros(1, 2 if layers else 3, side, side)
    elements = 0

    def add(layer: nn.Module, _: Any, output: torch.Tensor) -> None:
        nonlocal elements
        elements += output.numel()

    convolutions = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    for layer in convolutions:
        layer.register_forward_hook(add)
    model.eval()(inputs)
    arithmetic = 2 * 3 * recipes.multiply_adds(network, layers, side, width) / OPERATIONS
    memory = PASSES * 2 * elements / BANDWIDTH
    launches = recipes._LAUNCHES * len(convolutions) * math.ceil(examples / batch)
    return max((arithmetic + memory) * examples, launches)


@pytest.mark.parametrize("name", ["02-training", "03-similarity", "04-shortest-path"])
def test_profile_gpu_is_expected_to_take_less_than_a_quarter_of_an_hour(top, name):
    networks, *how = trainings(top, name)
    minutes = sum(seconds(network, *how) for network in networks) / 60
    print(f"{name}: {', '.join(networks)}: about {minutes:.1f} min")
    assert 1 < minutes < ROOM * MINUTES
