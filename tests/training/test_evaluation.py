"""Scores against a plain loop, and re-estimated BatchNorm statistics."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import softshare
from softshare import banks, models
from softshare.bank import TemplateBank
from softshare.training import evaluate, fit, pick_precision, with_reestimated_statistics
from softshare.training.devices import precision_name
from softshare.training.settings import Settings

CPU = torch.device("cpu")


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_metrics_against_a_plain_loop(task, digits, small_net, precision):
    net = small_net().eval()
    found = evaluate(net, task, precision)
    mean, deviation = (torch.tensor(values).view(1, 3, 1, 1) for values in digits[0].statistics())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        logits = net((digits[1].images.float() - mean) / deviation).float()
    right = sum(int(row.argmax()) == int(label) for row, label in zip(logits, digits[1].labels, strict=True))
    assert found["accuracy"] == pytest.approx(100 * right / 100) and found["error"] == pytest.approx(100 - right)
    assert found["loss"] == pytest.approx(float(F.cross_entropy(logits, digits[1].labels)), rel=1e-5)


def test_a_network_is_scored_in_the_precision_in_which_it_was_trained(task, small_net):
    net = small_net()
    history = fit(net, task, Settings(epochs=1, rate=0.01), progress=False, device="cpu")
    found = evaluate(net, task)
    assert found == evaluate(net, task, precision_name(pick_precision("auto", CPU)))
    assert {f"held_out_{name}": value for name, value in found.items()}.items() <= history[-1].items()
    assert evaluate(net, task, "float32")["loss"] != evaluate(net, task, "bfloat16")["loss"]


def test_evaluation_leaves_mode_and_statistics_alone(task):
    net = models.wrn(10, 1).train()
    net.stage2.eval()  # frozen, as in fine-tuning
    modes = {name: module.training for name, module in net.named_modules()}
    before = copy.deepcopy(net.state_dict())
    evaluate(net, task)
    assert {name: module.training for name, module in net.named_modules()} == modes
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_modes_are_restored_after_an_error(task):
    net = models.wrn(10, 1, num_classes=3).train()  # labels go to 9
    with pytest.raises(IndexError):
        evaluate(net, task)
    assert net.training


# ---------------------------------------------------------------------------------------------------- BatchNorm statistics


def test_statistics_are_the_mean_over_batches():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    inputs = torch.randn(70, 3, 6, 6) * 2 + 1
    found = with_reestimated_statistics(net, inputs, "float32", batch=30)
    with torch.no_grad():
        parts = [net[0](some) for some in inputs.split(30)]
    means = torch.stack([part.mean((0, 2, 3)) for part in parts]).mean(0)
    variances = torch.stack([part.var((0, 2, 3)) for part in parts]).mean(0)
    torch.testing.assert_close(found[1].running_mean, means)
    torch.testing.assert_close(found[1].running_var, variances)
    assert found[1].momentum == net[1].momentum == 0.1


def test_earlier_statistics_do_not_count_and_the_original_stays(task):
    net = models.swrn(16, 1).train()
    before = copy.deepcopy(net.state_dict())
    inputs = torch.randn(20, 3, 8, 8)
    first = with_reestimated_statistics(net, inputs, "float32")
    assert net.training and not any(module.training for module in first.modules())
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, before[name]), "no weight changes"
    with torch.no_grad():
        for buffer in net.buffers():
            buffer.fill_(3)
    again = with_reestimated_statistics(net, inputs, "float32")
    for name, buffer in first.named_buffers():
        assert torch.equal(buffer, again.get_buffer(name)), name
    assert softshare.banks(first)["stage1"] is not softshare.banks(net)["stage1"]


def test_reestimated_statistics_restore_the_scores_of_a_fold_below_one(task):
    """What re-estimation is for: after a fold the running statistics describe weights that are gone."""
    net = models.swrn(22, 1, 2)
    fit(net, task, Settings(epochs=10, batch_size=20, rate=0.05), progress=False)
    folded = softshare.fold(net, softshare.tie(net, {"stage2": [(1, 3), (2, 4)], "stage3": [(1, 3), (2, 4)]}))
    inputs = task.augmentation.normalise(task.images)
    mended = with_reestimated_statistics(folded, inputs)
    losses = [evaluate(model, task)["loss"] for model in (net, folded, mended)]
    assert losses[0] < losses[2] < losses[1]


def test_statistics_are_estimated_in_the_precision_of_training():
    net, inputs = models.wrn(10, 1), torch.randn(20, 3, 8, 8)
    seen = set()
    net.stage1[0].conv1.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    for precision in ("float32", "bfloat16", "auto"):
        with_reestimated_statistics(net, inputs, precision)
        assert seen == {pick_precision(precision, CPU)}
        seen.clear()


def test_a_network_without_statistics_is_copied(small_net):
    net = small_net()
    found = with_reestimated_statistics(net, torch.randn(4, 3, 8, 8))
    assert found is not net and all(
        torch.equal(a, b) for a, b in zip(found.parameters(), net.parameters(), strict=True)
    )


def test_training_evaluation_and_statistics_mix_once(task, monkeypatch):
    """Each pass asks each bank for one product of all its coefficients, and for nothing else."""
    asked = []
    original = TemplateBank.product
    monkeypatch.setattr(TemplateBank, "product", lambda *args: asked.append(args[1].dim()) or original(*args))
    net = models.swrn(16, 1)
    fit(net, task, Settings(epochs=1, batch_size=task.size, precision="float32"), progress=False)
    assert asked == [2] * 2 * len(banks(net)), "one training step and one evaluation"
    asked.clear()
    evaluate(net, task, "float32")
    assert asked == [2] * len(banks(net))
    asked.clear()
    inputs, _ = task.batch(torch.arange(20), 0, 1)
    with_reestimated_statistics(net, inputs, "float32", batch=10)
    assert asked == [2] * len(banks(net))
