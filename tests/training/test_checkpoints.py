"""Checkpoints under real faults: kills, damage, full disks, foreign files; runs that are resumed, in any precision."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import softshare
from softshare import images, models
from softshare.training import Classification, ForeignCheckpoint, Settings, checkpoints, fit, read_checkpoint
from softshare.training.checkpoints import newest_checkpoint, write_checkpoint

HERE = Path(__file__).parent
RUN = {"run": "a"}


@pytest.fixture(scope="module")
def task():
    train, test = (images.load("digits", split).shrunk(4) for split in ("train", "test"))
    return Classification(
        train.split(90)[0], test.split(50)[0], images.Augmentation(*train.statistics(), flip=False, pad=1)
    )


def filled(folder: Path, steps=(10, 20, 30), identity=RUN) -> list[Path]:
    return [
        write_checkpoint(folder, step, identity, {"w": torch.full((50,), float(step))}, {"s": step}) for step in steps
    ]


class Stop(Exception):
    pass


def test_what_is_written_is_read(tmp_path):
    tensors = {
        "a": torch.randn(3, 4, 5, 6).contiguous(memory_format=torch.channels_last),
        "b": torch.tensor(7),
        "c": torch.arange(5, dtype=torch.uint8),
        "same": torch.ones(2),
    }
    tensors["again"] = tensors["same"]  # tied weights occur twice in a state dict
    path = write_checkpoint(tmp_path / "new" / "folder", 3, RUN, tensors, {"history": [{"loss": 0.1 + 0.2}]})
    identity, found, facts = read_checkpoint(path)
    assert identity == RUN and facts == {"history": [{"loss": 0.1 + 0.2}]} and set(found) == set(tensors)
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in tensors.items())
    assert newest_checkpoint(tmp_path / "new" / "folder", RUN)[0] == path
    assert newest_checkpoint(tmp_path / "nowhere", RUN) is None


@given(st.integers(0, 10**9), st.integers(0, 7))
def test_any_flipped_bit_is_noticed(tmp_path_factory, place, bit):
    folder = tmp_path_factory.mktemp("flip")
    good, bad = filled(folder, (10, 20))
    data = bytearray(bad.read_bytes())
    data[place % len(data)] ^= 1 << bit
    bad.write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        read_checkpoint(bad)
    with pytest.warns(UserWarning, match=bad.name):
        assert newest_checkpoint(folder, RUN)[0] == good


@given(st.floats(0.0, 1.0, exclude_max=True))
def test_a_file_cut_short_anywhere_is_noticed(tmp_path_factory, share):
    folder = tmp_path_factory.mktemp("cut")
    good, bad = filled(folder, (10, 20))
    bad.write_bytes(bad.read_bytes()[: int(share * bad.stat().st_size)])
    with pytest.warns(UserWarning, match=f"{bad.name} is damaged"):
        assert newest_checkpoint(folder, RUN)[0] == good


def test_foreign_files_are_refused_by_name(tmp_path):
    good = filled(tmp_path, (10,))[0]
    other = filled(tmp_path, (20,), {"run": "b", "epochs": 3})[0]
    stranger = tmp_path / "step-00000030-aaaaaaaa-bbbbbbbbbbbbbbbb.safetensors"
    stranger.write_bytes(b"not a checkpoint at all")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.warns(UserWarning) as caught:
        assert newest_checkpoint(tmp_path, RUN)[0] == good
    text = "\n".join(str(warning.message) for warning in caught)
    assert (
        other.name in text and 'run "b", here "a"' in text and "epochs 3, here null" in text and stranger.name in text
    )
    stranger.unlink()
    good.unlink()
    with pytest.warns(UserWarning), pytest.raises(ForeignCheckpoint, match="its own folder"):
        newest_checkpoint(tmp_path, RUN)
    with pytest.raises(ForeignCheckpoint, match="names are like"):
        read_checkpoint(tmp_path / "notes.txt")


def test_a_safetensors_file_from_elsewhere_is_foreign(tmp_path):
    import hashlib

    from safetensors.torch import save

    data = save({"w": torch.ones(3)})
    path = tmp_path / f"step-00000010-aaaaaaaa-{hashlib.sha256(data).hexdigest()[:16]}.safetensors"
    path.write_bytes(data)
    with pytest.raises(ForeignCheckpoint, match="not of format"):
        read_checkpoint(path)


def test_pruning_keeps_the_newest_and_what_is_not_ours(tmp_path):
    first, second, third, later = filled(tmp_path, (10, 20, 30, 40))
    other = filled(tmp_path, (5,), {"run": "b"})[0]
    left = tmp_path / f"{third.name}.123.part"
    left.write_bytes(b"half")
    checkpoints.prune_checkpoints(tmp_path, 30, RUN)
    assert sorted(tmp_path.iterdir()) == sorted([other, second, third, later])


# ---------------------------------------------------------------------------------------------------------- resuming runs


def test_a_finished_run_resumes_at_its_end(task, tmp_path):
    settings = Settings(epochs=2, batch_size=20, rate=0.05)
    nets = [models.swrn(16, 1) for _ in range(2)]
    recorders = [softshare.SimilarityRecorder() for _ in nets]
    histories = [
        fit(net, task, settings, [recorder], progress=False, checkpoints=tmp_path)
        for net, recorder in zip(nets, recorders, strict=True)
    ]
    assert histories[0] == histories[1] and recorders[1].steps == [0, 1, 2]
    found = dict(histories[1].execution)
    assert found.pop("measured by")["torch"] and found == histories[0].execution and "earlier" not in found
    for name, value in nets[0].state_dict().items():
        assert torch.equal(nets[1].state_dict()[name], value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": lambda: models.swrn(16, 2)}, "belongs to another run .*parameters"),
        ({"model": lambda: models.wrn(16, 1)}, "belongs to another run .*model"),
        ({"settings": {"rate": 0.2}}, r"rate 0\.05, here 0\.2"),
        ({"settings": {"epochs": 2}}, "epochs 1, here 2"),
        ({"settings": {"seed": 1}}, "seed 0, here 1"),
        ({"settings": {"cycle": 1}}, "cycle 0, here 1"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(task, tmp_path, change, message):
    start = {"epochs": 1, "batch_size": 30, "rate": 0.05}
    fit(models.swrn(16, 1), task, Settings(**start), progress=False, checkpoints=tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    model = change.get("model", lambda: models.swrn(16, 1))()
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=message):
        fit(model, task, Settings(**start | change.get("settings", {})), progress=False, checkpoints=tmp_path)
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}


def other_images(task):
    train = images.load("digits", "train").shrunk(4).split(90, seed=5)[0]
    return Classification(train, None, task.augmentation)


@pytest.mark.parametrize(
    "change",
    [
        lambda task: {"task": other_images(task)},
        lambda task: {"augmentation": dataclasses.replace(task.augmentation, cutout=4)},
        lambda task: {"model": models.swrn(16, 1, dropout=0.3)},
        lambda task: {"callbacks": [softshare.SimilarityRecorder()]},
    ],
    ids=["images", "augmentation", "dropout", "callbacks"],
)
def test_runs_that_differ_in_no_shape_are_distinguished(task, tmp_path, change):
    settings = Settings(epochs=1, batch_size=30, rate=0.05)
    fit(models.swrn(16, 1), task, settings, progress=False, checkpoints=tmp_path)
    changed = change(task)
    other = changed.get("task", task)
    if "augmentation" in changed:
        other = other.to(torch.device("cpu"))
        other.augmentation = changed["augmentation"]
    model = changed.get("model") or models.swrn(16, 1)
    with pytest.warns(UserWarning), pytest.raises(ForeignCheckpoint, match="belongs to another run"):
        fit(model, other, settings, changed.get("callbacks", ()), progress=False, checkpoints=tmp_path)


def test_a_temporarily_unreadable_disk_costs_nothing(task, tmp_path, monkeypatch):
    settings = Settings(epochs=2, batch_size=30, rate=0.05)
    fit(models.swrn(16, 1), task, settings, progress=False, checkpoints=tmp_path, checkpoint_seconds=0)
    before = sorted(tmp_path.iterdir())

    def failing(path):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints, "read_checkpoint", failing)
        with pytest.raises(OSError, match="Input/output error"):
            fit(models.swrn(16, 1), task, settings, progress=False, checkpoints=tmp_path)
    assert sorted(tmp_path.iterdir()) == before


def test_a_whole_checkpoint_that_lacks_something_is_refused_by_name(task, tmp_path):
    settings = Settings(epochs=1, batch_size=30, rate=0.05)
    fit(models.swrn(16, 1), task, settings, progress=False, checkpoints=tmp_path)
    (path,) = tmp_path.iterdir()
    identity, tensors, facts = read_checkpoint(path)
    path.unlink()
    for change in ({"tensors": {**tensors, "losses": torch.zeros(99)}}, {"facts": {**facts, "step": 3, "epoch": 1}}):
        folder = tmp_path / next(iter(change))
        made = write_checkpoint(folder, 3, identity, change.get("tensors", tensors), change.get("facts", facts))
        with pytest.raises(ForeignCheckpoint, match=f"{made.name} does not hold what this run needs"):
            fit(models.swrn(16, 1), task, settings, progress=False, checkpoints=folder)


def test_the_scaler_resumes_where_it_was(task, tmp_path, monkeypatch):
    """Its scale falls while gradients overflow at the start; a fresh scaler would skip those steps again."""
    scaler = torch.amp.GradScaler
    start = {"init_scale": 2.0**40}
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: scaler(device, enabled=enabled, **start))
    settings = Settings(epochs=2, batch_size=10, rate=0.01, precision="float16")
    arguments = {"progress": False, "device": "cpu", "checkpoints": tmp_path, "checkpoint_seconds": 0}
    whole, stopped = models.swrn(16, 1), models.swrn(16, 1)
    stopped.load_state_dict(whole.state_dict())
    fit(whole, task, settings, progress=False, device="cpu")

    def stop(model, epoch):
        if epoch == 1:
            raise Stop

    with pytest.raises(Stop):
        fit(stopped, task, settings, [stop], **arguments)
    scale = newest_checkpoint(tmp_path, read_checkpoint(next(tmp_path.iterdir()))[0])[2]["scaler"]["scale"]
    assert 1 < scale < 2.0**40
    fit(stopped, task, settings, [lambda model, epoch: None], **arguments)
    for name, value in whole.state_dict().items():
        assert torch.equal(stopped.state_dict()[name], value), name


def test_a_resumed_epoch_keeps_its_time_and_is_evaluated_as_planned(task, tmp_path):
    settings = Settings(epochs=3, batch_size=30, rate=0.05, evaluate_every=2)
    arguments = {"device": "cpu", "progress": False, "checkpoints": tmp_path}
    history = fit(models.swrn(16, 1), task, settings, **arguments, checkpoint_seconds=0)
    assert ["held_out_error" in row for row in history] == [False, True, True]
    newest, before = sorted(tmp_path.iterdir(), reverse=True)
    assert newest.name.startswith("step-00000009") and before.name.startswith("step-00000008")
    newest.unlink()
    identity, tensors, facts = read_checkpoint(before)
    before.unlink()
    write_checkpoint(tmp_path, 8, identity, tensors, facts | {"seconds": 1000.0})
    assert fit(models.swrn(16, 1), task, settings, **arguments)[-1]["seconds"] > 1000.0


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_run_stopped_by_an_error_resumes_to_the_same_weights(task, tmp_path, optimizer, precision, monkeypatch):
    """In the middle of an epoch, with a gradient scaler and with Adam's own tensors."""
    settings = Settings(epochs=3, batch_size=20, rate=0.01, optimizer=optimizer, precision=precision, penalty=0.01)
    net = models.swrn(16, 1, dropout=0.2)
    start = {name: value.clone() for name, value in net.state_dict().items()}
    fit(net, task, settings, progress=False, device="cpu")
    calls = 0
    batch = Classification.batch

    def failing(self, *arguments):
        nonlocal calls
        calls += 1
        if calls == 9:  # step 4 of epoch 2
            raise Stop
        return batch(self, *arguments)

    monkeypatch.setattr(Classification, "batch", failing)
    other = models.swrn(16, 1, dropout=0.2)
    other.load_state_dict(start)
    arguments = {"progress": False, "device": "cpu", "checkpoints": tmp_path, "checkpoint_seconds": 0}
    with pytest.raises(Stop):
        fit(other, task, settings, **arguments)
    assert any(path.name.startswith("step-00000008") for path in tmp_path.iterdir())
    again = models.swrn(16, 1, dropout=0.2)  # with other initial weights
    history = fit(again, task, settings, **arguments)
    assert len(history) == 3
    for name, value in net.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


# ------------------------------------------------------------------------------------------------------- other precisions


def stopped(net, task, settings, folder, after):
    """Train until an epoch is over, and stop there, with a checkpoint from before its end."""

    def stop(model, epoch):
        if epoch == after:
            raise Stop

    with pytest.raises(Stop):
        fit(net, task, settings, [stop], "cpu", progress=False, checkpoints=folder, checkpoint_seconds=0)


def test_another_precision_resumes_from_a_checkpoint_with_a_warning(task, tmp_path):
    """The schedule decides the outcome; the record notes how each process carried it out."""
    settings = [
        Settings(epochs=4, batch_size=30, rate=0.05, precision=precision)
        for precision in ("float32", "bfloat16", "bfloat16")
    ]
    net = models.swrn(16, 1)
    stopped(net, task, settings[0], tmp_path, after=1)
    with pytest.warns(
        UserWarning, match="written in float32, and training resumes in bfloat16: the outcome is that of"
    ):
        stopped(models.swrn(16, 1), task, settings[1], tmp_path, after=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it already resumed in bfloat16
        history = fit(models.swrn(16, 1), task, settings[2], (), "cpu", progress=False, checkpoints=tmp_path)
    assert [row["epoch"] for row in history] == [1, 2, 3, 4]
    found = history.execution
    assert found["precision"] == "bfloat16" and [each["precision"] for each in found["earlier"]] == [
        "float32",
        "bfloat16",
    ]
    assert all({"hardware", "revision", "date", "compiled"} <= set(each) for each in found["earlier"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a finished run is reported as it was, whatever is asked for now
        again = fit(models.swrn(16, 1), task, settings[0], (), "cpu", progress=False, checkpoints=tmp_path)
    reported = dict(again.execution)
    assert reported.pop("measured by")["precision"] == "float32"
    assert again == history and reported == found


def test_the_precision_of_a_resumed_run_changes_its_weights(task, tmp_path):
    """This is why the precision is reported."""
    ends = []
    for precision in ("float32", "bfloat16"):
        torch.manual_seed(0)
        folder = tmp_path / precision
        stopped(models.swrn(16, 1), task, Settings(epochs=2, batch_size=30, precision="float32"), folder, after=1)
        net = models.swrn(16, 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            settings = Settings(epochs=2, batch_size=30, precision=precision)
            fit(net, task, settings, (), "cpu", progress=False, checkpoints=folder)
        ends.append(torch.cat([parameter.detach().flatten() for parameter in net.parameters()]))
    assert not torch.equal(*ends)


def test_the_rest_of_the_execution_does_not_distinguish_runs(task, tmp_path):
    start = {"epochs": 2, "batch_size": 30, "rate": 0.05}
    stopped(models.swrn(16, 1), task, Settings(**start, channels_last=True, tf32=True), tmp_path, after=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        settings = Settings(**start, channels_last=False, tf32=False, compile=False)
        history = fit(models.swrn(16, 1), task, settings, (), "cpu", progress=False, checkpoints=tmp_path)
    (earlier,) = history.execution["earlier"]
    assert earlier["channels_last"] and not history.execution["channels_last"] and len(history) == 2


# ----------------------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_an_infinite_loss_names_step_and_last_good_checkpoint(task, tmp_path, precision):
    net = models.swrn(16, 1)

    def spoil(model, epoch):
        if epoch == 1:
            with torch.no_grad():
                model.stem.weight.fill_(float("nan"))

    settings = Settings(epochs=3, batch_size=20, rate=0.05, precision=precision)
    with pytest.raises(FloatingPointError, match=rf"step 1 of 5 in epoch 2 of 3 at rate 0\.01 in {precision}") as error:
        fit(net, task, settings, [spoil], "cpu", progress=False, checkpoints=tmp_path, checkpoint_seconds=0)
    newest, tensors, _ = newest_checkpoint(tmp_path, read_checkpoint(next(tmp_path.iterdir()))[0])
    assert str(newest) in str(error.value) and newest.name.startswith("step-00000004")
    assert all(value.isfinite().all() for name, value in tensors.items() if name.startswith("model."))


@pytest.fixture
def tiny_disk(tmp_path):
    """A real file system of 6 MB."""
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("making a file system needs to be root")
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_loses_no_earlier_checkpoint(task, tiny_disk):
    net = models.swrn(16, 1)  # about 1.4 MB per checkpoint
    settings = Settings(epochs=2, batch_size=20, rate=0.05)

    def fill(model, epoch):
        if epoch == 1:
            room = os.statvfs(tiny_disk)
            (tiny_disk / "others").write_bytes(bytes(room.f_bavail * room.f_bsize - 300_000))

    with pytest.warns(UserWarning, match="no checkpoint could be written .*No space left.*training continues"):
        history = fit(net, task, settings, [fill], "cpu", progress=False, checkpoints=tiny_disk, checkpoint_seconds=0)
    assert len(history) == 2 and not list(tiny_disk.glob("*.part"))
    kept = [path for path in tiny_disk.iterdir() if path.suffix == ".safetensors"]
    assert kept and [read_checkpoint(path)[2]["epoch"] for path in kept] == [1] * len(kept)
    (tiny_disk / "others").unlink()
    again = models.swrn(16, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(again, task, settings, [lambda model, epoch: None], "cpu", progress=False, checkpoints=tiny_disk)
    for name, value in net.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


@pytest.mark.long
@pytest.mark.parametrize(("mode", "seed"), [("random", 1), ("random", 2), ("random", 3), ("writes", 4)])
def test_killed_at_any_moment_a_run_ends_with_the_same_bits(tmp_path, mode, seed):
    run = [sys.executable, str(HERE / "interrupted.py"), str(tmp_path / "checkpoints"), mode, str(seed)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["found"] == found["expected"]
    assert found["kills"] >= 10 and len(found["reached"]) >= 5 and len(found["left"]) == 2
