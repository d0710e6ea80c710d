"""Does sharing help with large images and many classes?

Our rows of the poster's ImageNet table: ``softshare run "SWRN 50-2" --data FOLDER --profile paper``. The poster does not
give the recipe; this is the usual one for such networks. Profiles fast and gpu only try the code: small images, a narrow
network. Findings so far: see the page Results.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from ..models import Network
from ..training.evaluation import evaluate
from ..training.settings import ADDED_LATER, Settings
from ..training.streaming import StreamedImages
from .sources import SOURCES
from .study import Plan, Recipe, Study, Tasks


class ImageNet(Study):
    """Bottleneck networks, plain and softly shared, on image folders that are streamed."""

    name = "imagenet"
    version = 1
    defaults = {
        "sizes": {"side": 224},
        "schedule": {
            "batch_size": 256,
            "optimizer": "sgd",
            "rate": 0.1,
            "milestones": [0.3, 0.6, 0.9],
            "factor": 0.1,
            "cycle": 0,
            "weight_decay": 1e-4,
            "penalty": 0.0,
            "evaluate_every": 1,
            **ADDED_LATER,
        },
    }

    def recipes(self) -> Sequence[Recipe]:
        names = ("WRN 50-2", "DenseNet-264", "ResNet-200", "SWRN 50-2")
        return [Recipe(name, self.name, name, "table ImageNet", source=SOURCES.get(name)) for name in names]

    def plan(self, recipe: Recipe, profile: str, seed: int) -> Plan:
        network, small = Network.parse(recipe.network), profile in ("fast", "gpu")
        settings = Settings(
            epochs={"fast": 1, "gpu": 1, "short": 10, "paper": 100}[profile],
            batch_size=32 if profile == "fast" else 256,
            milestones=(0.3, 0.6, 0.9),
            factor=0.1,
            weight_decay=1e-4,
            penalty=recipe.penalty_in(profile),
            seed=seed,
        )
        settings = recipe.as_published(settings, profile)
        if profile == "fast":
            settings = replace(settings, batch_size=32, precision="float32", tf32=False)
        return Plan(recipe, profile, network.narrowed() if small else network, settings, {"side": 64 if small else 224})

    def rehearsal(self, plan: Plan) -> Plan:
        return replace(plan, sizes={"side": 32}, settings=replace(plan.settings, epochs=1, batch_size=8))

    def data_told(self, recipe: Recipe) -> str:
        return "--data FOLDER"

    def examples(self, plan: Plan) -> int:
        return 1_281_167

    def fingerprint(self, plan: Plan, data: str | None = None, download: bool = False) -> str:
        return self.tasks(plan, data).data["fingerprint"]

    def used(self, plan: Plan, tasks: Tasks) -> dict[str, dict[str, Any]]:
        config = plan.config()
        assert isinstance(tasks.test, StreamedImages)
        config["sizes"] |= {"train": tasks.train.size, "test": tasks.test.held_out_size, "classes": tasks.classes}
        return config

    def tasks(self, plan: Plan, data: str | None = None, download: bool = False) -> Tasks:
        """Training and validation images of the folder `data`, decoded during training."""
        if data is None:
            raise ValueError(
                f"{plan.recipe.name} streams its images from a folder with train/<class>/<file> and val/<class>/<file>; "
                "give the folder with data= (--data on the command line)"
            )
        train = StreamedImages(data, plan.sizes["side"], held_out=None)
        test = StreamedImages(data, plan.sizes["side"])
        return Tasks(train, test, {"source": test.source, "fingerprint": test.fingerprint}, len(test.classes))

    def measure(self, model: nn.Module, plan: Plan, tasks: Tasks, watchers: Sequence[Any]) -> dict[str, Any]:
        return evaluate(model, tasks.test, plan.settings.precision)
