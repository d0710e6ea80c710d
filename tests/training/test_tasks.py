"""What is trained on: images, grids and curricula of grids; their batches, identities and scores."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from softshare import images, models, shortest_path
from softshare.models.searched import set_progress
from softshare.training import Classification, Curriculum, Settings, ShortestPaths, Task, fit


def test_splits_with_other_classes_are_refused(digits):
    other = dataclasses.replace(digits[1], classes=tuple("abcdefghij"))
    with pytest.raises(ValueError, match="different classes"):
        Classification(digits[0], other)


def test_nothing_held_out_means_no_evaluation(digits, small_net):
    history = fit(small_net(), Classification(digits[0]), Settings(epochs=1), progress=False)
    assert set(history[0]) == {"epoch", "rate", "loss", "seconds", "examples_per_second"}


def test_a_curriculum_goes_from_phase_to_phase(task):
    phases = [
        ShortestPaths(shortest_path.generate(20, size=8, box=box), shortest_path.generate(10, size=8, box=box, seed=1))
        for box in (3, 5)
    ]
    task = Curriculum(phases, epochs=2)
    assert [task.at(epoch) is phases[place] for epoch, place in ((0, 0), (1, 0), (2, 0), (3, 1), (4, 1), (9, 1))]
    settings = Settings(epochs=4, batch_size=10, optimizer="adam", rate=0.01, milestones=())
    history = fit(models.gridnet(layers=2, width=4), task, settings, progress=False, device="cpu")
    assert all({"held_out_f1", "held_out_exact", "held_out_hard_f1"} <= set(row) for row in history)
    with pytest.raises(ValueError, match="phases of one size, got .20, 7."):
        Curriculum([phases[0], ShortestPaths(shortest_path.generate(7, size=8, box=3))], epochs=2)


def test_grids_and_curricula_are_distinguished():
    def phase(seed):
        return ShortestPaths(shortest_path.generate(5, size=8, box=3, seed=seed))

    names = [phase(0).identity(), phase(1).identity()]
    names += [Curriculum([phase(0), phase(1)], epochs).identity() for epochs in (1, 2)]
    names.append(Curriculum([phase(1), phase(0)], 1).identity())
    assert len(set(names)) == 5 and phase(0).identity() == names[0]


def test_batches_of_images_do_not_depend_on_what_else_is_in_them(task):
    everything, labels = task.batch(torch.arange(task.size), 3, 2)
    some = torch.tensor([150, 3, 77])
    images_, found = task.batch(some, 3, 2)
    assert torch.equal(images_, everything[some]) and torch.equal(found, labels[some])
    draws = task.augmentation.draw(task.size, 3, 2, 8)
    assert torch.equal(images_, task.augmentation(task.images[some], draws[some]))
    for seed, epoch in ((4, 2), (3, 1)):
        assert not torch.equal(task.batch(some, seed, epoch)[0], images_)
    parts = list(task.batches([some[:1], some[1:]], 3, 2))
    assert torch.equal(torch.cat([images for images, _ in parts]), images_)


@given(st.integers(0, 2**40), st.integers(0, 500), st.integers(0, 8), st.booleans())
def test_prepared_epochs_have_the_same_images(seed, epoch, cutout, flip):
    """From seed, epoch and index, whether all images are cropped at once or a batch's alone."""
    train = images.load("digits", "train").shrunk(4).split(30, 0)[0]
    changes = images.Augmentation(*train.statistics(), flip=flip, pad=1, cutout=cutout)
    single, prepared = Classification(train, None, changes), Classification(train, None, changes)
    for each in (epoch, epoch + 1, epoch):
        prepared.prepare(seed, each)
        some = torch.randperm(30)[:7]
        for one, other in zip(single.batch(some, seed, each), prepared.batch(some, seed, each), strict=True):
            assert torch.equal(one, other)
        assert torch.equal(single.batch(some, seed, 999)[0], prepared.batch(some, seed, 999)[0]), "of another epoch"


def test_epochs_are_prepared_in_the_same_memory(task):
    """A captured step reads it; a single batch of another epoch must leave it alone."""
    places = [[tensor.data_ptr() for tensor in task.prepare(0, epoch)] for epoch in (1, 2)]
    assert places[0] == places[1]
    before = [tensor.clone() for tensor in task.prepare(0, 2)]
    task.batch(torch.arange(5), 1, 7)
    assert all(map(torch.equal, before, task.prepare(0, 2)))


def test_identities_of_images_distinguish_data_and_augmentation(task, digits):
    same = Classification(digits[0], None, task.augmentation)
    assert same.identity() == task.identity() == task.to(torch.device("cpu")).identity()
    others = [
        Classification(digits[0].split(50)[0], None, task.augmentation),
        Classification(digits[0], None, dataclasses.replace(task.augmentation, flip=True)),
        Classification(digits[0]),
    ]
    assert len({task.identity(), *(other.identity() for other in others)}) == 4


def test_grids_are_scored_as_predicted_next_to_the_rule():
    held_out = shortest_path.generate(300, size=8, box=7, obstacle_probability=0.3, seed=1)
    task = ShortestPaths(shortest_path.generate(5, size=8, box=5), held_out)
    logits = torch.randn(held_out.targets.shape)
    place = 0

    def predict(inputs):
        nonlocal place
        assert inputs.dtype == torch.float32 and torch.equal(
            inputs.bool(), held_out.inputs[place : place + len(inputs)]
        )
        place += len(inputs)
        return logits[place - len(inputs) : place]

    found = task.evaluate(predict)
    expected = shortest_path.scores_beside_the_rule(logits > 0, held_out)
    assert found == {"loss": found["loss"], **expected} and set(found) == {
        "loss",
        "f1",
        "exact",
        "hard_f1",
        "hard_exact",
    }
    loss = F.binary_cross_entropy_with_logits(logits, held_out.targets.float())
    assert found["loss"] == pytest.approx(float(loss))
    perfect = task.evaluate(lambda inputs: 40.0 * shortest_path.rectangle_rule(inputs) - 20.0)
    assert perfect["hard_exact"] == 0 < perfect["exact"] < 1


def test_a_custom_task_trains():
    """What a user writes: examples, a batch and a loss."""

    class Doubling(Task):
        size = 32

        def batch(self, indices, seed, epoch):
            x = indices.float()[:, None] / 32
            return x, 2 * x

        def loss(self, outputs, targets):
            return F.mse_loss(outputs, targets)

    history = fit(torch.nn.Linear(1, 1), Doubling(), Settings(epochs=40, batch_size=8), progress=False, device="cpu")
    assert history[-1]["loss"] < 0.01 * history[0]["loss"] and math.isfinite(history[-1]["loss"])
    assert not any(name.startswith("held_out") for name in history[-1])
    with pytest.raises(TypeError, match="abstract"):
        Task()


def test_targets_are_part_of_the_identity_of_grids():
    """Shuffled targets, as a control has them, are other data."""
    grids = shortest_path.generate(5, size=8, box=5)
    assert ShortestPaths(grids).identity() != ShortestPaths(grids._replace(targets=grids.targets.flip(0))).identity()


def test_the_draws_of_an_epoch_are_kept_for_that_augmentation_alone(task):
    some = torch.tensor([3, 77])
    task.batch(some, 3, 2)
    task.augmentation = dataclasses.replace(task.augmentation, pad=2)
    draws = task.augmentation.draw(task.size, 3, 2, 8)
    assert torch.equal(task.batch(some, 3, 2)[0], task.augmentation(task.images[some], draws[some]))


class Unnamed(Classification):
    def identity(self):
        return ""


def test_resuming_on_data_that_nothing_identifies_warns(digits, small_net, tmp_path, recwarn):
    for _ in range(2):
        settings = Settings(epochs=1, precision="float32")
        fit(small_net(), Unnamed(*digits), settings, progress=False, checkpoints=tmp_path, device="cpu")
        said = [str(each.message) for each in recwarn if "has no identity()" in str(each.message)]
    assert len(said) == 1 and "Unnamed has no identity(), so nothing shows whether its data are the same" in said[0]


@pytest.mark.parametrize("kind", [Classification, ShortestPaths, Curriculum])
def test_a_custom_task_stays_one_on_a_device(kind, digits):
    """Its overridden methods must be those that `fit` calls."""
    grids = shortest_path.generate(5, size=8, box=5)
    own = type("Own", (kind,), {"loss": lambda self, outputs, targets: outputs.sum()})
    arguments = {Classification: digits, ShortestPaths: (grids, grids), Curriculum: ([ShortestPaths(grids)], 1)}[kind]
    moved = own(*arguments).to(torch.device("cpu"))
    assert type(moved) is own and moved.size == own(*arguments).size
    assert moved.identity() == own(*arguments).identity()


def test_the_loss_of_an_auxiliary_head_counts_at_four_tenths(task):
    outputs, targets = torch.randn(2, 7, 10), torch.arange(7)
    expected = F.cross_entropy(outputs[0], targets) + 0.4 * F.cross_entropy(outputs[1], targets)
    torch.testing.assert_close(task.loss(outputs, targets), expected)
    torch.testing.assert_close(task.loss(outputs[0], targets), F.cross_entropy(outputs[0], targets))


def test_a_network_with_an_auxiliary_head_trains_and_resumes(digits, tmp_path):
    """Its progress for drop-path travels in checkpoints."""
    train, test = (images.load("digits", split).split(40)[0].shrunk(2) for split in ("train", "test"))

    def run(**how):
        torch.manual_seed(0)
        net = models.cell_network("NASNet-A", 4, repeats=1, auxiliary=True, drop_path=0.4, side=16)
        tell = [lambda model, epoch: set_progress(model, epoch / 3)]
        settings = Settings(epochs=3, batch_size=20, rate=0.01, precision="float32")
        return fit(net, Classification(train, test), settings, tell, progress=False, device="cpu", **how), net

    history, net = run(checkpoints=tmp_path)
    assert {"held_out_accuracy", "held_out_loss"} <= set(history[-1]) and float(net.cells[0].drop.progress) == 1.0
    again, resumed = run(checkpoints=tmp_path)
    assert [row["loss"] for row in again] == [row["loss"] for row in history]
    assert float(resumed.cells[0].drop.progress) == 1.0
