"""Training by recipe, or of any model, with a record of what was done.

``run("SWRN 28-10-2*", profile="paper", seed=0)`` trains a recipe and writes its record; a second call finds the record.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from . import distributed, images, models, shortest_path
from .augmentation import Augmentation
from .checkpoints import read_checkpoint
from .files import writable
from .recipes import Plan, plan
from .records import Record, environment, read_record, record_path, runs_folder, write_record
from .sharing import banks
from .similarity import SimilarityRecorder
from .streaming import StreamedImages
from .tasks import Classification, Curriculum, ShortestPaths, Task, path_scores
from .training import Settings, evaluate, fit, pick_device, pick_precision


def _load(name: str | None, plan: Plan, download: bool) -> tuple[images.ImageSet, images.ImageSet]:
    if name is None and plan.profile == "fast":
        try:
            return _load("cifar10", plan, download)
        except FileNotFoundError:
            given = os.environ.get("SOFTSHARE_DATA")
            if given and not Path(given).expanduser().exists():
                raise  # a mistyped name is not the same as having no images
            name = "digits"
    name = name or plan.recipe.data[0]
    return images.load(name, "train", download=download), images.load(name, "test", download=download)


def _image_tasks(plan: Plan, name: str | None, download: bool) -> tuple[Task, Task, dict[str, str], int]:
    seed, sizes = plan.settings.seed, plan.sizes
    train, test = _load(name, plan, download)
    data = {"source": train.source, "fingerprint": f"{train.fingerprint[:32]} {test.fingerprint[:32]}"}
    held_out = None
    if sizes["train"] is not None:
        share = min(sizes["train"], round(0.9 * len(train.labels)))
        train, rest = train.split(share, seed)
        held_out = rest if len(rest.labels) <= sizes["held_out"] else rest.split(sizes["held_out"], seed)[0]
    if sizes["test"] is not None and sizes["test"] < len(test.labels):
        test = test.split(sizes["test"], seed)[0]
    shrink = train.images.shape[-1] // sizes["side"]
    if shrink > 1:
        train, test = train.shrunk(shrink), test.shrunk(shrink)
        held_out = None if held_out is None else held_out.shrunk(shrink)
    augmentation = Augmentation(
        *train.statistics(), flip=train.source != "digits", pad=4 // shrink, cutout=plan.recipe.cutout // shrink
    )
    task = Classification(train, held_out, augmentation)
    return task, Classification(train, test, augmentation), data, len(train.classes)


def _tasks(plan: Plan, data: str | None, download: bool) -> tuple[Task, Task, dict[str, str], int | None]:
    """The task to train on, the one to test on at the end, the data as a record has it, and the number of classes."""
    if plan.recipe.task == "paths":
        if data is not None:
            raise ValueError(f"{plan.recipe.name} makes its own grids and takes no data, got {data!r}")
        return *_path_tasks(plan), None
    if plan.recipe.task == "cifar":
        return _image_tasks(plan, data, download)
    if data is None:
        raise ValueError(
            f"{plan.recipe.name} streams its images from a folder with train/<class>/<file> and val/<class>/<file>; name it "
            "with data= (--data on the command line)"
        )
    train = StreamedImages(data, plan.sizes["side"], held_out=None)
    test = StreamedImages(data, plan.sizes["side"])
    return train, test, {"source": test.source, "fingerprint": test.fingerprint}, len(test.classes)


def _path_tasks(plan: Plan) -> tuple[Task, Task, dict[str, str]]:
    sizes, seed = plan.sizes, plan.settings.seed
    size, obstacles = sizes["side"], sizes["obstacles"]

    def grids(examples: int, box: int, first: int) -> shortest_path.Grids:
        return shortest_path.generate(examples, size, box, obstacles, first)

    # Held-out grids are the same for all seeds and networks; the seeds of training grids stay far below theirs.
    phases = [
        ShortestPaths(grids(sizes["train"], box, 100 * seed + phase), grids(sizes["held_out"], box, 2**62 + phase))
        for phase, box in enumerate(sizes["boxes"])
    ]
    task = Curriculum(phases, sizes["epochs_a_phase"])
    test = ShortestPaths(phases[-1].train, grids(sizes["held_out"], sizes["boxes"][-1], 2**62 + 2**32))
    data = {"source": "shortest paths, generated", "fingerprint": f"training seeds from {100 * seed}"}
    return task, test, data


def settled(model: nn.Module, inputs: Tensor) -> nn.Module:
    """A copy in eval mode whose BatchNorm statistics are taken anew on inputs (N, ...), on the model's device.

    At a high rate the running statistics lag behind the weights, and scores jump from epoch to epoch.
    """
    model = copy.deepcopy(model)
    device = next(model.parameters()).device
    update_bn((some.to(device) for some in inputs.split(250)), model)
    return model.eval()


class _Where:
    """Where a run took place, process by process: a callback for `fit` that does nothing but travel in checkpoints."""

    def __init__(self, device: torch.device, settings: Settings) -> None:
        now = environment(str(device), str(pick_precision(settings.precision, device)).removeprefix("torch."))
        self.places: list[dict[str, Any]] = [now]

    def __call__(self, model: nn.Module, epoch: int) -> None:
        pass

    def state_dict(self) -> dict[str, Tensor]:
        return {"json": torch.tensor(list(json.dumps(self.places).encode()), dtype=torch.uint8)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.places = [*json.loads(bytes(state["json"].tolist())), self.places[-1]]

    def record(self) -> dict[str, Any]:
        """The last process's place, and the earlier ones' as "earlier" if there were any."""
        earlier = {"earlier": self.places[:-1]} if len(self.places) > 1 else {}
        return self.places[-1] | earlier


class _PhaseEnds:
    """Settled scores at the end of each phase of a curriculum; a callback for `fit` that travels in checkpoints."""

    keys = ("exact", "f1", "hard_f1")

    def __init__(self, task: Curriculum, precision: str) -> None:
        self.task, self.precision = task, precision
        self.rows: list[list[float]] = []  # phases of exact, f1, hard_f1

    def __call__(self, model: nn.Module, epoch: int) -> None:
        if epoch and epoch % self.task.epochs == 0 and len(self.rows) < len(self.task.phases):
            phase = self.task.at(epoch)
            found = evaluate(settled(model, phase.train.inputs[:1000].float()), phase, self.precision)
            self.rows.append([found[key] for key in self.keys])

    def state_dict(self) -> dict[str, Tensor]:
        return {"rows": torch.tensor(self.rows, dtype=torch.float64).view(-1, len(self.keys))}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.rows = state["rows"].tolist()

    def metrics(self) -> dict[str, float]:
        """By phase, beside what the rectangle rule scores on the same grids."""
        found = {}
        for number, (phase, row) in enumerate(zip(self.task.phases, self.rows, strict=True), start=1):
            assert phase.held_out is not None
            rule = path_scores(shortest_path.rectangle_rule(phase.held_out.inputs), phase.held_out)
            for key, value in zip(self.keys, row, strict=True):
                found[f"phase{number}_{key}"] = value
                found[f"rule_phase{number}_{key}"] = rule[key]
        return found


def checkpoints_folder(record: Path, checkpoints: str | Path = "") -> Path:
    """Where the checkpoints of the run with that record are kept.

    In a subfolder of the record's name: of the given folder, or by default of data/checkpoints of a checkout (ignored by
    git) or ./checkpoints.
    """
    checkout = runs_folder(profile="paper").parent / "checkpoints"
    return (Path(checkpoints).expanduser() if checkpoints else checkout) / record.stem


def build(name: str, profile: str, seed: int = 0, num_classes: int | None = None) -> nn.Module:
    """The network that a recipe trains, as it is before training."""
    chosen = plan(name, profile, seed)
    torch.manual_seed(seed)
    if chosen.recipe.task == "paths":
        shared = chosen.network.startswith("S")
        templates = int(chosen.network.partition("-")[2] or chosen.recipe.layers)
        return models.gridnet(chosen.recipe.layers, chosen.sizes["width"], templates if shared else None)
    return models.build(chosen.network, num_classes)


def run(
    name: str,
    profile: str = "fast",
    seed: int = 0,
    data: str | None = None,
    device: str | None = None,
    runs: str | Path = "",
    checkpoints: str | Path = "",
    download: bool = False,
    progress: bool = True,
    checkpoint_seconds: float = 120.0,
) -> Record:
    """Train a recipe and write its record, or find the record of the same run.

    A run that was killed goes on from its checkpoint. The last checkpoint, with the trained weights, is kept, see `trained`.
    Under ``torchrun`` all its processes train together.

    Args:
        name: one of `RECIPES`.
        profile: "fast", "gpu" or "paper".
        seed: of weights, split, order, augmentation and dropout.
        data: a data set by name or path, see `softshare.images.load`; for ImageNet recipes the path of a folder. Default:
            the first one of the recipe; in profile "fast" CIFAR-10 where a copy is at hand, else the embedded digits.
        device: default: CUDA where there is one.
        runs: folder of records, see `softshare.records.runs_folder`.
        checkpoints: see `checkpoints_folder`.
        download: fetch the data set if no copy is found.
        progress: whether to show progress.
        checkpoint_seconds: the least time between two checkpoints.

    Raises ValueError for an unknown recipe, profile or data set, FileNotFoundError where there is no copy of the data.
    """
    chosen = plan(name, profile, seed)
    with distributed.process_group(pick_device(device)) as place:
        task, test, source, classes = _tasks(chosen, data, download)
        path = record_path(chosen.recipe.name, profile, seed, chosen.config(), source, runs)
        if path.exists():
            return read_record(path)
        folder = checkpoints_folder(path, checkpoints)
        for each in (path.parent, folder):
            writable(each)
        model = build(name, profile, seed, classes)
        similarity = SimilarityRecorder(chosen.recipe.dense_epochs, per_epoch=20)
        ends = _PhaseEnds(task, chosen.settings.precision) if isinstance(task, Curriculum) else None
        where = _Where(place, chosen.settings)
        callbacks: list[Any] = [similarity, where, *([] if ends is None else [ends])]
        title = f"{chosen.recipe.name} ({profile}, seed {seed})"
        history = fit(model, task, chosen.settings, callbacks, place, title, progress, folder, checkpoint_seconds)
        metrics = {
            f"last_{key}": value for key, value in history[-1].items() if key not in ("epoch", "rate", "seconds")
        }
        metrics["parameters"] = sum(parameter.numel() for parameter in model.parameters())
        metrics |= ends.metrics() if ends is not None else {}
        # The only time that the test examples are looked at.
        metrics |= evaluate(model, test, chosen.settings.precision)
        if isinstance(task, Curriculum):
            calm = settled(model, task.phases[-1].train.inputs[:1000].float())
            found = evaluate(calm, test, chosen.settings.precision)
            metrics |= {f"settled_{key}": value for key, value in found.items()}
        if distributed.rank() == 0:
            name = chosen.recipe.name
            _write(name, profile, chosen.settings, chosen.config(), source, metrics, history, similarity, where, runs)
        distributed.barrier()
        return read_record(path)


def test_task(name: str, profile: str, seed: int = 0, data: str | None = None) -> tuple[Task, dict[str, str]]:
    """The task that `run` tests on at the end, and its data as a record has it."""
    _, test, source, _ = _tasks(plan(name, profile, seed), data, download=False)
    return test, source


def trained(record: Record, checkpoints: str | Path = "") -> nn.Module:
    """The network of a record with its trained weights, from the last checkpoint, in eval mode on the CPU.

    Raises FileNotFoundError where that is not kept any more.
    """
    folder = checkpoints_folder(record.path, checkpoints)
    for path in sorted(folder.glob("step-*.safetensors"), reverse=True):
        with contextlib.suppress(ValueError):
            _, tensors, facts = read_checkpoint(path)
            if facts["epoch"] > len(record.history):
                break
    else:
        raise FileNotFoundError(
            f"no checkpoint of the end of {record.path.name} is in {folder}; records travel, checkpoints do not. To train "
            "it again, move the record away and run the recipe"
        )
    state = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
    classes = len(state["classifier.bias"]) if "classifier.bias" in state else None
    model = build(record.recipe, record.profile, record.seed, classes)
    model.load_state_dict(state)
    return model.eval()


def train(
    recipe: str,
    model: nn.Module,
    task: Task,
    settings: Settings,
    *,
    profile: str,
    data: Mapping[str, str],
    config: Mapping[str, Any] | None = None,
    device: str | None = None,
    runs: str | Path = "",
    progress: bool = True,
    checkpoints: str | Path = "",
) -> Record:
    """Train any model in place with `softshare.training.fit` and write the record, similarities of every epoch included.

    Args:
        recipe: the name of the run, say "SWRN 28-10-2 cutout".
        model: any network; its number of parameters and its banks are recorded.
        task, settings, device, progress: see `fit`.
        profile: "fast", "gpu" or "paper".
        data: source and fingerprint of the data.
        config: whatever else decides the outcome.
        runs: folder for the record, see `softshare.records.runs_folder`.
        checkpoints: folder for checkpoints, in a subfolder of the record's name; "": none are kept.
    """
    parameters = sum(parameter.numel() for parameter in model.parameters())
    groups = {name: [bank.num_layers, bank.num_templates] for name, bank in banks(model).items()}
    chosen = {
        "parameters": parameters,
        "banks": groups,
        "examples": task.size,
        "settings": asdict(settings) | {"milestones": list(settings.milestones)},
        **(config or {}),
    }
    path = record_path(recipe, profile, settings.seed, chosen, data, runs)
    folder = checkpoints_folder(path, checkpoints) if checkpoints else None
    for each in filter(None, (path.parent, folder)):
        writable(each)
    with distributed.process_group(pick_device(device)) as place:
        similarity, where = SimilarityRecorder(), _Where(place, settings)
        history = fit(model, task, settings, [similarity, where], place, recipe, progress, folder)
        last = {name: value for name, value in history[-1].items() if name not in ("epoch", "rate", "seconds")}
        if distributed.rank() == 0:
            _write(recipe, profile, settings, chosen, data, last, history, similarity, where, runs)
        distributed.barrier()
        return read_record(path)


def _write(
    recipe: str,
    profile: str,
    settings: Settings,
    config: Mapping[str, Any],
    data: Mapping[str, str],
    metrics: Mapping[str, Any],
    history: list[dict[str, float]],
    similarity: SimilarityRecorder,
    where: _Where,
    runs: str | Path,
) -> None:
    write_record(
        recipe,
        profile=profile,
        seed=settings.seed,
        config=config,
        metrics=metrics,
        data=data,
        history=history,
        similarity=similarity,
        seconds=sum(row["seconds"] for row in history),
        where=where.record(),
        runs=runs,
    )
