"""Search next to a network: steps by networkx, answers by the network itself, pixel by pixel."""

from __future__ import annotations

from collections import Counter

import networkx
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb

from softshare import models, pictures
from softshare.shortest_path import generate, steps_from


def oracle(inputs):
    """Steps from the first query by networkx, (H, W) with -1 where there is no path."""
    free = ~inputs[1].numpy()
    height, width = free.shape
    graph = networkx.grid_2d_graph(height, width)
    graph.remove_nodes_from([node for node in list(graph) if not free[node]])
    steps = -np.ones(free.shape, dtype=int)
    for node, length in networkx.single_source_shortest_path_length(
        graph, tuple(np.argwhere(inputs[0].numpy())[0])
    ).items():
        steps[node] = length
    return steps


def test_steps_agree_with_networkx():
    grids = generate(40, size=9, box=9, obstacle_probability=0.35, seed=3)
    found = steps_from(grids.inputs)
    for inputs, steps in zip(grids.inputs, found, strict=True):
        assert np.array_equal(steps.numpy(), oracle(inputs))
    assert (found == -1).logical_and(~grids.inputs[:, 1]).any(), "some free pixels are out of reach"
    with pytest.raises(ValueError, match="must mark a query"):
        steps_from(torch.zeros(1, 2, 5, 5))


def test_search_and_guesses_are_counted_correctly(rendered):
    torch.manual_seed(0)
    networks = {"CNN": models.gridnet(5, 4).eval(), "SCNN": models.gridnet(5, 4, templates=5).eval()}
    picture = pictures.search(networks, 8, 7, 0.3, seed=4, grids=3)
    grids = generate(3, 8, 7, 0.3, seed=4)
    for n in range(3):
        steps, free = oracle(grids.inputs[n]), ~grids.inputs[n, 1]
        for step, (name, network) in zip((0, 3), networks.items(), strict=True):
            reached, wrong = rendered(picture, step=step, net=name, grid=f"grid {n + 1}").find_text(
                r"search: (\d+) pixels? reached; network: (\d+) pixels? wrong"
            )
            assert int(reached) == ((steps >= 0) & (steps <= step)).sum()
            with torch.no_grad():
                guess = network(grids.inputs[n : n + 1])[0] > 0
            assert int(wrong) == int(((guess != grids.targets[n]) & free).sum()), (
                "after all layers: the network's answer"
            )
    assert picture.controls["step"].start <= picture.controls["step"].most
    early = {rendered(picture, layer=layer).find_text(r"network: (\d+)")[0] for layer in range(6)}
    assert len(early) > 1, "the layers differ"


def test_every_pixel_of_the_search_has_the_right_colour(rendered):
    torch.manual_seed(1)
    network = models.gridnet(4, 6).eval()
    picture = pictures.search({"CNN": network}, 9, 7, 0.25, seed=2, grids=2)
    grids = generate(2, 9, 7, 0.25, seed=2)
    with torch.no_grad():
        marks = (network(grids.inputs) > 0).numpy()
    for n in (0, 1):
        steps, truth = oracle(grids.inputs[n]), grids.targets[n].numpy()
        queries, obstacles = grids.inputs[n].numpy()
        free = ~queries & ~obstacles
        found = Counter(fill.upper() for fill in rendered(picture, step=3, grid=f"grid {n + 1}").fills)
        expected = {
            "#595959": 2 * obstacles.sum(),
            "#0072B2": 2 * queries.sum(),
            "#CFE8F7": (free & (steps >= 0) & (steps < 3)).sum(),
            "#56B4E9": (free & (steps == 3)).sum(),
            "#E69F00": (free & marks[n] & truth).sum(),
            "#CC79A7": (free & marks[n] & ~truth).sum(),
            "BLACK": 2 * (free & truth).sum(),  # the dots
        }
        assert {colour: found[colour] for colour in expected} == expected
        # The live form, pixel by pixel.
        drawn = picture.draw(step=3, layer=4, grid=f"grid {n + 1}", net="CNN")
        left, right = (axes.get_images()[0].get_array() for axes in drawn.axes)
        shades = {name: np.array(to_rgb(name)) for name in ("#CFE8F7", "#56B4E9", "#E69F00", "#CC79A7")}
        assert np.array_equal(np.isclose(left, shades["#CFE8F7"]).all(-1), free & (steps >= 0) & (steps < 3))
        assert np.array_equal(np.isclose(left, shades["#56B4E9"]).all(-1), free & (steps == 3))
        assert np.array_equal(np.isclose(right, shades["#E69F00"]).all(-1), free & marks[n] & truth)
        assert np.array_equal(np.isclose(right, shades["#CC79A7"]).all(-1), free & marks[n] & ~truth)


def test_networks_are_left_as_they_were_and_refused_in_training_mode():
    network = models.gridnet(5, 4)
    with pytest.raises(ValueError, match="evaluation mode"):
        pictures.search({"CNN": network}, 8, 5, 0.2)
    with pytest.raises(ValueError, match=r"one depth, got layers: {'a': 5, 'b': 4}"):
        pictures.search({"a": network.eval(), "b": models.gridnet(4, 4).eval()}, 8, 5, 0.2)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    pictures.search({"CNN": network}, 8, 5, 0.2, grids=1)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


@pytest.mark.parametrize("templates", [None, 3])
def test_an_answer_after_some_layers_is_that_of_the_network_cut_there(templates):
    network = models.gridnet(5, 4, templates).eval()
    inputs = generate(3, 9, 7, 0.2).inputs
    answers = network.answers_by_layer(inputs)
    assert answers.shape == (3, 6, 9, 9) and answers.dtype is torch.bool and not answers.is_inference()
    stages = [network.stem, *network.layers]
    with torch.no_grad():
        assert torch.equal(answers[:, -1], network(inputs) > 0)
        for layers in range(6):
            features = torch.nn.Sequential(*stages[: layers + 1])(inputs.float())
            assert torch.equal(answers[:, layers], network.head(features).squeeze(1) > 0)
    with pytest.raises(ValueError, match=r"\(N, 2, H, W\), got \(2, 9, 9\)"):
        network.answers_by_layer(inputs[0])
    with pytest.raises(ValueError, match="evaluation mode"):
        network.train().answers_by_layer(inputs)
