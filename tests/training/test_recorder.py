"""The recorder of coefficients: snapshots, when they are due, files and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import softshare
from softshare import SimilarityRecorder, models, share_, similarity_matrices
from softshare.training import Settings, fit


def recorded(steps=(0, 3, 10)):
    model, recorder, seen = models.swrn(22, 1, 2), SimilarityRecorder(), []
    for step in steps:
        recorder.record(model, step)
        seen.append(similarity_matrices(model))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_()
    return model, recorder, seen


def test_the_recorder_keeps_snapshots():
    _, recorder, seen = recorded()
    assert recorder.steps == [0, 3, 10]
    for name, matrices in recorder.matrices().items():
        assert matrices.shape == (3, 4, 4)
        np.testing.assert_allclose(matrices, torch.stack([s[name] for s in seen]).numpy(), atol=1e-6)


def test_a_record_is_saved_and_loaded(tmp_path):
    _, recorder, _ = recorded()
    path = tmp_path / "new folder" / "record.npz"
    recorder.save(path)
    found = SimilarityRecorder.load(path)
    assert found.steps == recorder.steps and list(found.coefficients) == list(recorder.coefficients)
    for name, matrices in recorder.matrices().items():
        np.testing.assert_array_equal(found.matrices()[name], matrices)
    assert [file.name for file in path.parent.iterdir()] == ["record.npz"]
    with np.load(path, allow_pickle=False) as arrays:
        assert len(arrays.files) > 1  # nothing in it needs unpickling


def test_odd_group_names_are_kept(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    share_(model, 1, lambda *_: "a/b: ü, [c]")
    recorder = SimilarityRecorder()
    recorder.record(model, 0)
    recorder.save(tmp_path / "r.npz")
    assert list(SimilarityRecorder.load(tmp_path / "r.npz").coefficients) == ["a/b: ü, [c]"]


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "text", "other"])
def test_a_damaged_record_is_refused_by_name(tmp_path, damage):
    path = tmp_path / "record.npz"
    recorded()[1].save(path)
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 3] ^= 0xFF
    changed = {"cut": data[: len(data) // 2], "flip": data, "empty": b"", "text": b"steps"}
    if damage == "other":
        np.savez(path, something=np.arange(3))
    else:
        path.write_bytes(changed[damage])
    with pytest.raises(ValueError, match=r"record\.npz"):
        SimilarityRecorder.load(path)


def test_a_missing_record_is_not_found(tmp_path):
    with pytest.raises(FileNotFoundError):
        SimilarityRecorder.load(tmp_path / "none.npz")


def test_the_recorder_refuses_steps_that_do_not_increase_and_other_models():
    model, recorder, _ = recorded()
    with pytest.raises(ValueError, match="10"):
        recorder.record(model, 10)
    with pytest.raises(ValueError, match="stage1"):
        recorder.record(models.gridnet(layers=3, width=2, templates=1), 11)
    assert recorder.steps == [0, 3, 10]


def test_snapshots_are_dense_in_the_first_epochs_only(task, small_net):
    net = small_net()
    softshare.share_(net, 2)
    recorder = softshare.SimilarityRecorder(dense_epochs=1, per_epoch=4)
    fit(net, task, Settings(epochs=2, batch_size=10, rate=0.01), [recorder], progress=False)  # 20 steps per epoch
    assert recorder.steps == pytest.approx([0, 0.25, 0.5, 0.75, 1, 2])
    again = softshare.SimilarityRecorder()
    again.load_state_dict(recorder.state_dict())
    assert again.steps == recorder.steps and again.matrices().keys() == recorder.matrices().keys()
    for name, matrices in recorder.matrices().items():
        assert (again.matrices()[name] == matrices).all()


@pytest.mark.parametrize("steps", [1, 4, 7, 20])
@pytest.mark.parametrize("per_epoch", [1, 3, 4, 50])
def test_snapshots_are_due_evenly_and_never_at_the_end_of_an_epoch(per_epoch, steps):
    recorder = SimilarityRecorder(dense_epochs=2, per_epoch=per_epoch)
    for epoch in (1, 2):
        due = [step for step in range(1, steps + 1) if recorder.due(epoch, step, steps)]
        expected = {-(-part * steps // per_epoch) for part in range(1, per_epoch)} - {steps}
        assert due == sorted(expected)
    assert not any(recorder.due(3, step, steps) for step in range(1, steps + 1))
    with pytest.raises(ValueError, match="per_epoch.*0"):
        SimilarityRecorder(per_epoch=0)
