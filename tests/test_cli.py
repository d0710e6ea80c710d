"""The command line: what it lists, runs, folds and reports, and how it tells what went wrong."""

from __future__ import annotations

import os
import struct
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import softshare
from softshare import cli, models
from softshare.studies import RECIPES, find_records


def test_the_list_names_every_recipe_and_its_cost(capsys):
    assert cli.main(["list"]) == 0
    text = capsys.readouterr().out
    lines = {line[:24].strip(): line for line in text.splitlines()}
    assert set(RECIPES) <= set(lines) and "not measured" in text
    assert "cifar10, cifar100" in lines["SWRN 28-10-2*"] and "days" in lines["SWRN 28-18*"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["run", "SWRN 1-2"], "unknown recipe 'SWRN 1-2'; known: WRN 28-10"),
        (["run", "CNN", "--seed", "-1"], "seed"),
        (["run", "WRN 28-10", "--profile", "gpu", "--data", "/nowhere/at/all"], "no image folder or archive at"),
        (["fold", "SCNN", "--runs", "/nowhere"], "train it first: softshare run 'SCNN'"),
        (["fold", "CNN", "--runs", "/nowhere", "--threshold", "2"], "no record of CNN"),
        (["gpu", "--minutes", "0"], "minutes must be above 0"),
    ],
)
def test_wrong_arguments_are_told_in_a_line(arguments, told, capsys):
    assert cli.main(arguments) == 1
    error = capsys.readouterr().err
    assert told in error and error.startswith(f"softshare {arguments[0]}: ") and "Traceback" not in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_told(tmp_path, capsys):
    assert cli.main(["run", "CNN", "--device", "cuda", "--runs", str(tmp_path)]) == 1
    assert "finds no CUDA GPU on this machine" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA error: an illegal memory access"), torch.OutOfMemoryError("no room")]
)
def test_an_error_of_cuda_keeps_its_traceback(error, monkeypatch):
    """Cut to one line nobody could tell where it came from."""

    def failing(*_, **__):
        raise error

    monkeypatch.setattr(cli, "run", failing)
    with pytest.raises(type(error), match=str(error)):
        cli.main(["run", "CNN"])


def test_run_fold_and_report_from_the_command_line(tmp_path, capsys):
    places = ["--runs", str(tmp_path), "--checkpoints", str(tmp_path / "c")]
    assert cli.main(["run", "SCNN", "--quiet", *places]) == 0
    told = capsys.readouterr().out
    assert "SCNN, profile fast, seed 0, shortest paths, generated: trained in" in told and "record" in told
    assert cli.main(["fold", "SCNN", "--threshold", "0.3", "--output", str(tmp_path / "o" / "x-0.3"), *places]) == 0
    told = capsys.readouterr().out
    assert "layers: 1 -> " in told and " 20 distinct layers" in told
    errors = [float(line.split()[-1].rstrip("%")) for line in told.splitlines() if "test error" in line]
    assert len(errors) == 4 and all(0 <= error <= 100 for error in errors)
    saved = softshare.FoldPlan.from_json((tmp_path / "o" / "x-0.3.json").read_text())
    assert 1 <= saved.distinct_layers < 20
    (run,) = find_records(tmp_path, "SCNN")
    folded = softshare.fold(models.build(run.network), saved)
    folded.load_state_dict(load_file(tmp_path / "o" / "x-0.3.safetensors"))
    (analysis,) = find_records(tmp_path, "fold of SCNN")
    assert analysis.metrics["distinct_at_0.3"] == saved.distinct_layers
    assert cli.main(["report", "--runs", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "2 records in" in told and "ResNeXt-29 16x64" in told and "rectangle rule" in told
    (line,) = (line for line in told.splitlines() if line.startswith("SCNN  "))
    assert "not run" in line and "fast" not in line  # a run of profile fast fills no cell


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
