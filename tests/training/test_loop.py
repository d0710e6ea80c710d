"""The training loop against plain PyTorch, what it returns, and its errors."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F

import softshare
from softshare import images, models, shortest_path
from softshare.training import (
    Classification,
    ForeignCheckpoint,
    History,
    Settings,
    ShortestPaths,
    evaluate,
    fit,
    with_reestimated_statistics,
)


def test_fit_is_plain_sgd_with_the_papers_recipe(task, small_net):
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


def test_channels_last_changes_nothing_but_rounding(task, small_net):
    nets = [small_net(), small_net()]
    for net, channels_last in zip(nets, (False, True), strict=True):
        fit(net, task, Settings(epochs=1, precision="float32", channels_last=channels_last), progress=False)
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_bfloat16_trains(task):
    net = models.swrn(16, 1)
    history = fit(net, task, Settings(epochs=2, batch_size=32, rate=0.05, precision="bfloat16"), progress=False)
    assert history[-1]["loss"] < history[0]["loss"] and next(net.parameters()).dtype is torch.float32


def test_callbacks_see_the_start_and_every_epoch(task, small_net):
    net = small_net()
    softshare.share_(net, 2)
    seen, recorder = [], softshare.SimilarityRecorder()
    fit(net, task, Settings(epochs=2), [lambda model, epoch: seen.append(epoch), recorder], progress=False)
    assert seen == [0, 1, 2] == recorder.steps


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_an_infinite_loss_stops_with_epoch_rate_and_precision(task, small_net, precision):
    net = small_net()
    with torch.no_grad():
        net[0].weight.fill_(float("inf"))
    said = rf"step 1 of 2 in epoch 1 of 2 at rate 0\.1 in {precision}; no checkpoint was kept"
    with pytest.raises(FloatingPointError, match=said):
        fit(net, task, Settings(epochs=2, precision=precision), progress=False, device="cpu")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_cuda_learns_what_the_cpu_learns(task):
    losses = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        net = models.swrn(16, 1)
        settings = Settings(epochs=2, batch_size=32, rate=0.05, precision="float32")
        losses.append(fit(net, task, settings, device=device, progress=False)[-1]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=0.15)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_the_history_says_how_the_run_was_carried_out(task, small_net, precision):
    settings = Settings(epochs=2, precision=precision, rate=0.01)
    history = fit(small_net(), task, settings, progress=False, device="cpu")
    assert isinstance(history, History) and isinstance(history, list) and [row["epoch"] for row in history] == [1, 2]
    found = history.execution
    assert found["precision"] == precision and found["tf32"] is False and found["compiled"] is False
    assert (
        found["channels_last"] is True and found["processes"] == 1 and "earlier" not in found and "others" not in found
    )
    assert (
        found["device"] == "cpu" and found["threads"] == torch.get_num_threads() and found["torch"] == torch.__version__
    )
    assert json.loads(json.dumps(found)) == found


def test_auto_is_recorded_as_the_precision_used(task, small_net):
    """If "auto" chooses the precision that suits the machine, the record names that precision."""
    expected = softshare.training.pick_precision("auto", torch.device("cpu"))
    history = fit(small_net(), task, Settings(epochs=1), progress=False, device="cpu")
    assert history.execution["precision"] == str(expected).removeprefix("torch.")


def test_a_cycle_of_the_rates_is_followed(task, small_net):
    settings = Settings(epochs=4, batch_size=100, rate=0.01, milestones=(0.5,), factor=0.1, cycle=2)
    history = fit(small_net(), task, settings, progress=False)
    assert [row["rate"] for row in history] == pytest.approx([0.01, 0.001, 0.01, 0.001])


def test_the_model_is_left_in_evaluation_mode(task):
    net = models.wrn(10, 1).train()
    fit(net, task, Settings(epochs=1, rate=0.01), progress=False)
    assert not any(module.training for module in net.modules())


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"model": "SWRN 16-1"}, TypeError, "a torch.nn.Module, .* and Settings, got str, Classification, Settings"),
        ({"settings": {"epochs": 1}}, TypeError, "got Sequential, Classification, dict"),
        ({"checkpoint_seconds": -1}, ValueError, "checkpoint_seconds must be at least 0, got -1"),
        ({"checkpoint_seconds": float("nan")}, ValueError, "checkpoint_seconds"),
    ],
)
def test_bad_arguments_are_refused(task, small_net, change, error, says):
    with pytest.raises(error, match=says):
        fit(**{"model": small_net(), "task": task, "settings": Settings(epochs=1)} | change)


# ----------------------------------------------------------------------------------------- models and settings from outside


class Wrapped(torch.nn.Module):
    """A network whose outputs and state a test chooses."""

    def __init__(self, outputs=lambda found: found, extra=None):
        super().__init__()
        self.net, self.outputs, self.extra = models.wrn(10, 1), outputs, extra

    def forward(self, x):
        return self.outputs(self.net(x))

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


ONE = Settings(epochs=1, batch_size=50, precision="float32")


@pytest.mark.parametrize("outputs", [lambda found: {"logits": found}, lambda found: (found, found), lambda found: None])
def test_outputs_that_are_not_tensors_are_named(task, outputs):
    model = Wrapped(outputs)
    with pytest.raises(TypeError, match="outputs must be one tensor, .* got (dict|tuple|NoneType); wrap the model"):
        fit(model, task, ONE, progress=False)
    with pytest.raises(TypeError, match="outputs must be one tensor"):
        evaluate(model, task)


def test_a_model_in_double_precision_trains_in_it(task):
    double, single = models.swrn(16, 1, 2).double(), models.swrn(16, 1, 2)
    single.load_state_dict(double.state_dict())
    settings = Settings(epochs=1, batch_size=50, precision="bfloat16", channels_last=False)
    history = fit(double, task, settings, progress=False, device="cpu")
    assert history.execution["precision"] == "float64"
    assert all(parameter.dtype is torch.float64 for parameter in double.parameters())
    other = fit(single, task, ONE, progress=False, device="cpu")
    assert history[0]["loss"] == pytest.approx(other[0]["loss"], rel=1e-4)
    assert evaluate(double, task)["loss"] == pytest.approx(evaluate(single, task, "float32")["loss"], rel=1e-2)
    fresh = with_reestimated_statistics(double, task.images[:50].float())
    assert next(fresh.buffers()).dtype is torch.float64
    grids = ShortestPaths(*(shortest_path.generate(20, size=8, box=5, seed=seed) for seed in (0, 1)))
    fit(models.gridnet(2, 4).double(), grids, ONE, progress=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model.half(), "parameters are float16; .* call model.float()"),
        (lambda model: model.to(torch.bfloat16), "parameters are bfloat16"),
        (lambda model: model.classifier.double(), "several dtypes, float32, float64"),
    ],
)
def test_parameters_in_half_or_mixed_precision_are_refused(task, change, message):
    model = models.wrn(10, 1)
    change(model)
    with pytest.raises(ValueError, match=message):
        fit(model, task, ONE, progress=False)


def test_extra_state_travels_in_checkpoints(task, tmp_path):
    """A count that the model keeps, as some normalisations do."""
    model = Wrapped(extra={"seen": [3, 4.5, None], "name": "x"})
    fit(model, task, ONE, progress=False, checkpoints=tmp_path, device="cpu")
    again = Wrapped()
    again.extra = "nothing yet"
    fit(again, task, ONE, progress=False, checkpoints=tmp_path, device="cpu")
    assert again.extra == {"seen": [3, 4.5, None], "name": "x"}
    for mine, other in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("extra", [object(), {1: "a"}, (1, 2), torch.zeros(2).numpy(), {"x": float("nan")}])
def test_extra_state_that_would_come_back_changed_is_refused_before_training(task, tmp_path, extra):
    model = Wrapped(extra=extra)
    called = []
    with pytest.raises(TypeError, match="'_extra_state' is .*have its get_extra_state return a tensor or JSON"):
        fit(model, task, ONE, [lambda *_: called.append(1)], progress=False, checkpoints=tmp_path)
    assert not called
    fit(model, task, ONE, progress=False)


def test_training_works_inside_inference_mode_and_without_gradients(task, small_net):
    first, second = small_net(), small_net()
    fit(first, task, ONE, progress=False, device="cpu")
    with torch.inference_mode(), torch.no_grad():
        fit(second, task, ONE, progress=False, device="cpu")
    for mine, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(mine, other)
    with torch.inference_mode():
        model = small_net()
    with pytest.raises(ValueError, match="made under torch.inference_mode"):
        fit(model, task, ONE, progress=False)


@pytest.fixture
def odd_defaults():
    """A program with unusual PyTorch defaults: float64, and a device on which nothing has a value."""
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)


def test_defaults_of_pytorch_change_nothing(task, small_net, odd_defaults, tmp_path):
    with torch.device("cpu"):
        torch.set_default_dtype(torch.float32)
        first, second = small_net(), small_net()
        expected = fit(first, task, ONE, [softshare.SimilarityRecorder()], progress=False, device="cpu")
        similar = softshare.similarity.initial_similarity(4, 2, draws=5)
        torch.set_default_dtype(torch.float64)
    images_ = images.load("digits", "train").split(100)[0].shrunk(4)
    assert images_.statistics()[0][0] > 0
    found = fit(second, task, ONE, [softshare.SimilarityRecorder()], progress=False, checkpoints=tmp_path, device="cpu")
    assert [row["loss"] for row in found] == [row["loss"] for row in expected]
    for mine, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(mine, other) and mine.dtype is torch.float32
    assert torch.equal(softshare.similarity.initial_similarity(4, 2, draws=5), similar)
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(3)
    softshare.share_(first, 2)
    torch.set_default_device(None)
    torch.manual_seed(3)
    softshare.share_(second, 2)
    for mine, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("given", ["digits", "a loader", None])
def test_anything_but_a_task_is_named(digits, small_net, given):
    other = {"digits": digits[0], "a loader": torch.utils.data.DataLoader(digits[0].labels), None: None}[given]
    with pytest.raises(
        TypeError, match="a task such as Classification.* got Sequential, (ImageSet|DataLoader|NoneType)"
    ):
        fit(small_net(), other, ONE, progress=False)


@pytest.mark.parametrize("callback", [softshare.SimilarityRecorder, "recorder", 3])
def test_callbacks_that_cannot_be_called_are_named(task, small_net, callback):
    with pytest.raises(
        TypeError, match=r"callbacks must be functions or instances such as SimilarityRecorder\(\), got"
    ):
        fit(small_net(), task, ONE, [callback], progress=False)


def test_an_unwritable_folder_for_checkpoints_is_an_error_before_training(task, small_net, tmp_path):
    """After a crash, hours later, it would be too late to find that there are no checkpoints."""
    (tmp_path / "a file").write_text("x")
    called = []
    with pytest.raises(OSError, match="nothing can be written to the folder .*a file"):
        fit(small_net(), task, ONE, [lambda *_: called.append(1)], progress=False, checkpoints=tmp_path / "a file")
    assert not called


class Applying(torch.nn.Module):
    """A function as a module, whose text holds the function's address."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)

    def extra_repr(self):
        return str(self.function)


def test_a_run_is_the_same_run_though_its_model_has_other_addresses(task, tmp_path):
    def make():
        torch.manual_seed(0)

        def flat(x):
            return x.flatten(1)

        return torch.nn.Sequential(Applying(flat), torch.nn.Linear(192, 10))

    first, second = make(), make()
    assert str(first) != str(second) and " at 0x" in str(first)
    fit(first, task, ONE, progress=False, checkpoints=tmp_path, device="cpu")
    with torch.no_grad():
        second[1].weight.zero_()
    fit(second, task, ONE, progress=False, checkpoints=tmp_path, device="cpu")
    assert torch.equal(first[1].weight, second[1].weight), "found finished"


@pytest.mark.parametrize("change", ["frozen", "another loss"])
def test_a_run_with_other_frozen_parameters_or_another_loss_is_another_run(task, digits, small_net, tmp_path, change):
    fit(small_net(), task, ONE, progress=False, checkpoints=tmp_path, device="cpu")
    model, other = small_net(), task
    if change == "frozen":
        model[0].weight.requires_grad_(False)
    else:
        other = type("Own", (Classification,), {"loss": lambda self, outputs, targets: outputs.square().mean()})(
            *digits
        )
        other.augmentation = task.augmentation
    with pytest.warns(UserWarning), pytest.raises(ForeignCheckpoint, match="frozen|data"):
        fit(model, other, ONE, progress=False, checkpoints=tmp_path, device="cpu")


def test_extra_state_that_goes_wrong_in_training_costs_checkpoints_and_nothing_else(task, tmp_path):
    model = Wrapped(extra={"mean": 0.0})

    def spoil(model, epoch):
        model.extra = {"mean": float("nan")} if epoch else {"mean": 0.0}

    with pytest.warns(UserWarning, match="no checkpoint could be written .*_extra_state.*training continues"):
        history = fit(model, task, ONE, [spoil], progress=False, checkpoints=tmp_path, device="cpu")
    assert len(history) == 1


def test_statistics_can_be_reestimated_under_inference_mode(task):
    model = models.wrn(10, 1)
    expected = with_reestimated_statistics(model, task.images[:50].float())
    with torch.inference_mode():
        found = with_reestimated_statistics(model, task.images[:50].float())
    for mine, other in zip(found.buffers(), expected.buffers(), strict=True):
        assert torch.equal(mine, other)
