"""One of two processes, started by torchrun: a shared model under fully_shard, whole and block by block."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import softshare


def build(share: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(4)))
    if share:
        softshare.share_(model, 2)
    return model


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    plain, whole, x = build(), build(), torch.randn(4, 8)
    fully_shard(whole, mesh=mesh)
    expected, outputs = plain(x), whole(x)
    for model, found in ((plain, expected), (whole, outputs)):
        (found.square().mean() + 0.1 * softshare.recurrence_penalty(model)).backward()
    gradient = whole[0][0].bank.templates.grad.full_tensor()
    ours = softshare.recurrence_penalty(whole)
    found = {
        "outputs": float((outputs - expected).abs().max()),
        "gradients": float((gradient - plain[0][0].bank.templates.grad).abs().max()),
        "penalty": float(
            (ours.full_tensor() if hasattr(ours, "full_tensor") else ours) - softshare.recurrence_penalty(plain)
        ),
    }
    blocks = build()
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(blocks, mesh=mesh)
    try:
        blocks(x)
    except RuntimeError as error:
        found["blocks"] = str(error)
    late = build(share=False)
    fully_shard(late, mesh=mesh)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            softshare.share_(late, 2)
        except ValueError:
            found["shared too late"] = str(caught[-1].message)
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


main(Path(sys.argv[1]))
