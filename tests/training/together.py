"""Trains a network without batch statistics, alone or under torchrun, and writes what came out.

Run as ``python together.py OUT CHECKPOINTS KILL`` or ``torchrun ... together.py ...``. Each process writes OUT/<rank>.json;
with KILL above 0 the last process kills itself once, before that epoch; with -1 it looks for checkpoints elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from pathlib import Path

import torch
from torch import nn

import softshare
from softshare import images
from softshare.training import Classification, Settings, distributed, fit


def main() -> None:
    out, folder, kill = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    life = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    train, test = (images.load("digits", split).shrunk(4) for split in ("train", "test"))
    # 131 examples in batches of 26: the last batch holds one example, fewer than there are processes
    task = Classification(train.split(131)[0], test.split(50)[0])
    torch.manual_seed(int(os.environ.get("RANK", "0")))  # all processes use the weights of process 0
    convolutions = [nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()) for _ in range(4)]
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *convolutions, nn.Flatten(), nn.Linear(8 * 64, 10))
    softshare.share_(net, 2)

    def die(model: nn.Module, epoch: int) -> None:
        if kill > 0 and epoch == kill and life == 0 and distributed.rank() == distributed.world_size() - 1:
            os.kill(os.getpid(), signal.SIGKILL)

    settings = Settings(epochs=4, batch_size=26, rate=0.02, precision="float32", penalty=0.001)
    with distributed.process_group(torch.device("cpu")):
        if kill == -1 and distributed.rank() == 1:
            folder = folder / "elsewhere"
        history = fit(net, task, settings, [die], "cpu", progress=False, checkpoints=folder, checkpoint_seconds=0)
        weights = torch.cat([parameter.detach().flatten() for parameter in net.parameters()])
        found = {
            "losses": [row["loss"] for row in history],
            "accuracy": history[-1]["held_out_accuracy"],
            "digest": hashlib.sha256(weights.numpy().tobytes()).hexdigest(),
            "coefficients": softshare.banks(net)["Conv2d 8x8x3x3"].coefficients.tolist(),
            "world": distributed.world_size(),
            "life": life,
        }
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{distributed.rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
