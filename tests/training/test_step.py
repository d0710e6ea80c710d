"""One step of training, and how it is compiled: tried once, only for full batches, by all processes or by none."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import softshare
from softshare import models
from softshare.training import Settings, fit, make_optimizer, step, train_step
from softshare.training.step import Stepper

NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)


@pytest.mark.parametrize(("name", "kind"), [("sgd", torch.optim.SGD), ("adam", torch.optim.Adam)])
def test_the_optimizer_decays_everything_but_coefficients(name, kind):
    net = models.swrn(16, 1)
    optimizer = make_optimizer(net, Settings(epochs=1, optimizer=name, rate=0.3, weight_decay=0.01))
    assert type(optimizer) is kind and all(group["lr"] == 0.3 for group in optimizer.param_groups)
    if name == "sgd":
        assert all(group["momentum"] == 0.9 and group["nesterov"] for group in optimizer.param_groups)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    coefficients = {id(bank.coefficients) for bank in softshare.banks(net).values()}
    assert decay == {id(p): 0.0 if id(p) in coefficients else 0.01 for p in net.parameters()}


@pytest.mark.parametrize(("penalty", "weight"), [(0.0, 1.0), (0.3, 1.0), (0.3, 0.5), (0.0, 0.0)])
def test_a_step_is_that_of_the_weighted_loss_with_the_penalty(task, small_net, penalty, weight):
    ours = small_net()
    softshare.share_(ours, 2)
    theirs = copy.deepcopy(ours)
    inputs, targets = task.batch(torch.arange(20), 0, 1)
    optimizers = [torch.optim.SGD(net.parameters(), 0.1) for net in (ours, theirs)]
    found = train_step(ours, task, inputs, targets, optimizers[0], NO_SCALER, torch.float32, penalty, weight)
    loss = weight * F.cross_entropy(theirs(inputs), targets) + penalty * softshare.recurrence_penalty(theirs)
    loss.backward()
    optimizers[1].step()
    assert not found.requires_grad and found.item() == pytest.approx(loss.item(), rel=1e-5)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other)


def test_a_step_whose_gradients_overflow_is_skipped(task, small_net):
    net = small_net()
    before = copy.deepcopy(net.state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    inputs, targets = task.batch(torch.arange(20), 0, 1)
    train_step(net, task, inputs, targets, torch.optim.SGD(net.parameters(), 0.1), scaler, torch.float16)
    assert scaler.get_scale() == 2.0**59
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


# ---------------------------------------------------------------------------------------------------------------- compiling


class Compiled(nn.Module):
    """A stand-in for a compiled model: it computes the same and records the shapes that it is called with."""

    def __init__(self, model):
        super().__init__()
        self.model, self.shapes = model, []

    def forward(self, inputs):
        self.shapes.append(tuple(inputs.shape))
        return self.model(inputs)


@pytest.fixture
def compiler(monkeypatch):
    """Stands in for torch.compile; yields what was compiled."""
    made = []

    def compile(model, dynamic):
        assert dynamic is False
        made.append(Compiled(model))
        return made[-1]

    monkeypatch.setattr(torch, "compile", compile)
    return made


def trained(task, **settings):
    """The end of a short training with dropout and BatchNorm: weights and statistics, and the history."""
    torch.manual_seed(0)
    net = models.swrn(16, 1, dropout=0.3)
    history = fit(net, task, Settings(epochs=2, batch_size=64, rate=0.05, **settings), progress=False, device="cpu")
    return net.state_dict(), history


def assert_same(a, b):
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_full_batches_run_compiled_and_no_others(task, compiler):
    """Nothing is left to be compiled after the trial: neither an epoch's last batch nor the evaluation."""
    plain, history = trained(task, compile=False)
    assert history.execution["compiled"] is False and not compiler
    found, history = trained(task, compile=True)
    assert history.execution["compiled"] is True and len(compiler) == 1
    assert compiler[0].shapes == [(64, 3, 8, 8)] * (1 + 2 * 3)  # the trial; three of an epoch's 64, 64, 64 and 8 images
    assert_same(found, plain)  # so the trial left statistics, gradients and random numbers as they were


@pytest.mark.parametrize("settings", [{"precision": "float32"}, {"precision": "bfloat16"}, {"precision": "float16"}])
def test_the_trial_is_made_in_the_precision_of_training(task, compiler, settings):
    seen = []
    watched = Compiled.forward

    def forward(self, inputs):
        seen.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
        return watched(self, inputs)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Compiled, "forward", forward)
        trained(task, compile=True, **settings)
    dtype = getattr(torch, settings["precision"])
    assert len(seen) == 7 and len(set(seen)) == 1
    assert seen[0] == (True, dtype) if dtype is not torch.float32 else not seen[0][0]


@pytest.mark.parametrize("place", ["compile", "forward", "backward"])
def test_a_failed_trial_costs_only_a_warning(task, compiler, monkeypatch, place):
    plain, _ = trained(task, compile=False)

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError("no such unit\nand so on")

    def fails(self, inputs):
        outputs = self.model(inputs)  # statistics and random numbers have moved on
        if place == "forward":
            raise RuntimeError("no such unit\nand so on")
        return Fails.apply(outputs)

    def refuses(model, dynamic):
        raise RuntimeError("no such unit\nand so on")

    monkeypatch.setattr(Compiled, "forward", fails)
    if place == "compile":
        monkeypatch.setattr(torch, "compile", refuses)
    with pytest.warns(UserWarning) as caught:
        found, history = trained(task, compile=True)
    said = [str(warning.message) for warning in caught if "torch.compile" in str(warning.message)]
    assert said == ["torch.compile failed (RuntimeError: no such unit); training continues without it, more slowly"]
    assert history.execution["compiled"] == "failed, so it ran without"
    assert_same(found, plain)


def test_an_error_of_cuda_itself_is_raised(task, compiler, monkeypatch):
    """Nothing runs after such an error, so training cannot continue without the compiler."""

    def fails(self, inputs):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(Compiled, "forward", fails)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        trained(task, compile=True)


def test_a_compiler_that_failed_in_one_process_is_used_in_none(task, compiler, monkeypatch):
    plain, _ = trained(task, compile=False)
    asked = []
    monkeypatch.setattr(step.distributed, "all_of", lambda own: asked.append(own))
    with pytest.warns(UserWarning, match="torch.compile failed in another process, so no process uses it"):
        found, history = trained(task, compile=True)
    assert asked == [True] and compiler[0].shapes == [(64, 3, 8, 8)]  # only the trial
    assert history.execution["compiled"] == "failed, so it ran without"
    assert_same(found, plain)


@pytest.mark.parametrize(
    "done",
    [2, 3],
)
def test_a_resumed_run_is_compiled_for_full_batches(task, compiler, monkeypatch, tmp_path, done):
    """Also if it resumes with an epoch's last, smaller batch; and the earlier part is recorded as compiled."""
    taken, calls = step.train_step, []

    def stopping(*arguments):
        calls.append(1)
        if len(calls) == done + 1:
            raise KeyboardInterrupt
        return taken(*arguments)

    monkeypatch.setattr(step, "train_step", stopping)
    settings = Settings(epochs=2, batch_size=64, rate=0.05, compile=True)
    arguments = {"device": "cpu", "progress": False, "checkpoints": tmp_path, "checkpoint_seconds": 0}
    with pytest.raises(KeyboardInterrupt):
        fit(models.swrn(16, 1), task, settings, **arguments)
    history = fit(models.swrn(16, 1), task, settings, **arguments)
    first, second = compiler
    assert {*first.shapes, *second.shapes} == {(64, 3, 8, 8)}
    assert (len(first.shapes), len(second.shapes)) == (1 + done, 1 + 6 - done)
    (earlier,) = history.execution["earlier"]
    assert history.execution["compiled"] is True and earlier["compiled"] is True


def test_a_short_run_or_one_on_a_cpu_is_not_compiled_unasked(task, compiler):
    _, history = trained(task)
    assert history.execution["compiled"] is False and not compiler


def test_a_partly_compiled_model_holds_its_parameters_once():
    net = models.wrn(10, 1)
    both = step.FullBatchesCompiled(net, Compiled(net), torch.Size((4, 3, 8, 8)))
    assert [id(p) for p in both.parameters()] == [id(p) for p in net.parameters()]
    x = torch.randn(4, 3, 8, 8)
    assert both(x).shape == (4, 10) and both(x[:3]).shape == (3, 10) and both.runs[0].shapes == [(4, 3, 8, 8)]


@pytest.mark.long
def test_nothing_is_compiled_after_the_trial(task, monkeypatch):
    """With PyTorch's own tracer, and without the compiler behind it: the number of graphs stays that of the trial."""
    import torch._dynamo.utils

    torch._dynamo.reset()
    compile, graphs = torch.compile, torch._dynamo.utils.counters["stats"]
    monkeypatch.setattr(torch, "compile", lambda model, **how: compile(model, backend="aot_eager", **how))
    try_compiled, traced = step.try_compiled, []

    def tried(*arguments):
        found = try_compiled(*arguments)
        traced.append(graphs["unique_graphs"])
        return found

    monkeypatch.setattr(step, "try_compiled", tried)
    before = graphs["unique_graphs"]
    found, history = trained(task, compile=True, precision="float32")
    assert history.execution["compiled"] is True and traced == [graphs["unique_graphs"]] and traced[0] > before
    plain, _ = trained(task, compile=False, precision="float32")
    for name, value in plain.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.long
def test_without_a_working_compiler_training_continues_with_a_warning(task, digits):
    """A real failure: the C++ compiler that torch.compile calls on a CPU does not exist."""
    code = """
import warnings, torch, softshare
from softshare import images, models
from softshare.training import Classification, Settings, fit
torch.set_num_threads(1)
train = images.load("digits", "train").shrunk(4).split(60)[0]
ends = []
for compile in (False, True):
    torch.manual_seed(0)
    net = models.swrn(16, 1, dropout=0.2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        settings = Settings(epochs=1, batch_size=20, compile=compile)
        history = fit(net, Classification(train), settings, progress=False, device="cpu")
    ends.append(net.state_dict())
    assert history.execution["compiled"] == ("failed, so it ran without" if compile else False)
said = [str(w.message) for w in caught if "torch.compile failed" in str(w.message)]
assert len(said) == 1 and "training continues without it" in said[0], said
assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
"""
    broken = {"CXX": "/nonexistent/c++", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1", "TORCHINDUCTOR_CPP_WRAPPER": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | broken, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("clip", [0.0, 1e-3, 1e3])
def test_a_long_gradient_is_scaled_to_its_largest_norm(task, small_net, clip):
    """Against plain PyTorch."""
    ours, theirs = small_net(), small_net()
    inputs, targets = task.batch(torch.arange(20), 0, 1)
    settings = Settings(epochs=1, rate=0.1, precision="float32", clip=clip, nesterov=False, channels_last=False)
    Stepper(ours, task, settings, torch.device("cpu"), torch.float32)(inputs, targets)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    task.loss(theirs(inputs), targets).backward()
    norm = torch.cat([parameter.grad.flatten() for parameter in theirs.parameters()]).norm()
    if clip and norm > clip:
        for parameter in theirs.parameters():
            parameter.grad *= clip / norm
    optimizer.step()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)
