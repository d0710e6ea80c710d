"""Does a network whose layers share templates learn as well as a plain one, with fewer parameters?

The rows of the poster's two CIFAR tables, with the controls that they lack: a plain WRN of the same width in the same
trainer. One run: ``softshare run "SWRN 28-10-2*" --profile paper --seed 0``; what it costs: ``softshare list``.
The schedule of profile "paper" is that of the authors' released code. Findings so far: see the page Results.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from .. import images
from ..files import user_path
from ..images import Augmentation, ImageSet
from ..models import Network
from ..training.evaluation import evaluate
from ..training.settings import ADDED_LATER, Settings
from ..training.tasks import Classification
from .sources import SOURCES
from .study import Plan, Recipe, Study, Tasks

_PARAMETERS = "table Improved Parameter Efficiency"
_SEARCH = "table Comparison to Neural Architecture Search"
_BOTH = ("cifar10", "cifar100")
_BY_HAND = ("ResNeXt-29 16x64", "DenseNet 100-24", "DenseNet 190-40")
_SEARCHED = (
    "NASNet-A",
    "NASNet-A 27.6M",
    "AmoebaNet-B",
    "AmoebaNet-B 13.7M",
    "AmoebaNet-B 34.9M",
    "DARTS",
    "SNAS",
    "ENAS",
)
_SIMILARITY = "figures of similarity and folding"


class Cifar(Study):
    """Wide ResNets, plain and softly shared, on CIFAR-10 and CIFAR-100."""

    name = "cifar"
    version = 1
    defaults = {
        "sizes": {"train": None, "held_out": 0, "test": None, "side": 32},
        "augmentation": {"flip": True, "pad": 4, "cutout": 0},
        "schedule": {
            "batch_size": 128,
            "optimizer": "sgd",
            "rate": 0.1,
            "milestones": [0.3, 0.6, 0.8],
            "factor": 0.2,
            "cycle": 0,
            "weight_decay": 5e-4,
            "penalty": 0.0,
            "evaluate_every": 1,
            **ADDED_LATER,
        },
    }

    def recipes(self) -> Sequence[Recipe]:
        poster = ["WRN 28-10", "WRN 28-10*", "SWRN 28-10*", "SWRN 28-10-2*", "SWRN 28-14*", "SWRN 28-14-2*"]
        poster += ["SWRN 28-18*", "SWRN 28-18-2*"]
        found = [self._compared(name, _PARAMETERS, _BOTH) for name in _BY_HAND]
        found += [Recipe(name, self.name, name, _PARAMETERS, _BOTH) for name in poster]
        found += [self._compared(name, _SEARCH, ("cifar10",), cutout=16) for name in _SEARCHED]
        for name in ("WRN 28-10", "SWRN 28-6-2", "SWRN 28-10-2", "SWRN 28-14-2"):
            found.append(self._with_cutout(name, _SEARCH))
        for width in (2, 6, 10):
            shared = f"SWRN 28-{width}-2"
            others = {
                f"WRN 28-{width}": f"control for {shared} cutout: nothing shared",
                shared: "the same comparison at a width that trains in minutes",
                f"SWRN 28-{width}-1": f"control for {shared} cutout: one template",
                f"SWRN 28-{width}": f"control for {shared} cutout: one template per layer",
                f"WRN 16-{width}": f"control for {shared} cutout: as many parameters, fewer layers",
            }
            names = [recipe.network for recipe in found if recipe.cutout]
            found += [self._with_cutout(name, shows) for name, shows in others.items() if name not in names]
        found += [
            Recipe("WRN 28-6", self.name, "WRN 28-6", "control for WRN 28-6 cutout", _BOTH),
            Recipe("SWRN 28-10-2", self.name, "SWRN 28-10-2", "WRN 28-10 shared, without dropout either", _BOTH),
            Recipe("SWRN 40-8-8", self.name, "SWRN 40-8-8", _SIMILARITY, ("cifar10",), dense_epochs=5),
            Recipe(
                "SWRN 40-8-8 with penalty",
                self.name,
                "SWRN 40-8-8",
                f"{_SIMILARITY}, regularised; lambda is our choice for each profile",
                ("cifar10",),
                penalty={"fast": 2.5e-3, "gpu": 1e-4, "short": 1e-4, "paper": 1e-5},
                dense_epochs=5,
            ),
            Recipe(
                "SWRN 40-8-8 shuffled",
                self.name,
                "SWRN 40-8-8",
                f"control for {_SIMILARITY}: what training alone does",
                ("cifar10",),
                dense_epochs=5,
                shuffled=True,
            ),
        ]
        return found

    def _with_cutout(self, network: str, shows: str) -> Recipe:
        return Recipe(f"{network} cutout", self.name, network, shows, ("cifar10",), cutout=16)

    def _compared(self, name: str, shows: str, data: tuple[str, ...], cutout: int = 0) -> Recipe:
        return Recipe(name, self.name, name, shows, data, cutout, source=SOURCES[name])

    def plan(self, recipe: Recipe, profile: str, seed: int) -> Plan:
        network = Network.parse(recipe.network)
        sizes: dict[str, Any] = {"train": None, "held_out": 0, "test": None, "side": 32}  # None: all of them
        settings = Settings(
            epochs={"fast": 8, "gpu": 10, "short": 30, "paper": 200}[profile],
            penalty=recipe.penalty_in(profile),
            seed=seed,
        )
        sizes |= {"shuffled": True} if recipe.shuffled else {}
        settings = recipe.as_published(settings, profile)
        options = dict(recipe.source.options) if recipe.source else {}
        if profile == "fast":
            network = network.narrowed()
            sizes |= {"train": 2_000, "held_out": 300, "test": 1_000, "side": 16}
            settings = replace(settings, batch_size=32, precision="float32", tf32=False)
            if options:  # 16 pixels are too few for an auxiliary head, and one cell of each kind does to try the code
                options |= {"repeats": 1}
                del options["auxiliary"]
        if profile == "gpu":  # the seeded split of the authors' code is 90 / 10
            network = network.narrowed(4 * network.narrowed().width)
            sizes |= {"train": 45_000, "held_out": 5_000}
        shrink = 32 // sizes["side"]
        augmentation = {"flip": True, "pad": 4 // shrink, "cutout": recipe.cutout // shrink}
        return Plan(recipe, profile, network, settings, sizes, augmentation, options)

    def rehearsal(self, plan: Plan) -> Plan:
        sizes = {**plan.sizes, "train": 300, "held_out": 100, "test": 200}
        return replace(plan, sizes=sizes, settings=replace(plan.settings, epochs=2, batch_size=50))

    def tasks(self, plan: Plan, data: str | None = None, download: bool = False) -> Tasks:
        """Images to train on, to hold out and to test on, as many as the plan asks for, or all if there are fewer.

        Without `data` they are from the recipe's first data set; only profile fast uses the embedded digits if no copy of
        CIFAR-10 is found. Digits are not mirrored.
        """
        train, test = self._load(plan, data, download)
        facts = {"source": train.source, "fingerprint": _fingerprint(train, test)}
        sizes, held_out = plan.sizes, None
        if sizes["train"] is not None:
            train, rest = train.split(min(sizes["train"], round(0.9 * len(train.labels))), plan.seed)
            held_out = _at_most(rest, sizes["held_out"], plan.seed)
        if sizes["test"] is not None:
            test = _at_most(test, sizes["test"], plan.seed)
        if sizes.get("shuffled"):
            train = train.shuffled(plan.seed)
        shrink = train.images.shape[-1] // sizes["side"]
        if shrink > 1:
            train, test = train.shrunk(shrink), test.shrunk(shrink)
            held_out = None if held_out is None else held_out.shrunk(shrink)
        chosen = {**plan.augmentation, "flip": plan.augmentation["flip"] and train.source != "digits"}
        augmentation = Augmentation(*train.statistics(), **chosen)
        return Tasks(
            Classification(train, held_out, augmentation),
            Classification(train, test, augmentation),
            facts,
            len(train.classes),
        )

    def fingerprint(self, plan: Plan, data: str | None = None, download: bool = False) -> str:
        return _fingerprint(*self._load(plan, data, download))

    def examples(self, plan: Plan) -> int:
        return plan.sizes["train"] or 50_000

    def used(self, plan: Plan, tasks: Tasks) -> dict[str, dict[str, Any]]:
        train, test = tasks.train, tasks.test
        assert isinstance(train, Classification) and isinstance(test, Classification) and test.held_out is not None
        held_out = 0 if train.held_out is None else len(train.held_out[1])
        config = plan.config()
        config["sizes"] |= {"train": train.size, "held_out": held_out, "test": len(test.held_out[1])}
        config["augmentation"] |= {"flip": train.augmentation.flip}
        return config

    def _load(self, plan: Plan, name: str | None, download: bool) -> tuple[ImageSet, ImageSet]:
        def both(name: str) -> tuple[ImageSet, ImageSet]:
            return images.load(name, "train", download=download), images.load(name, "test", download=download)

        if name is not None:
            return both(name)
        try:
            return both(plan.recipe.data[0])
        except FileNotFoundError as error:
            if plan.profile != "fast":
                raise FileNotFoundError(f"profile {plan.profile} needs the images of the poster: {error}") from error
            given = os.environ.get("SOFTSHARE_DATA")
            if given and not user_path(given).exists():
                raise  # a mistyped name is not the same as having no images
            return both("digits")

    def measure(self, model: nn.Module, plan: Plan, tasks: Tasks, watchers: Sequence[Any]) -> dict[str, Any]:
        return evaluate(model, tasks.test, plan.settings.precision)


def _fingerprint(train: ImageSet, test: ImageSet) -> str:
    return f"{train.fingerprint[:32]} {test.fingerprint[:32]}"


def _at_most(found: ImageSet, n: int, seed: int) -> ImageSet:
    """`n` of the images, drawn at random, or all if there are no more than that."""
    return found if len(found.labels) <= n else found.split(n, seed)[0]
