"""Records: complete, found again by their identity, refused when changed."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest

import softshare
from softshare import models
from softshare.studies import Identity, find_records, read_record, records, tables, train, write_findings, write_record


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    places = {"runs": folder, "checkpoints": folder / "c", "progress": False, "device": "cpu"}
    return train("SWRN 28-10-2*", "fast", 0, "digits", rehearse=True, **places)


def test_a_record_says_what_was_run_and_how(trained):
    found, model = trained
    identity = found.identity
    assert found.path.name == f"swrn-28-10-2-dropout-fast-s0-{identity.hash}.json"
    assert (identity.study, identity.version, found.recipe, found.network) == (
        "cifar",
        1,
        "SWRN 28-10-2*",
        "SWRN 28-1-2*",
    )
    assert found.metrics["parameters"] == sum(p.numel() for p in model.parameters())
    assert set(found.config) == {"sizes", "augmentation", "schedule"} and found.config["schedule"]["epochs"] == 2
    assert len(found.history) == 2 and found.data["source"] == "digits"
    wanted = {"device", "hardware", "precision", "tf32", "compiled", "processes", "threads", "cores"}
    wanted |= {"torch", "numpy", "python", "softshare", "revision", "dirty", "date", "seconds"}
    assert wanted <= set(found.execution)
    assert found.execution["precision"] == "float32" and found.execution["seconds"] > 0
    assert read_record(found.path) == found
    assert find_records(found.path.parent, "SWRN 28-10-2*", "fast") == [found]
    assert find_records(found.path.parent, "WRN 28-10") == []
    assert not list(found.path.parent.glob("*.part"))


def test_similarities_come_with_the_record(trained):
    found, model = trained
    last = found.similarity().matrices()["stage2"][-1]
    np.testing.assert_allclose(last, softshare.similarity_matrices(model)["stage2"].cpu(), atol=1e-6)
    assert found.similarity().steps == [0, 1, 2]


def test_snapshots_of_another_run_are_refused(trained, tmp_path):
    for suffix in (".json", ".npz"):
        shutil.copy(trained[0].path.with_suffix(suffix), tmp_path / f"x{suffix}")
    found = read_record(tmp_path / "x.json")
    assert found.similarity().steps == [0, 1, 2]
    other = softshare.SimilarityRecorder()
    other.record(models.swrn(16, 1), 0)
    other.save(tmp_path / "x.npz")
    with pytest.raises(ValueError, match="its checksum is different"):
        found.similarity()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda fields: fields["chosen"].update(sizes={"train": 3}), "changed by hand"),
        (lambda fields: fields["config"]["schedule"].update(epochs=3), "changed by hand"),
        (lambda fields: fields.update(seed=1), "changed by hand"),
        (lambda fields: fields.update(version=2), "changed by hand"),
        (lambda fields: fields["data"].update(fingerprint="x"), "changed by hand"),
        (lambda fields: fields.pop("metrics"), "'metrics' is missing"),
        (lambda fields: fields.update(history={}), "'history' is missing or not of type list"),
        (lambda fields: fields.update(format="other"), "not a record of format"),
        (lambda fields: fields.update(profile="huge"), "unknown profile"),
        (lambda fields: fields["metrics"].update(accuracy=99.9), "changed by hand"),
        (lambda fields: fields["execution"].update(hardware="better"), "changed by hand"),
    ],
)
def test_a_changed_record_is_refused(trained, tmp_path, change, message):
    fields = json.loads(trained[0].path.read_text())
    change(fields)
    path = tmp_path / "changed.json"
    path.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=message):
        read_record(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="changed.json is not a record"):
        read_record(path)


BASE = Identity("cifar", 1, "a", "fast", 0, "WRN 28-1", {"sizes": {"x": 1, "y": 2}}, "f")


def test_the_hash_covers_everything_in_an_identity_but_not_its_order():
    assert dataclasses.replace(BASE, chosen={"sizes": {"y": 2, "x": 1}}).hash == BASE.hash
    others = {"study": "paths", "version": 2, "recipe": "b", "profile": "gpu", "seed": 1, "network": "WRN 28-2"}
    others |= {"chosen": {"sizes": {"x": 1}}, "fingerprint": "g"}
    assert set(others) == {field.name for field in dataclasses.fields(Identity)}
    hashes = {dataclasses.replace(BASE, **{name: value}).hash for name, value in others.items()}
    assert len(hashes | {BASE.hash}) == len(others) + 1


def test_what_cannot_be_recorded_is_refused_before_a_file_is_written(tmp_path):
    with pytest.raises(ValueError, match="fast, gpu, short, paper"):
        Identity("book", 1, "x", "huge", 0)
    with pytest.raises(ValueError, match="fast, gpu, short, paper"):
        find_records(tmp_path, profile="quick")
    with pytest.raises(ValueError, match="but a has the fingerprint 'f'"):
        write_record(BASE, {}, data={"source": "x", "fingerprint": "g"}, runs=tmp_path)
    with pytest.raises(TypeError, match="must be JSON"):
        records.record_path(dataclasses.replace(BASE, chosen={"x": np.float32(1)}), tmp_path)
    assert not list(tmp_path.iterdir())


def test_folders_by_profile(tmp_path, monkeypatch):
    monkeypatch.setattr(records.files, "checkout", lambda: None)
    monkeypatch.chdir(tmp_path)
    assert records.runs_folder() == tmp_path / "runs" / "fast"
    assert records.runs_folder(profile="paper") == records.runs_folder(profile="short") == tmp_path / "runs"
    assert records.runs_folder("x", "paper") == records.runs_folder("x", "fast")


def test_an_analysis_keeps_rows_of_its_own(tmp_path):
    identity = Identity("folding", 1, "fold of x", "paper", 3, chosen={"of": "abc"})
    record = write_record(identity, {"m": 1}, history=[{"way": "kept", "threshold": 0.5}], runs=tmp_path)
    assert record.history == [{"way": "kept", "threshold": 0.5}] and record.config == {"of": "abc"}
    assert record.execution["torch"] and record.seed == 3
    assert find_records(tmp_path, "x") == [] and find_records(tmp_path, "fold of x") == [record]


def test_findings_name_the_runs_that_they_are_based_on(trained, tmp_path):
    record = trained[0]
    found = write_findings("chapter", "fast", 0, {"m": 1.5}, of=[record], runs=tmp_path, draws=3)
    assert found.identity.chosen == {"of": [record.identity.hash], "draws": 3} and found.data == record.data
    alone = write_findings("chapter", "fast", 0, {"m": 1.5}, runs=tmp_path)
    assert alone.identity.hash != found.identity.hash and find_records(tmp_path, "chapter") == sorted(
        [found, alone], key=lambda each: each.path.name
    )


def test_a_record_states_how_much_of_the_data_was_used(trained):
    """There are fewer digits than the plan would use, and they are not mirrored."""
    config = trained[0].config
    assert config["augmentation"]["flip"] is False
    assert config["sizes"] == {"train": 300, "held_out": 100, "test": 200, "side": 16}


def test_one_bad_file_does_not_hide_the_others(trained, tmp_path):
    for suffix in (".json", ".npz"):
        shutil.copy(trained[0].path.with_suffix(suffix), tmp_path / f"{trained[0].path.stem}{suffix}")
    (tmp_path / "a.json").write_text("{")
    (tmp_path / "z.json").write_text('{"format": "softshare record 2"}')
    with pytest.warns(UserWarning) as caught:
        (found,) = find_records(tmp_path)
    assert found.identity == trained[0].identity
    assert [str(each.message).partition(" is")[0] for each in caught] == [
        f"left out: {tmp_path / n}.json" for n in "az"
    ]
    (tmp_path / f"{trained[0].path.stem}.npz").write_bytes(b"another")
    with pytest.warns(UserWarning, match="a.json|z.json|.npz is not the file that belongs to"):
        assert tables.structure(find_records(tmp_path), found.recipe) == {}


def test_a_record_and_its_snapshots_are_replaced_together(trained, tmp_path, monkeypatch):
    """A full disk at the second file leaves the first as it was, and both still belong together."""
    recorder = trained[0].similarity()
    before = write_record(BASE, {"m": 1}, data={"source": "x", "fingerprint": "f"}, similarity=recorder, runs=tmp_path)

    def full(self, path=None):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    other = softshare.SimilarityRecorder()
    other.record(models.swrn(16, 1), 0)
    with pytest.raises(OSError, match="No space left"):
        write_record(BASE, {"m": 2}, data={"source": "x", "fingerprint": "f"}, similarity=other, runs=tmp_path)
    found = read_record(before.path)
    assert found.metrics == {"m": 1} and found.similarity().steps == recorder.steps


def test_the_files_of_a_user_may_be_in_the_home_folder(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    record = write_record(BASE, {"m": 1}, data={"source": "x", "fingerprint": "f"}, runs="~/runs")
    assert record.path == tmp_path / "runs" / f"{BASE.stem}.json"
    assert read_record(f"~/runs/{BASE.stem}.json") == record and find_records("~/runs") == [record]
    recorder = softshare.SimilarityRecorder()
    recorder.record(models.swrn(16, 1), 0)
    recorder.save("~/x.y.npz")
    assert softshare.SimilarityRecorder.load("~/x.y.npz").steps == [0]
