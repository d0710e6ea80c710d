"""Does sharing help a network to learn an algorithm: faster, better, and beyond what it was trained on?

The curriculum of the poster's last section: CNN and SCNN learn shortest paths on grids whose distances grow from phase to
phase. ``softshare run SCNN --profile paper --seed 0``; what it costs: ``softshare list``. The poster gives grids of
32 x 32, the target, and 50 epochs per phase; the rest is remembered from the paper, not confirmed, and the batch size is
ours. Findings so far: see the page Results.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..models import Network
from ..shortest_path import PHASES, Grids, curriculum, generate, rectangle_rule, scores_beside_the_rule
from ..training.evaluation import evaluate, with_reestimated_statistics
from ..training.settings import ADDED_LATER, Settings
from ..training.tasks import Curriculum, ShortestPaths
from .study import REESTIMATED_ON, Plan, Recipe, Study, Tasks

SCORES = ("exact", "f1", "hard_exact", "hard_f1")
"""The scores of a network's answers, see `softshare.shortest_path.scores_beside_the_rule`."""

_CURRICULUM = "figure of the shortest-path curriculum"


class Paths(Study):
    """Grid networks, plain (CNN) and softly shared (SCNN), on a curriculum of shortest paths."""

    name = "paths"
    version = 1
    defaults = {
        "sizes": {"side": 32, "boxes": list(PHASES), "obstacles": 0.1, "train": 5_000, "held_out": 1_000},
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
        deep = "figure of the similarity of a 100-layer network over training"
        found.append(Recipe("SCNN 100 layers", self.name, "SCNN 100 layers", deep, dense_epochs=2))
        return found

    def plan(self, recipe: Recipe, profile: str, seed: int) -> Plan:
        network = Network.parse(recipe.network)
        sizes: dict[str, Any] = {"side": 32, "boxes": list(PHASES), "obstacles": 0.1, "train": 5_000, "held_out": 1_000}
        per_phase = {"fast": 3, "gpu": 25, "short": 10, "paper": 50}[profile]
        if profile == "fast":  # more obstacles, since small grids leave little room to search
            network = network.narrowed()
            sizes |= {"side": 12, "boxes": [5, 7, 9], "obstacles": 0.2, "train": 3_000}
        settings = Settings(
            epochs=per_phase * len(sizes["boxes"]),
            batch_size=100,
            optimizer="adam",
            rate=0.01,
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
        return Plan(recipe, profile, network, settings, sizes)

    def rehearsal(self, plan: Plan) -> Plan:
        sizes = {**plan.sizes, "side": 12, "boxes": [5, 9], "train": 200, "held_out": 100}
        settings = replace(plan.settings, epochs=2, batch_size=100, cycle=1, milestones=())
        return replace(plan, network=plan.network.narrowed(8), sizes=sizes, settings=settings)

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
        phases = [
            ShortestPaths(grids, grids_of(plan, sizes["held_out"], box, 2**62 + phase))
            for phase, (box, grids) in enumerate(drawn)
        ]
        task = Curriculum(phases, plan.settings.epochs // len(boxes))
        test = ShortestPaths(phases[-1].train, grids_of(plan, sizes["held_out"], boxes[-1], 2**62 + 2**32))
        facts = {"source": "shortest paths, generated", "fingerprint": self.fingerprint(plan)}
        return Tasks(task, test, facts, None)

    def watchers(self, plan: Plan, tasks: Tasks) -> Sequence[PhaseScores]:
        assert isinstance(tasks.train, Curriculum)
        return [PhaseScores(tasks.train, plan.settings.precision)]

    def measure(self, model: nn.Module, plan: Plan, tasks: Tasks, watchers: Sequence[PhaseScores]) -> dict[str, Any]:
        """Scores before each phase and at its end, those of the rule, and those of the final network on test grids.

        "phase2_exact": at the end of phase 2; "before2_exact": on its grids before training on them; both with re-estimated
        BatchNorm statistics. "rule2_exact": the rectangle rule's. "exact", "reestimated_exact": on test grids.
        """
        (scores,), precision = watchers, plan.settings.precision
        fresh = with_reestimated_statistics(model, self.sample(plan, tasks), precision)
        found = scores.metrics() | evaluate(model, tasks.test, precision)
        return found | {f"reestimated_{key}": value for key, value in evaluate(fresh, tasks.test, precision).items()}

    def rows(self, history: Sequence[Mapping[str, Any]], watchers: Sequence[PhaseScores]) -> list[dict[str, Any]]:
        """The history with "phase" and, with statistics re-estimated after each epoch, "reestimated_exact" and so on."""
        (scores,) = watchers
        return [{**row, **scores.row(int(row["epoch"]))} for row in history]


def grids_of(plan: Plan, n: int, box: int, seed: int, side: int | None = None) -> Grids:
    """`n` grids like those of a plan, with another side if one is given."""
    return generate(n, side or plan.sizes["side"], box, plan.sizes["obstacles"], seed)


def sample_of(task: Curriculum, phase: int) -> Tensor:
    """The training grids of a phase (from 1) on which statistics are re-estimated."""
    return task.phases[phase - 1].train.inputs[:REESTIMATED_ON].float()


class PhaseScores:
    """Scores with re-estimated statistics after each epoch, and on each phase's grids before training on them.

    A callback for `fit` whose state is kept in checkpoints.
    """

    def __init__(self, task: Curriculum, precision: str) -> None:
        self.task, self.precision = task, precision
        self.found: list[list[float]] = []  # rows of epoch, phase (from 1), and SCORES

    def __call__(self, model: nn.Module, epoch: int) -> None:
        phases = self.task.phases
        # At the end of a phase the network is also scored on the grids of the next.
        now, then = -(-epoch // self.task.epochs), epoch // self.task.epochs + 1
        for phase in range(max(1, now), min(then, len(phases)) + 1):
            fresh = with_reestimated_statistics(model, sample_of(self.task, phase), self.precision)
            scores = evaluate(fresh, phases[phase - 1], self.precision)
            self.found.append([epoch, phase, *(scores[key] for key in SCORES)])

    def state_dict(self) -> dict[str, Tensor]:
        return {"found": torch.tensor(self.found, dtype=torch.float64, device="cpu").view(-1, 2 + len(SCORES))}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.found = state["found"].tolist()

    def phase_of(self, epoch: int) -> int:
        """The phase (from 1) that an epoch (from 1) belongs to."""
        return min(-(-epoch // self.task.epochs), len(self.task.phases))

    def row(self, epoch: int) -> dict[str, float]:
        """The scores after an epoch, on the grids of its phase."""
        phase = self.phase_of(epoch)
        scores = self._seen(epoch, phase)
        return {"phase": float(phase)} | {f"reestimated_{key}": value for key, value in scores.items()}

    def _seen(self, epoch: int, phase: int) -> dict[str, float]:
        row = next(row for row in self.found if row[:2] == [epoch, phase])
        return dict(zip(SCORES, row[2:], strict=True))

    def metrics(self) -> dict[str, float]:
        """By phase: before training on its grids, at its end, and what the rectangle rule scores on them."""
        found: dict[str, float] = {}
        for phase, task in enumerate(self.task.phases, start=1):
            assert task.held_out is not None
            rule = scores_beside_the_rule(rectangle_rule(task.held_out.inputs), task.held_out)
            ends = self._seen(phase * self.task.epochs, phase)
            before = self._seen((phase - 1) * self.task.epochs, phase)
            for name, scores in (("phase", ends), ("before", before), ("rule", rule)):
                found |= {f"{name}{phase}_{key}": scores[key] for key in SCORES}
        return found
