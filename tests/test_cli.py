"""The command line: what it lists, runs, folds and reports, and how it reports errors."""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import softshare
from softshare import cli, models
from softshare.studies import RECIPES, find_records, make_plan, study_of, write_record


def test_the_list_names_every_recipe_and_its_cost(capsys):
    assert cli.main(["list"]) == 0
    text = capsys.readouterr().out
    width = next(line for line in text.splitlines() if line.startswith("recipe")).index("data")
    lines = {line[:width].strip(): line for line in text.splitlines()}
    assert set(RECIPES) <= set(lines) and "not measured" in text
    assert "cifar10, cifar100" in lines["SWRN 28-10-2*"] and "days" in lines["SWRN 28-18*"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "SWRN 1-2"], "unknown recipe 'SWRN 1-2'; known: ResNeXt-29 16x64"),
        (["run", "CNN", "--seed", "-1"], "seed"),
        (["run", "WRN 28-10", "--profile", "gpu", "--data", "/nowhere/at/all"], "no image folder or archive at"),
        (["fold", "SCNN", "--runs", "/nowhere"], "train it first: softshare run 'SCNN'"),
        (["fold", "CNN", "--runs", "/nowhere", "--threshold", "2"], "no record of CNN"),
        (["gpu", "--minutes", "0"], "minutes and carry must be above 0"),
    ],
)
def test_wrong_arguments_are_reported_in_one_line(arguments, message, capsys):
    assert cli.main(arguments) == 1
    error = capsys.readouterr().err
    assert message in error and error.startswith(f"softshare {arguments[0]}: ") and "Traceback" not in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_missing_gpu_is_reported(tmp_path, capsys):
    assert cli.main(["run", "CNN", "--device", "cuda", "--runs", str(tmp_path)]) == 1
    assert "finds no CUDA GPU on this machine" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA error: an illegal memory access"), torch.OutOfMemoryError("no room")]
)
def test_an_error_of_cuda_keeps_its_traceback(error, monkeypatch):
    """Cut to one line, it would not show where it came from."""

    def failing(*_, **__):
        raise error

    monkeypatch.setattr(cli, "run", failing)
    with pytest.raises(type(error), match=str(error)):
        cli.main(["run", "CNN"])


def test_run_fold_and_report_from_the_command_line(tmp_path, capsys):
    places = ["--runs", str(tmp_path), "--checkpoints", str(tmp_path / "c")]
    assert cli.main(["run", "SCNN", "--quiet", *places]) == 0
    output = capsys.readouterr().out
    assert "SCNN, profile fast, seed 0, shortest paths, generated: trained in" in output and "record" in output
    assert cli.main(["fold", "SCNN", "--threshold", "0.3", "--output", str(tmp_path / "o" / "x-0.3"), *places]) == 0
    output = capsys.readouterr().out
    assert "layers: 1 -> " in output and " 20 distinct layers" in output
    errors = [float(line.split()[-1].rstrip("%")) for line in output.splitlines() if "test error" in line]
    assert len(errors) == 4 and all(0 <= error <= 100 for error in errors)
    saved = softshare.FoldPlan.from_json((tmp_path / "o" / "x-0.3.json").read_text())
    assert 1 <= saved.distinct_layers < 20
    (run,) = find_records(tmp_path, "SCNN")
    folded = softshare.fold(models.build(run.network), saved)
    folded.load_state_dict(load_file(tmp_path / "o" / "x-0.3.safetensors"))
    (analysis,) = find_records(tmp_path, "fold of SCNN")
    assert analysis.metrics["distinct_at_0.3"] == saved.distinct_layers
    assert cli.main(["report", "--runs", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "2 records in" in output and "ResNeXt-29 16x64" in output and "rectangle rule" in output
    (line,) = (line for line in output.splitlines() if line.startswith("SCNN  "))
    assert "not run" in line and "fast" not in line  # a run of profile fast fills no cell


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """A folder with the record and checkpoints of a run at toy sizes."""
    folder = tmp_path_factory.mktemp("rehearsed")
    assert cli.main(["run", "SCNN", "--rehearse", "--quiet", "--runs", str(folder), "--checkpoints", str(folder)]) == 0
    return folder


def fold_of(folder, *arguments):
    places = ["--runs", str(folder), "--checkpoints", str(folder)]
    return cli.main(["fold", "SCNN", "--rehearse", *places, *arguments])


@pytest.mark.parametrize("words", [["scnn"], ["SCNN", "lambda", "0.01"], ["scnn lambda  0.01"]])
def test_names_of_recipes_need_neither_quotation_marks_nor_capitals(words, tmp_path, capsys):
    places = ["--runs", str(tmp_path), "--checkpoints", str(tmp_path)]
    assert cli.main(["run", *words, "--rehearse", "--quiet", *places]) == 0
    assert capsys.readouterr().out.startswith(
        "SCNN lambda 0.01," if len(words[0].split()) > 1 or words[1:] else "SCNN,"
    )


def test_every_path_option_expands_the_home_folder(rehearsed, monkeypatch, tmp_path, capsys):
    """As in ``--output=~/x``, where the shell does not expand the ``~``."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cli.main(["run", "SCNN", "--rehearse", "--quiet", "--runs=~/r", "--checkpoints=~/c"]) == 0
    assert cli.main(["fold", "SCNN", "--rehearse", "--runs=~/r", "--checkpoints=~/c", "--output=~/o/fold-0.9"]) == 0
    assert cli.main(["report", "--runs=~/r"]) == 0
    assert "2 records in" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "o", "r"]
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == ["fold-0.9.json", "fold-0.9.safetensors"]


def test_plan_and_weights_belong_together_and_a_full_disk_is_reported_in_one_line(
    rehearsed, monkeypatch, tmp_path, capsys
):
    assert fold_of(rehearsed, "--output", str(tmp_path / "f")) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with safe_open(tmp_path / "f.safetensors", "pt") as file:
        assert file.metadata()["plan"] == hashlib.sha256(before["f.json"]).hexdigest()
    write = cli.write_together

    def full(contents):
        monkeypatch.setattr("os.fsync", lambda number: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        write(contents)

    monkeypatch.setattr(cli, "write_together", full)
    capsys.readouterr()
    assert fold_of(rehearsed, "--threshold", "0.2", "--output", str(tmp_path / "f")) == 1
    error = capsys.readouterr().err
    assert error.startswith("softshare fold: ") and "No space left on device" in error and len(error.splitlines()) == 1
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("encoding", ["ascii", "cp437"])
def test_every_command_works_where_the_terminal_is_not_utf_8(rehearsed, tmp_path, encoding):
    folder = tmp_path / "\N{LATIN SMALL LETTER U WITH DIAERESIS}\u4e2d"
    shutil.copytree(rehearsed, folder)
    for seed, error in ((0, 5.0), (1, 6.0)):  # two runs, so that a spread is shown
        plan = make_plan("WRN 28-10*", "paper", seed)
        data = {"source": "CIFAR-10", "fingerprint": "x"}
        config = plan.config() | {"sizes": {"train": 50_000, "test": 10_000}}
        identity = study_of(plan).identity(plan, "x")
        write_record(identity, {"error": error}, data=data, config=config, runs=folder)
    places = ["--runs", str(folder), "--checkpoints", str(folder)]
    environment = os.environ | {"PYTHONIOENCODING": encoding, "OMP_NUM_THREADS": "1"}
    for command in (
        ["list"],
        ["report", *places[:2]],
        ["run", "SCNN", "--rehearse", *places],
        ["fold", "SCNN", "--rehearse", *places],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "softshare", *command], capture_output=True, env=environment, timeout=120
        )
        assert done.returncode == 0, done.stderr
        if command[0] == "report":
            assert b"5.50 \\N{PLUS-MINUS SIGN} 0.71 (2 runs" in done.stdout or encoding == "cp437"


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a terminal")
def test_on_a_terminal_a_bar_shows_speed_loss_and_time_left(tmp_path):
    import fcntl
    import termios

    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 150, 0, 0))
    command = [sys.executable, "-m", "softshare", "run", "CNN", "--rehearse"]
    command += ["--runs", str(tmp_path), "--checkpoints", str(tmp_path)]
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
