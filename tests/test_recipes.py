"""Recipes, the command line and the GPU list: what is chosen, what is run, what is found again, what is told."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import softshare
from softshare import cli, experiments, gpu_list, images, recipes, records, report, training
from softshare.checkpoints import read_checkpoint, write_checkpoint
from softshare.experiments import run
from softshare.recipes import RECIPES, plan
from softshare.tasks import Classification

PATHS = [name for name, recipe in RECIPES.items() if recipe.task == "paths"]


def test_every_row_of_the_poster_that_is_ours_has_a_recipe():
    for table in report.TABLES:
        for row in report.paper_table(table):
            assert (row["model"] in RECIPES) == ("WRN" in row["model"]), row["model"]
    networks = {recipe.network for recipe in RECIPES.values()}
    assert {"WRN 28-6", "SWRN 40-8-8", "CNN", "SCNN", "SCNN-5", "SCNN-1"} <= networks
    assert {RECIPES[name].penalty for name in PATHS} == {0.0, 1e-2, 1e-3, 1e-4}
    assert RECIPES["SCNN 100 layers"].layers == 100
    assert all(RECIPES[name].cutout == 16 * name.endswith("cutout") for name in RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_builds_the_network_of_its_name(name):
    recipe = RECIPES[name]
    with torch.device("meta"):
        net = experiments.build(name, "paper")
    banks = softshare.banks(net)
    assert bool(banks) == name.startswith("S")
    dropouts = {module.p for module in net.modules() if isinstance(module, torch.nn.Dropout)}
    if recipe.task == "cifar":
        assert dropouts == {0.3 if "*" in name else 0.0}
        numbers = recipe.network.split(" ")[1].rstrip("*").split("-")
        assert net.classifier.in_features == 64 * int(numbers[1])
        if banks:
            layers = (int(numbers[0]) - 4) // 3 - 2
            k = int(numbers[2]) if len(numbers) == 3 else layers
            assert [(bank.num_layers, bank.num_templates) for bank in banks.values()] == [(layers, k)] * 3
    if recipe.task == "paths" and banks:
        expected = {"SCNN-5": 5, "SCNN-1": 1, "SCNN 100 layers": 100}.get(name, 20)
        assert banks["layers"].num_templates == expected and len(net.layers) == recipe.layers


def test_the_papers_schedule():
    settings = plan("SWRN 28-10-2*", "paper").settings
    rates = [training.learning_rate(settings, epoch) for epoch in range(settings.epochs)]
    assert settings.epochs == 200 and settings.batch_size == 128 and settings.optimizer == "sgd"
    assert settings.weight_decay == 5e-4 and settings.penalty == 0.0
    for first, last, rate in ((0, 60, 0.1), (60, 120, 0.02), (120, 160, 0.004), (160, 200, 0.0008)):
        assert rates[first:last] == pytest.approx([rate] * (last - first))
    paths = plan("SCNN lambda 0.01", "paper")
    assert paths.settings.epochs == 250 and paths.settings.optimizer == "adam" and paths.settings.penalty == 0.01
    assert {training.learning_rate(paths.settings, epoch) for epoch in range(250)} == {0.01}
    assert paths.sizes["boxes"] == [5, 9, 13, 17, 21] and paths.sizes["train"] == 5000 and paths.sizes["side"] == 32


def test_what_each_profile_chooses():
    """Everything that decides the outcome, against literals."""
    sgd = {
        "optimizer": "sgd",
        "rate": 0.1,
        "factor": 0.2,
        "weight_decay": 5e-4,
        "penalty": 0.0,
        "milestones": [0.3, 0.6, 0.8],
    }
    adam = {"optimizer": "adam", "rate": 0.01, "weight_decay": 0.0, "milestones": []}
    boxes = [5, 9, 13, 17, 21]
    wanted = {
        ("WRN 28-6 cutout", "fast"): ("WRN 28-1", 2, 50, sgd, {"train": 300, "held_out": 100, "test": 200, "side": 16}),
        ("SWRN 28-10-2*", "gpu"): ("SWRN 28-10-2*", 10, 128, sgd, {"train": 45_000, "held_out": 5_000, "side": 32}),
        ("SWRN 40-8-8", "paper"): ("SWRN 40-8-8", 200, 128, sgd, {"train": None, "held_out": 0, "test": None, "side": 32}),
        ("SCNN lambda 0.001", "gpu"): ("SCNN", 50, 100, adam | {"penalty": 1e-3}, {"obstacles": 0.1, "boxes": boxes}),
        ("SCNN 100 layers", "paper"): ("SCNN-100", 250, 100, adam, {"train": 5_000, "width": 32, "epochs_a_phase": 50}),
        ("SWRN 50-2", "paper"): ("SWRN 50-2", 100, 256, sgd | {"factor": 0.1, "weight_decay": 1e-4,
                                                             "milestones": [0.3, 0.6, 0.9]}, {"side": 224}),
    }  # fmt: skip
    for (name, profile), (network, epochs, batch, settings, sizes) in wanted.items():
        found = plan(name, profile, 7).config()
        assert found["network"] == network and found["settings"] | settings == found["settings"], name
        assert found["settings"]["epochs"] == epochs and found["settings"]["batch_size"] == batch, name
        assert found["sizes"] | sizes == found["sizes"] and found["settings"]["seed"] == 7, name
    assert plan("SWRN 40-8-8", "paper").config()["dense_epochs"] == 5
    assert plan("WRN 28-10", "paper").config()["dense_epochs"] == 0
    with pytest.raises(ValueError, match="below 2\\*\\*32"):
        plan("SCNN", "fast", 2**32)


@pytest.fixture
def fake_cifar(monkeypatch):
    """50,000 and 10,000 images whose first pixel tells them apart."""

    def load(name, split, root=None, download=False):
        n = 50_000 if split == "train" else 10_000
        pixels = torch.zeros(n, 3, 32, 32, dtype=torch.uint8)
        number = torch.arange(n)
        pixels[:, 0, 0, 0], pixels[:, 1, 0, 0] = number % 256, number // 256
        title = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}[name]
        return images.ImageSet(pixels, number % 10, tuple("0123456789"), title, f"{split} of {name}")

    monkeypatch.setattr(images, "load", load)


def numbers_of(pixels: torch.Tensor) -> set[int]:
    return set((pixels[:, 0, 0, 0].long() + 256 * pixels[:, 1, 0, 0].long()).tolist())


def test_what_is_trained_on_held_out_and_tested_on(fake_cifar):
    task, test, data, classes = experiments._tasks(plan("WRN 28-10", "gpu", 3), None, False)
    train, held_out = numbers_of(task.images), numbers_of(task.held_out[0])
    assert len(train) == 45_000 and len(held_out) == 5_000 and not train & held_out
    assert len(test.held_out[1]) == 10_000 and classes == 10 and data["source"] == "CIFAR-10"
    other = experiments._tasks(plan("WRN 28-10", "gpu", 4), None, False)[0]
    assert numbers_of(other.images) != train  # the split is seeded
    again = experiments._tasks(plan("WRN 28-10", "gpu", 3), None, False)[0]
    assert torch.equal(again.images, task.images)
    paper, _, data, _ = experiments._tasks(plan("WRN 28-10 cutout", "paper"), "cifar100", False)
    assert paper.size == 50_000 and paper.held_out is None and data["source"] == "CIFAR-100"
    assert paper.augmentation.cutout == 16 and paper.augmentation.pad == 4 and paper.augmentation.flip
    assert tuple(paper.augmentation.mean) == images.STATISTICS["CIFAR-100"][0]


def test_validation_grids_are_nobodys_training_grids():
    task, test, data, _ = experiments._tasks(plan("SCNN", "fast", 1), None, False)
    other = experiments._tasks(plan("SCNN", "fast", 2), None, False)[0]
    assert not torch.equal(task.phases[0].train.inputs, other.phases[0].train.inputs)
    for mine, theirs in zip(task.phases, other.phases, strict=True):
        assert torch.equal(mine.held_out.inputs, theirs.held_out.inputs)
        seen = {grid.numpy().tobytes() for grid in mine.train.inputs}
        assert not any(grid.numpy().tobytes() in seen for grid in [*mine.held_out.inputs, *test.held_out.inputs])


def test_a_second_call_finds_the_record_and_a_seed_or_profile_does_not(tmp_path, monkeypatch):
    monkeypatch.setenv("SOFTSHARE_DATA", "")
    places = {"runs": tmp_path / "runs", "checkpoints": tmp_path / "checkpoints", "data": "digits", "progress": False}
    first = run("SWRN 28-6-2, cutout", "fast", **places)
    assert first.recipe == "SWRN 28-6-2 cutout" and first.config["network"] == "SWRN 28-1-2"
    assert first.data["source"] == "digits" and first.config["cutout"] == 16
    assert {"error", "accuracy", "parameters", "last_loss", "last_held_out_error"} <= set(first.metrics)
    assert first.similarity().steps == [0, 1, 2]
    net = experiments.trained(first, tmp_path / "checkpoints")
    test, source = experiments.test_task("SWRN 28-6-2 cutout", "fast", 0, "digits")
    assert source == first.data
    assert training.evaluate(net, test)["error"] == pytest.approx(first.metrics["error"])
    monkeypatch.setattr(experiments, "fit", lambda *_, **__: pytest.fail("trained again"))
    assert run("SWRN 28-6-2 cutout", "fast", **places) == first
    with pytest.raises(pytest.fail.Exception):
        run("SWRN 28-6-2 cutout", "fast", seed=1, **places)
    with pytest.raises(FileNotFoundError, match="records travel, checkpoints do not"):
        experiments.trained(first, tmp_path / "elsewhere")
    (end,) = (tmp_path / "checkpoints").rglob("*.safetensors")
    identity, tensors, facts = read_checkpoint(end)
    end.unlink()  # only one of the middle is left, as after a disk was full at the end
    write_checkpoint(end.parent, 6, identity, tensors, facts | {"epoch": 2})
    with pytest.raises(FileNotFoundError, match="no checkpoint of the end"):
        experiments.trained(first, tmp_path / "checkpoints")


def test_the_test_set_is_looked_at_once_at_the_end(tmp_path, monkeypatch):
    events = []
    inner_fit, inner_evaluate = experiments.fit, Classification.evaluate

    def watched_fit(*arguments, **named):
        history = inner_fit(*arguments, **named)
        events.append("trained")
        return history

    def watched_evaluate(self, predict):
        events.append(len(self.held_out[1]))
        return inner_evaluate(self, predict)

    monkeypatch.setattr(experiments, "fit", watched_fit)
    monkeypatch.setattr(Classification, "evaluate", watched_evaluate)
    run("WRN 28-6", "fast", data="digits", runs=tmp_path, checkpoints=tmp_path / "c", progress=False)
    assert events == [100, 100, "trained", 200]  # 100 held out after each epoch; 200 test images


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in RECIPES if RECIPES[name].task != "imagenet"])
def test_every_recipe_runs_in_profile_fast(name, tmp_path):
    data = "digits" if RECIPES[name].task == "cifar" else None
    record = run(name, "fast", data=data, runs=tmp_path, checkpoints=tmp_path / "c", progress=False)
    assert np.isfinite([value for value in record.metrics.values() if isinstance(value, (int, float))]).all()
    assert len(record.history) == record.config["settings"]["epochs"]
    if RECIPES[name].task == "paths":
        wanted = {f"{who}phase{n}_{key}" for who in ("", "rule_") for n in (1, 2) for key in ("exact", "f1", "hard_f1")}
        assert wanted | {"settled_exact", "exact"} <= set(record.metrics)


@pytest.mark.parametrize("name", ["WRN 50-2", "SWRN 50-2"])
def test_imagenet_recipes_stream_a_folder(name, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="--data on the command line"):
        run(name, "fast", runs=tmp_path)
    random = np.random.default_rng(0)
    for split, n in (("train", 3), ("val", 2)):
        for label in ("cat", "dog"):
            folder = tmp_path / "images" / split / label
            folder.mkdir(parents=True)
            for number in range(n):
                Image.fromarray(random.integers(0, 255, (70, 80, 3), dtype=np.uint8)).save(folder / f"{number}.jpg")
    small = softshare.models.build("SWRN 16-1", 2)
    monkeypatch.setattr(experiments, "build", lambda *_: small)
    record = run(name, "fast", data=str(tmp_path / "images"), runs=tmp_path, checkpoints=tmp_path / "c", progress=False)
    assert {"top1_error", "top5_error"} <= set(record.metrics) and record.data["source"] == "images"


def softly(*arguments: str, **named) -> subprocess.CompletedProcess:
    """Run the command in a process of its own, without images other than those embedded."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "SOFTSHARE_DATA": ""}
    return subprocess.run(
        [sys.executable, "-m", "softshare", *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        env=environment,
        **named,
    )


@pytest.mark.long
def test_two_processes_run_a_recipe_and_one_of_them_writes(tmp_path):
    """BatchNorm and dropout among them; a run that was stopped says in its record where it was before."""
    engine = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "softshare"]
    arguments = ["run", "SWRN 28-10-2*", "--data", "digits", "--quiet", "--device", "cpu", "--checkpoint-seconds", "0"]
    arguments += ["--runs", str(tmp_path), "--checkpoints", str(tmp_path / "c")]
    done = subprocess.run(
        [*engine, *arguments], capture_output=True, text=True, timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("  record ") == 1
    (record,) = records.find_records(tmp_path)
    assert record.environment["processes"] == 2 and "earlier" not in record.environment
    before = record.path.stat().st_mtime_ns
    record.path.unlink()  # and once more from its last checkpoint, with one process
    assert softly(*arguments).returncode == 0
    (again,) = records.find_records(tmp_path)
    assert again.path.stat().st_mtime_ns != before and again.metrics["error"] == record.metrics["error"]
    assert again.environment["processes"] == 1 and again.environment["earlier"][0]["processes"] == 2


@pytest.mark.long
def test_a_killed_run_goes_on_and_ends_in_the_same_record(tmp_path):
    def arguments(folder: str) -> list[str]:
        places = ["--runs", str(tmp_path / folder), "--checkpoints", str(tmp_path / folder / "c")]
        return ["run", "SCNN", "--seed", "4", "--quiet", "--checkpoint-seconds", "0", "--device", "cpu", *places]

    assert softly(*arguments("whole")).returncode == 0
    environment = os.environ | {"OMP_NUM_THREADS": "1", "SOFTSHARE_DATA": ""}
    process = subprocess.Popen([sys.executable, "-m", "softshare", *arguments("killed")], env=environment)
    limit = time.monotonic() + 60
    while not list((tmp_path / "killed").rglob("*.safetensors")) and time.monotonic() < limit:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list((tmp_path / "killed").glob("*.json")) and list((tmp_path / "killed").rglob("*.safetensors"))
    done = softly(*arguments("killed"))
    assert done.returncode == 0, done.stderr
    (whole,), (killed,) = (records.find_records(tmp_path / folder) for folder in ("whole", "killed"))
    timed = "examples_per_second"
    assert {k: v for k, v in whole.metrics.items() if timed not in k} == {
        k: v for k, v in killed.metrics.items() if timed not in k
    }
    assert [row["loss"] for row in whole.history] == [row["loss"] for row in killed.history]
    for name, matrices in whole.similarity().matrices().items():
        assert (killed.similarity().matrices()[name] == matrices).all()


def test_the_list_names_every_recipe_and_its_cost(capsys):
    assert cli.main(["list"]) == 0
    text = capsys.readouterr().out
    lines = {line[:20].strip(): line for line in text.splitlines()}
    assert set(RECIPES) <= set(lines) and "not measured" in text
    assert "cifar10, cifar100" in lines["SWRN 28-10-2*"] and "days" in lines["SWRN 28-18*"]


def test_costs_follow_from_multiply_adds():
    # By hand, WRN 16-4: the stem, and in each stage four 3x3 convolutions and a 1x1 shortcut
    total, before = 32 * 32 * 27 * 16, 16
    for channels, side in ((64, 32), (128, 16), (256, 8)):
        total += side * side * (9 * before * channels + 3 * 9 * channels * channels + before * channels)
        before = channels
    total += 256 * 10
    assert recipes.multiply_adds("SWRN 16-4-2", 20, 32, 0) == pytest.approx(total)
    cheap, dear = (recipes.expected_seconds(plan("WRN 28-10", profile), gpu=True) for profile in ("gpu", "paper"))
    assert dear / cheap == pytest.approx(200 * 50_000 / (10 * 45_000))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["run", "SWRN 1-2"], "unknown recipe 'SWRN 1-2'; known: WRN 28-10"),
        (["run", "CNN", "--seed", "-1"], "seed"),
        (["run", "WRN 28-10", "--profile", "gpu", "--data", "/nowhere/at/all"], "no image folder or archive at"),
        (["fold", "SCNN", "--runs", "/nowhere"], "train it first: softshare run 'SCNN'"),
        (["fold", "CNN", "--threshold", "2"], "no record of CNN"),
        (["gpu", "--hours", "0"], "hours must be above 0"),
    ],
)
def test_wrong_arguments_are_told_in_a_line(arguments, told, capsys):
    assert cli.main(arguments) == 1
    error = capsys.readouterr().err
    assert told in error and error.startswith(f"softshare {arguments[0]}: ") and "Traceback" not in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_told(capsys):
    assert cli.main(["run", "CNN", "--device", "cuda"]) == 1
    assert "sees no CUDA GPU here" in capsys.readouterr().err


def test_run_fold_and_report_from_the_command_line(tmp_path, capsys):
    places = ["--runs", str(tmp_path), "--checkpoints", str(tmp_path / "c")]
    assert cli.main(["run", "SWRN 40-8-8", "--data", "digits", "--quiet", *places]) == 0
    told = capsys.readouterr().out
    assert "SWRN 40-8-8, profile fast, seed 0, digits: trained in" in told and "record" in told
    arguments = [
        "fold",
        "SWRN 40-8-8",
        "--data",
        "digits",
        "--threshold",
        "0.25",
        "--output",
        str(tmp_path / "o" / "x"),
    ]
    assert cli.main([*arguments, *places]) == 0
    told = capsys.readouterr().out
    assert "stage2: 1 -> " in told and "30 distinct layers" in told and "test error" in told
    errors = {line.split("  ")[0]: float(line.split()[-1]) for line in told.splitlines() if "test error" in line}
    assert list(errors) == ["as trained", "folded", "BatchNorm anew"] and all(0 <= e <= 100 for e in errors.values())
    saved = softshare.FoldPlan.from_json((tmp_path / "o" / "x.json").read_text())
    assert 3 <= saved.distinct_layers < 30
    from safetensors.torch import load_file

    folded = softshare.fold(experiments.build("SWRN 40-8-8", "fast"), saved)
    folded.load_state_dict(load_file(tmp_path / "o" / "x.safetensors"))
    assert cli.main(["report", "--runs", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "1 records in" in told and "ResNeXt-29 16x64" in told and "rectangle rule" in told
    (line,) = (line for line in told.splitlines() if line.startswith("SWRN 40-8-8 "))
    assert "not run" in line and "fast" not in line  # a run of profile fast fills no cell


class TestGpuList:
    def test_the_order_is_that_of_value(self):
        runs = [entry.runs for entry in gpu_list.entries()]
        assert runs[0] == ()
        assert {(name, seed) for name, seed, _ in runs[1]} == {
            (name, seed) for name in ("CNN", "SCNN", "SCNN lambda 0.01") for seed in range(5)
        }
        for seed in range(3):
            assert [each[:2] for each in runs[2 + seed]] == [("WRN 28-6 cutout", seed), ("SWRN 28-6-2 cutout", seed)]
        assert runs[5][0][0] == "SWRN 40-8-8"
        assert [each[0][0] for each in runs[6:8]] == ["WRN 28-10 cutout", "SWRN 28-10-2 cutout"]
        assert {each[0][0] for each in runs[8:]} == {name for name in RECIPES if name.endswith("*")}

    @pytest.mark.parametrize(
        ("hours", "chosen"), [(0.06, []), (0.5, ["curriculum", "pair"]), (5, ["curriculum", "pair", "pair"])]
    )
    def test_what_fits_is_chosen_from_the_top(self, hours, chosen, tmp_path, monkeypatch, capsys):
        """At the assumed speed the curriculum takes minutes side by side, a pair of WRN 28-6 about four hours.

        With time left, the first entry that does not fit is begun at the end.
        """
        done, clock = [], [0.0]
        monkeypatch.setattr(gpu_list.time, "monotonic", lambda: clock[0])
        monkeypatch.setattr(gpu_list, "_benchmark", lambda *_: ("done", 1.0))

        def train(waiting, arguments, side, limit, with_data):
            done.append("curriculum" if waiting[0][0] == "CNN" else "pair")
            needs = sum(gpu_list._still_needs(run, "paper", "cuda", None, tmp_path) for run in waiting) / side
            clock[0] += min(needs, limit)
            assert arguments[:4] == ["--profile", "paper", "--device", "cuda"] and with_data
            assert clock[0] <= hours * 3600 + 1e-6
            return [(run, "done after 1 s") for run in waiting]

        monkeypatch.setattr(gpu_list, "_side_by_side", train)
        assert gpu_list.run_list(hours, device="cuda", runs=tmp_path, checkpoints=tmp_path) == 0
        assert done == chosen
        assert "passed over: needs about" in capsys.readouterr().out

    def test_what_a_checkpoint_has_behind_it_is_not_needed_again(self, tmp_path):
        run = ("SWRN 28-14-2*", 3, "cifar100")
        whole = gpu_list._still_needs(run, "paper", "cuda", None, tmp_path)
        folder = tmp_path / "swrn-28-14-2-dropout-paper-s3-0123456789ab"
        folder.mkdir()
        (folder / f"step-{391 * 150:08d}-aaaaaaaa-bbbbbbbbbbbbbbbb.safetensors").touch()
        assert gpu_list._still_needs(run, "paper", "cuda", None, tmp_path) == pytest.approx(whole / 4)
        assert gpu_list._still_needs(("SWRN 28-14-2*", 4, None), "paper", "cuda", None, tmp_path) == whole

    def test_only_the_same_run_on_the_same_data_counts_as_done(self, tmp_path):
        def write(seed, source, **change):
            config = plan("WRN 28-10*", "paper", seed).config() | change
            place = {"profile": "paper", "seed": seed, "runs": tmp_path}
            records.write_record("WRN 28-10*", config=config, data={"source": source}, metrics={}, **place)

        def recorded(seed, data):
            return gpu_list._recorded("WRN 28-10*", seed, data, "paper", tmp_path)

        write(0, "CIFAR-100")
        write(1, "digits")
        write(2, "CIFAR-10", cutout=16)
        assert recorded(0, "cifar100") and not recorded(0, "cifar10") and not recorded(0, None)
        assert not recorded(1, None) and not recorded(2, None) and not recorded(5, "cifar100")
        write(2, "CIFAR-10 (JPEG)")
        assert recorded(2, None) and recorded(2, "cifar10") and not recorded(2, "cifar100")

    def test_the_command_of_a_run(self, tmp_path, monkeypatch):
        """A stand-in for the interpreter writes down what it was called with."""
        program = tmp_path / "python"
        program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n')
        program.chmod(0o755)
        monkeypatch.setattr(gpu_list.sys, "executable", str(program))
        runs = [("WRN 28-10*", 2, "cifar100"), ("CNN", 0, None)]
        for with_data in (True, False):
            outcomes = gpu_list._side_by_side(runs, ["--quiet"], 1, 60.0, with_data)
            assert [run for run, _ in outcomes] == runs
        calls = (tmp_path / "calls").read_text().splitlines()
        start = "-m softshare run"
        assert calls[0] == f"{start} WRN 28-10* --seed 2 --quiet --data cifar100"
        assert calls[1:] == [f"{start} CNN --seed 0 --quiet", f"{start} WRN 28-10* --seed 2 --quiet", calls[1]]

    def test_sigterm_ends_the_runs_too(self, tmp_path):
        command = [sys.executable, "-m", "softshare", "gpu", "--hours", "1", "--device", "cpu"]
        command += ["--runs", str(tmp_path), "--checkpoints", str(tmp_path / "c")]
        code = (
            "import sys; from softshare import cli, gpu_list, recipes\n"
            "gpu_list.entries = lambda: [gpu_list.Entry('one', (('CNN', 0, None),))]\n"
            "recipes.GPU_SPEED = recipes.CPU_SPEED = 1e15\n"
            "sys.exit(cli.main(sys.argv[1:]))"
        )
        command[1:3] = ["-c", code]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=tmp_path)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        if not children.exists():
            process.kill()
            pytest.skip("needs Linux")
        limit = time.monotonic() + 60
        while not (found := children.read_text().split()) and time.monotonic() < limit:
            time.sleep(0.05)
        process.terminate()
        assert process.wait(timeout=30) == 143 and found
        assert not any(Path(f"/proc/{child}").exists() for child in found)

    def test_a_failed_run_is_told_and_others_go_on(self, tmp_path, monkeypatch, capsys):
        entry = gpu_list.Entry("broken", (("WRN 28-6", 0, None), ("CNN", 0, None)))
        monkeypatch.setattr(gpu_list, "entries", lambda: [entry])
        monkeypatch.setenv("SOFTSHARE_DATA", str(tmp_path / "mistyped"))
        assert gpu_list.run_list(0.1, rehearse=True, runs=tmp_path, checkpoints=tmp_path / "c") == 1
        told = capsys.readouterr().out
        assert "WRN 28-6, seed 0: failed with status 1" in told and "CNN, seed 0: done after" in told

    def test_a_run_over_its_limit_is_stopped(self, tmp_path):
        waiting = [("CNN", seed, None) for seed in range(3)]
        started = time.monotonic()
        arguments = ["--profile", "paper", "--device", "cpu", "--runs", str(tmp_path), "--checkpoints", str(tmp_path)]
        outcomes = gpu_list._side_by_side(waiting, arguments, 2, 2.0, with_data=True)
        assert time.monotonic() - started < 10
        assert [outcome.split(":")[0] for _, outcome in outcomes] == [
            "stopped at its limit; the same command goes on with it",
            "stopped at its limit; the same command goes on with it",
            "not begun",
        ]

    @pytest.mark.long
    def test_a_rehearsal_executes_every_step_and_a_second_one_finds_all(self, tmp_path):
        arguments = ["gpu", "--hours", "1", "--rehearse", "--parallel", "2", "--device", "cpu"]
        arguments += ["--runs", str(tmp_path / "runs"), "--checkpoints", str(tmp_path / "c")]
        first = softly(*arguments)
        assert first.returncode == 0, first.stdout + first.stderr
        found = records.find_records(tmp_path / "runs")
        wanted = {(name, seed) for entry in gpu_list.entries() for name, seed, _ in entry.runs}
        assert {(record.recipe, record.seed) for record in found} == wanted
        assert json.loads((tmp_path / "runs" / "benchmarks" / "benchmark.json").read_text())["quick"] is True
        before = {record.path: record.path.stat().st_mtime_ns for record in found}
        second = softly(*arguments)
        assert second.returncode == 0 and "has its record" in second.stdout and "passed over" not in second.stdout
        assert before == {path: path.stat().st_mtime_ns for path in before}


def test_a_plan_changes_the_hash_of_its_record():
    base = plan("SCNN", "fast")
    data = {"source": "x", "fingerprint": "y"}
    paths = {records.record_path("SCNN", "fast", 0, base.config(), data)}
    for changed in (
        dataclasses.replace(base, settings=dataclasses.replace(base.settings, penalty=0.1)),
        dataclasses.replace(base, sizes=base.sizes | {"train": 3}),
        dataclasses.replace(base, network="SCNN-3"),
    ):
        paths.add(records.record_path("SCNN", "fast", 0, changed.config(), data))
    assert len(paths) == 4
    assert Path(next(iter(paths))).name.startswith("scnn-fast-s0-")


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a terminal")
def test_on_a_terminal_a_bar_shows_speed_loss_and_time_left(tmp_path):
    import fcntl
    import termios

    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 150, 0, 0))
    command = [sys.executable, "-m", "softshare", "run", "CNN", "--runs", str(tmp_path), "--checkpoints", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=theirs, stdout=subprocess.DEVNULL, env=environment)
    os.close(theirs)
    shown = b""
    while True:
        try:
            some = os.read(ours, 4096)
        except OSError:  # the other end was closed
            break
        if not some:
            break
        shown += some
    os.close(ours)
    assert process.wait(timeout=60) == 0
    text = shown.decode()
    assert "CNN (fast, seed 0)" in text and "400/400" in text and "examples/s" in text and "loss " in text
    assert "epoch 2/2" in text and "<00:00" in text  # tqdm's time left
