"""One layer run again and again, for the shortest-path task: does a loop search farther if it may run longer?

Soft sharing lets layers become alike; here they are one layer by construction. The options are the ingredients of networks
built to extrapolate (Schwarzschild et al. 2021, Bansal et al. 2022): the grid fed in again at each step, and a number of
steps drawn at random in training.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..arguments import count

TIED = ("batch", "group")
GROUP = 4
"""Channels per group of GroupNorm."""


class LoopedGridNet(nn.Module):
    """A 1x1 convolution from 2 channels, one 3x3 layer with a skip run repeatedly, a 1x1 convolution to one channel.

    (N, 2, H, W) grids (queries, obstacles; bool or floating) of any size to (N, H, W) logits.

    Statistics of BatchNorm exist only for trained steps. So a network with BatchNorm per step cannot run more of them; with
    GroupNorm, which keeps no statistics, all steps share one normalisation and their number is free.

    Args:
        steps: how often the layer runs.
        width: number of channels.
        tied: "batch": BatchNorm per step; "group": one GroupNorm for all steps.
        recall: whether the layer also sees the grid at each step.
        random_steps: whether training draws the number of steps of each batch, from `steps` / 2 to 3 `steps` / 2.

    Raises:
        ValueError: a number below 1, an unknown `tied`, a width that GroupNorm cannot divide, or random steps with
            BatchNorm per step.
        TypeError: sizes that are not whole numbers.
    """

    def __init__(
        self, steps: int = 20, width: int = 32, tied: str = "group", recall: bool = False, random_steps: bool = False
    ) -> None:
        super().__init__()
        self.steps, self.tied = count("steps", steps), tied
        self.recall, self.random_steps = recall, random_steps
        count("width", width)
        if tied not in TIED:
            raise ValueError(f"unknown tied {tied!r}; known: {', '.join(TIED)}")
        if tied == "group" and width % GROUP:
            raise ValueError(f"GroupNorm needs a width that is a multiple of {GROUP}, got {width}")
        if tied == "batch" and random_steps:
            raise ValueError("with BatchNorm per step the number of steps is fixed; random_steps needs tied='group'")
        norm: Callable[[], nn.Module] = (
            (lambda: nn.GroupNorm(width // GROUP, width)) if tied == "group" else (lambda: nn.BatchNorm2d(width))
        )
        self.stem = nn.Conv2d(2, width, 1)
        self.conv = nn.Conv2d(width + 2 * recall, width, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(self.conv.weight)
        self.norms = nn.ModuleList(norm() for _ in range(self.steps if tied == "batch" else 1))
        self.head = nn.Conv2d(width, 1, 1)

    def forward(self, grids: Tensor, steps: int | None = None) -> Tensor:
        """The logits after `steps` steps; default: as many as in training.

        Raises ValueError for more steps than there are normalisations.
        """
        grids = grids.to(self.stem.weight.dtype)
        if steps is None:
            low, high = self.steps - self.steps // 2, self.steps + self.steps // 2
            drawn = self.training and self.random_steps
            steps = int(torch.randint(low, high + 1, (), device="cpu")) if drawn else self.steps
        count("steps", steps)
        if self.tied == "batch" and steps > len(self.norms):
            raise ValueError(f"BatchNorm has statistics for {len(self.norms)} steps, got {steps}")
        x = self.stem(grids)  # (N, width, H, W)
        for step in range(steps):
            seen = torch.cat((x, grids.to(x.dtype)), dim=1) if self.recall else x
            x = x + F.relu(self.norms[min(step, len(self.norms) - 1)](self.conv(seen)))
        return self.head(x).squeeze(1)  # type: ignore[no-any-return]
