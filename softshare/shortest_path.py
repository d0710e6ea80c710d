"""The shortest-path task: grids with obstacles, exact targets, the curriculum's phases, and how answers are scored.

Each example is a square grid with two query pixels and random obstacles; the target marks every pixel that lies on some
shortest path between the queries, moving in four directions over free pixels. The poster gives the input (32 x 32 x 2), the
target and a curriculum of 50 epochs per phase with growing distance. Obstacle probability, the box of each phase and the
4-connected grid are remembered from the paper, not confirmed.

Letters: N grids of H x W pixels (H = W = size).
"""

from __future__ import annotations

import numbers
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .arguments import count

PHASES = (5, 9, 13, 17, 21)
"""Side of the box around the first query that contains the second, in the five phases of the curriculum."""

_TRIES = 1000
_WORD = 64


class Grids(NamedTuple):
    """Examples of the shortest-path task.

    Attributes:
        inputs: (N, 2, H, W) bool; channel 0 marks the two queries, channel 1 the obstacles.
        targets: (N, H, W) bool; every pixel on some shortest path, both queries included.
        distances: (N,) int64; the number of steps on a shortest path.
    """

    inputs: Tensor
    targets: Tensor
    distances: Tensor


def generate(n: int, size: int = 32, box: int = 9, obstacle_probability: float = 0.1, seed: int = 0) -> Grids:
    """Draw n grids with their exact targets.

    The first query is uniform over the grid, the second uniform over the box around it: inside the grid, at most
    ``box // 2`` rows and columns away, not the same pixel. Every other pixel is an obstacle with the given probability.
    If the queries are not connected, queries and obstacles are drawn again.

    Random numbers come from our own counter-based generator (SplitMix64 of seed, grid, try and pixel), so a seed gives
    the same grids on every machine and library version, and a longer set begins with the grids of a shorter one.

    Args:
        n: number of grids.
        size: side of the grid, at least 3.
        box: odd side of the box, from 3 to `size`.
        obstacle_probability: at least 0 and below 1.
        seed: any whole number from 0 to 2**63 - 1.

    Raises:
        ValueError: an argument out of range, or an obstacle probability so high that no connected pair is found for
            some grid within 1,000 tries.
        TypeError: sizes or a seed that are not whole numbers.
    """
    count("n", n)
    count("size", size)
    count("box", box)
    if size < 3:
        raise ValueError(f"size must be at least 3, the smallest box; got {size}")
    if box % 2 == 0 or not 3 <= box <= size:
        raise ValueError(f"box must be odd, at least 3 and at most size ({size}), got {box}")
    if isinstance(obstacle_probability, bool) or not isinstance(obstacle_probability, numbers.Real):
        raise TypeError(f"obstacle_probability must be a number, got {obstacle_probability!r}")
    if not 0.0 <= obstacle_probability < 1.0:
        raise ValueError(f"obstacle_probability must be at least 0 and below 1, got {obstacle_probability}")
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral):
        raise TypeError(f"seed must be a whole number, got {seed!r}")
    seed = int(seed)
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be from 0 to 2**63 - 1, got {seed}")
    inputs = np.zeros((n, 2, size, size), dtype=bool)
    targets = np.zeros((n, size, size), dtype=bool)
    distances = np.zeros(n, dtype=np.int64)
    chunk = max(1, 2**19 // (size * size))  # a chunk's random numbers fit into a cache
    for start in range(0, n, chunk):
        waiting = np.arange(start, min(start + chunk, n))
        for attempt in range(_TRIES):
            queries, free = _draw(waiting, attempt, size, box, obstacle_probability, seed)
            paths, steps = _shortest_paths(queries, _pack(free))
            done = steps > 0
            inputs[waiting[done], 0] = _marks(queries[done], size)
            inputs[waiting[done], 1] = ~free[done]
            targets[waiting[done]] = _unpack(paths[done], size)
            distances[waiting[done]] = steps[done]
            waiting = waiting[~done]
            if not len(waiting):
                break
        else:
            raise ValueError(
                f"no connected pair of queries in {_TRIES} tries for {len(waiting)} grids at obstacle_probability "
                f"{obstacle_probability}, box {box}, size {size}; lower the probability or the box"
            )
    return Grids(torch.from_numpy(inputs), torch.from_numpy(targets), torch.from_numpy(distances))


def _mix64(x: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele, Lea and Flood, 2014): uint64 to well-mixed uint64."""
    x = x ^ (x >> np.uint64(30))
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def _draw(
    grids: np.ndarray, attempt: int, size: int, box: int, obstacle_probability: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Query coordinates (n, 2, 2) as (query, row or column), and free pixels (n, H, W) bool."""
    gamma = 0x9E3779B97F4A7C15
    key = _mix64(np.array([seed], dtype=np.uint64) * np.uint64(2) + np.uint64(1))
    key = _mix64(key + grids.astype(np.uint64) * np.uint64(gamma))
    key = _mix64(key + np.array([attempt * gamma % 2**64], dtype=np.uint64))  # (n,), one stream per grid and try
    words = 2 + (size * size + 1) // 2
    steps = np.arange(1, words + 1, dtype=np.uint64) * np.uint64(gamma)
    raw = _mix64(key[:, None] + steps).view(np.uint32).reshape(len(grids), 2 * words)
    if not np.little_endian:
        raw = raw.reshape(len(grids), words, 2)[:, :, ::-1].reshape(len(grids), 2 * words)

    first = _below(raw[:, 0], size * size)
    row, column = first // size, first % size
    reach = box // 2
    top, left = np.maximum(row - reach, 0), np.maximum(column - reach, 0)
    height = np.minimum(row + reach, size - 1) - top + 1
    width = np.minimum(column + reach, size - 1) - left + 1
    second = _below(raw[:, 1], height * width - 1)
    second += second >= (row - top) * width + (column - left)  # skips the first query itself
    queries = np.stack([row, column, top + second // width, left + second % width], axis=1).reshape(-1, 2, 2)

    free = raw[:, 4 : 4 + size * size] >= np.uint32(min(round(obstacle_probability * 2**32), 2**32 - 1))
    free = free.reshape(-1, size, size)
    free |= _marks(queries, size)
    return queries, free


def _below(raw: np.ndarray, limit: np.ndarray | int) -> np.ndarray:
    """Whole numbers below `limit` from uniform uint32."""
    return ((raw.astype(np.uint64) * np.asarray(limit, dtype=np.uint64)) >> np.uint64(32)).astype(np.int64)


def _marks(queries: np.ndarray, size: int) -> np.ndarray:
    """(n, 2, 2) coordinates to (n, H, W) bool."""
    marks = np.zeros((len(queries), size, size), dtype=bool)
    index = np.arange(len(queries))
    for query in (0, 1):
        marks[index, queries[:, query, 0], queries[:, query, 1]] = True
    return marks


def _pack(pixels: np.ndarray) -> np.ndarray:
    """(n, H, W) bool to rows of bits, (n, H, words) uint64; column c is bit c % 64 of word c // 64."""
    n, height, width = pixels.shape
    words = -(-width // _WORD)
    padded = np.zeros((n, height, words * _WORD), dtype=bool) if width % _WORD else pixels
    if width % _WORD:
        padded[:, :, :width] = pixels
    return np.packbits(padded, axis=-1, bitorder="little").view("<u8").astype(np.uint64)


def _unpack(bits: np.ndarray, size: int) -> np.ndarray:
    """The inverse of `_pack`: (n, H, words) to (n, H, size) bool."""
    octets = np.ascontiguousarray(bits).astype("<u8").view(np.uint8)
    return np.unpackbits(octets, axis=-1, bitorder="little", count=size).astype(bool)


def _neighbours(bits: np.ndarray) -> np.ndarray:
    """The four neighbours of every marked pixel, (n, H, words). Bits beyond the last column are never free."""
    one, top = np.uint64(1), np.uint64(_WORD - 1)
    spread = (bits << one) | (bits >> one)
    if bits.shape[-1] > 1:
        spread[..., 1:] |= bits[..., :-1] >> top
        spread[..., :-1] |= bits[..., 1:] << top
    spread[:, 1:] |= bits[:, :-1]
    spread[:, :-1] |= bits[:, 1:]
    return spread


def _shortest_paths(queries: np.ndarray, free: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Breadth-first search on all grids at once: (n, H, words) bits of the shortest paths' pixels, (n,) steps or 0.

    The forward pass keeps the frontiers of all distances. The backward pass, from the second query, keeps only those
    pixels of each frontier that lead to it.
    """
    n, height = free.shape[:2]
    index = np.arange(n)
    ends = []
    for query in (0, 1):
        row, column = queries[:, query, 0], queries[:, query, 1]
        bits = np.zeros_like(free)
        bits[index, row, column // _WORD] = np.uint64(1) << (column % _WORD).astype(np.uint64)
        ends.append(bits)
    start, goal = ends
    goal_row, goal_word = queries[:, 1, 0], queries[:, 1, 1] // _WORD
    goal_bit = goal[index, goal_row, goal_word]

    steps = np.zeros(n, dtype=np.int64)
    frontiers = [start]
    unseen = free & ~start
    active = index  # grids whose search continues; the others' frontiers are left out
    members = [index]
    frontier = start
    while len(active):
        frontier = _neighbours(frontier) & unseen
        unseen &= ~frontier
        reached = (frontier[np.arange(len(active)), goal_row[active], goal_word[active]] & goal_bit[active]) != 0
        steps[active[reached]] = len(frontiers)
        frontiers.append(frontier)
        members.append(active)
        going = ~reached & frontier.any(axis=(1, 2))
        if not going.all():
            active, frontier, unseen = active[going], frontier[going], unseen[going]

    paths = np.zeros_like(free)
    layer = np.zeros_like(free)  # pixels of the paths at the current distance
    for distance in range(len(frontiers) - 1, 0, -1):
        starting = steps == distance
        layer[starting] = goal[starting]
        paths |= layer
        previous = np.zeros_like(free)
        previous[members[distance - 1]] = frontiers[distance - 1]
        layer = _neighbours(layer) & previous
    return paths | layer, steps


def curriculum(
    examples: int, phases: tuple[int, ...] = PHASES, size: int = 32, obstacle_probability: float = 0.1, seed: int = 0
) -> Iterator[tuple[int, Grids]]:
    """The phases in turn, as pairs of box side and `examples` fresh grids; phase p draws from ``seed + p``."""
    for phase, box in enumerate(phases):
        yield box, generate(examples, size, box, obstacle_probability, seed + phase)


def steps_from(inputs: Tensor) -> Tensor:
    """Breadth-first search from the first query in reading order, (N, 2, H, W) bool to its steps (N, H, W) int64.

    The query itself has 0; pixels that the search does not reach, such as obstacles, have -1. Grids without a query raise
    ValueError.
    """
    if inputs.dim() != 4 or inputs.shape[1] != 2:
        raise ValueError(f"inputs must be (N, 2, H, W), got {tuple(inputs.shape)}")
    queries, free = inputs[:, 0].bool(), ~inputs[:, 1].bool()  # (N, H, W)
    if not bool(queries.flatten(1).any(1).all()):
        raise ValueError("every grid must mark a query in inputs[:, 0]")
    marks = queries.flatten(1)  # (N, H W)
    reached = (marks & (marks.cumsum(1) == 1)).view(queries.shape)
    steps = reached.long() - 1
    count = 0
    while True:
        count += 1
        near = torch.zeros_like(reached)
        near[:, 1:] |= reached[:, :-1]
        near[:, :-1] |= reached[:, 1:]
        near[:, :, 1:] |= reached[:, :, :-1]
        near[:, :, :-1] |= reached[:, :, 1:]
        new = near & free & ~reached
        if not bool(new.any()):
            return steps
        steps[new] = count
        reached |= new


def rectangle_rule(inputs: Tensor) -> Tensor:
    """Mark every free pixel of the rectangle that the two queries span: (N, 2, H, W) bool to (N, H, W) bool.

    Without obstacles this is the exact answer, so the rule shows how much of a score needs no search at all.
    """
    queries, obstacles = inputs[:, 0].bool(), inputs[:, 1].bool()
    rows, columns = queries.any(dim=2), queries.any(dim=1)  # (N, H), (N, W)
    return _span(rows).unsqueeze(2) & _span(columns).unsqueeze(1) & ~obstacles


def _span(marks: Tensor) -> Tensor:
    """(N, H) bool to (N, H) bool: everything from the first to the last mark."""
    up = marks.int().cumsum(1) > 0
    down = marks.flip(1).int().cumsum(1).flip(1) > 0
    return up & down


def scores(predictions: Tensor, targets: Tensor) -> dict[str, float]:
    """How well predicted pixels (N, H, W) bool match the targets.

    Returns:
        f1: 2 TP / (2 TP + FP + FN) over all pixels of all grids.
        exact: the fraction of grids with every pixel right.

    Raises ValueError for shapes that differ, or without grids.
    """
    if predictions.shape != targets.shape:
        raise ValueError(f"predictions {tuple(predictions.shape)} and targets {tuple(targets.shape)} differ in shape")
    if not len(targets):
        raise ValueError("there are no grids to score")
    predictions, targets = predictions.bool(), targets.bool()
    hits = int((predictions & targets).sum())
    marked = int(predictions.sum()) + int(targets.sum())
    exact = (predictions == targets).flatten(1).all(1).float().mean()
    return {"f1": 2 * hits / marked if marked else 1.0, "exact": float(exact)}


def scores_beside_the_rule(predictions: Tensor, grids: Grids) -> dict[str, float]:
    """`scores` of predictions (N, H, W) bool, and as hard_f1 and hard_exact those on grids where the rule fails.

    The rule is `rectangle_rule`; if it never fails, both are 1.
    """
    hard = (rectangle_rule(grids.inputs) != grids.targets).flatten(1).any(1)  # (N,)
    found = {"f1": 1.0, "exact": 1.0}
    if bool(hard.any()):
        found = scores(predictions[hard], grids.targets[hard])
    return scores(predictions, grids.targets) | {f"hard_{name}": value for name, value in found.items()}
