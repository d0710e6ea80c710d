"""Profile gpu is planned for 15 minutes per chapter on a T4 in float16. This is an estimate on paper: nothing is run.

The estimate counts the trainings and, in chapter 3, the folded networks that are evaluated. Multiply-adds run at a quarter
of the T4's peak; passes over activations run at its memory bandwidth, and their time is added, as if the two did not
overlap. A tenth of the time is left for the rest: scores on held-out examples, figures, the start. Grids of 32 channels are
bound by the memory and, since a batch of 100 is small, by how fast kernels can be launched, for which
`softshare.studies.costs` has a guess.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from softshare import models
from softshare.studies import Plan, costs, make_plan, study_of

MINUTES, ROOM = 15, 0.9
OPERATIONS, BANDWIDTH = 65e12 / 4, 320e9  # floating-point operations and bytes per second
PASSES = 25  # over each convolution's output, ten of them forward: convolution, BatchNorm, ReLU, sum


#: The recipes that each chapter trains.
CHAPTERS = {
    "02-training": ("WRN 28-10", "SWRN 28-10-2"),
    "03-similarity": ("SWRN 40-8-8", "SWRN 40-8-8 with penalty"),
    "04-shortest-path": ("CNN", "SCNN"),
}


def seconds(plan: Plan, folds: bool) -> float:
    """The estimate for one training."""
    examples = study_of(plan).examples(plan) * plan.settings.epochs
    if folds:  # before folding and for a dozen plans, in two ways; a forward pass is a third
        examples += 2 * 13 * 10_000 // 3
    side = plan.sizes["side"]
    with torch.device("meta"):
        model = models.build(plan.network)
        inputs = torch.zeros(1, 2 if plan.network.grids else 3, side, side)
    elements = 0

    def add(layer: nn.Module, _: Any, output: torch.Tensor) -> None:
        nonlocal elements
        elements += output.numel()

    convolutions = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    for layer in convolutions:
        layer.register_forward_hook(add)
    model.eval()(inputs)
    arithmetic = 2 * 3 * models.multiply_adds(plan.network, side) / OPERATIONS
    memory = PASSES * 2 * elements / BANDWIDTH
    launches = costs.LAUNCH_SECONDS * len(convolutions) * math.ceil(examples / plan.settings.batch_size)
    return max((arithmetic + memory) * examples, launches)


@pytest.mark.parametrize("name", CHAPTERS)
def test_profile_gpu_is_expected_to_take_less_than_a_quarter_of_an_hour(top, name):
    text = (top / "book" / f"{name}.md").read_text(encoding="utf8")
    plans = [make_plan(recipe, "gpu") for recipe in CHAPTERS[name]]
    assert all(f'"{plan.recipe.name}"' in text for plan in plans)
    minutes = sum(seconds(plan, folds=name == "03-similarity") for plan in plans) / 60
    print(f"{name}: {', '.join(str(plan.network) for plan in plans)}: about {minutes:.1f} min")
    assert 1 < minutes < ROOM * MINUTES
