"""What the timings of networks hold, in which order they are taken, and which records are read."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from softshare import cli, files
from softshare.models import Network
from softshare.speed import benchmark, networks, records, steps
from softshare.studies import comparison, tables
from softshare.training import step

SMALL = {
    "CIFAR": networks.Group(("WRN 28-1", "SWRN 28-1-2", "DARTS width 4"), 32, 1.0),
    "ImageNet": networks.Group(("ResNet-200 width 8",), 64, 0.25),
}


def setup_of(**changes):
    given = {"device": torch.device("cpu"), "threads": 1, "rounds": 2, "batch": 8, "quick": True}
    return Namespace(**given | changes)


@pytest.fixture
def timed(monkeypatch):
    """What would be timed, in order: name, images, side; every step takes a second more than the one before."""
    calls = []

    def seconds(name, task):
        calls.append((name, task.size, task.images.shape[-1]))
        return float(len(calls))

    monkeypatch.setattr(networks, "GROUPS", SMALL)
    monkeypatch.setattr(networks, "seconds_of_a_step", seconds)
    return calls


@pytest.fixture
def written(timed, tmp_path, capsys):
    """The path of a record of made-up numbers, and what was printed."""
    path = tmp_path / "deep" / "networks-record.json"
    arguments = ["bench", "--networks", "--device", "cpu", "--rounds", "2", "--threads", "1", "--output", str(path)]
    assert cli.main(arguments) == 0
    return path, capsys.readouterr()


def test_all_networks_of_the_poster_are_timed_with_plain_ones_and_twins():
    cifar, imagenet = (set(networks.GROUPS[title].networks) for title in ("CIFAR", "ImageNet"))
    rows = {
        name: {str(comparison.network_of(row["model"])) for row in tables.paper_table(name)} for name in tables.TABLES
    }
    assert rows["cifar"] | rows["search"] <= cifar and rows["imagenet"] == imagenet
    for name in comparison.SHARED:
        network = Network.parse(name)
        assert {name, str(network.plain), str(network.twin)} <= cifar
    for title, group in networks.GROUPS.items():
        assert [str(Network.parse(name)) for name in group.networks] == list(group.networks)
        assert all(Network.parse(name).imagenet == (title == "ImageNet") for name in group.networks)
        assert len(set(group.networks)) == len(group.networks)
    assert (networks.GROUPS["CIFAR"].side, networks.GROUPS["ImageNet"].side) == (32, 224)


def test_quick_networks_are_narrow_and_each_is_timed_once():
    quick = networks.in_groups(True)
    for group in quick.values():
        assert all(Network.parse(name).narrowed() == Network.parse(name) for name in group.networks)
        assert len(set(group.networks)) == len(group.networks) and group.side <= 64
    assert {Network.parse(name).family for name in quick["CIFAR"].networks} == {
        Network.parse(name).family for name in networks.GROUPS["CIFAR"].networks
    }
    assert networks.in_groups(False) is networks.GROUPS


def test_networks_take_turns_in_alternating_order_with_batches_by_group(timed, capsys):
    found = networks.measure(setup_of(quick=False))
    names = [name for name, *_ in timed]
    assert names == ["WRN 28-1", "SWRN 28-1-2", "DARTS width 4", "ResNet-200 width 8"] + names[:4][::-1]
    assert {(size, side) for _, size, side in timed[:3]} == {(8, 32)} and timed[3][1:] == (2, 64)
    groups = found["groups"]
    assert groups["CIFAR"] == {
        "side": 32,
        "batch": 8,
        "seconds": {"WRN 28-1": [1.0, 8.0], "SWRN 28-1-2": [2.0, 7.0], "DARTS width 4": [3.0, 6.0]},
    }
    assert groups["ImageNet"]["batch"] == 2 and groups["ImageNet"]["seconds"] == {"ResNet-200 width 8": [4.0, 5.0]}
    said = capsys.readouterr().err.splitlines()
    assert (
        len(said) == 8 and said[0].startswith("round 1 of 2, WRN 28-1: 1 s; about") and said[-1].endswith(" 0 s left")
    )
    assert found["precision"] in ("float32", "bfloat16")


def test_the_time_left_adds_up_what_each_network_took_before(monkeypatch, timed, capsys):
    clock = [0.0]

    def seconds(name, task):
        clock[0] += {"WRN 28-1": 1.0, "SWRN 28-1-2": 2.0, "DARTS width 4": 30.0}.get(name, 400.0)
        return 1.0

    monkeypatch.setattr(networks, "seconds_of_a_step", seconds)
    monkeypatch.setattr(networks, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    networks.measure(setup_of(quick=False))
    left = [int(number) for number in re.findall(r"about (\d+) s left", capsys.readouterr().err)]
    assert left[3:] == [433, 33, 3, 1, 0]  # known from the end of the first round on
    assert left[0] == 7  # seven turns like the first


@pytest.mark.parametrize("each, measured, calls", [(5.0, 5.0, 2), (0.03125, 0.03125, 2 + 4)])
def test_a_step_is_timed_after_one_to_warm_up_and_for_at_least_a_tenth_of_a_second(monkeypatch, each, measured, calls):
    clock, made = [0.0], []

    def ours(task, name, batch):
        made.append((name, batch))
        durations = iter([100.0])

        def step():
            clock[0] += next(durations, each)
            made.append("step")

        return step

    monkeypatch.setattr(networks, "ours", ours)
    monkeypatch.setattr(networks, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    task = steps.noise(4, torch.device("cpu"))
    assert networks.seconds_of_a_step("DARTS", task) == pytest.approx(measured)
    assert made == [("DARTS", 4), *["step"] * calls]


@pytest.mark.parametrize("name, side", [("SWRN 28-1-2", 32), ("DenseNet-264 width 4", 64)])
def test_a_step_trains_the_named_network_on_all_images(name, side, monkeypatch):
    seen = []

    def look(model, task, inputs, targets, optimizer, scaler, dtype, *others):
        before = [parameter.clone() for parameter in model.parameters()]
        loss = train_step(model, task, inputs, targets, optimizer, scaler, dtype, *others)
        moved = sum(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
        seen.append((sum(p.numel() for p in model.parameters()), inputs.shape, targets.shape, moved / len(before)))
        return loss

    train_step = step.train_step
    monkeypatch.setattr(step, "train_step", look)
    assert networks.seconds_of_a_step(name, steps.noise(2, torch.device("cpu"), side)) > 0
    from softshare import models

    assert len(seen) >= 2
    for parameters, images, labels, moved in seen:
        assert parameters == models.parameters(name)
        assert images == (2, 3, side, side) and labels == (2,) and moved > 0.9


def test_a_record_holds_what_was_measured_and_where(written):
    path, printed = written
    record = networks.load_network_timings(path)
    assert record["format"] == networks.FORMAT and record["quick"] is False and record["rounds"] == 2
    assert record["groups"]["CIFAR"]["batch"] == 16 and record["groups"]["ImageNet"]["batch"] == 4
    assert record["groups"]["CIFAR"]["seconds"]["SWRN 28-1-2"] == [2.0, 7.0]
    assert record["versions"]["torch"] == torch.__version__ and {"revision", "hardware", "date"} <= set(
        record["versions"]
    )
    assert {"processor", "cores", "load before", "load after"} <= set(record["machine"]) and record["threads"] == 1
    assert record["precision"] in ("float32", "bfloat16") and record["device"] == "cpu"
    assert max(map(len, printed.out.splitlines())) <= 100
    (line,) = (line for line in printed.out.splitlines() if line.startswith("SWRN 28-1-2"))
    assert line.split()[-3:] == ["4,500.0", "2,000.0", "7,000.0"]
    assert f"wrote {path}" in printed.err


def test_a_quick_run_without_output_leaves_no_file(timed, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "data_folder", lambda name: tmp_path / name)
    assert networks.main(["--quick", "--device", "cpu", "--rounds", "1"]) == 0
    assert not list(tmp_path.rglob("*"))
    assert networks.main(["--device", "cpu", "--rounds", "1"]) == 0
    (path,) = (each for each in tmp_path.rglob("*") if each.is_file())
    assert path.match(networks.PATTERN) and path.parent.name == "benchmarks"
    hardware = networks.load_network_timings(path)["versions"]["hardware"]
    assert path.name == f"networks-{records.default_output(hardware).name}"


@pytest.mark.parametrize("arguments", [["--rounds", "0"], ["--batch", "0"], ["--threads", "0"], ["--device", "tpu"]])
def test_wrong_arguments_end_in_a_message(arguments, capsys, monkeypatch):
    monkeypatch.setattr(networks, "measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(SystemExit) as ended:
        benchmark.main(["--networks", "--device", "cpu", *arguments])
    assert ended.value.code == 2 and "softshare bench --networks: error" in capsys.readouterr().err


@pytest.mark.parametrize(
    "place, value, message",
    [
        (("format",), "softshare benchmark 3", "format"),
        (("groups",), [], "'groups' is missing or not of type dict"),
        (("rounds",), 3, "'WRN 28-1' in 'CIFAR'"),
        (("groups", "CIFAR"), [], "'CIFAR' lacks the side"),
        (("groups", "CIFAR", "batch"), "4", "'CIFAR' lacks the side of its images or its batch"),
        (("groups", "CIFAR", "seconds"), {}, "'CIFAR' has no lists"),
        (("groups", "CIFAR", "seconds", "WRN 28-1"), [1.0, -1.0], "'WRN 28-1' in 'CIFAR'"),
        (("groups", "CIFAR", "seconds", "WRN 28"), [1.0, 1.0], "unknown model 'WRN 28'"),
        (("versions", "hardware"), None, "does not name the hardware"),
        (("precision",), "float64", "changed by hand"),
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
        networks.load_network_timings(path)
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ValueError, match="not JSON"):
        networks.load_network_timings(path)
    with pytest.raises(FileNotFoundError):
        networks.load_network_timings(path.with_name("nothing.json"))


def test_records_of_this_hardware_come_first_and_bad_ones_are_left_out(written, tmp_path, monkeypatch):
    record = json.loads(written[0].read_text())
    own, bundled = tmp_path / "own", tmp_path / "bundled"

    def store(folder, name, hardware):
        files.write_json(
            folder / f"networks-{name}.json", record | {"versions": record["versions"] | {"hardware": hardware}}
        )

    store(bundled, "a", "another machine")
    store(bundled, "b", "this machine")
    store(bundled, "twice", "the project's")
    store(own, "twice", "the user's")
    (bundled / "networks-bad.json").write_text("{")
    (bundled / "other.json").write_text("{}")
    monkeypatch.setattr(files, "data_folder", lambda name: own)
    monkeypatch.setattr(files, "bundled_folder", lambda name: bundled)
    monkeypatch.setattr(networks, "processor_name", lambda: "this machine")
    with pytest.warns(UserWarning, match="left out: .*networks-bad.json is not JSON"):
        found = networks.network_timings()
    hardware = [each["versions"]["hardware"] for each in found]
    assert hardware[0] == "this machine" and sorted(hardware[1:]) == ["another machine", "the user's"]


def test_benchmarks_of_pairs_leave_these_records_alone(written, tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr(tables, "bundled_folder", lambda name: written[0].parent)
    assert tables.benchmarks() == [] and not recwarn.list


def test_every_stored_record_loads():
    kept = sorted((Path(benchmark.__file__).parents[2] / "data" / "benchmarks").glob(networks.PATTERN))
    for path in kept:
        record = networks.load_network_timings(path)
        assert record["quick"] is False
        assert {title: set(group["seconds"]) for title, group in record["groups"].items()} == {
            title: set(group.networks) for title, group in networks.GROUPS.items()
        }


@pytest.mark.long
def test_a_quick_run_times_every_kind_of_network(tmp_path):
    command = [sys.executable, "-m", "softshare", "bench", "--networks", "--quick", "--device", "cpu", "--rounds", "1"]
    environment = {**os.environ, "PYTHONPATH": str(Path(benchmark.__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--batch", "2", "--output", "a/b.json"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["b.json"]
    record = networks.load_network_timings(tmp_path / "a" / "b.json")
    assert record["quick"] is True and record["groups"]["CIFAR"]["batch"] == 2
    assert [list(group["seconds"]) for group in record["groups"].values()] == [
        list(group.networks) for group in networks.in_groups(True).values()
    ]
