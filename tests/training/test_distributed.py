"""Several processes that train together: as one, with one opinion, and through the loss of one of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from softshare.training import distributed

HERE = Path(__file__).parent


def test_one_process_agrees_with_itself():
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert distributed.all_of(True) is True and distributed.all_of(False) is False
    assert distributed.gathered("a") == ["a"]
    assert distributed.average_(torch.tensor([3.0])).tolist() == [3.0]
    indices, weight = distributed.own_part(torch.arange(5))
    assert indices.tolist() == [0, 1, 2, 3, 4] and weight == 1.0
    net = nn.BatchNorm2d(2)
    assert distributed.wrapped(net, torch.device("cpu")) is net
    distributed.agree("anything", 3)
    distributed.agree_on_buffers(net)
    distributed.barrier()
    with distributed.process_group(torch.device("cpu")) as device:
        assert device == torch.device("cpu") and distributed.world_size() == 1


@given(st.integers(1, 20), st.integers(2, 6))
def test_the_mean_over_processes_is_that_over_the_batch(size, processes):
    losses = torch.randn(size, dtype=torch.double)
    parts, total = [], 0.0
    for rank in range(processes):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(distributed, "rank", lambda rank=rank: rank)
            patched.setattr(distributed, "world_size", lambda: processes)
            part, weight = distributed.own_part(torch.arange(size))
        assert len(part) > 0, "all have to take part in every step"
        total += weight * losses[part].mean().item() / processes
        parts += part.tolist() if weight else []
    assert sorted(parts) == list(range(size))
    assert total == pytest.approx(losses.mean().item())


def torchrun(processes: int, *script: str, restarts: int = 0) -> subprocess.CompletedProcess[str]:
    run = [sys.executable, *script]
    if processes > 1:
        engine = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        run = [sys.executable, *engine, f"--max-restarts={restarts}", *script]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(run, capture_output=True, text=True, timeout=240, env=environment)


def together(tmp_path: Path, name: str, processes: int, kill: int = 0) -> list[dict]:
    script = [str(HERE / "together.py"), str(tmp_path / name), str(tmp_path / f"{name}-checkpoints"), str(kill)]
    done = torchrun(processes, *script, restarts=2)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((tmp_path / name / f"{rank}.json").read_text()) for rank in range(processes)]


@pytest.mark.long
def test_two_processes_train_as_one_and_survive_a_killed_worker(tmp_path):
    alone = together(tmp_path, "alone", 1)[0]
    pair = together(tmp_path, "pair", 2)
    assert [found["world"] for found in pair] == [2, 2]
    for found in pair:
        assert found["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        torch.testing.assert_close(
            torch.tensor(found["coefficients"]), torch.tensor(alone["coefficients"]), rtol=1e-4, atol=1e-6
        )
    assert pair[0]["digest"] == pair[1]["digest"]  # weights and templates stay in step, to the bit
    assert pair[0]["losses"] == pair[1]["losses"] and pair[0]["accuracy"] == pair[1]["accuracy"]
    assert not list(tmp_path.glob("pair-checkpoints/*.part"))

    # Where processes see different folders, all of them stop before a step is taken.
    script = [str(HERE / "together.py"), str(tmp_path / "apart"), str(tmp_path / "pair-checkpoints"), "-1"]
    done = torchrun(2, *script)
    assert done.returncode != 0 and "do not agree on the epoch and step to go on at" in done.stderr

    killed = together(tmp_path, "killed", 2, kill=3)
    assert [found["life"] for found in killed] == [1, 1]  # both were started again
    assert [found["digest"] for found in killed] == [found["digest"] for found in pair]
    assert killed[0]["losses"] == pair[0]["losses"]


@pytest.fixture(scope="module")
def agreed(tmp_path_factory):
    """What each of two processes found; see agreeing.py."""
    folder = tmp_path_factory.mktemp("agreeing")
    done = torchrun(2, str(HERE / "agreeing.py"), str(folder))
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.long
def test_every_process_hears_what_all_of_them_say(agreed):
    for found in agreed:
        assert found["all_of"] == [True, False, False, False]
        assert found["gathered"] == [{"rank": 0, "text": "x"}, {"rank": 1, "text": "x" * 1001}]
        assert found["average"] == [1.0, 0.5]
        assert "do not agree on the number" in found["disagreement"] and "from [0] to [1]" in found["disagreement"]


@pytest.mark.long
def test_statistics_are_each_processs_own_in_an_epoch_and_everybodys_after_it(agreed):
    """BatchNorm statistics are not handed round at every step, which would cost time; at the end of an epoch they are."""
    first, second = (found["statistics"] for found in agreed)
    assert first["weights"] == second["weights"] and first["buffers"] == second["buffers"]
    assert first["losses"] == second["losses"] and first["accuracy"] == second["accuracy"]
    same = [a == b for a, b in zip(first["before"], second["before"], strict=True)]
    steps = 6  # 131 images in batches of 26
    assert same == ([True] + [False] * (steps - 1)) * 2


@pytest.mark.long
def test_the_record_tells_of_every_process(agreed):
    for found in agreed:
        execution = found["statistics"]["execution"]
        assert execution["processes"] == 2 and len(execution["others"]) == 1
        for name in ("hardware", "torch", "precision", "revision"):
            assert execution["others"][0][name] == execution[name]


@pytest.mark.long
def test_all_processes_use_the_compiled_model_or_none(agreed):
    first, second = (found["compiled"]["-1"] for found in agreed)
    assert first["outcome"] is second["outcome"] is True and first["said"] == second["said"] == []
    assert first["runs"] == second["runs"] == [13] * (1 + 5)  # the trial, and an epoch's full batches
    failed = [found["compiled"]["1"] for found in agreed]
    assert [found["outcome"] for found in failed] == ["failed, so it ran without"] * 2
    assert [found["runs"] for found in failed] == [[13], []]
    assert failed[0]["said"] == ["torch.compile failed in another process, so no process uses it"]
    assert failed[1]["said"] == [
        "torch.compile failed (RuntimeError: no compiler here); training continues without it, more slowly"
    ]
    assert len({found["weights"] for found in (first, second, *failed)}) == 1
