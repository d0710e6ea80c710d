"""What the benchmark measures, how it compares, and what it writes; how long things take is nobody's concern here."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from softshare import benchmark, contenders, files, models, plotting
from softshare.augmentation import Augmentation
from softshare.images import STATISTICS, ImageSet
from softshare.sharing import shared_layers

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
    "generator": {"networkx": "not measured: needs networkx", "seconds": {"generate": [1e-5, 1.23456789e-5]}},
    "folding": {"seconds": {"plan": [0.1], "fold": [0.2]}},
    "inference": {"seconds": {"folded": [0.1], "unfolded": [0.1]}},
    "cost by templates": {
        "model": "SWRN 28-1-k",
        "plain": "WRN 28-1",
        "seconds": {"plain": [1.0, 1.0], "1": [1.0, 1.2], "2": [1.2, 1.3]},
        "ratios": {"1": (1.1, 1.0, 1.2), "2": (1.25, 1.2, 1.3)},
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
    """The path of a record made of hand-made numbers, as for SWRN 16-4-2 on a CPU, and the table that was printed."""
    monkeypatch.setattr(benchmark, "measure", lambda *_: copy.deepcopy(SECTIONS))
    path = tmp_path / "deep" / "record.json"
    assert benchmark.main(["--device", "cpu", "--output", str(path)]) == 0
    return path, capsys.readouterr().out


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quick")
    command = [sys.executable, "-m", "softshare.benchmark", "--quick", "--device", "cpu", "--output", "a/b.json"]
    source = str(Path(benchmark.__file__).parents[1])
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
    assert record["steps"]["workers"] == 2 and any("workers" in note for note in record["notes"])
    assert set(record["generator"]["seconds"]) == {"generate", "networkx"}
    assert set(record["cost by templates"]["ratios"]) == {"1", "2"}
    assert "(3 -> 4) x 4" in record["folding"]["plan"][1]
    middle = np.median(record["steps"]["seconds"]["ours"])
    assert record["epoch"]["seconds"]["ours"] == pytest.approx(50_000 / 16 * middle, rel=1e-4)
    if (
        sys.platform == "linux"
    ):  # weights, gradients, momentum and activations of 16 images: no less than that, not much more
        assert all(5 * 2**20 < peak < 2**30 for peak in record["memory"]["bytes"].values())
    assert all(target["measured"] == "not measured" and target["met"] is None for target in record["targets"])
    assert max(map(len, done.stdout.splitlines())) <= 100
    assert " s  generator" in done.stderr


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
    flops = 6 * ceiling["multiply-adds an image"] * steps["batch"] / np.array(seconds["ours"])
    rate = 2 * ceiling["matrix side"] ** 3 / np.array(seconds["matrix product"])
    np.testing.assert_allclose(record["ratios"]["share of the matrix ceiling"][0], np.median(flops / rate), rtol=1e-4)


def test_a_ratio_is_taken_within_rounds():
    """Load that hits one round alike changes nothing; the ratio of medians would be 3."""
    seconds = {"a": [2.0, 30.0, 6.0], "b": [1.0, 10.0, 2.0]}
    assert benchmark.ratio(seconds, "a", "b") == (3.0, 2.0, 3.0)
    assert benchmark.ratio({"a": [1.0, 8.0], "b": [1.0, 2.0]}, "a", "b", 10.0) == (25.0, 10.0, 40.0)


def test_turns_alternate_and_count_every_call_but_the_warm_up(monkeypatch):
    clock, order = [0.0], []

    def takes(name, seconds):
        def call():
            clock[0] += seconds
            order.append(name)

        return call

    monkeypatch.setattr(benchmark, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    seconds = benchmark.in_turn({"a": takes("a", 1.0), "b": takes("b", 4.0)}, 3, warmup=1, calls={"b": 2})
    assert "".join(order) == "ab" + "abb" + "bba" + "abb"
    assert seconds == {"a": [1.0] * 3, "b": [4.0] * 3}


def test_layerwise_mixing_computes_what_the_shared_model_computes():
    shared = models.swrn(22, 1, 3)
    count = len(list(shared_layers(shared)))
    mixed = contenders.layerwise(copy.deepcopy(shared))
    layers = [module for module in mixed.modules() if isinstance(module, contenders.LayerwiseMixing)]
    assert len(layers) == count == 12 and not list(shared_layers(mixed))
    assert len({id(layer.templates) for layer in layers}) == 3  # one tensor a stage
    x = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(mixed(x), shared(x), rtol=1e-4, atol=1e-4)
    assert sum(p.numel() for p in mixed.parameters()) == sum(p.numel() for p in shared.parameters())


def test_images_one_by_one_equal_our_batch_for_the_same_draws():
    augmentation = Augmentation(*STATISTICS["CIFAR-10"])
    pixels = torch.randint(256, (40, 3, 32, 32), dtype=torch.uint8)
    draws = augmentation.draw(40, seed=1, epoch=1)
    assert set(draws[:, 0].tolist()) == {0, 1}
    data = contenders.OneByOne(ImageSet(pixels, torch.arange(40) % 10, tuple("0123456789"), "", ""), augmentation)
    one_by_one = []
    for image, (flip, row, column, *_) in zip(data.pixels, draws.tolist(), strict=True):
        column = 8 - column if flip else column  # we crop first and mirror then, the authors the other way round
        one_by_one.append(contenders.augment_one(image, bool(flip), row, column, data.mean, data.deviation))
    torch.testing.assert_close(torch.stack(one_by_one), augmentation(pixels, draws), rtol=1e-4, atol=1e-5)


def test_the_loaders_images_are_drawn_from_all_flips_and_crops():
    pixels = torch.arange(32, dtype=torch.uint8).expand(1, 3, 32, 32) + 1  # column c holds c + 1
    images = ImageSet(pixels, torch.tensor([7]), tuple("0123456789"), "", "")
    data = contenders.OneByOne(images, Augmentation((0.0,) * 3, (1.0,) * 3))
    crops = set()
    for _ in range(600):
        image, label = data[0]
        assert image.shape == (3, 32, 32) and image.dtype == torch.float32 and label == 7
        crops.add(tuple(image[0, 16].round().int().tolist()))
    assert len(crops) == 18  # two flips, nine columns


@pytest.fixture
def bench():
    threads = torch.get_num_threads()
    setup = contenders.Setup("SWRN 16-1-2", 8, 20, torch.device("cpu"), 1, True, 2)
    yield contenders.Bench(setup)
    torch.set_num_threads(threads)


def test_our_data_path_is_the_tasks_in_whole_batches(bench):
    batches = bench.batches()
    order = torch.Generator().manual_seed(0)
    for epoch in (1, 2, 3):
        indices = torch.randperm(20, generator=order)
        for start in (0, 8):
            inputs, targets = next(batches)
            expected, labels = bench.task.batch(indices[start : start + 8], 0, epoch)
            assert torch.equal(inputs, expected) and torch.equal(targets, labels)
            assert inputs.is_contiguous(memory_format=torch.channels_last)


def test_where_compilation_fails_the_step_runs_without_it_and_the_record_says_so(bench, monkeypatch):
    def broken(model):
        def run(*_):
            raise RuntimeError("no compiler here")

        return run

    monkeypatch.setattr(torch, "compile", broken)
    bench.candidates()["ours"]()()
    assert len(bench.notes) == 1 and "SWRN 16-1-2" in bench.notes[0] and "no compiler here" in bench.notes[0]


def test_tf32_is_as_told_within_a_step_and_as_before_after_it():
    def flags():
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

    before = flags()
    for allowed in (True, False):
        with pytest.raises(KeyError), contenders._tf32(allowed):
            assert flags() == (allowed, allowed)
            raise KeyError
        assert flags() == before


def test_multiply_adds_are_those_counted_by_hand():
    """Each convolution: output pixels times weights."""
    pixels, convolutions = 32 * 32, 3 * 16 * 9
    by_hand = pixels * convolutions
    for stage, width in enumerate((16, 32, 64)):
        pixels = (32 >> stage) ** 2
        by_hand += pixels * 9 * (max(16, width // 2) * width + 3 * width * width)
        by_hand += pixels * width // 2 * width if stage else 0  # the shortcut
    by_hand += 64 * 10
    forward, factor = benchmark.multiply_adds("WRN 16-1")
    assert forward == by_hand and 2.9 < factor < 3.0  # the stem passes no gradient on
    assert contenders.plain("SWRN 28-10-2*") == "WRN 28-10*" and contenders.plain("SWRN 16-1") == "WRN 16-1"


def test_without_networkx_the_row_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "networkx", None)
    found = benchmark._generator(5, 2, 2)
    assert found["networkx"] == "not measured: needs networkx" and list(found["seconds"]) == ["generate"]


def test_targets_are_judged_where_they_were_measured_alone(written):
    record = benchmark.load_benchmark(written[0])
    met = {target["what"]: target["met"] for target in record["targets"]}
    assert [met[name] for name in met if name.startswith("cpu")] == [True, False, True]
    assert {met[name] for name in met if name.startswith("cuda")} == {None}
    measured = [target["measured"] for target in record["targets"]]
    assert measured == [2.875, 1.03333, 0.0075, *["not measured"] * 4]
    for change in ({"quick": True}, {"device": "cuda"}, {"steps": record["steps"] | {"batch": 64}}):
        assert not any(
            target["met"] for target in benchmark.targets(record | change) if target["what"].startswith("cpu")
        )


def test_a_record_holds_what_was_measured_in_six_digits(written):
    path, printed = written
    record = benchmark.load_benchmark(path)
    assert record["format"] == "softshare benchmark 2" and record["quick"] is False
    assert record["generator"]["seconds"]["generate"] == [1e-5, 1.23457e-5]
    assert {"processor", "cores", "load before", "load after"} <= set(record["machine"])
    assert record["versions"]["torch"] == torch.__version__
    assert max(map(len, printed.splitlines())) <= 100
    steps = {line[:20].strip(): line.split()[2:] for line in printed.splitlines() if line.startswith("step, ")}
    assert steps["step, plain"] == ["2950.00", "43", "1000.0", "1"] and steps["step, authors"][0] == "8500.00"
    assert "authors / ours" in printed and "2.875" in printed and "needs networkx" in printed


def test_a_quick_run_without_output_and_a_failed_write_leave_no_file(written, tmp_path, monkeypatch):
    path, _ = written
    before = path.read_bytes()
    monkeypatch.setattr(benchmark, "default_output", lambda _: tmp_path / "default.json")
    assert benchmark.main(["--quick", "--device", "cpu"]) == 0
    assert not (tmp_path / "default.json").exists()
    assert benchmark.main(["--device", "cpu"]) == 0
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
        (("threads",), "1", "'threads' is missing or not a int"),
        (("steps", "seconds"), [], "'steps' has no lists"),
        (("steps", "seconds", "ours"), [1.0], "'plain' in 'steps'"),
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


def test_a_cut_record_and_a_missing_one_are_told_apart(written, tmp_path):
    path, _ = written
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ValueError, match="not JSON"):
        benchmark.load_benchmark(path)
    with pytest.raises(FileNotFoundError):
        benchmark.load_benchmark(tmp_path / "nothing.json")


def test_every_record_that_is_kept_loads():
    kept = sorted((Path(benchmark.__file__).parents[1] / "data" / "benchmarks").glob("*.json"))
    assert not any(benchmark.load_benchmark(path)["quick"] for path in kept)


def test_the_plot_shows_medians_and_their_range(written):
    record = benchmark.load_benchmark(written[0])
    axes = plotting.cost_by_templates(record)
    (line,) = (line for line in axes.get_lines() if line.get_label() == "SWRN 28-1-k")
    assert line.get_xdata().tolist() == [1, 2] and line.get_ydata().tolist() == [1.1, 1.25]
    (one,) = (line for line in axes.get_lines() if line.get_label() == "WRN 28-1")
    assert list(one.get_ydata()) == [1.0, 1.0]
    band = axes.collections[0].get_paths()[0].vertices
    assert {tuple(row) for row in band} == {(1.0, 1.0), (1.0, 1.2), (2.0, 1.2), (2.0, 1.3)}
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("templates k", "step time / plain WRN")
    plt.close("all")
