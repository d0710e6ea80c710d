"""One layer run again and again, against the loop written out, and what it may be asked to do."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from softshare import models
from softshare.models.looped import LoopedGridNet


def grids(n=2, side=7):
    return torch.randint(2, (n, 2, side, side), generator=torch.Generator().manual_seed(0)).float()


def test_per_step_it_is_the_grid_network_with_one_weight():
    """The same as a grid network all of whose layers have the same weight, each with its own BatchNorm."""
    looped, plain = LoopedGridNet(4, 8, "batch"), models.gridnet(4, 8)
    looped.stem.load_state_dict(plain.stem.state_dict())
    looped.head.load_state_dict(plain.head.state_dict())
    for layer in plain.layers:
        layer.conv.weight.data.copy_(looped.conv.weight)
    for net in (looped, plain):
        net.train()
        net(grids(20))  # gives each step its own statistics
        net.eval()
    torch.testing.assert_close(looped(grids()), plain(grids()))
    assert len({float(norm.running_var[0]) for norm in looped.norms}) == 4


@pytest.mark.parametrize("recall", [False, True])
def test_the_loop_written_out(recall):
    torch.manual_seed(0)
    net, inputs = LoopedGridNet(3, 8, recall=recall), grids()
    for steps in (None, 1, 7):
        x = F.conv2d(inputs, net.stem.weight, net.stem.bias)
        for _ in range(steps or 3):
            seen = torch.cat((x, inputs), 1) if recall else x
            x = x + F.relu(F.group_norm(F.conv2d(seen, net.conv.weight, padding=1), 2, *net.norms[0].parameters()))
        expected = F.conv2d(x, net.head.weight, net.head.bias)[:, 0]
        torch.testing.assert_close(net(inputs, steps), expected)


def test_steps_are_drawn_in_training_alone():
    net, counted = LoopedGridNet(10, 4, random_steps=True), []
    net.conv.register_forward_hook(lambda *_: counted.append(1))

    def steps():
        counted.clear()
        net(grids())
        return len(counted)

    torch.manual_seed(0)
    drawn = {steps() for _ in range(200)}
    assert drawn == set(range(5, 16))
    net.eval()
    assert {steps() for _ in range(5)} == {10}
    torch.manual_seed(3)
    first = [net.train() and steps() for _ in range(5)]
    torch.manual_seed(3)
    assert first == [steps() for _ in range(5)], "the same for a seed"


def test_what_it_refuses():
    with pytest.raises(ValueError, match="statistics for 4 steps, got 5"):
        LoopedGridNet(4, 8, "batch")(grids(), 5)
    for arguments, message in (
        ((4, 8, "layer"), "unknown tied 'layer'"),
        ((4, 6, "group"), "multiple of 4, got 6"),
        ((0, 8), "steps"),
        ((4, 8, "batch", False, True), "needs tied='group'"),
    ):
        with pytest.raises(ValueError, match=message):
            LoopedGridNet(*arguments)
    with pytest.raises(ValueError, match="SCNN shares softly"):
        models.build("SCNN", tied="group")


def test_it_is_built_by_name_and_counted():
    net = models.build("CNN", tied="group", recall=True)
    assert isinstance(net, LoopedGridNet) and net.steps == 20 and net.recall
    parameters = 2 * 32 + 32 + 9 * 34 * 32 + 2 * 32 + 32 + 1
    assert models.parameters("CNN", tied="group", recall=True) == parameters
    once = models.multiply_adds("CNN", 32, tied="group")
    assert once == models.multiply_adds("CNN", 32), "the same work as 20 layers"
