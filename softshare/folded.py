"""Folding a network by a plan: tied weights held once, loops that run, and plain weights where templates do not pay off.

`fold` carries out a plan; `sweep` shows what each threshold would cost before you choose one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .bank import TemplateBank, WeightSource
from .folding import FoldPlan, GroupPlan, block_chains, exploring, group_members, plan_fold
from .models.blocks import RecurrentBlock
from .sharing import draw_weight_from, give_plain_weight, owner_of_bank, shared_layers
from .similarity import in_double


class DistinctWeights(WeightSource):
    """The weights that several layers of a folded group use, each held once; a use is a weight times a scale.

    It holds plain weights (`weights`) or, if more distinct layers than templates are left, a `TemplateBank` with one row
    of coefficients for each of them.
    """

    scales: Tensor

    def __init__(self, name: str, held: TemplateBank | Sequence[Tensor]) -> None:
        super().__init__()
        self.name = name
        if isinstance(held, TemplateBank):
            self.templates = held
        else:
            self.weights = nn.ParameterList(nn.Parameter(weight) for weight in held)
        self.users: list[int] = []  # the number of the weight that each use takes
        like = held.templates if isinstance(held, TemplateBank) else held[0]
        self.register_buffer("scales", like.detach().new_ones(0))  # (uses,)

    def use(self, weight: int, scale: float) -> int:
        """Add a use of weight number `weight` and return its index, for `mix`."""
        self.users.append(weight)
        self.scales = torch.cat([self.scales, self.scales.new_tensor([scale])])
        return len(self.users) - 1

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw fresh plain weights with kaiming_normal_, as in our networks; a bank of templates draws its own."""
        for weight in getattr(self, "weights", ()):
            nn.init.kaiming_normal_(weight)

    def mix(self, index: int) -> Tensor:
        held = self.users[index]
        weight = self.weights[held] if hasattr(self, "weights") else self.templates.mix(held)
        return weight * self.scales[index]


class Loop(nn.Module):
    """A few blocks executed several times, (N, C, H, W) to the same shape.

    Attributes:
        body: the blocks, with the convolutions that all passes share and the normalisations of the first pass.
        norms: the normalisations of the later passes, by pass, block and place.
        scales: buffer (passes, blocks, convolutions of a block): the factors of each convolution's output.
    """

    scales: Tensor

    def __init__(self, passes: Sequence[Sequence[RecurrentBlock]], scales: Tensor) -> None:
        super().__init__()
        self.body = nn.ModuleList(passes[0])
        self.norms = nn.ModuleList(
            nn.ModuleList(nn.ModuleList(block.norms()) for block in blocks) for blocks in passes[1:]
        )
        self.register_buffer("scales", scales)

    def forward(self, x: Tensor) -> Tensor:
        for turn in range(len(self.scales)):
            for place, block in enumerate(self.body):
                norms = block.norms() if turn == 0 else self.norms[turn - 1][place]  # type: ignore[operator, index]
                x = block.step(x, norms, self.scales[turn, place])  # type: ignore[operator]
        return x

    def extra_repr(self) -> str:
        return f"passes={len(self.scales)}"


@torch.inference_mode(False)
@torch.no_grad()
def fold(model: nn.Module, plan_or_threshold: FoldPlan | float) -> nn.Module:
    """A new model in which tied layers use one weight, held once, and aligned repeats of blocks run as loops.

    Ties work in any module. A *loop* needs equal ties at equal places in consecutive blocks of one of our networks (WRN,
    grid network); all other ties are *reuse*. Every step of the unrolled network keeps its own BatchNorm and its own
    scale. A group with no more distinct layers than templates goes back to plain weights; the others keep their templates
    with one row of coefficients for each distinct layer. The representative of a cluster is the least-squares fit to its
    mixed weights under the plan's scales.

    To load a saved folded model, build the same model, fold it with the saved plan and load the state dict.

    Args:
        model: is not changed.
        plan_or_threshold: a plan for this model (or for one with the same layers), or a threshold for `plan_fold`.

    Raises:
        ValueError: a model without shared layers, a threshold outside (0, 1], a plan for another model.
        TypeError: neither a plan nor a number.
    """
    plan = plan_or_threshold if isinstance(plan_or_threshold, FoldPlan) else plan_fold(model, plan_or_threshold)
    _check_plan(model, plan)
    folded = copy.deepcopy(model)
    before = set(folded.modules())
    sources = {name: bank for name, (bank, _) in group_members(folded).items()}
    for group in plan.groups:
        if len(group.clusters) == len(group.layers) and not group.rolls_back:
            continue  # no ties, and plain weights would take more space: the group stays as it is
        weights = _representatives(sources[group.name], group)
        bodies = _loop_blocks(folded, group)
        _tie_layers(folded, sources[group.name], group, weights, bodies)
    for module in set(folded.modules()) - before:
        module.training = model.training  # only of the new modules: a BatchNorm may be kept in another mode
    return folded


def _check_plan(model: nn.Module, plan: FoldPlan) -> None:
    members = group_members(model)
    for group in plan.groups:
        if group.name not in members:
            raise ValueError(f"the plan is for another model: it has a group {group.name!r}, the model {list(members)}")
        bank, layers = members[group.name]
        if list(group.layers) != layers or group.templates != bank.num_templates:
            raise ValueError(
                f"the plan is for another model: group {group.name!r} has {len(group.layers)} layers and "
                f"{group.templates} templates in the plan, {len(layers)} and {bank.num_templates} in the model"
                + ("" if len(group.layers) != len(layers) else "; or its layers have other names")
            )


def _representatives(bank: TemplateBank, group: GroupPlan) -> list[Tensor] | TemplateBank:
    """One weight for each cluster: plain tensors if the group rolls back, else a smaller bank."""
    coefficients = in_double(bank.coefficients)
    rows = []
    for cluster in group.clusters:
        members = [layer - 1 for layer in cluster]
        scales = [group.scales[member] for member in members]
        norm = sum(scale * scale for scale in scales) or 1.0
        rows.append(coefficients.new_tensor(scales) @ coefficients[members] / norm)
    fitted = torch.stack(rows).to(bank.coefficients)  # (clusters, k)
    smaller = copy.deepcopy(bank)
    smaller.coefficients = nn.Parameter(fitted, requires_grad=bank.coefficients.requires_grad)
    if group.rolls_back:
        return [smaller.mix(row).detach().clone(memory_format=torch.contiguous_format) for row in range(len(rows))]
    return smaller


def _learns(bank: TemplateBank) -> bool:
    return bank.templates.requires_grad or bank.coefficients.requires_grad


def _loop_blocks(model: nn.Module, group: GroupPlan) -> set[nn.Module]:
    """Replace the blocks of the group's loops with `Loop` modules; returns the layers of their bodies."""
    bodies: set[nn.Module] = set()
    for paths, chain in block_chains(model, group.layers):
        width = len(chain[0])  # layers of a block
        for loop in group.loops:
            first = next((index for index, block in enumerate(chain) if block[0] == loop.start), None)
            if first is None:
                continue
            period = loop.length // width
            replaced = paths[first : first + period * loop.repeats]
            blocks: list[Any] = [model.get_submodule(path) for path in replaced]
            bodies.update(getattr(block, name) for block in blocks[:period] for name in block.layer_names)
            weight = getattr(blocks[0], blocks[0].layer_names[0]).weight
            scales = weight.new_tensor(group.scales[loop.start - 1 :][: loop.length * loop.repeats])
            passes = [blocks[turn * period : (turn + 1) * period] for turn in range(loop.repeats)]
            looped = Loop(passes, scales.view(loop.repeats, period, width))
            parent, _, name = replaced[0].rpartition(".")
            children = model.get_submodule(parent)._modules
            children[name] = looped
            for path in replaced[1:]:
                del children[path.rpartition(".")[2]]
    return bodies


def _tie_layers(
    model: nn.Module, bank: TemplateBank, group: GroupPlan, weights: list[Tensor] | TemplateBank, bodies: set[nn.Module]
) -> None:
    """Give the remaining layers their weights: a plain one if a single layer uses it, else one from `DistinctWeights`."""
    cluster_of = {layer: index for index, cluster in enumerate(group.clusters) for layer in cluster}
    users: dict[int, list[tuple[nn.Module, float]]] = {}
    for _, layer in shared_layers(model):
        if layer.softshare_source[0] is bank:
            number = layer.softshare_source[1] + 1
            # A loop scales its convolutions' outputs, step by step.
            scale = 1.0 if layer in bodies else group.scales[number - 1]
            users.setdefault(cluster_of[number], []).append((layer, scale))
            layer._modules.pop("bank", None)
    if isinstance(weights, TemplateBank):
        held, alone = sorted(users), []
    else:
        held = [cluster for cluster in sorted(users) if len(users[cluster]) > 1]
        alone = [cluster for cluster in users if len(users[cluster]) == 1]
        for cluster in alone:
            give_plain_weight(users[cluster][0][0], weights[cluster], _learns(bank))
        weights = [weights[cluster] for cluster in held]
    if held:
        distinct = DistinctWeights(group.name, weights)
        if not _learns(bank):
            distinct.requires_grad_(False)
        for index, cluster in enumerate(held):
            for user, scale in users[cluster]:
                draw_weight_from(user, distinct, distinct.use(index, scale))
        owner_of_bank(model, [user for cluster in held for user, _ in users[cluster]]).add_module("bank", distinct)


def sweep(
    model: nn.Module, evaluate: Callable[[nn.Module], float], thresholds: Iterable[float]
) -> list[dict[str, Any]]:
    """Fold at each threshold and evaluate, to see what a plan costs before choosing one.

    If two thresholds give the same plan, it is evaluated once. Returns a list of dicts with threshold, plan (as text),
    distinct and total layers of all groups, parameters of the whole model, value (of the folded model) and change (value
    minus that of the unfolded model).
    """
    before = evaluate(model)
    rows: list[dict[str, Any]] = []
    values: dict[tuple[GroupPlan, ...], float] = {}
    for threshold in thresholds:
        with exploring():
            plan = plan_fold(model, threshold)
        folded = fold(model, plan)
        if plan.groups not in values:
            values[plan.groups] = evaluate(folded)
        value = values[plan.groups]
        rows.append(
            {
                "threshold": threshold,
                "plan": str(plan),
                "distinct": plan.distinct_layers,
                "total": plan.total_layers,
                "parameters": sum(parameter.numel() for parameter in folded.parameters()),
                "value": value,
                "change": value - before,
            }
        )
    return rows
