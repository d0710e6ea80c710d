"""Has processes started by torchrun agree on several things, and writes what each of them found.

Run as ``torchrun ... agreeing.py OUT``; each process writes OUT/<rank>.json.
"""

from __future__ import annotations

import hashlib
import json
import sys
import warnings
from pathlib import Path

import torch
from torch import nn

from softshare import images, models
from softshare.training import Classification, Settings, distributed, fit


def digest(tensors) -> str:
    return hashlib.sha256(b"".join(tensor.detach().contiguous().numpy().tobytes() for tensor in tensors)).hexdigest()


def functions() -> dict:
    """What the small functions return when the processes pass different values."""
    rank = distributed.rank()
    found = {
        "all_of": [distributed.all_of(own) for own in (True, False, rank == 0, rank == 1)],
        "gathered": distributed.gathered({"rank": rank, "text": "x" * (1 + 1000 * rank)}),
        "average": distributed.average_(torch.tensor([1.0, float(rank)])).tolist(),
    }
    distributed.agree("the same", 3, 4)
    try:
        distributed.agree("the number", rank)
    except distributed.Disagreement as error:
        found["disagreement"] = str(error)
    return found


def statistics(task: Classification) -> dict:
    """Weights and BatchNorm statistics after two epochs, and what the statistics were before each step."""
    torch.manual_seed(distributed.rank())  # all processes use the weights of process 0
    net, before = models.swrn(16, 1), []
    net.norm.register_forward_pre_hook(
        lambda norm, inputs: before.append(digest([norm.running_mean])) if norm.training else None
    )
    settings = Settings(epochs=2, batch_size=26, rate=0.05, precision="float32", compile=False)
    history = fit(net, task, settings, device="cpu", progress=False)
    return {
        "weights": digest(net.parameters()),
        "buffers": digest(net.buffers()),
        "before": before,
        "losses": [row["loss"] for row in history],
        "accuracy": history[-1]["held_out_accuracy"],
        "execution": history.execution,
    }


def compiled(task: Classification, failing: int) -> dict:
    """Train with a stand-in compiler that fails in one process, or in none (-1): what ran, its warnings and the outcome."""
    runs = []

    class Compiled(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            if distributed.rank() == failing:
                raise RuntimeError("no compiler here")
            runs.append(len(inputs))
            return self.model(inputs)

    compile, torch.compile = torch.compile, lambda model, dynamic: Compiled(model)
    torch.manual_seed(0)
    net = models.swrn(16, 1)
    settings = Settings(epochs=1, batch_size=26, rate=0.05, precision="float32", compile=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        history = fit(net, task, settings, device="cpu", progress=False)
    torch.compile = compile
    said = [str(warning.message) for warning in caught if "torch.compile failed" in str(warning.message)]
    return {"runs": runs, "said": said, "outcome": history.execution["compiled"], "weights": digest(net.parameters())}


def main() -> None:
    torch.set_num_threads(1)
    train, test = (images.load("digits", split).shrunk(4) for split in ("train", "test"))
    task = Classification(train.split(131)[0], test.split(50)[0])  # five batches of 26, and a last one of one image
    with distributed.process_group(torch.device("cpu")):
        found = functions()
        found["statistics"] = statistics(task)
        found["compiled"] = {str(failing): compiled(task, failing) for failing in (-1, 1)}
        (Path(sys.argv[1]) / f"{distributed.rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
