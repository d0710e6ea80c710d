"""Several processes that train together: as one, in agreement, and despite the loss of one of them."""

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
    assert pair[0]["digest"] == pair[1]["digest"]  # weights and templates stay equal, to the bit
    assert pair[0]["losses"] == pair[1]["losses"] and pair[0]["accuracy"] == pair[1]["accuracy"]
    assert not list(tmp_path.glob("pair-checkpoints/*.part"))

    # If processes see different folders, all of them stop before taking a step.
    script = [str(HERE / "together.py"), str(tmp_path / "apart"), str(tmp_path / "pair-checkpoints"), "-1"]
    done = torchrun(2, *script)
    assert done.returncode != 0 and "do not agree on the epoch and step to resume at" in done.stderr

    killed = together(tmp_path, "killed", 2, kill=3)
    assert [found["life"] for found in killed] == [1, 1]  # both were restarted
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
def test_every_process_gets_what_all_of_them_contribute(agreed):
    for found in agreed:
        assert found["all_of"] == [True, False, False, False]
        assert found["gathered"] == [{"rank": 0, "text": "x"}, {"rank": 1, "text": "x" * 1001}]
        assert found["average"] == [1.0, 0.5]
        assert "do not agree on the number" in found["disagreement"] and "from [0] to [1]" in found["disagreement"]


@pytest.mark.long
def test_statistics_differ_between_processes_within_an_epoch_and_agree_after_it(agreed):
    """BatchNorm statistics are synchronised at the end of an epoch, not at every step, which would cost time."""
    first, second = (found["statistics"] for found in agreed)
    assert first["weights"] == second["weights"] and first["buffers"] == second["buffers"]
    assert first["losses"] == second["losses"] and first["accuracy"] == second["accuracy"]
    same = [a == b for a, b in zip(first["before"], second["before"], strict=True)]
    steps = 6  # 131 images in batches of 26
    assert same == ([True] + [False] * (steps - 1)) * 2


@pytest.mark.long
def test_the_record_covers_every_process(agreed):
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


# --------------------------------------------------------------------- the environment of other launchers, other sharding


@pytest.fixture
def set_launcher(monkeypatch):
    """A function that sets the given variables of a launcher and unsets the others."""

    def set_variables(**variables):
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_variables


@pytest.mark.parametrize("variables", [{"RANK": "1"}, {"RANK": "1", "WORLD_SIZE": "1"}, {"RANK": "", "WORLD_SIZE": ""}])
def test_a_rank_alone_is_not_torchrun(set_launcher, variables, recwarn):
    """It may be the number of an array job, or a leftover: this process trains, writes and reports."""
    set_launcher(**variables)
    assert distributed.rank() == 0 and len(recwarn) == 0
    with distributed.process_group(torch.device("cpu")):
        assert distributed.world_size() == 1


def test_a_rank_that_is_not_a_number_is_named_and_ignored(set_launcher):
    set_launcher(RANK="senior")
    distributed._warn_once.cache_clear()
    with pytest.warns(UserWarning, match="ignored: RANK is 'senior', not a number"):
        assert distributed.rank() == 0


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE must be a whole number, as torchrun sets it, got 'two'"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE must be a whole number"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, .* without RANK and MASTER_ADDR and MASTER_PORT;.*unset WORLD_SIZE"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "x"}, "find each other without MASTER_PORT;"),
        ({"WORLD_SIZE": "2", "RANK": "x", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, "RANK must be a whole number.*'x'"),
        (
            {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "abc"},
            "MASTER_PORT must be a whole number",
        ),
        ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, "RANK 2 must be below WORLD_SIZE 2"),
    ],
)
def test_several_processes_that_cannot_find_each_other_are_an_error(set_launcher, variables, message):
    """Each would train alone and overwrite the others' files."""
    set_launcher(**variables)
    for call in (distributed.rank, lambda: distributed.process_group(torch.device("cpu")).__enter__()):
        with pytest.raises(ValueError, match=message):
            call()


def test_a_process_without_its_own_gpu_is_an_error(set_launcher, monkeypatch):
    set_launcher(WORLD_SIZE="2", RANK="1", LOCAL_RANK="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(distributed.NoSuchDevice, match=r"process 1 .*LOCAL_RANK.* but there are 1"):
        distributed.process_group(torch.device("cuda")).__enter__()


def test_a_process_that_does_not_know_its_gpu_is_an_error(set_launcher):
    """All processes of a machine would take the first one."""
    set_launcher(WORLD_SIZE="2", RANK="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    with pytest.raises(ValueError, match="LOCAL_RANK is not set, .*start it by torchrun"):
        distributed.process_group(torch.device("cuda")).__enter__()


@pytest.mark.long
def test_sharding_the_whole_model_works_and_sharding_blocks_is_an_error(tmp_path):
    """`fully_shard` keeps a part of each parameter in each process, and gathers those of a block for its pass."""
    done = torchrun(2, str(HERE / "sharded.py"), str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["outputs"] < 1e-6 and found["gradients"] < 1e-6 and found["penalty"] < 1e-6
        assert "call fully_shard once, on the whole model" in found["blocks"]
        assert "sharded over processes: share first" in found["shared too late"]
