"""The training loop against plain PyTorch, and its errors."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import softshare
from softshare import images, models, progress, shortest_path, tasks
from softshare.tasks import Classification, ShortestPaths
from softshare.training import Settings, evaluate, fit


@pytest.fixture(scope="module")
def digits():
    train, test = (images.load("digits", split).shrunk(4) for split in ("train", "test"))
    return train.split(200)[0], test.split(100)[0]


@pytest.fixture
def task(digits):
    return Classification(*digits, images.Augmentation(*digits[0].statistics(), flip=False, pad=1))


def small_net() -> nn.Module:
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(8, 8, 3, padding=1) for _ in range(4)]
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *convolutions, nn.Flatten(), nn.Linear(8 * 64, 10))


def test_fit_is_plain_sgd_with_the_papers_recipe(task):
    """An independent loop with torch.optim and hand-made groups reaches the same weights."""
    shared = small_net()
    softshare.share_(shared, 2)
    ours, theirs = copy.deepcopy(shared), copy.deepcopy(shared)
    settings = Settings(epochs=3, batch_size=64, rate=0.05, milestones=(0.5,), precision="float32", channels_last=False)
    history = fit(ours, task, settings, progress=False, device="cpu")

    coefficients = [p for name, p in theirs.named_parameters() if name.endswith("coefficients")]
    others = [p for name, p in theirs.named_parameters() if not name.endswith("coefficients")]
    assert len(coefficients) == 1
    groups = [{"params": others, "weight_decay": 5e-4}, {"params": coefficients, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True)
    order, losses = torch.Generator().manual_seed(0), []
    for epoch in (1, 2, 3):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 if epoch <= 2 else 0.01  # round(0.5 * 3) = 2
        total = 0.0
        for batch in torch.randperm(task.size, generator=order).split(64):
            inputs, targets = task.batch(batch, 0, epoch)
            loss = F.cross_entropy(theirs(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += float(loss.detach()) * len(batch)
        losses.append(total / task.size)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other)
    assert [row["loss"] for row in history] == pytest.approx(losses, rel=1e-4)
    assert [row["rate"] for row in history] == [0.05, 0.05, pytest.approx(0.01)]


def test_both_tasks_learn(task):
    wide = models.swrn(16, 1)
    torch.manual_seed(0)
    history = fit(wide, task, Settings(epochs=12, batch_size=20, rate=0.05), progress=False)
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    assert history[-1]["held_out_accuracy"] > 50  # of ten classes
    grids = shortest_path.generate(300, size=8, box=5), shortest_path.generate(100, size=8, box=5, seed=1)
    torch.manual_seed(0)
    net = models.gridnet(layers=6, width=16, templates=3)
    settings = Settings(epochs=6, batch_size=32, optimizer="adam", rate=0.01, milestones=(0.5,), weight_decay=0.0)
    history = fit(net, ShortestPaths(*grids), settings, progress=False)
    assert history[-1]["loss"] < 0.5 * history[0]["loss"] and history[-1]["held_out_f1"] > 0.8


def test_the_seed_decides_the_outcome(task):
    def trained(seed):
        net = models.swrn(16, 1, dropout=0.3)
        net.load_state_dict(start)
        fit(net, task, Settings(epochs=1, seed=seed), progress=False)
        return torch.cat([p.detach().flatten() for p in net.parameters()])

    start = models.swrn(16, 1).state_dict()
    assert torch.equal(trained(3), trained(3)) and not torch.equal(trained(3), trained(4))


def test_the_penalty_raises_similarity(task):
    means = {}
    for penalty in (0.0, 0.02):
        torch.manual_seed(0)
        net = models.swrn(22, 1)
        fit(net, task, Settings(epochs=10, batch_size=20, penalty=penalty), progress=False)
        matrices = softshare.similarity_matrices(net)
        means[penalty] = sum(softshare.similarity.off_diagonal(matrices).values()) / 3
    assert means[0.02] > means[0.0] + 0.2


def test_metrics_against_a_plain_loop(task, digits):
    net = small_net().eval()
    found = evaluate(net, task)
    mean, deviation = (torch.tensor(values).view(1, 3, 1, 1) for values in digits[0].statistics())
    with torch.no_grad():
        logits = net((digits[1].images.float() - mean) / deviation)
    right = sum(int(row.argmax()) == int(label) for row, label in zip(logits, digits[1].labels, strict=True))
    assert found["accuracy"] == pytest.approx(100 * right / 100) and found["error"] == pytest.approx(100 - right)
    assert found["loss"] == pytest.approx(float(F.cross_entropy(logits, digits[1].labels)), rel=1e-5)


def test_evaluation_leaves_mode_and_statistics_alone(task):
    net = models.wrn(10, 1).train()
    before = copy.deepcopy(net.state_dict())
    evaluate(net, task)
    assert net.training and all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_callbacks_see_the_start_and_every_epoch(task):
    net = small_net()
    softshare.share_(net, 2)
    seen, recorder = [], softshare.SimilarityRecorder()
    fit(net, task, Settings(epochs=2), [lambda model, epoch: seen.append(epoch), recorder], progress=False)
    assert seen == [0, 1, 2] == recorder.steps


def test_channels_last_changes_nothing_but_rounding(task):
    nets = [small_net(), small_net()]
    for net, channels_last in zip(nets, (False, True), strict=True):
        fit(net, task, Settings(epochs=1, precision="float32", channels_last=channels_last), progress=False)
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_bfloat16_trains(task):
    net = models.swrn(16, 1)
    history = fit(net, task, Settings(epochs=2, batch_size=32, rate=0.05, precision="bfloat16"), progress=False)
    assert history[-1]["loss"] < history[0]["loss"] and next(net.parameters()).dtype is torch.float32


def test_display_shows_epoch_loss_speed_and_time_left(task, capsys, monkeypatch):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: False, raising=False)
    fit(small_net(), task, Settings(epochs=1), title="a run")
    assert "a run epoch 1/1: loss " in (text := capsys.readouterr().out) and "/s" in text and "s left" in text


def test_an_infinite_loss_stops_with_epoch_and_rate(task):
    net = small_net()
    with torch.no_grad():
        net[0].weight.fill_(float("inf"))
    with pytest.raises(FloatingPointError, match=r"epoch 1 of 2 at rate 0\.1"):
        fit(net, task, Settings(epochs=2), progress=False)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"epochs": 0}, ValueError),
        ({"epochs": 1.5}, TypeError),
        ({"batch_size": -1}, ValueError),
        ({"precision": "int8"}, ValueError),
        ({"optimizer": "lion"}, ValueError),
        ({"rate": 0.0}, ValueError),
        ({"penalty": -1.0}, ValueError),
        ({"weight_decay": -1.0}, ValueError),
    ],
)
def test_bad_settings_are_refused(change, error):
    with pytest.raises(error, match=next(iter(change)).split("_")[0]):
        dataclasses.replace(Settings(epochs=1), **change)


def test_splits_with_other_classes_are_refused(digits):
    other = dataclasses.replace(digits[1], classes=tuple("abcdefghij"))
    with pytest.raises(ValueError, match="different classes"):
        Classification(digits[0], other)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_named(task):
    with pytest.raises(RuntimeError, match="no CUDA GPU"):
        fit(small_net(), task, Settings(epochs=1), device="cuda", progress=False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_cuda_learns_what_the_cpu_learns(task):
    losses = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        net = models.swrn(16, 1)
        settings = Settings(epochs=2, batch_size=32, rate=0.05, precision="float32")
        losses.append(fit(net, task, settings, device=device, progress=False)[-1]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=0.15)


def test_a_curriculum_goes_from_phase_to_phase():
    phases = [
        ShortestPaths(shortest_path.generate(20, size=8, box=box), shortest_path.generate(10, size=8, box=box, seed=1))
        for box in (3, 5)
    ]
    task = tasks.Curriculum(phases, epochs=2)
    assert [task.at(epoch) is phases[place] for epoch, place in ((0, 0), (1, 0), (2, 0), (3, 1), (4, 1), (9, 1))]
    settings = Settings(epochs=4, batch_size=10, optimizer="adam", rate=0.01, milestones=())
    history = fit(models.gridnet(layers=2, width=4), task, settings, progress=False, device="cpu")
    assert all({"held_out_f1", "held_out_exact", "held_out_hard_f1"} <= set(row) for row in history)
    with pytest.raises(ValueError, match="phases of one size, got .20, 7."):
        tasks.Curriculum([phases[0], ShortestPaths(shortest_path.generate(7, size=8, box=3))], epochs=2)


def test_nothing_held_out_means_no_evaluation(digits):
    history = fit(small_net(), Classification(digits[0]), Settings(epochs=1), progress=False)
    assert set(history[0]) == {"epoch", "rate", "loss", "seconds", "examples_per_second"}


def test_snapshots_are_dense_in_the_first_epochs_only(task):
    net = small_net()
    softshare.share_(net, 2)
    recorder = softshare.SimilarityRecorder(dense_epochs=1, per_epoch=4)
    fit(net, task, Settings(epochs=2, batch_size=10, rate=0.01), [recorder], progress=False)  # 20 steps an epoch
    assert recorder.steps == pytest.approx([0, 0.25, 0.5, 0.75, 1, 2])
    again = softshare.SimilarityRecorder()
    again.load_state_dict(recorder.state_dict())
    assert again.steps == recorder.steps and again.matrices().keys() == recorder.matrices().keys()
    for name, matrices in recorder.matrices().items():
        assert (again.matrices()[name] == matrices).all()


def test_a_long_epoch_says_how_far_it_is(task, capsys, monkeypatch):
    clock = iter(range(0, 100_000, 40))
    monkeypatch.setattr(progress.time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: False, raising=False)
    fit(small_net(), task, Settings(epochs=1, batch_size=50), title="slow")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("slow epoch 1/1 (25% of it): loss ") and lines[0].endswith(" left") and ":" in lines[0]
