"""From recipe to record: found again, resumed where it stopped, tested once, trained by several processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from softshare.studies import RECIPES, find_records, run, running, tasks_of, train, trained
from softshare.training import evaluate
from softshare.training.checkpoints import read_checkpoint, write_checkpoint
from softshare.training.tasks import Classification


def places(folder):
    return {"runs": folder / "runs", "checkpoints": folder / "checkpoints", "progress": False, "device": "cpu"}


def test_a_second_call_finds_the_record_and_a_seed_or_profile_does_not(tmp_path, monkeypatch):
    where = places(tmp_path) | {"rehearse": True}
    first = run("SWRN 28-6-2, cutout", "fast", 0, "digits", **where)
    assert first.recipe == "SWRN 28-6-2 cutout" and first.network == "SWRN 28-1-2"
    assert first.data["source"] == "digits" and first.config["augmentation"]["cutout"] == 8
    assert {"error", "accuracy", "parameters", "last_loss", "last_held_out_error"} <= set(first.metrics)
    assert first.similarity().steps == [0, 1, 2]
    monkeypatch.setattr(running, "fit", lambda *_, **__: pytest.fail("trained again"))
    assert run("SWRN 28-6-2 cutout", "fast", 0, "digits", **where) == first
    record, net = train("SWRN 28-6-2 cutout", "fast", 0, "digits", **where)
    assert record == first and not net.training
    for other in ({"seed": 1}, {"data": "digits", "again": True}):
        with pytest.raises(pytest.fail.Exception):
            train("SWRN 28-6-2 cutout", "fast", **{"data": "digits"} | other, **where)


def test_weights_are_those_of_the_record_or_reported_missing(tmp_path):
    where = places(tmp_path)
    first, model = train("WRN 28-6", "fast", 0, "digits", **where | {"rehearse": True})
    net = trained(first, tmp_path / "checkpoints")
    assert all((net.state_dict()[name] == value).all() for name, value in model.state_dict().items())
    with pytest.raises(FileNotFoundError, match="records travel, checkpoints do not"):
        trained(first, tmp_path / "elsewhere")
    (end,) = (tmp_path / "checkpoints").rglob("*.safetensors")
    identity, tensors, facts = read_checkpoint(end)
    end.unlink()  # only one from the middle is left, as if the disk had been full at the end
    write_checkpoint(end.parent, 6, identity, tensors, facts | {"epoch": 2, "history": facts["history"][:1]})
    with pytest.raises(FileNotFoundError, match="no checkpoint of the end"):
        trained(first, tmp_path / "checkpoints")
    next((tmp_path / "checkpoints").rglob("*.safetensors")).unlink()
    # Nothing is trained unasked, and a record is not replaced.
    before = first.path.stat().st_mtime_ns
    with pytest.raises(FileNotFoundError, match="again=True"):
        train("WRN 28-6", "fast", 0, "digits", **where | {"rehearse": True})
    assert first.path.stat().st_mtime_ns == before
    record, net = train("WRN 28-6", "fast", 0, "digits", **where | {"rehearse": True}, again=True)
    assert record.metrics["error"] == first.metrics["error"]


def test_training_again_starts_from_the_start(tmp_path):
    where = places(tmp_path) | {"rehearse": True}
    first, model = train("CNN", "fast", 0, **where)
    before = first.path.stat().st_mtime_ns
    second, again = train("CNN", "fast", 0, **where, again=True)
    assert second.path.stat().st_mtime_ns != before and second.metrics["exact"] == first.metrics["exact"]
    assert "earlier" not in second.execution and second.execution["date"] >= first.execution["date"]


def test_the_tasks_of_a_record_are_those_it_was_made_with(tmp_path, monkeypatch):
    record = run("WRN 28-6", "fast", 0, "digits", **places(tmp_path))
    tasks = tasks_of(record, "digits")
    assert evaluate(trained(record, tmp_path / "checkpoints"), tasks.test, "float32")["error"] == pytest.approx(
        record.metrics["error"]
    )
    monkeypatch.setattr(Classification, "fingerprint", "other", raising=False)
    real = running.study_of(running.make_plan("WRN 28-6", "fast")).tasks
    other = lambda plan, data: real(plan, "digits")._replace(data={"source": "digits", "fingerprint": "other"})  # noqa: E731
    monkeypatch.setattr(running.study_of(running.make_plan("WRN 28-6", "fast")), "tasks", other, raising=False)
    with pytest.raises(ValueError, match="was made with .* but the data here are"):
        tasks_of(record, "digits")


def test_the_test_set_is_looked_at_once_at_the_end(tmp_path, monkeypatch):
    events = []
    inner_fit, inner_evaluate = running.fit, Classification.evaluate

    def watched_fit(*arguments, **named):
        history = inner_fit(*arguments, **named)
        events.append("trained")
        return history

    def watched_evaluate(self, predict):
        events.append(len(self.held_out[1]))
        return inner_evaluate(self, predict)

    monkeypatch.setattr(running, "fit", watched_fit)
    monkeypatch.setattr(Classification, "evaluate", watched_evaluate)
    run("WRN 28-6", "fast", 0, "digits", **places(tmp_path), rehearse=True)
    assert events == [100, 100, "trained", 200]  # 100 held out after each epoch; 200 test images


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in RECIPES if RECIPES[name].study != "imagenet"])
def test_every_recipe_runs(name, tmp_path):
    data = "digits" if RECIPES[name].study == "cifar" else None
    record = run(name, "fast", 0, data, **places(tmp_path), rehearse=True)
    assert np.isfinite([value for value in record.metrics.values() if isinstance(value, (int, float))]).all()
    assert len(record.history) == record.config["schedule"]["epochs"]


def run_softshare(*arguments: str, **named) -> subprocess.CompletedProcess:
    """Run the command in its own process, with no images but the embedded ones."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "SOFTSHARE_DATA": ""}
    command = [sys.executable, "-m", "softshare", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, **named)


@pytest.mark.long
def test_two_processes_run_a_recipe_and_one_of_them_writes(tmp_path):
    """With BatchNorm and dropout; the record of a run that was stopped notes where it ran before."""
    engine = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "softshare"]
    arguments = ["run", "SWRN 28-10-2*", "--data", "digits", "--quiet", "--device", "cpu", "--checkpoint-seconds", "0"]
    arguments += ["--rehearse", "--runs", str(tmp_path), "--checkpoints", str(tmp_path / "c")]
    done = subprocess.run(
        [*engine, *arguments], capture_output=True, text=True, timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("  record ") == 1
    (record,) = find_records(tmp_path)
    assert record.execution["processes"] == 2 and "earlier" not in record.execution
    (other,) = record.execution["others"]  # of every process that took part
    assert other["precision"] == record.execution["precision"] and other["torch"] == record.execution["torch"]
    before = record.path.stat().st_mtime_ns
    record.path.unlink()  # and once more from its last checkpoint, with one process
    assert run_softshare(*arguments).returncode == 0
    (again,) = find_records(tmp_path)
    assert again.path.stat().st_mtime_ns != before and again.metrics["error"] == record.metrics["error"]
    assert again.execution["processes"] == 2, "nothing was left to train, so the record names the processes that did"


@pytest.mark.long
def test_a_killed_run_resumes_and_ends_in_the_same_record(tmp_path):
    def arguments(folder: str) -> list[str]:
        places = ["--runs", str(tmp_path / folder), "--checkpoints", str(tmp_path / folder / "c")]
        quick = ["--quiet", "--checkpoint-seconds", "0", "--device", "cpu", "--rehearse"]
        return ["run", "SCNN", "--seed", "4", *quick, *places]

    assert run_softshare(*arguments("whole")).returncode == 0
    environment = os.environ | {"OMP_NUM_THREADS": "1", "SOFTSHARE_DATA": ""}
    process = subprocess.Popen([sys.executable, "-m", "softshare", *arguments("killed")], env=environment)
    limit = time.monotonic() + 60
    while not list((tmp_path / "killed").rglob("*.safetensors")) and time.monotonic() < limit:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list((tmp_path / "killed").glob("*.json")) and list((tmp_path / "killed").rglob("*.safetensors"))
    done = run_softshare(*arguments("killed"))
    assert done.returncode == 0, done.stderr
    (whole,), (killed,) = (find_records(tmp_path / folder) for folder in ("whole", "killed"))
    timed = "examples_per_second"
    assert {k: v for k, v in whole.metrics.items() if timed not in k} == {
        k: v for k, v in killed.metrics.items() if timed not in k
    }
    assert [row["loss"] for row in whole.history] == [row["loss"] for row in killed.history]
    assert len(killed.execution["earlier"]) == 1 and whole.identity == killed.identity
    for name, matrices in whole.similarity().matrices().items():
        assert (killed.similarity().matrices()[name] == matrices).all()
