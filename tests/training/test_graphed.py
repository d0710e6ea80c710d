"""Captured steps: as eager ones, checked before they are trusted, given up with a reason; a strict stand-in on the CPU."""

from __future__ import annotations

import contextlib
import gc
import random
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from softshare import images, models
from softshare.models.searched import set_progress
from softshare.shortest_path import generate
from softshare.training import (
    Classification,
    Curriculum,
    Settings,
    ShortestPaths,
    evaluate,
    fit,
    graphed,
    step,
    with_reestimated_statistics,
)
from softshare.training.graphed import State

NO_GPU = not torch.cuda.is_available()
SHARED = {"capture": True, "batch_size": 64, "rate": 0.05, "epochs": 3, "precision": "float32", "tf32": False}
"""Four steps an epoch on the task of these tests: 64, 64, 64 and 8 images."""


@pytest.fixture(
    params=[
        "cpu",
        pytest.param("cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(NO_GPU, reason="needs a CUDA GPU")]),
    ]
)
def device(request):
    """A device that can capture: a GPU, or the CPU with the stand-in."""
    if request.param == "cpu":
        request.getfixturevalue("tapes")
    return request.param


def trained(task, model=lambda: models.swrn(16, 1), callbacks=(), device="cpu", **changes):
    """The end of a short training: weights and statistics, losses by epoch, and how it was carried out."""
    torch.manual_seed(0)
    net = model()
    history = fit(net, task, Settings(**SHARED | changes), list(callbacks), progress=False, device=device)
    return net.cpu().state_dict(), [row["loss"] for row in history], history.execution


def assert_captured_is_eager(task, tolerance=1e-3, **how):
    found, losses, facts = trained(task, **how)
    assert facts["captured"] is True
    expected, eager, facts = trained(task, **how | {"capture": False})
    assert facts["captured"] is False
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(eager), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


CASES = {
    "plain": {"model": lambda: models.wrn(16, 1)},
    "shared, with penalty": {"penalty": 0.01},
    "dropout": {"model": lambda: models.swrn(16, 1, dropout=0.3)},
    "a rate in steps": {"milestones": (0.3, 0.6), "factor": 0.1},
    "a cosine rate": {"annealing": "cosine"},
    "plain momentum, clipped": {"nesterov": False, "clip": 0.5},
    "Adam": {"optimizer": "adam", "rate": 1e-3},
    "contiguous": {"channels_last": False},
    "one batch": {"batch_size": 1000},
}


@pytest.mark.parametrize("case", CASES)
def test_replayed_steps_are_eager_steps(task, device, case):
    assert_captured_is_eager(task, device=device, **CASES[case])


def test_half_precision(task, device):
    assert_captured_is_eager(task, device=device, precision="bfloat16", tolerance=0.05)


def test_cutout_and_flips_change_from_epoch_to_epoch(digits, device):
    changes = images.Augmentation(*digits[0].statistics(), flip=True, pad=2, cutout=4)
    assert_captured_is_eager(Classification(*digits, changes), device=device)


def test_dropout_draws_new_numbers_at_each_replay(digits, device):
    """With hardly any rate and one batch, losses differ by what was dropped alone; the same seed drops the same."""
    one = Classification(digits[0].split(64)[0], None, images.Augmentation(*digits[0].statistics(), flip=False, pad=0))
    found = [
        trained(one, lambda: models.wrn(16, 1, dropout=0.5), device=device, rate=1e-30, weight_decay=0.0, epochs=4)[1]
        for _ in range(2)
    ]
    assert len(set(found[0])) == 4 and found[0] == found[1]


def test_networks_with_several_heads_and_drop_path(digits, tapes):
    """The progress that a callback sets is a buffer, so one capture serves all epochs."""
    train, test = (images.load("digits", split) for split in ("train", "test"))
    found, losses, facts = [], [], []
    for capture in (True, False):
        torch.manual_seed(0)
        net = models.cell_network("DARTS", 4, repeats=1, auxiliary=True, drop_path=0.4)
        settings = Settings(2, 16, rate=0.02, precision="float32", capture=capture)
        progress = [lambda model, epoch: set_progress(model, epoch / 2)]
        task = Classification(train.split(32)[0], test.split(8)[0])
        history = fit(net, task, settings, progress, progress=False, device="cpu")
        found.append(net.state_dict())
        losses.append(torch.tensor([row["loss"] for row in history]))
        facts.append(history.execution["captured"])
    assert facts == [True, False] and len(tapes) == 1
    torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(*found, rtol=1e-2, atol=1e-2)


def test_curricula_are_captured_phase_by_phase(device):
    phases = [ShortestPaths(generate(24, 8, box, seed=box), generate(8, 8, box, seed=99)) for box in (3, 5)]
    how = {"model": lambda: models.gridnet(3, 4, templates=2), "batch_size": 8, "epochs": 4, "rate": 0.02}
    assert_captured_is_eager(Curriculum(phases, 2), device=device, **how, optimizer="adam")


def test_python_runs_a_step_only_for_the_check_the_capture_and_smaller_batches(task, tapes, monkeypatch):
    taken, sizes = step.train_step, []
    monkeypatch.setattr(step, "train_step", lambda *args: sizes.append(len(args[2])) or taken(*args))
    trained(task)
    assert sizes == [64] * (2 * graphed.CHECKED + 1) + [8] * 3


def test_a_run_resumes_to_the_same_end(task, device, tmp_path, monkeypatch):
    """Stopped in the middle of the second epoch; dropout goes on with the numbers that it would have drawn."""

    def model():
        torch.manual_seed(0)
        return models.swrn(16, 1, dropout=0.3)

    whole = model()
    settings = Settings(**SHARED)
    fit(whole, task, settings, progress=False, device=device)
    runs = graphed.CapturedStep.__call__

    def stopping(self, indices, place):
        if len(list(tmp_path.glob("step-0000000[5-9]*"))):
            raise KeyboardInterrupt
        runs(self, indices, place)

    arguments = {"device": device, "progress": False, "checkpoints": tmp_path, "checkpoint_seconds": 0}
    with monkeypatch.context() as patched:
        patched.setattr(graphed.CapturedStep, "__call__", stopping)
        with pytest.raises(KeyboardInterrupt):
            fit(model(), task, settings, **arguments)
    resumed = model()
    history = fit(resumed, task, settings, **arguments)
    assert history.execution["captured"] is True and history.execution["earlier"][0]["captured"] is True
    exact = {"rtol": 0, "atol": 0} if device == "cpu" else {"rtol": 1e-3, "atol": 1e-3}
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), **exact)


def test_what_callbacks_change_is_captured_again(task, device):
    """A number of a module, such as the probability of dropout, and whether a parameter learns."""

    def change(model, epoch):
        model.probability.p = 0.1 * epoch
        model[1].weight.requires_grad_(epoch != 1)

    class Net(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 10))
            self.probability = nn.Dropout(0.0)

        def forward(self, x):
            return self[3](self.probability(self[2](self[1](self[0](x)).relu())))

    assert_captured_is_eager(task, model=Net, callbacks=[change], device=device)


# ------------------------------------------------------------------------------------------------ trust, and its limits


@pytest.mark.parametrize("missed", ["conv1.weight", "losses", "place of the next loss"])
def test_a_capture_that_misses_something_is_refused(task, monkeypatch, missed):
    made = graphed.CapturedStep.__init__
    kept = {}

    def noting(self, *args):
        made(self, *args)
        kept["tensor"] = self.state[next(name for name in self.state if name.endswith(missed))]

    def capture(body, fixed):
        def replay():
            before = kept["tensor"].detach().clone()
            body()
            with torch.no_grad():
                kept["tensor"].copy_(before)

        return replay

    monkeypatch.setattr(graphed.CapturedStep, "__init__", noting)
    monkeypatch.setattr(graphed.Steps, "capture", staticmethod(capture))
    with pytest.warns(UserWarning, match="not captured .*do not match eager ones: .* is off by") as caught:
        found, losses, facts = trained(task)
    assert len([each for each in caught if "not captured" in str(each.message)]) == 1
    assert facts["captured"] == "failed, so it ran without"
    expected, eager, _ = trained(task, capture=False)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert losses == pytest.approx(eager, rel=1e-4)


class Reading(Classification):
    """Its loss needs something that a CUDA graph cannot give."""

    how = staticmethod(lambda loss: loss)

    def prepare(self, seed, epoch):
        return super().prepare(seed, epoch)

    def loss(self, outputs, targets):
        return self.how(super().loss(outputs, targets))


OUTSIDE = torch.tensor(2.0)
FORBIDDEN = {
    "item": lambda loss: loss if loss.item() < 1e9 else 0 * loss,
    "a condition": lambda loss: loss if loss < 1e9 else 0 * loss,
    "a copy": lambda loss: loss + 0 * float(loss.detach().cpu()),
    "a list": lambda loss: loss + 0 * loss.detach().view(1).tolist()[0],
    "nonzero": lambda loss: loss + 0 * loss.detach().view(1).nonzero().sum(),
    "memory from outside": lambda loss: loss * OUTSIDE,
    "a constant": lambda loss: loss * torch.tensor([2.0], device=loss.device).sum(),
}


@pytest.mark.parametrize("name", FORBIDDEN)
def test_steps_that_cannot_be_captured_run_without(digits, device, name, monkeypatch):
    if device == "cuda" and name == "memory from outside":
        pytest.skip("a graph may read memory of the GPU that happens to stay")
    monkeypatch.setattr(Reading, "how", staticmethod(FORBIDDEN[name]))
    task = Reading(*digits, images.Augmentation(*digits[0].statistics(), flip=False, pad=1))
    with pytest.warns(
        UserWarning, match=r"not captured in a CUDA graph \(HostRead" if device == "cpu" else "not captured"
    ):
        _, losses, facts = trained(task, device=device)
    assert facts["captured"] == "failed, so it ran without"
    _, eager, _ = trained(task, device=device, capture=False)
    assert losses == pytest.approx(eager, rel=1e-4)


def test_a_failed_capture_leaves_everything_as_it_was(digits, device, monkeypatch):
    """Random numbers too: the run equals one whose fused steps were never captured, to the bit."""
    augmentation = images.Augmentation(*digits[0].statistics(), flip=False, pad=1)

    def model():
        return models.swrn(16, 1, dropout=0.3)

    monkeypatch.setattr(Reading, "how", staticmethod(FORBIDDEN["item"]))
    with pytest.warns(UserWarning, match="not captured"):
        found, losses, _ = trained(Reading(*digits, augmentation), model=model, device=device)
    monkeypatch.setattr(Reading, "how", staticmethod(lambda loss: loss))
    monkeypatch.setattr(graphed.Steps, "_for", lambda *args: None)
    expected, eager, _ = trained(Reading(*digits, augmentation), model=model, device=device)
    exact = {"rtol": 0, "atol": 0} if device == "cpu" else {"rtol": 1e-3, "atol": 1e-3}
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(eager), **exact)
    torch.testing.assert_close(found, expected, **exact)


def test_tasks_that_do_not_tell_what_they_read_are_not_captured(digits, tapes):
    class Noisy(Classification):
        def batch(self, indices, seed, epoch):
            inputs, targets = super().batch(indices, seed, epoch)
            return inputs + torch.randn(1).item(), targets

    class Weighted(Classification):
        def loss(self, outputs, targets):
            return 2 * super().loss(outputs, targets)

    for kind in (Noisy, Weighted):
        with pytest.warns(UserWarning, match=f"{kind.__name__} does not say which tensors"):
            _, _, facts = trained(kind(*digits))
        assert facts["captured"] == "failed, so it ran without" and not tapes
    assert graphed.tells_what_it_reads(Reading(*digits)) and graphed.tells_what_it_reads(Classification(*digits))


def test_capture_is_refused_with_a_reason_and_not_tried_unasked(task, monkeypatch, tapes):
    with pytest.warns(UserWarning, match="gradient scaler of float16"):
        trained(task, precision="float16")
    with monkeypatch.context() as patched:
        patched.setattr(graphed.Steps, "capture", staticmethod(graphed.cuda_graph))
        with pytest.warns(UserWarning, match="they do not run on CUDA"):
            trained(task)
    for capture in (None, False):
        _, _, facts = trained(task, capture=capture)
        assert facts["captured"] is False and not tapes, "12 steps are not worth it"
    monkeypatch.setattr(graphed, "WORTH_CAPTURING", 12)
    _, _, facts = trained(task, capture=None)
    assert facts["captured"] is True and len(tapes) == 1


class Counting(nn.Sequential):
    """A network that does something else in each call."""

    calls = 0
    how = ""

    def forward(self, inputs):
        if self.how == "counter":
            self.calls += 1
        drawn = {
            "counter": self.calls,
            "python": random.random(),
            "numpy": np.random.rand(),
            "torch": torch.rand((), device="cpu"),
        }
        return super().forward(inputs) * float(drawn[self.how])


@pytest.mark.parametrize("how", ["counter", "python", "numpy", "torch"])
def test_what_python_draws_or_counts_is_no_capture(digits, device, monkeypatch, how):
    """Two eager runs draw the same, so a replay that repeats one draw forever is seen to differ."""
    monkeypatch.setattr(Counting, "how", how)
    reason = (
        "changes the model's state in Python|do not match" if how == "counter" else "do not match|HostRead|synchron"
    )
    task = Classification(*digits, images.Augmentation(*digits[0].statistics(), flip=False, pad=1))
    with pytest.warns(UserWarning, match=reason):
        _, _, facts = trained(task, lambda: Counting(models.wrn(16, 1)), device=device)
    assert facts["captured"] == "failed, so it ran without"


def test_a_parameter_with_other_memory_is_captured_again(task, device):
    def replace(model, epoch):
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()

    assert_captured_is_eager(task, device=device, callbacks=[replace])


def test_a_finished_run_gives_its_memory_back(task, device, monkeypatch):
    made, capture = [], graphed.Steps.capture

    def counted(body, fixed):
        replay = capture(body, fixed)
        made.append(weakref.ref(getattr(replay, "__self__", replay)))
        return replay

    monkeypatch.setattr(graphed.Steps, "capture", staticmethod(counted))
    torch.manual_seed(0)
    net = models.swrn(16, 1)
    callbacks = [lambda model, epoch: setattr(model, "told", epoch)]  # captured again in each epoch
    fit(net, task, Settings(**SHARED), callbacks, progress=False, device=device)
    gc.collect()
    assert len(made) == 3 and all(parameter.grad is None for parameter in net.parameters())
    if device == "cuda":  # the stand-in's tapes are kept by their fixture
        assert not any(each() for each in made)


def test_a_run_that_resumes_near_its_end_is_not_captured(task, tapes, monkeypatch, tmp_path):
    monkeypatch.setattr(graphed, "WORTH_CAPTURING", 9)

    class Stop(Exception):
        pass

    def stop(model, epoch):
        if epoch == 2:
            raise Stop

    settings = Settings(**SHARED | {"capture": None})
    for callback in (stop, lambda model, epoch: None):
        torch.manual_seed(0)
        with contextlib.suppress(Stop):
            history = fit(
                models.swrn(16, 1), task, settings, [callback], "cpu", progress=False, checkpoints=tmp_path,
                checkpoint_seconds=0,
            )  # fmt: skip
    assert len(tapes) == 1 and history.execution["captured"] is False


def test_reestimating_reads_nothing_from_the_device(task):
    """PyTorch's own running mean makes the host read a counter in each layer for each batch."""
    net, (inputs, _) = models.swrn(16, 1), task.batch(torch.arange(100), 0, 1)
    reads = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "_local_scalar_dense" in function._schema.name:
                reads.append(function)
            return function(*args, **(kwargs or {}))

    with Count():
        found = with_reestimated_statistics(net, inputs, "float32", batch=30)
    assert not reads
    torch.optim.swa_utils.update_bn(inputs.split(30), net)
    torch.testing.assert_close(dict(found.named_buffers()), dict(net.named_buffers()))
    assert [norm.momentum for norm in found.modules() if isinstance(norm, nn.BatchNorm2d)][0] == 0.1


# ------------------------------------------------------------------------------------------------------------ compiling


@pytest.fixture
def compiler(monkeypatch):
    """Stands in for torch.compile and counts calls; what it makes computes the same."""
    made = []

    class Compiled(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, inputs):
            return self.model(inputs)

    monkeypatch.setattr(torch, "compile", lambda model, dynamic: made.append(Compiled(model)) or made[-1])
    return made


@pytest.mark.parametrize("faster", [True, False])
def test_a_captured_step_is_compiled_if_that_pays(task, tapes, compiler, monkeypatch, faster):
    monkeypatch.setattr(graphed, "COMPILING_SECONDS", 0.0)
    checked = graphed.CapturedStep._checked_run

    def timed(self, *args):
        found = checked(self, *args)
        self.seconds = 1.0 + len(compiler) * (-0.5 if faster else 0.5)
        return found

    monkeypatch.setattr(graphed.CapturedStep, "_checked_run", timed)
    found, _, facts = trained(task)
    assert facts["captured"] is True and len(compiler) == 1
    assert facts["compiled"] == (True if faster else "no gain, so it ran without")
    assert len(tapes) == (2 if faster else 3)
    torch.testing.assert_close(found, trained(task, capture=False)[0], rtol=1e-3, atol=1e-3)


def test_a_captured_step_is_not_compiled_if_that_takes_longer_than_it_saves(task, tapes, compiler):
    _, _, facts = trained(task)
    assert facts["compiled"] is False and not compiler


def test_a_compiler_that_fails_leaves_a_captured_step(task, tapes, monkeypatch):
    monkeypatch.setattr(graphed, "COMPILING_SECONDS", 0.0)
    monkeypatch.setattr(torch, "compile", lambda model, dynamic: 1 / 0)
    with pytest.warns(UserWarning, match="torch.compile failed"):
        _, _, facts = trained(task)
    assert facts["captured"] is True and facts["compiled"] == "failed, so it ran without"


@pytest.mark.cuda
@pytest.mark.skipif(NO_GPU, reason="needs a CUDA GPU")
class TestOnAGPU:
    """What only a GPU shows; the tests above run there, too."""

    def test_float16_with_its_scaler(self, task):
        _, losses, facts = trained(task, device="cuda", precision="float16", capture=None, epochs=12)
        assert facts["captured"] is False and losses[-1] < 0.7 * losses[0]

    def test_inductor_inside_a_captured_step(self, task):
        found, losses, facts = trained(task, device="cuda", compile=True)
        assert facts["captured"] is True and facts["compiled"] is True
        expected, eager, _ = trained(task, device="cuda", capture=False)
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(eager), rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)

    @pytest.mark.parametrize("precision", ["float32", "bfloat16"])
    def test_evaluation_is_that_of_the_cpu(self, task, precision):
        torch.manual_seed(0)
        net = models.swrn(16, 1)
        scores = [evaluate(net.to(where), task, precision) for where in ("cpu", "cuda")]
        assert scores[0]["loss"] == pytest.approx(scores[1]["loss"], rel=0.02)
        inputs, _ = task.batch(torch.arange(100), 0, 1)
        fresh = [with_reestimated_statistics(net.to(where), inputs, precision) for where in ("cpu", "cuda")]
        for one, other in zip(*(each.cpu().buffers() for each in fresh), strict=True):
            torch.testing.assert_close(one, other, rtol=0.02, atol=0.02)

    def test_training_goes_on_after_a_failed_capture_with_dropout(self, digits, monkeypatch):
        """A broken-off capture must not leave the random generator as if it were being captured."""
        monkeypatch.setattr(Reading, "how", staticmethod(FORBIDDEN["item"]))
        with pytest.warns(UserWarning, match="not captured"):
            _, losses, _ = trained(Reading(*digits), lambda: models.swrn(16, 1, dropout=0.3), device="cuda", epochs=12)
        assert losses[-1] < 0.7 * losses[0] and torch.rand(3, device="cuda").unique().numel() == 3


# ------------------------------------------------------------------------------------------------------------ comparing


def test_the_difference_of_runs():
    tensor = torch.zeros(4)
    state = State({"w": tensor}, torch.device("cpu"))
    one, two = [torch.ones(4)], [torch.ones(4) + 0.01]
    assert not state.difference(one, two, [torch.ones(4) + 0.029])
    assert "w is off by" in state.difference(one, two, [torch.ones(4) + 0.04])
    assert not state.difference(one, one, [torch.ones(4) * 1.00005]), "rounding, where eager runs are equal to the bit"
    assert state.difference(one, one, [torch.ones(4) * 1.001])
    assert state.difference(one, one, [torch.full((4,), float("nan"))])
    assert state.difference([torch.zeros(4)], [torch.zeros(4)], [torch.full((4,), 1e-30)]), "what stays must stay"


def test_two_runs_that_agree_by_chance_in_a_single_number_refuse_nothing():
    state = State({"w": torch.zeros(1000), "bias": torch.zeros(1)}, torch.device("cpu"))
    one, two = [torch.ones(1000), torch.ones(1)], [torch.ones(1000) * 1.01, torch.ones(1)]
    assert not state.difference(one, two, [torch.ones(1000) * 0.99, torch.ones(1) * 1.02])
    assert "bias" in state.difference(one, two, [torch.ones(1000), torch.ones(1) * 1.04])


def test_a_state_is_put_back_in_place():
    tensor = torch.randn(3)
    before, where = tensor.clone(), tensor.data_ptr()
    state = State({"w": tensor}, torch.device("cpu"))
    drawn = torch.rand(2)
    tensor.add_(1)
    state.restore()
    assert torch.equal(tensor, before) and tensor.data_ptr() == where and torch.equal(torch.rand(2), drawn)


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_filled_optimizers_step_as_fresh_ones(name):
    nets = [nn.Linear(3, 2) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    optimizers = [step.make_optimizer(net, Settings(epochs=1, optimizer=name)) for net in nets]
    found = graphed.filled(optimizers[0])
    assert len(found) == (2 if name == "sgd" else 6)
    for net, optimizer in zip(nets, optimizers, strict=True):
        for _ in range(3):
            optimizer.zero_grad()
            net(torch.ones(4, 3)).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(nets[0].state_dict(), nets[1].state_dict(), rtol=0, atol=0)
    assert all(value.abs().sum() > 0 for value in found.values()), "the tensors that it uses"
