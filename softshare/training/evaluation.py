"""What a network scores on held-out examples, and BatchNorm statistics that fit its current weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ..sharing import mixed_once
from .devices import autocast, device_of, outputs_of, parameter_dtype, pick_precision
from .tasks import Task


def evaluate(model: nn.Module, task: Task, precision: str = "auto") -> dict[str, float]:
    """Metrics of the task's held-out examples, in eval mode, on the model's device; every module's mode is restored.

    `precision` is as in `Settings`, with the same default, so that a network is scored as it was trained.
    """
    device = device_of(model)
    dtype = pick_precision(precision, device, parameter_dtype(model))
    modes = {module: module.training for module in model.modules()}
    model.eval()

    def predict(inputs: Tensor) -> Tensor:
        return outputs_of(model, inputs, dtype)

    try:
        with torch.inference_mode(), mixed_once(model):
            return task.to(device).evaluate(predict)
    finally:
        for module, mode in modes.items():
            module.training = mode


def with_reestimated_statistics(
    model: nn.Module, inputs: Tensor, precision: str = "auto", batch: int = 250
) -> nn.Module:
    """A copy in eval mode whose BatchNorm statistics are re-estimated on inputs (N, ...), on the model's device.

    Running statistics lag behind the weights, so at a high rate scores jump from epoch to epoch; after a fold they describe
    weights that no longer exist. No weight changes. The statistics are the mean over batches of `batch` examples;
    dropout, if any, draws the same numbers in each call, and the default random generators are left as they were.
    """
    with torch.inference_mode(False):
        model = copy.deepcopy(model)
        device = device_of(model)
        dtype = pick_precision(precision, device, parameter_dtype(model))
        inputs = inputs.double() if dtype is torch.float64 else inputs
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
            momenta = [norm.momentum for norm in norms]
            for norm in norms:
                norm.reset_running_stats()
            model.train()
            with autocast(device, dtype), torch.no_grad(), mixed_once(model):
                for number, some in enumerate(inputs.split(batch) if norms else (), start=1):
                    for norm in norms:  # a running mean; PyTorch's own would make the host read a counter in each layer
                        norm.momentum = 1.0 / number
                    model(some.to(device))
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
    return model.eval()
