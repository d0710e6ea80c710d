"""What the benchmark measures, how it compares, and what it writes; actual durations are not tested here."""

from __future__ import annotations

import copy
import json
import math
import os
import re
import subprocess
import sys
from argparse import Namespace
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from softshare import files, models, pictures
from softshare.images import STATISTICS, Augmentation, ImageSet
from softshare.sharing import banks, shared_layers
from softshare.speed import benchmark, networks, steps
from softshare.training import step as step_of_training
from softshare.training.tasks import Classification

matplotlib.use("Agg")

SECTIONS = {
    "precision": "float32",
    "steps": {
        "model": "SWRN 16-4-2",
        "batch": 128,
        "compile": False,
        "seconds": {
            "ours": [2.0, 4.0],
            "plain": [2.0, 3.9],
            "authors": [6.0, 11.0],
            "data path": [0.02, 0.02],
            "matrix product": [0.1, 0.1],
            "copy": [0.1, 0.1],
        },
    },
    "memory": {"how": "", "bytes": {"ours": 2**20, "plain": 2**20, "authors": 2**21}},
    "epoch": {"how": "", "seconds": {"ours": 1000.0, "plain": 1000.0, "authors": 3000.0}},
    "ceiling": {},
    "generator": {"ratios": {}, "seconds": {"generate": [1e-5, 1.23456789e-5]}},
    "folding": {"seconds": {"plan": [0.1, 0.1], "fold": [0.2, 0.2]}},
    "inference": {"seconds": {"folded": [0.1, 0.1], "unfolded": [0.1, 0.1]}},
    "cost by templates": {
        "model": "SWRN 28-1-k",
        "plain": "WRN 28-1",
        "seconds": {"plain": [1.0, 1.0], "1": [1.0, 1.2], "6": [1.2, 1.3]},
        "ratios": {"1": (1.1, 1.0, 1.2), "6": (1.25, 1.2, 1.3)},
    },
    "ratios": {
        "authors / ours": (2.875, 2.75, 3.0),
        "ours / plain": (1.0333333, 1.0, 1.05),
        "data path / ours": (0.0075, 0.005, 0.01),
    },
    "notes": [],
}


@pytest.fixture
def written(tmp_path, monkeypatch, capsys):
    """The path of a record of made-up numbers, as for SWRN 16-4-2 on a CPU, and the table that was printed."""
    monkeypatch.setattr(benchmark, "measure", lambda *_: copy.deepcopy(SECTIONS))
    path = tmp_path / "deep" / "record.json"
    assert benchmark.main(["--device", "cpu", "--rounds", "2", "--output", str(path)]) == 0
    return path, capsys.readouterr().out


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quick")
    command = [sys.executable, "-m", "softshare", "bench", "--quick", "--device", "cpu", "--output", "a/b.json"]
    source = str(Path(benchmark.__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"}
    return folder, subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=300, env=environment, check=False
    )


@pytest.mark.long
def test_a_quick_run_measures_everything_and_writes_one_whole_record(quick):
    folder, done = quick
    assert done.returncode == 0, done.stderr
    assert [path.name for path in folder.rglob("*") if path.is_file()] == ["b.json"]
    record = benchmark.load_benchmark(folder / "a" / "b.json")
    assert record["quick"] is True and record["gpu"] == "not measured" and record["threads"] == 1
    assert all(len(times) == 2 for part in benchmark._TIMED for times in record[part]["seconds"].values())
    assert set(record["steps"]["seconds"]) >= {"ours", "plain", "authors", "data path", "matrix product", "copy"}
    workers = record["steps"]["workers"]
    assert 1 <= workers <= 4 and any(f"{workers} workers" in note for note in record["notes"])
    assert set(record["generator"]["seconds"]) == {"generate", "networkx"}
    assert record["generator"]["ratios"]["networkx / generate"][0] > 10
    assert set(record["cost by templates"]["ratios"]) == {"1", "2"}
    assert "(3 -> 4) x 4" in record["folding"]["plan"][1]
    middle = np.median(record["steps"]["seconds"]["ours"])
    assert record["epoch"]["seconds"]["ours"] == pytest.approx(50_000 / 16 * middle, rel=1e-4)
    if (
        sys.platform == "linux"
    ):  # weights, gradients, momentum and activations of 16 images: at least that, and not much more
        assert all(5 * 2**20 < peak < 2**30 for peak in record["memory"]["bytes"].values())
    assert all(target["measured"] == "not measured" and target["met"] is None for target in record["targets"])
    assert max(map(len, done.stdout.splitlines())) <= 100
    assert " s  steps" in done.stderr


def by_hand():
    """The multiply-adds of WRN 16-1 for one image; each convolution costs output pixels times weights."""
    total = 32 * 32 * 3 * 16 * 9
    for stage, width in enumerate((16, 32, 64)):
        pixels = (32 >> stage) ** 2
        total += pixels * 9 * (max(16, width // 2) * width + 3 * width * width)
        total += pixels * width // 2 * width if stage else 0  # the shortcut
    return total + 64 * 10


@pytest.mark.long
def test_the_ratios_of_a_record_follow_from_its_seconds(quick):
    folder, _ = quick
    record = benchmark.load_benchmark(folder / "a" / "b.json")
    seconds, costs = record["steps"]["seconds"], record["cost by templates"]
    by_round = np.array(seconds["authors"]) / seconds["ours"]
    found = record["ratios"]["authors / ours"]
    np.testing.assert_allclose(found, [np.median(by_round), by_round.min(), by_round.max()], rtol=1e-4)
    by_round = np.array(costs["seconds"]["2"]) / costs["seconds"]["plain"]
    np.testing.assert_allclose(costs["ratios"]["2"][0], np.median(by_round), rtol=1e-4)
    ceiling, steps = record["ceiling"], record["steps"]
    assert ceiling["multiply-adds an image"] == by_hand()
    flops = 6 * ceiling["multiply-adds an image"] * steps["batch"] / np.array(seconds["ours"])
    rate = 2 * ceiling["matrix side"] ** 3 / np.array(seconds["matrix product"])
    np.testing.assert_allclose(record["ratios"]["share of the matrix ceiling"][0], np.median(flops / rate), rtol=1e-4)


def test_a_ratio_is_taken_within_rounds():
    """Load that slows a whole round equally changes nothing; the ratio of medians would be 3."""
    seconds = {"a": [2.0, 30.0, 6.0], "b": [1.0, 10.0, 2.0]}
    assert benchmark.ratio(seconds, "a", "b") == (3.0, 2.0, 3.0)
    assert benchmark.ratio({"a": [1.0, 8.0], "b": [1.0, 2.0]}, "a", "b", 10.0) == (25.0, 10.0, 40.0)


@pytest.mark.parametrize("rounds, rank", [(2, 0), (5, 0), (6, 0), (8, 0), (9, 1), (15, 3), (25, 7), (51, 18)])
def test_the_interval_is_that_of_the_sign_test(rounds, rank):
    """scipy's binomial tells that these ranks enclose the median with 95%, and that the next ones do not."""
    ratios = np.random.default_rng(0).permutation(np.linspace(1, 2, rounds))
    found = benchmark.interval({"a": list(3 * ratios), "b": [3.0] * rounds}, "a", "b")
    np.testing.assert_allclose(found, [np.sort(ratios)[rank], np.sort(ratios)[-1 - rank]])
    outside = [2 * sum(math.comb(rounds, below) for below in range(each + 1)) / 2**rounds for each in (rank, rank + 1)]
    assert (outside[0] <= 0.05 or rounds < 6) and outside[1] > 0.05


def test_turns_alternate_and_take_a_tenth_of_a_second_after_the_warm_up(monkeypatch):
    clock, order = [0.0], []

    def takes(name, *seconds):
        waiting = list(seconds)

        def call():
            clock[0] += waiting.pop(0) if len(waiting) > 1 else waiting[0]
            order.append(name)

        return call

    monkeypatch.setattr(benchmark, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    seconds = benchmark.in_turn({"a": takes("a", 100.0, 1.0), "b": takes("b", 70.0, 0.0625)}, 3)
    assert "".join(order) == "ab" + "ba" + "abb" + "bba" + "abb"
    assert seconds == {"a": [1.0] * 3, "b": [0.0625] * 3}


def test_layerwise_mixing_computes_what_the_shared_model_computes(monkeypatch):
    shared = models.swrn(22, 1, 3)
    count = len(list(shared_layers(shared)))
    mixed = steps.layerwise(copy.deepcopy(shared))
    mixes, mix = Counter(), steps.LayerwiseBank.mix

    def counted(bank, index):
        mixes[bank.name, index] += 1
        return mix(bank, index)

    monkeypatch.setattr(steps.LayerwiseBank, "mix", counted)
    x = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(mixed(x), shared(x), rtol=1e-4, atol=1e-4)
    assert len(mixes) == count == 12 and set(mixes.values()) == {1}  # each layer mixes its own weight, once
    for bank, before in zip(banks(mixed).values(), banks(shared).values(), strict=True):  # one tensor per stage
        assert bank.templates.shape == (3, *before.weight_shape) and bank.templates.is_contiguous()
        weight = bank.mix(1)
        assert weight.is_contiguous() and torch.equal(
            weight, sum(bank.templates * bank.coefficients[1].view(-1, 1, 1, 1, 1))
        )
    assert sum(p.numel() for p in mixed.parameters()) == sum(p.numel() for p in shared.parameters())
    mixed(x).sum().backward()
    assert all(parameter.grad is not None for parameter in mixed.parameters())


@pytest.fixture
def task():
    return steps.noise(20, torch.device("cpu"))


def test_images_one_by_one_equal_our_batch_for_the_same_draws(task):
    augmentation = task.augmentation
    assert augmentation == Augmentation(*STATISTICS["CIFAR-10"])
    draws = augmentation.draw(20, seed=1, epoch=1)
    assert set(draws[:, 0].tolist()) == {0, 1}
    done = []
    for image, (flip, row, column, *_) in zip(task.images.permute(0, 2, 3, 1).numpy(), draws.tolist(), strict=True):
        column = 8 - column if flip else column  # we crop first and then mirror; the authors do the reverse
        done.append(steps.augment_one(np.ascontiguousarray(image), augmentation, flip, row, column))
    torch.testing.assert_close(torch.cat(done), augmentation(task.images, draws), rtol=1e-4, atol=1e-5)


def test_the_loaders_images_are_drawn_from_all_flips_and_crops():
    pixels = torch.arange(32, dtype=torch.uint8).expand(600, 3, 32, 32) + 1  # column c holds c + 1
    images = ImageSet(pixels, torch.arange(600) % 10, tuple("0123456789"), "", "")
    task = Classification(images, None, Augmentation((0.0,) * 3, (1.0,) * 3))
    inputs, labels = steps.one_by_one(task, [*range(100, 600), *range(100)])
    assert inputs.shape == (600, 3, 32, 32) and inputs.dtype == torch.float32 and inputs.is_contiguous()
    assert torch.equal(labels, images.labels)
    assert len({tuple(row) for row in inputs[:, 0, 16].round().int().tolist()}) == 18  # two flips, nine columns
    assert not torch.equal(inputs, steps.one_by_one(task, [*range(600)])[0])


def test_our_data_path_takes_whole_batches_from_the_task(task):
    batches = steps.batches(task, 8)
    order = torch.Generator().manual_seed(0)
    for epoch in (1, 2, 3):
        indices = torch.randperm(20, generator=order)
        for start in (0, 8):
            inputs, targets = next(batches)
            expected, labels = task.batch(indices[start : start + 8], 0, epoch)
            assert torch.equal(inputs, expected) and torch.equal(targets, labels)
            assert inputs.is_contiguous(memory_format=torch.channels_last)


def setup_of(**changes):
    given = {"model": "SWRN 16-1-2", "batch": 8, "compile": False, "threads": 1, "rounds": 2, "workers": 1}
    return Namespace(**given | {"device": torch.device("cpu"), "cuda": False, "quick": True} | changes)


@pytest.mark.parametrize("name", ["ours", "plain", "authors"])
def test_every_step_trains_the_network_that_it_is_named_after(name, task, monkeypatch):
    seen = []

    def look(model, task, inputs, targets, optimizer, scaler, dtype, *others):
        seen.append((model, inputs, targets, dtype, torch.backends.cudnn.allow_tf32))
        return train_step(model, task, inputs, targets, optimizer, scaler, dtype, *others)

    train_step = steps.train_step
    for module in (steps, step_of_training):
        monkeypatch.setattr(module, "train_step", look)
    step = benchmark.make_step(setup_of(), task, name)
    step()
    model, inputs, targets, *_ = seen[0]
    before = [parameter.clone() for parameter in model.parameters()]
    step()
    assert all(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    assert bool(banks(model)) == (name != "plain")
    kinds = {type(bank).__name__ for bank in banks(model).values()}
    assert kinds == {"ours": {"TemplateBank"}, "plain": set(), "authors": {"LayerwiseBank"}}[name]
    form = torch.contiguous_format if name == "authors" else torch.channels_last
    assert inputs.shape == (8, 3, 32, 32) and inputs.is_contiguous(memory_format=form) and targets.shape == (8,)
    if name == "authors":
        assert seen[0][3] is torch.float32 and model.stem.weight.is_contiguous()


def test_if_compilation_fails_the_step_runs_without_it_and_a_note_is_recorded(task, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no compiler here")

    def sections(setup, task):
        benchmark.make_step(setup, task, "ours")()
        return {"ratios": {}, "inference": {"seconds": {"folded": [1.0], "unfolded": [1.0]}}}

    monkeypatch.setattr(torch, "compile", broken)
    for name in ("_memory", "_others", "_costs"):
        monkeypatch.setattr(benchmark, name, lambda *_: {})
        getattr(benchmark, name).__name__ = name
    monkeypatch.setattr(benchmark, "_steps", sections)
    monkeypatch.setattr(benchmark, "noise", lambda *_: task)
    notes = benchmark.measure(setup_of(compile=True, threads=torch.get_num_threads()))["notes"]
    assert len(notes) == 3 and "1 workers" in notes[0]
    assert "no compiler here" in notes[1] and notes[2] == "SWRN 16-1-2 runs without torch.compile"


def test_tf32_is_set_within_a_step_and_restored_after_it(task, monkeypatch):
    flags = []

    def look(*_):
        flags.append(torch.backends.cudnn.allow_tf32)
        if len(flags) == 4:
            raise KeyError

    monkeypatch.setattr(steps, "train_step", look)
    before = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark
    setup = setup_of(workers=0)
    off, on = (benchmark.make_step(setup, task, f"authors, TF32 {state}") for state in ("off", "on"))
    for step in (off, on, off):
        step()
    with pytest.raises(KeyError):
        on()
    assert flags == [False, True, False, True]
    assert before == (torch.backends.cudnn.allow_tf32, torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark)


@pytest.mark.parametrize("name, plain", [("SWRN 28-10-2*", "WRN 28-10*"), ("SWRN 16-1", "WRN 16-1")])
def test_the_plain_network_is_of_the_same_size(name, plain, monkeypatch):
    made = []
    monkeypatch.setattr(benchmark, "ours", lambda task, name, *_: made.append(name))
    for step in ("ours", "plain"):
        benchmark.make_step(setup_of(model=name), None, step)
    assert made == [name, plain]


@pytest.mark.long
def test_memory_that_cannot_be_measured_is_recorded_with_the_reason(written):
    peaks = benchmark._memory(setup_of(model="SWRN 17-1-2"), None)["memory"]["bytes"]
    assert set(peaks) == {"ours", "plain", "authors"} and all(
        "not measured: ValueError" in each for each in peaks.values()
    )
    record = benchmark.load_benchmark(written[0]) | {"memory": {"bytes": peaks}}
    assert benchmark.table(record).count("not measured") == 7 + 3


def test_only_measured_targets_are_judged(written):
    record = benchmark.load_benchmark(written[0])
    met = {target["what"]: target["met"] for target in record["targets"]}
    assert [met[name] for name in met if name.startswith("cpu")] == [True, True, True, False]
    assert {met[name] for name in met if name.startswith("cuda")} == {None}
    measured = [target["measured"] for target in record["targets"]]
    assert measured == [2.875, 1.0, 0.0075, 1.2, *["not measured"] * 6], "lower ends, where the target says so"
    for change in ({"quick": True}, {"device": "cuda"}, {"steps": record["steps"] | {"batch": 64}}):
        assert not any(
            target["met"] for target in benchmark.targets(record | change) if target["what"].startswith("cpu")
        )


def numbers_of(line):
    """The words of a line of the table, and the numbers with three digits at its end."""
    words = line.split()
    count = next((n for n, word in enumerate(reversed(words)) if not re.fullmatch(r"[\d,]+\.\d{3}", word)), 0)
    return words, words[len(words) - count :]


def test_a_record_holds_what_was_measured_in_six_digits(written):
    path, printed = written
    record = benchmark.load_benchmark(path)
    assert record["format"] == benchmark.FORMAT and record["quick"] is False
    assert record["generator"]["seconds"]["generate"] == [1e-5, 1.23457e-5]
    assert {"processor", "cores", "load before", "load after"} <= set(record["machine"])
    assert record["versions"]["torch"] == torch.__version__
    assert max(map(len, printed.splitlines())) <= 100
    rows = {
        " ".join(words[: -len(numbers)]): numbers for words, numbers in map(numbers_of, printed.splitlines()) if numbers
    }
    assert rows["steps: plain"] == ["2,950.000"] and rows["steps: authors"] == ["8,500.000"]
    assert rows["plain"] == ["50.000", "1,000.000", "1.000"] and rows["authors"][2] == "2.000"
    assert rows["authors / ours"] == ["2.875", "2.750", "3.000"] and rows["SWRN 28-1-6 / plain"] == ["1.200", "1.300"]
    assert "load" in printed and printed.count("not measured") == 7
    assert [line.split()[-2:] for line in printed.splitlines() if line.startswith("cpu, ")] == [
        ["2.875", "yes"],
        ["1.000", "yes"],
        ["0.007", "yes"],
        ["1.200", "no"],
    ]


def test_a_quick_run_without_output_and_a_failed_write_leave_no_file(written, tmp_path, monkeypatch):
    path, _ = written
    before = path.read_bytes()
    monkeypatch.setattr(benchmark, "default_output", lambda _: tmp_path / "default.json")
    assert benchmark.main(["--quick", "--device", "cpu"]) == 0
    assert not (tmp_path / "default.json").exists()
    assert benchmark.main(["--device", "cpu", "--rounds", "2"]) == 0
    assert benchmark.load_benchmark(tmp_path / "default.json")["quick"] is False

    def full(_):
        raise OSError("no space left")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        benchmark.main(["--device", "cpu", "--output", str(path)])
    assert path.read_bytes() == before and [each.name for each in path.parent.iterdir()] == [path.name]


def test_the_default_place_names_the_hardware():
    path = benchmark.default_output("Intel(R) Xeon(R) Gold 6430 @ 2.10GHz")
    assert path.name == "intel-xeon-gold-6430-2-10ghz.json" and path.parent.name == "benchmarks"


@pytest.mark.parametrize(
    "arguments",
    [["--model", "WRN 16-4"], ["--model", "SWRN 17-1-2"], ["--rounds", "0"], ["--batch", "0"], ["--threads", "0"]],
)
def test_wrong_arguments_end_in_a_message(arguments, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(SystemExit) as ended:
        benchmark.main([*arguments, "--device", "cpu"])
    assert ended.value.code == 2 and "softshare bench: error" in capsys.readouterr().err


@pytest.mark.parametrize(
    "place, value, message",
    [
        (("format",), "softshare benchmark 1", "format"),
        (("memory",), None, "'memory' is missing"),
        (("threads",), "1", "'threads' is missing or not of type int"),
        (("steps", "seconds"), [], "'steps' has no lists"),
        (("steps", "seconds", "ours"), [1.0], "'ours' in 'steps'"),
        (("rounds",), 3, "'ours' in 'steps'"),
        (("steps", "seconds", "ours"), [1.0, -1.0], "'ours' in 'steps'"),
        (("steps", "seconds", "ours"), [1.0, float("nan")], "'ours' in 'steps'"),
        (("inference", "seconds", "folded"), [], "'folded' in 'inference'"),
        (("targets", 0), {"what": ""}, "target lacks"),
    ],
)
def test_a_damaged_record_is_refused_by_name(written, place, value, message):
    path, _ = written
    record = json.loads(path.read_text())
    at = record
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = value
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=message):
        benchmark.load_benchmark(path)


def test_a_record_changed_by_hand_is_refused(written, tmp_path):
    record = json.loads(written[0].read_text())
    record["ratios"]["ours / plain"] = [0.5, 0.5, 0.5]
    (tmp_path / "changed.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="changed by hand"):
        benchmark.load_benchmark(tmp_path / "changed.json")


def test_a_truncated_record_and_a_missing_one_are_distinguished(written, tmp_path):
    path, _ = written
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ValueError, match="not JSON"):
        benchmark.load_benchmark(path)
    with pytest.raises(FileNotFoundError):
        benchmark.load_benchmark(tmp_path / "nothing.json")


def test_every_stored_record_loads():
    kept = sorted((Path(benchmark.__file__).parents[2] / "data" / "benchmarks").glob("*.json"))
    assert not any(benchmark.load_benchmark(path)["quick"] for path in kept if not path.match(networks.PATTERN))


def test_the_plot_shows_medians_and_their_range(written):
    record = benchmark.load_benchmark(written[0])
    axes = pictures.cost_by_templates(record)
    (line,) = (line for line in axes.get_lines() if line.get_label() == "SWRN 28-1-k")
    assert line.get_xdata().tolist() == [1, 6] and line.get_ydata().tolist() == [1.1, 1.25]
    (one,) = (line for line in axes.get_lines() if line.get_label() == "WRN 28-1")
    assert list(one.get_ydata()) == [1.0, 1.0]
    band = axes.collections[0].get_paths()[0].vertices
    assert {tuple(row) for row in band} == {(1.0, 1.0), (1.0, 1.2), (6.0, 1.2), (6.0, 1.3)}
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("templates k", "step time / plain WRN")
    plt.close("all")
