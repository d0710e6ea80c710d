"""Fold plans: which layers of a trained network become one, and which repeats of them become loops.

The poster: "If LSM_ij is about 1, set alpha(i) = +-alpha(j), connect layer j-1 to i and i to j+1, remove layer j"; with
fewer distinct layers than templates, "roll back to standard parameterization". It does not state how far from 1 a
similarity may be, how a tied layer is rescaled, or what becomes of BatchNorm. Here, clusters are found by complete linkage
at a threshold that the caller chooses. Each tied weight is a stored scale times one representative, so exact ties stay
exact whatever their sign and length. Every step of the unrolled network keeps its own BatchNorm.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import numbers
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .arguments import count
from .bank import TemplateBank
from .files import content_checksum, json_bytes
from .models.blocks import RecurrentBlock
from .sharing import banks, shared_layers
from .similarity import beyond_chance, in_double, layer_similarity

# Two rows of float32 numbers that are multiples of each other up to rounding have 1 - |cos| of about 1e-15.
_ROUNDING = 1e-13

_FORMAT = "softshare fold plan 2"


@dataclass(frozen=True)
class LoopPlan:
    """`length` consecutive layers from layer `start` (from 1), executed `repeats` times."""

    start: int
    length: int
    repeats: int


@dataclass(frozen=True)
class GroupPlan:
    """How the layers of one group fold. Layers are numbered from 1 in the group.

    Attributes:
        name: the name of the group's bank.
        layers: the module path of each layer.
        templates: k of the bank.
        clusters: layers that become one, ascending; clusters are in order of their first layer, every layer is in one.
        scales: for each layer, the factor that turns its cluster's representative into its weight.
        loops: aligned repeats of whole blocks.
    """

    name: str
    layers: tuple[str, ...]
    templates: int
    clusters: tuple[tuple[int, ...], ...]
    scales: tuple[float, ...]
    loops: tuple[LoopPlan, ...]

    def __post_init__(self) -> None:
        layers = len(self.layers)
        clusters = [
            tuple(count(f"a layer of group {self.name!r}", layer) for layer in cluster) for cluster in self.clusters
        ]
        if sorted(sum(clusters, ())) != list(range(1, layers + 1)) or () in clusters:
            raise ValueError(
                f"clusters of group {self.name!r} must hold each of its layers 1 to {layers} once, got {self.clusters}"
            )
        if clusters != sorted(tuple(sorted(cluster)) for cluster in clusters):
            raise ValueError(f"clusters of group {self.name!r} must be ascending, got {self.clusters}")
        if len(self.scales) != layers or not all(math.isfinite(scale) for scale in self.scales):
            raise ValueError(f"group {self.name!r} needs {layers} finite scales, one per layer, got {self.scales}")
        schedule, free = self.schedule, 1
        for loop in sorted(self.loops, key=lambda loop: loop.start):
            first, period, repeats = loop.start, loop.length, loop.repeats
            end = first + period * repeats  # the layer after the loop
            apart = first >= free and period >= 1 and repeats >= 2 and end <= layers + 1
            if not apart or schedule[first - 1 : end - 1] != schedule[first - 1 :][:period] * repeats:
                raise ValueError(f"group {self.name!r} has no {repeats} equal repeats of {period} layers at {first}")
            free = end

    @property
    def schedule(self) -> tuple[int, ...]:
        """For each layer in turn, the layer whose weight it uses: the first one in its cluster."""
        first = {layer: cluster[0] for cluster in self.clusters for layer in cluster}
        return tuple(first[layer] for layer in range(1, len(self.layers) + 1))

    @property
    def rolls_back(self) -> bool:
        """Whether there are at most as many distinct layers as templates, so that plain weights take no more space."""
        return len(self.clusters) <= self.templates

    def __str__(self) -> str:
        starts = {loop.start: loop for loop in self.loops}
        parts, layer, schedule = [], 1, self.schedule
        while layer <= len(schedule):
            loop = starts.get(layer)
            length = loop.length if loop else 1
            body = " -> ".join(str(schedule[i - 1]) for i in range(layer, layer + length))
            parts.append(f"({body}) x {loop.repeats}" if loop else body)
            layer += length * (loop.repeats if loop else 1)
        return f"{self.name}: {' -> '.join(parts)}"


@dataclass(frozen=True)
class FoldPlan:
    """What `fold` will do to a model; prints in readable form: ``stage1: 1 -> 2 -> (3 -> 4) x 4``.

    Attributes:
        threshold: the least similarity allowed between two layers of a cluster; None for a plan made by hand.
        groups: one `GroupPlan` per bank.
    """

    threshold: float | None
    groups: tuple[GroupPlan, ...]

    def __post_init__(self) -> None:
        if self.threshold is not None and not 0.0 < self.threshold <= 1.0:
            raise ValueError(f"threshold must be above 0 and at most 1, or None, got {self.threshold}")

    @property
    def clusters(self) -> dict[str, tuple[tuple[int, ...], ...]]:
        return {group.name: group.clusters for group in self.groups}

    @property
    def scales(self) -> dict[str, tuple[float, ...]]:
        return {group.name: group.scales for group in self.groups}

    @property
    def schedule(self) -> dict[str, tuple[int, ...]]:
        return {group.name: group.schedule for group in self.groups}

    @property
    def loops(self) -> dict[str, tuple[LoopPlan, ...]]:
        return {group.name: group.loops for group in self.groups}

    @property
    def distinct_layers(self) -> int:
        """The number of layers left with a weight of their own, over all groups."""
        return sum(len(group.clusters) for group in self.groups)

    @property
    def total_layers(self) -> int:
        """The number of layers in all groups before folding."""
        return sum(len(group.layers) for group in self.groups)

    def __str__(self) -> str:
        return "\n".join(str(group) for group in self.groups)

    def to_json(self) -> str:
        """The plan as JSON text with a checksum, for `from_json` to read."""
        return json_bytes({"format": _FORMAT, **asdict(self)}).decode()

    @classmethod
    def from_json(cls, text: str) -> FoldPlan:
        """Read a plan. Raises ValueError if the text is not one or was edited, TypeError for anything but text."""
        if not isinstance(text, (str, bytes)):
            raise TypeError(f"a plan is read from JSON text, got {type(text).__name__}")
        try:
            data = json.loads(text)
            if not isinstance(data, dict) or data.get("format") != _FORMAT:
                raise ValueError(f'the text lacks "format": "{_FORMAT}"')
            if data.get("content") != content_checksum(data):
                raise ValueError(
                    "its content does not match its checksum, so it was edited by hand or damaged; softshare.tie makes "
                    "a plan with clusters of your choice"
                )
            groups = tuple(
                GroupPlan(
                    name=str(group["name"]),
                    layers=tuple(map(str, group["layers"])),
                    templates=int(group["templates"]),
                    clusters=tuple(tuple(cluster) for cluster in group["clusters"]),
                    scales=tuple(map(float, group["scales"])),
                    loops=tuple(LoopPlan(**loop) for loop in group["loops"]),
                )
                for group in data["groups"]
            )
            return cls(None if data["threshold"] is None else float(data["threshold"]), groups)
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
            raise ValueError(f"not a fold plan: {error}") from error


class WithinChance(UserWarning):
    """Layers are tied that are no more alike than chance makes them."""


@contextlib.contextmanager
def exploring() -> Iterator[None]:
    """No `WithinChance` in a ``with`` block, where low thresholds are tried to see what they would do."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", WithinChance)
        yield


def plan_fold(model: nn.Module, threshold: float) -> FoldPlan:
    """Find which layers of each group can be tied at a similarity of at least `threshold`.

    Clusters are found by complete linkage on `layer_similarity`: the two clusters whose least similar pair is most
    similar are joined until no such pair reaches the threshold; ties are broken by the lower layer numbers. So every pair
    within a cluster reaches it, and the result depends only on the coefficients. A row of zeros joins no cluster.

    Layers can reach a threshold without being alike in any way that was learned. `WithinChance` warns of clusters no more
    similar than the most similar pair among random directions; `softshare.similarity.beyond_chance` knows more, given the
    coefficients at the start.

    Args:
        model: any model with banks that layers draw from (`share_`, `swrn`, `gridnet`).
        threshold: 0 < threshold <= 1; at 1 only exact ties fold, and folding changes no output beyond rounding.

    Raises:
        ValueError: a threshold outside (0, 1], a model without shared layers.
        TypeError: a threshold that is not a number.
    """
    if isinstance(threshold, bool) or not isinstance(threshold, numbers.Real):
        raise TypeError(f"threshold must be a number, got {threshold!r} ({type(threshold).__name__})")
    if not 0.0 < threshold <= 1.0:
        raise ValueError(f"threshold must be above 0 and at most 1, got {threshold}")
    plans = []
    require_values(model)
    similarities = {}
    for name, (bank, members) in group_members(model).items():
        if not bank.coefficients.isfinite().all():
            raise ValueError(f"the coefficients of group {name!r} are not finite, so their angles are undefined")
        similarity = similarities[name] = layer_similarity(in_double(bank.coefficients)).cpu()
        clusters = complete_linkage(similarity, threshold)
        plans.append(_group_plan(model, name, bank, members, clusters))
    _warn_of_chance(plans, similarities)
    return FoldPlan(float(threshold), tuple(plans))


def _warn_of_chance(plans: Sequence[GroupPlan], similarities: Mapping[str, Tensor]) -> None:
    """Warn if layers are tied that are not exactly equal and no more alike than chance makes some pair in 5% of cases."""
    limit = largest_by_chance(tuple((len(plan.layers), plan.templates) for plan in plans))
    weak, planes = [], False
    for plan in plans:
        for cluster in plan.clusters:
            places = torch.tensor(cluster, device="cpu") - 1
            found = float(similarities[plan.name][places][:, places].triu(1).max())
            if len(cluster) > 1 and found < 1.0 - _ROUNDING and (plan.templates < 3 or found <= limit):
                weak.append(f"layers {', '.join(map(str, cluster))} of {plan.name} at {found:.2f}")
                planes |= plan.templates < 3
    if weak:
        beyond = f"among random directions some pair reaches {limit:.2f} in 5% of cases" if limit > 0 else ""
        plane = "with 2 templates some pair is nearly always close to 1" if planes else ""
        why = "; ".join(filter(None, (beyond, plane)))
        warnings.warn(f"within chance: {'; '.join(weak)} ({why})", WithinChance, stacklevel=3)


@functools.lru_cache(maxsize=64)
def largest_by_chance(shapes: tuple[tuple[int, int], ...]) -> float:
    """The 95th percentile of the largest similarity of a pair in groups of (L, k) random coefficients, all groups together.

    Groups of fewer than 2 layers or 3 templates are left out; 0 if none is left.
    """
    told = [shape for shape in shapes if shape[0] > 1 and shape[1] > 2]
    kept = {str(place): torch.ones(shape, device="cpu") for place, shape in enumerate(told)}
    return beyond_chance(kept)["largest"].chance if kept else 0.0


def tie(model: nn.Module, clusters: Mapping[str, Iterable[Sequence[int]]]) -> FoldPlan:
    """A plan made by hand: which layers (from 1) to tie in each named group; layers not named stay as they are.

    ``tie(model, {"stage2": [(3, 5, 7), (4, 6, 8)]})`` makes a loop of layers 3 and 4 whatever their similarity.

    Raises ValueError for an unknown group, a layer out of range or in two clusters.
    """
    members = group_members(model)
    require_values(model)
    if unknown := set(clusters) - set(members):
        raise ValueError(f"unknown groups {sorted(unknown)}; this model has {list(members)}")
    plans = []
    for name, (bank, layers) in members.items():
        given = [tuple(cluster) for cluster in clusters.get(name, ())]
        named = [count(f"a layer of group {name!r}", layer) for cluster in given for layer in cluster]
        if () in given or len(set(named)) < len(named) or max(named, default=1) > bank.num_layers:
            raise ValueError(
                f"clusters of group {name!r} must name layers from 1 to {bank.num_layers}, each at most once and at least "
                f"one per cluster, got {given}"
            )
        rest = set(range(1, bank.num_layers + 1)).difference(named)
        full = tuple(sorted([*(tuple(sorted(cluster)) for cluster in given), *((layer,) for layer in rest)]))
        plans.append(_group_plan(model, name, bank, layers, full))
    return FoldPlan(None, tuple(plans))


def require_values(model: nn.Module) -> None:
    if any(bank.coefficients.is_meta for bank in banks(model).values()):
        raise ValueError("the coefficients hold no values (meta device): load the model's weights, or use a saved plan")


def group_members(model: nn.Module) -> dict[str, tuple[TemplateBank, list[str]]]:
    """The banks, with the paths of the layers that draw from them, in the order of their rows."""
    members: dict[str, tuple[TemplateBank, list[str]]] = {}
    for name, bank in banks(model).items():
        rows = {
            layer.softshare_source[1]: path for path, layer in shared_layers(model) if layer.softshare_source[0] is bank
        }
        if rows and sorted(rows) == list(range(bank.num_layers)):
            members[name] = (bank, [rows[row] for row in range(bank.num_layers)])
    if not members:
        raise ValueError(
            "no layer of this model draws its weight from a template bank, so there is nothing to fold; share it first "
            "(softshare.share_), or build a shared model such as softshare.models.swrn"
        )
    return members


def complete_linkage(similarity: Tensor, threshold: float) -> tuple[tuple[int, ...], ...]:
    """Clusters (of indices from 1) of a symmetric matrix (L, L) in which every pair is at least `threshold`."""
    clusters = [[index] for index in range(similarity.shape[0])]
    link = similarity.clone()  # link[a, b]: the least similarity between members of cluster a and of cluster b
    while len(clusters) > 1:
        upper = link.triu(1) - torch.ones_like(link).tril()
        best = upper.max()
        if best < threshold - _ROUNDING:
            break
        # The first of the pairs that are best up to rounding, so that rounding decides nothing.
        a, b = (upper >= best - _ROUNDING).nonzero()[0].tolist()
        clusters[a] += clusters.pop(b)
        keep = [index for index in range(link.shape[0]) if index != b]
        link[a] = link[:, a] = torch.minimum(link[a], link[b])
        link = link[keep][:, keep]
    return tuple(sorted(tuple(sorted(index + 1 for index in cluster)) for cluster in clusters))


def _group_plan(
    model: nn.Module, name: str, bank: TemplateBank, layers: list[str], clusters: tuple[tuple[int, ...], ...]
) -> GroupPlan:
    plan = GroupPlan(name, tuple(layers), bank.num_templates, clusters, _scales(bank, clusters), ())
    loops = []
    for _, chain in block_chains(model, layers):
        width = len(chain[0])  # layers of a block
        signatures = [tuple(plan.schedule[layer - 1] for layer in block) for block in chain]
        for first, period, repeats in _repeats(signatures):
            loops.append(LoopPlan(chain[first][0], period * width, repeats))
    return GroupPlan(name, tuple(layers), bank.num_templates, clusters, plan.scales, tuple(loops))


@torch.no_grad()
def _scales(bank: TemplateBank, clusters: Iterable[Sequence[int]]) -> tuple[float, ...]:
    """The scale of each layer: its mixed weight's projection on the leading direction of its cluster's mixed weights.

    Everything is computed in the k coordinates of the templates, with their Gram matrix as the inner product. The
    representative gets the root mean square length of its members and the sign of the first one.
    """
    templates = in_double(bank.templates)
    gram = templates @ templates.T  # (k, k)
    coefficients = in_double(bank.coefficients)  # (L, k)
    scales = [1.0] * bank.num_layers
    for cluster in clusters:
        if len(cluster) == 1:
            continue
        rows = coefficients[[layer - 1 for layer in cluster]]  # (n, k)
        inner = rows @ gram @ rows.T  # (n, n)
        direction = torch.linalg.eigh(inner).eigenvectors[:, -1] @ rows  # (k,)
        length = float(direction @ gram @ direction)
        if length <= 0.0:
            continue  # all weights are zero: any scale will do
        direction = direction * math.sqrt(float(inner.diagonal().mean()) / length)
        projections = (rows @ gram @ direction) / (direction @ gram @ direction)
        if projections[0] < 0:
            projections = -projections
        for layer, scale in zip(cluster, projections.tolist(), strict=True):
            scales[layer - 1] = scale
    return tuple(scales)


def block_chains(model: nn.Module, layers: Sequence[str]) -> list[tuple[list[str], list[tuple[int, ...]]]]:
    """Runs of consecutive blocks of an `nn.Sequential` whose layers are consecutive layers of the group.

    Returns, for each run, the paths of its blocks and, for each block, the numbers of its layers (from 1).
    """
    number = {path: index for index, path in enumerate(layers, start=1)}
    chains: list[tuple[list[str], list[tuple[int, ...]]]] = []
    for parent, container in model.named_modules():
        if not isinstance(container, nn.Sequential):
            continue
        previous: tuple[int, ...] = ()
        for child, block in container.named_children():
            path = f"{parent}.{child}" if parent else child
            inner = [f"{path}.{name}" for name in getattr(block, "layer_names", ())]
            if not isinstance(block, RecurrentBlock) or not all(name in number for name in inner):
                previous = ()
                continue
            numbers = tuple(number[name] for name in inner)
            if previous and numbers[0] == previous[-1] + 1 and len(numbers) == len(previous):
                chains[-1][0].append(path)
                chains[-1][1].append(numbers)
            else:
                chains.append(([path], [numbers]))
            previous = numbers
    return chains


def _repeats(sequence: Sequence[Any]) -> list[tuple[int, int, int]]:
    """Non-overlapping (start, period, repeats >= 2) of a sequence that leave the fewest items to write down.

    By dynamic programming from the end; among equal choices the shorter period wins, then the longer run.
    """
    size = len(sequence)
    cost = [0] * (size + 1)
    choice: list[tuple[int, int]] = [(1, 1)] * (size + 1)
    for start in range(size - 1, -1, -1):
        options = [(1 + cost[start + 1], 1, -1)]
        for period in range(1, (size - start) // 2 + 1):
            repeats = 1
            while (
                sequence[start : start + period] == sequence[start + repeats * period : start + (repeats + 1) * period]
            ):
                repeats += 1
                options.append((period + cost[start + period * repeats], period, -repeats))
        best = min(options)
        cost[start], choice[start] = best[0], (best[1], -best[2])
    found, start = [], 0
    while start < size:
        period, repeats = choice[start]
        if repeats > 1:
            found.append((start, period, repeats))
        start += period * repeats
    return found
