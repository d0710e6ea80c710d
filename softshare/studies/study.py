"""What a study is: its recipes, and for each of them the network, the tasks, and what is measured.

Each study of the reproduction is a `Study` in its own file. There is one way from recipe to record,
`softshare.studies.running.train`, which asks the study for these things in turn; chapters call them too.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import models
from ..models import Network
from ..models.searched import set_progress
from ..training.devices import standard_defaults
from ..training.settings import Settings
from ..training.tasks import Task
from .records import Identity
from .sources import Source

REESTIMATED_ON = 1_000
"""Training examples on which BatchNorm statistics are re-estimated."""


@dataclass(frozen=True)
class Recipe:
    """One row or figure of the poster, or a control for one.

    Attributes:
        name: its name on the poster.
        study: the name of its study.
        network: by the names of `softshare.models.build`.
        shows: where it is on the poster, or what it is the control for.
        data: names of data sets that it is run on, for `softshare.images.load`; () for generated grids and for folders.
        cutout: side of the hole at 32 x 32 pixels; 0: none.
        penalty: lambda of the recurrence penalty; a mapping if it depends on the profile.
        dense_epochs: similarities are recorded 20 times per epoch for the first `dense_epochs` epochs.
        source: how those who published the network trained it; None: as the study does.
        shuffled: whether labels of training images, or the answers of training grids, are shuffled, so that nothing can be
            learned but the examples themselves.
        reading: JSON; what differs from the study's own reading of what is not known, see the study.
    """

    name: str
    study: str
    network: str
    shows: str
    data: tuple[str, ...] = ()
    cutout: int = 0
    penalty: float | Mapping[str, float] = 0.0
    dense_epochs: int = 0
    source: Source | None = None
    shuffled: bool = False
    reading: Mapping[str, Any] = field(default_factory=dict)

    def penalty_in(self, profile: str) -> float:
        """Lambda in a profile."""
        return self.penalty[profile] if isinstance(self.penalty, Mapping) else self.penalty

    def as_published(self, settings: Settings, profile: str) -> Settings:
        """Settings with the schedule of the recipe's source, if it has one.

        Profiles other than "paper" keep their epochs, and cycles are shortened so that the last one ends with them.
        """
        if self.source is None:
            return settings
        schedule = dict(self.source.schedule)
        if profile != "paper":
            del schedule["epochs"]
            if "cycle" in schedule:
                schedule["cycle"] = _cycle_that_fits(settings.epochs, schedule["growth"])
        return replace(settings, **schedule)


def _cycle_that_fits(epochs: int, growth: int) -> int:
    """The first of as many growing cycles as fill the epochs exactly; a single cycle always does."""
    sums = [sum(growth**number for number in range(cycles)) for cycles in range(1, epochs + 1)]
    return epochs // max(length for length in sums if length <= epochs and epochs % length == 0)


@dataclass(frozen=True)
class Plan:
    """A recipe in one profile with one seed, everything chosen.

    Attributes:
        network: the network to build; in small profiles a narrower relative of the recipe's.
        settings: schedule and execution.
        sizes: JSON; numbers of examples, sides, phases; whether labels are shuffled.
        augmentation: JSON; the random changes of training images.
        options: JSON; of `softshare.models.build`.
    """

    recipe: Recipe
    profile: str
    network: Network
    settings: Settings
    sizes: Mapping[str, Any]
    augmentation: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def seed(self) -> int:
        return self.settings.seed

    def config(self) -> dict[str, dict[str, Any]]:
        """Everything chosen but the seed, as JSON: "sizes", "augmentation", "schedule", and "options" if there are any."""
        schedule = {name: value for name, value in self.settings.schedule().items() if name != "seed"}
        found = {"sizes": dict(self.sizes), "augmentation": dict(self.augmentation), "schedule": schedule}
        return found | ({"options": dict(self.options)} if self.options else {})


class Tasks(NamedTuple):
    """What a plan is trained and tested on.

    Attributes:
        train: the task to train on, with or without held-out examples.
        test: the task to test on, once, at the end.
        data: "source" in words and "fingerprint".
        classes: number of classes; None if there are none.
    """

    train: Task
    test: Task
    data: dict[str, str]
    classes: int | None


class Study(ABC):
    """One study of the reproduction.

    Attributes:
        name: the study's name, as in records.
        version: raised when the meaning of its training changes, so that older records are not mistaken for new ones.
        defaults: by part of a plan ("sizes", "augmentation", "schedule") the values that are left out of identities. They
            belong to the version and have no other use: they do not change when a plan or a default elsewhere changes,
            and a setting that is added later gets its old meaning written here, so that no identity changes.
    """

    name: str
    version: int
    defaults: Mapping[str, Mapping[str, Any]]

    @abstractmethod
    def recipes(self) -> Sequence[Recipe]:
        """Its recipes, in the order of the poster."""

    @abstractmethod
    def plan(self, recipe: Recipe, profile: str, seed: int) -> Plan:
        """A recipe with everything chosen."""

    @abstractmethod
    def fingerprint(self, plan: Plan, data: str | None = None, download: bool = False) -> str:
        """The fingerprint of the data that `tasks` would use, without making the tasks."""

    @abstractmethod
    def examples(self, plan: Plan) -> int:
        """Training examples per epoch according to the plan; for whole data sets, their published number."""

    def data_told(self, recipe: Recipe) -> str:
        """What a recipe is run on, in a few words."""
        return ", ".join(recipe.data)

    @abstractmethod
    def rehearsal(self, plan: Plan) -> Plan:
        """The same plan at toy sizes, which executes every step in seconds."""

    @standard_defaults()
    def network(self, plan: Plan, classes: int | None = None) -> nn.Module:
        """The network of a plan before training; seeds the default random generator."""
        torch.manual_seed(plan.seed)
        return models.build(plan.network, classes, **plan.options)

    @abstractmethod
    def tasks(self, plan: Plan, data: str | None = None, download: bool = False) -> Tasks:
        """What a plan is trained and tested on; `data` names a data set other than the recipe's first."""

    def used(self, plan: Plan, tasks: Tasks) -> dict[str, dict[str, Any]]:
        """The plan's `config` as it was carried out, with the values that the plan leaves to the data filled in."""
        return plan.config()

    def sample(self, plan: Plan, tasks: Tasks) -> Tensor:
        """At most 1,000 training inputs (n, ...) for re-estimating BatchNorm statistics, as seen at the end of training.

        They are drawn at random, since a data set may be sorted by class, and statistics of one class suit no other.
        """
        order = torch.randperm(tasks.train.size, generator=torch.Generator("cpu").manual_seed(plan.seed), device="cpu")
        parts = order[:REESTIMATED_ON].split(250)
        return torch.cat([inputs.float() for inputs, _ in tasks.train.batches(parts, plan.seed, 1)])

    def watchers(self, plan: Plan, tasks: Tasks) -> Sequence[Any]:
        """Callbacks for `fit` that measure during training, or change the network with its progress."""
        if "drop_path" not in plan.options:
            return ()
        return [lambda model, epoch: set_progress(model, min(1.0, epoch / plan.settings.epochs))]

    @abstractmethod
    def measure(self, model: nn.Module, plan: Plan, tasks: Tasks, watchers: Sequence[Any]) -> dict[str, Any]:
        """Metrics of the trained network, by name; the only use of the test examples."""

    def rows(self, history: Sequence[Mapping[str, Any]], watchers: Sequence[Any]) -> list[dict[str, Any]]:
        """The history to record: that of `fit`, with what the watchers measured in each epoch."""
        return [dict(row) for row in history]

    def identity(self, plan: Plan, fingerprint: str = "") -> Identity:
        """What decides the outcome of a plan on data with that fingerprint."""
        chosen = {
            part: {name: value for name, value in values.items() if not self._is_default(part, name, value)}
            for part, values in plan.config().items()
        }
        chosen = {part: values for part, values in chosen.items() if values}
        return Identity(
            self.name, self.version, plan.recipe.name, plan.profile, plan.seed, str(plan.network), chosen, fingerprint
        )

    def _is_default(self, part: str, name: str, value: Any) -> bool:
        defaults = self.defaults.get(part, {})
        return name in defaults and defaults[name] == value
