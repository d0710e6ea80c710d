"""Does sharing help a network to learn an algorithm: faster, better, and beyond what it was trained on?

The curriculum of the poster's last section: CNN and SCNN learn shortest paths on grids whose distances grow from phase to
phase. ``softshare run SCNN --profile paper --seed 0``; what it costs: ``softshare list``. The poster gives grids of
32 x 32, the target, and 50 epochs per phase; the rest is remembered from the paper, not confirmed, and the batch size is
ours. The plain network of a seed starts as the very function that the shared one starts as, so that a pair differs only in
what is learned. The rules by which the two are compared stand in data/paper/claims.csv. Findings so far: see chapter 4
and the page Results.

A finding that holds only for our reading is not the poster's, so `READINGS` are varied: a skip around each layer or none,
the same grids in all epochs or fresh ones, the rate, and the share of obstacles, as a half-fraction of the 16 combinations.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..folded import sweep
from ..models import Network
from ..models.grid import unit_coefficients
from ..models.looped import LoopedGridNet
from ..sharing import banks, unshare
from ..shortest_path import PHASES, Grids, curriculum, generate, rectangle_rule, scores_beside_the_rule
from ..similarity import in_double, layer_similarity, off_diagonal
from ..training.devices import standard_defaults
from ..training.evaluation import evaluate, with_reestimated_statistics
from ..training.settings import ADDED_LATER, Settings
from ..training.tasks import Curriculum, ShortestPaths
from .study import REESTIMATED_ON, Plan, Recipe, Study, Tasks

SCORES = ("exact", "f1", "hard_exact", "hard_f1")
"""The scores of a network's answers, see `softshare.shortest_path.scores_beside_the_rule`."""

FOLDED_AT = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
"""The similarities at which a shared network is folded when a phase ends."""

_SIZES: dict[str, Any] = {
    "side": 32,
    "boxes": list(PHASES),
    "obstacles": 0.1,
    "train": 5_000,
    "held_out": 2_000,  # of each phase, scored after every epoch
    "ends": 20_000,  # of each phase and of one beyond the last, scored when a phase ends
}

READINGS: dict[str, dict[str, Any]] = {
    "no skip": {"skip": False},
    "fresh grids": {"fresh": True},
    "rate 0.003": {"rate": 0.003},
    "obstacles 0.3": {"obstacles": 0.3},
}
"""What is varied: by name, what differs from our reading."""

LADDER: dict[str, dict[str, Any]] = {
    "CNN tied": {"tied": "batch"},
    "CNN tied GroupNorm": {"tied": "group"},
    "CNN tied GroupNorm recall": {"tied": "group", "recall": True},
    "CNN tied GroupNorm recall random steps": {"tied": "group", "recall": True, "random_steps": True},
}
"""From one layer for all steps to a network built to search farther than it was trained, ingredient by ingredient; soft
sharing is the rung below. See `softshare.models.looped`."""

STEPS = (10, 20, 30, 40, 60)
"""How many steps such a network is tested at if 20 are trained, otherwise in proportion."""

HALF = [(), *itertools.combinations(READINGS, 2), tuple(READINGS)]
"""The half-fraction of their combinations: an even number of differences, so that each one stands in half of them, and no
effect of one is that of another or of two others."""

_OPTIONS = ("skip", "gain", "unit", "tied", "recall", "random_steps")
_CURRICULUM = "figure of the shortest-path curriculum"


class Paths(Study):
    """Grid networks, plain (CNN) and softly shared (SCNN), on a curriculum of shortest paths."""

    name = "paths"
    version = 2
    defaults = {
        "sizes": {**_SIZES, "boxes": list(PHASES)},
        "schedule": {
            "batch_size": 100,
            "optimizer": "adam",
            "rate": 0.01,
            "milestones": [],
            "factor": 0.2,
            "cycle": 0,
            "weight_decay": 0.0,
            "penalty": 0.0,
            "evaluate_every": 1,
            **ADDED_LATER,
        },
    }

    def recipes(self) -> Sequence[Recipe]:
        found = [
            Recipe("CNN", self.name, "CNN", _CURRICULUM),
            Recipe("SCNN", self.name, "SCNN", _CURRICULUM),
            Recipe("SCNN-5", self.name, "SCNN-5", f"{_CURRICULUM}, fewer templates"),
            Recipe("SCNN-1", self.name, "SCNN-1", f"{_CURRICULUM}, one template"),
        ]
        for penalty in (1e-2, 1e-3, 1e-4):
            name = f"SCNN lambda {penalty:g}"
            found.append(Recipe(name, self.name, "SCNN", f"{_CURRICULUM}, regularised", penalty=penalty))
        explored = f"explored, {_CURRICULUM}: "
        found += [
            # The sum over all 400 pairs outweighs a loss of 0.05.
            Recipe(
                "SCNN lambda 0.01 per pair", self.name, "SCNN", f"{explored}lambda for the mean", penalty=1e-2 / 20**2
            ),
            Recipe("SCNN unit", self.name, "SCNN", f"{explored}coefficients of length 1", reading={"unit": True}),
            Recipe("CNN gain", self.name, "CNN", f"{explored}a learned gain per layer", reading={"gain": True}),
            Recipe(
                "SCNN shuffled",
                self.name,
                "SCNN",
                "what similarity becomes where nothing can be learned",
                shuffled=True,
            ),
        ]
        for readings in HALF[1:]:
            changes = {key: value for each in readings for key, value in READINGS[each].items()}
            for network in ("CNN", "SCNN"):
                shows = f"another reading, {_CURRICULUM}"
                found.append(Recipe(named(network, readings), self.name, network, shows, reading=changes))
        for name, ingredients in LADDER.items():
            found.append(Recipe(name, self.name, "CNN", f"an ingredient, {_CURRICULUM}", reading=ingredients))
        deep = "figure of the similarity of a 100-layer network over training"
        found.append(Recipe("SCNN 100 layers", self.name, "SCNN 100 layers", deep, dense_epochs=2))
        return found

    def plan(self, recipe: Recipe, profile: str, seed: int) -> Plan:
        network = Network.parse(recipe.network)
        sizes = {**_SIZES, "boxes": list(PHASES)}
        per_phase = {"fast": 3, "gpu": 25, "short": 10, "paper": 50}[profile]
        if profile == "fast":  # more obstacles, since small grids leave little room to search
            network = network.narrowed()
            sizes |= {
                "side": 12,
                "boxes": [5, 7, 9],
                "obstacles": 0.2,
                "train": 3_000,
                "held_out": 1_000,
                "ends": 1_000,
            }
        sizes |= {name: recipe.reading[name] for name in ("fresh", "obstacles") if name in recipe.reading}
        sizes |= {"shuffled": True} if recipe.shuffled else {}
        settings = Settings(
            epochs=per_phase * len(sizes["boxes"]),
            batch_size=100,
            optimizer="adam",
            rate=recipe.reading.get("rate", 0.01),
            milestones=(),
            weight_decay=0.0,
            penalty=recipe.penalty_in(profile),
            seed=seed,
        )
        # At a constant rate nothing settles within minutes, so the rate falls within each phase and restarts with the next.
        if profile == "fast":
            falls: dict[str, Any] = {"milestones": (0.34, 0.67), "factor": 0.25, "cycle": per_phase}
            settings = replace(settings, batch_size=32, precision="float32", tf32=False, **falls)
        if profile == "gpu":
            settings = replace(settings, milestones=(0.6, 0.8), cycle=per_phase)
        options = {name: recipe.reading[name] for name in _OPTIONS if name in recipe.reading}
        return Plan(recipe, profile, network, settings, sizes, options=options)

    def rehearsal(self, plan: Plan) -> Plan:
        sizes = {**plan.sizes, "side": 12, "boxes": [5, 7], "train": 200, "held_out": 100, "ends": 100}
        settings = replace(plan.settings, epochs=2, batch_size=100, cycle=1, milestones=())
        return replace(plan, network=plan.network.narrowed(8), sizes=sizes, settings=settings)

    @standard_defaults()
    def network(self, plan: Plan, classes: int | None = None) -> nn.Module:
        """The plain network is the shared one of the same seed with its mixed weights as its own."""
        if plan.network.shared or "tied" in plan.options:
            return super().network(plan, classes)
        return unshare(super().network(replace(plan, network=replace(plan.network, shared=True)), classes))

    def data_told(self, recipe: Recipe) -> str:
        return "generated"

    def examples(self, plan: Plan) -> int:
        return int(plan.sizes["train"])

    def fingerprint(self, plan: Plan, data: str | None = None, download: bool = False) -> str:
        return f"training seeds from {100 * plan.seed}"

    def sample(self, plan: Plan, tasks: Tasks) -> Tensor:
        assert isinstance(tasks.train, Curriculum)
        return sample_of(tasks.train, len(tasks.train.phases))

    def tasks(self, plan: Plan, data: str | None = None, download: bool = False) -> Tasks:
        """The curriculum, and unseen grids of its last phase; held-out grids are the same for all seeds and networks."""
        if data is not None:
            raise ValueError(f"{plan.recipe.name} makes its own grids and takes no data, got {data!r}")
        sizes, first = plan.sizes, 100 * plan.seed  # the seeds of training grids stay far below those of the others
        boxes = tuple(sizes["boxes"])
        drawn = curriculum(sizes["train"], boxes, sizes["side"], sizes["obstacles"], first)
        phases = []
        for phase, (box, grids) in enumerate(drawn):
            if sizes.get("shuffled"):
                order = torch.randperm(len(grids.targets), generator=torch.Generator().manual_seed(plan.seed))
                grids = grids._replace(targets=grids.targets[order])
            held_out = grids_of(plan, sizes["held_out"], box, 2**62 + phase)
            phases.append(Fresh(grids, held_out, plan, box) if sizes.get("fresh") else ShortestPaths(grids, held_out))
        task = Curriculum(phases, plan.settings.epochs // len(boxes))
        test = ShortestPaths(phases[-1].train, grids_of(plan, sizes["held_out"], boxes[-1], 2**62 + 2**32))
        facts = {"source": "shortest paths, generated", "fingerprint": self.fingerprint(plan)}
        return Tasks(task, test, facts, None)

    def watchers(self, plan: Plan, tasks: Tasks) -> Sequence[Any]:
        assert isinstance(tasks.train, Curriculum)
        boxes = plan.sizes["boxes"]
        beyond = [*boxes, 2 * boxes[-1] - boxes[-2]]
        ends = [grids_of(plan, plan.sizes["ends"], box, 2**62 + 2**33 + place) for place, box in enumerate(beyond)]
        scores = PhaseScores(tasks.train, ends, plan.settings.precision)
        # Lengths that have no effect would mislead folding.
        return [lambda model, epoch: unit_coefficients(model), scores] if plan.options.get("unit") else [scores]

    def measure(self, model: nn.Module, plan: Plan, tasks: Tasks, watchers: Sequence[Any]) -> dict[str, Any]:
        """Scores before each phase and at its end, those of the rule, and those of the final network on test grids.

        "phase2_exact": at the end of phase 2; "before2_exact": on its grids before training on them, so with five phases
        "before6_exact" is on grids beyond the last; both with BatchNorm statistics re-estimated on the grids that the
        network was last trained on. "rule2_exact": the rectangle rule's. "fold2_0.8_exact",
        "fold2_0.8_layers": of the network folded at similarity 0.8 at the end of phase 2, on the 2,000 grids of that phase
        that it is scored on after every epoch. "exact", "reestimated_exact": on test grids; "steps40_box25_exact": see
        `exact_by_steps`.
        """
        scores, precision = watchers[-1], plan.settings.precision
        fresh = with_reestimated_statistics(model, self.sample(plan, tasks), precision)
        found = scores.metrics() | evaluate(model, tasks.test, precision)
        found |= {f"reestimated_{key}": value for key, value in evaluate(fresh, tasks.test, precision).items()}
        if isinstance(model, LoopedGridNet) and model.tied == "group":
            found |= exact_by_steps(model, plan, tasks)
        return found

    def rows(self, history: Sequence[Mapping[str, Any]], watchers: Sequence[Any]) -> list[dict[str, Any]]:
        """The history with "phase", with statistics re-estimated after each epoch "reestimated_exact" and so on, and the
        mean and largest similarity of the weights of two layers, "weights_mean" and "weights_largest"."""
        scores = watchers[-1]
        return [{**row, **scores.row(int(row["epoch"]))} for row in history]


def named(network: str, readings: Sequence[str]) -> str:
    """The name of the recipe of a network with other readings."""
    return f"{network} {' + '.join(readings)}".strip()


def grids_of(plan: Plan, n: int, box: int, seed: int, side: int | None = None) -> Grids:
    """`n` grids like those of a plan, with another side if one is given."""
    return generate(n, side or plan.sizes["side"], box, plan.sizes["obstacles"], seed)


def sample_of(task: Curriculum, phase: int) -> Tensor:
    """The training grids of a phase (from 1) on which statistics are re-estimated."""
    return task.phases[phase - 1].train.inputs[:REESTIMATED_ON].float()


class _AtSteps(nn.Module):
    """A looped network that runs another number of steps."""

    def __init__(self, model: LoopedGridNet, steps: int) -> None:
        super().__init__()
        self.model, self.steps = model, steps

    def forward(self, grids: Tensor) -> Tensor:
        return self.model(grids, self.steps)  # type: ignore[no-any-return]


def exact_by_steps(model: LoopedGridNet, plan: Plan, tasks: Tasks) -> dict[str, float]:
    """ "steps40_box25_exact" and so on: the exact rate after `STEPS`, on unseen grids of the last box and two beyond it."""
    assert isinstance(tasks.train, Curriculum)
    boxes, found = plan.sizes["boxes"], {}
    for place in range(3):
        box = boxes[-1] + place * (boxes[-1] - boxes[-2])
        if box <= plan.sizes["side"]:
            grids = grids_of(plan, plan.sizes["held_out"], box, 2**62 + 2**34 + place)
            task = ShortestPaths(tasks.train.phases[-1].train, grids)
            for multiple in STEPS:
                steps = max(1, multiple * model.steps // 20)
                scores = evaluate(_AtSteps(model, steps), task, plan.settings.precision)
                found[f"steps{steps}_box{box}_exact"] = scores["exact"]
    return found


class Fresh(ShortestPaths):
    """`ShortestPaths` with new training grids, in the same memory, in each epoch.

    `train` keeps grids that no epoch trains on; statistics are re-estimated on them.
    """

    def __init__(self, train: Grids, held_out: Grids, plan: Plan, box: int) -> None:
        super().__init__(train, held_out)
        self.plan, self.box = plan, box
        self.drawn = train

    def to(self, device: torch.device) -> Fresh:
        moved = super().to(device)
        assert isinstance(moved, Fresh)
        moved.drawn = Grids(*(tensor.clone() for tensor in moved.train))
        return moved

    def identity(self) -> str:
        return f"{super().identity()}, fresh"

    def prepare(self, seed: int, epoch: int) -> Sequence[Tensor]:
        """Draw the grids of an epoch (counted through all phases)."""
        new = grids_of(self.plan, self.size, self.box, 2**61 + 1_000 * seed + epoch)
        for mine, theirs in zip(self.drawn, new, strict=True):
            mine.copy_(theirs)
        return [self.drawn.inputs, self.drawn.targets]

    def batch(self, indices: Tensor, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
        return self.drawn.inputs[indices].float(), self.drawn.targets[indices].float()


class PhaseScores:
    """Scores with re-estimated statistics: after each epoch on unseen grids of its phase; when a phase ends, on many more of
    that phase and of the next, on which the network has not trained. Then a shared network is folded, too.

    A callback for `fit` whose state is kept in checkpoints. The grids decide nothing: no epoch or setting is chosen by them.

    Args:
        task: the curriculum.
        ends: grids of each phase and of one beyond the last, for when a phase ends.
        precision: as in `Settings`.
    """

    def __init__(self, task: Curriculum, ends: Sequence[Grids], precision: str) -> None:
        self.task, self.precision = task, precision
        self.ends = [
            ShortestPaths(phase.train, grids) for phase, grids in zip(_and_beyond(task.phases), ends, strict=True)
        ]
        self.rows: dict[str, list[list[float]]] = {name: [] for name in _COLUMNS}

    def __call__(self, model: nn.Module, epoch: int) -> None:
        phase = self.phase_of(max(1, epoch))
        held_out, sample = self.task.phases[phase - 1], sample_of(self.task, phase)

        def scores(network: nn.Module, task: ShortestPaths) -> list[float]:
            found = evaluate(with_reestimated_statistics(network, sample, self.precision), task, self.precision)
            return [found[key] for key in SCORES]

        self.rows["weights"].append([epoch, *weights_alike(model)])
        if epoch:
            self.rows["scores"].append([epoch, *scores(model, held_out)])
        if epoch % self.task.epochs:
            return
        for place in (phase, phase + 1) if epoch else (phase,):
            self.rows["ends"].append([epoch, place, *scores(model, self.ends[place - 1])])
        if epoch and banks(model):
            for row in sweep(model, lambda folded: scores(folded, held_out)[0], FOLDED_AT):
                self.rows["folds"].append([phase, row["threshold"], row["distinct"], row["value"]])

    def state_dict(self) -> dict[str, Tensor]:
        return {
            name: torch.tensor(rows, dtype=torch.float64, device="cpu").view(-1, _COLUMNS[name])
            for name, rows in self.rows.items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.rows = {name: state[name].tolist() for name in _COLUMNS}

    def phase_of(self, epoch: int) -> int:
        """The phase (from 1) that an epoch (from 1) belongs to."""
        return min(-(-epoch // self.task.epochs), len(self.task.phases))

    def row(self, epoch: int) -> dict[str, float]:
        """What was found after an epoch, on the grids of its phase."""
        values, alike = (next(row[1:] for row in self.rows[name] if row[0] == epoch) for name in ("scores", "weights"))
        found = {f"reestimated_{key}": value for key, value in zip(SCORES, values, strict=True)}
        return {"phase": float(self.phase_of(epoch)), **found} | dict(zip(_ALIKE, alike, strict=True))

    def metrics(self) -> dict[str, float]:
        """By phase: before training on its grids, at its end, what the rectangle rule scores on them, and folds."""
        found = dict(zip((f"start_{name}" for name in _ALIKE), self.rows["weights"][0][1:], strict=True))
        for phase, task in enumerate(self.ends, start=1):
            assert task.held_out is not None
            rule = scores_beside_the_rule(rectangle_rule(task.held_out.inputs), task.held_out)
            found |= {f"rule{phase}_{key}": rule[key] for key in SCORES}
            for name, at in (("before", phase - 1), ("phase", phase)):
                for epoch, place, *values in self.rows["ends"]:
                    if (epoch, place) == (at * self.task.epochs, phase):
                        found |= {f"{name}{phase}_{key}": value for key, value in zip(SCORES, values, strict=True)}
        for ended, threshold, layers, exact in self.rows["folds"]:
            name = f"fold{ended:.0f}_{threshold:g}"
            found |= {f"{name}_layers": layers, f"{name}_exact": exact}
        return found


_ALIKE = ("weights_mean", "weights_largest")
_COLUMNS = {"scores": 1 + len(SCORES), "ends": 2 + len(SCORES), "weights": 1 + len(_ALIKE), "folds": 4}
"""Columns of what `PhaseScores` keeps: epoch, SCORES; epoch, phase of the grids, SCORES; epoch, _ALIKE; and phase,
threshold, layers left, exact rate."""


def weights_alike(model: nn.Module) -> tuple[float, float]:
    """The mean and the largest |cos| between the 3x3 weights of two layers of a grid network; 1 for a loop."""
    if isinstance(model, LoopedGridNet):
        return 1.0, 1.0
    named = model.named_modules()
    weights = [in_double(layer.weight).flatten() for name, layer in named if name.rpartition(".")[2] == "conv"]
    similarity = layer_similarity(torch.stack(weights)).cpu()
    return off_diagonal({"": similarity})[""], float(similarity.fill_diagonal_(0.0).max())


def _and_beyond(phases: Sequence[ShortestPaths]) -> list[ShortestPaths]:
    return [*phases, phases[-1]]
