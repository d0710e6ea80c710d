"""Trains a small network in processes that are killed with SIGKILL, again and again, until one finishes.

Run as ``python interrupted.py FOLDER MODE SEED``. It imports torch once and forks, so that many kills take seconds, and
prints one JSON line: digests of the weights with and without kills, how often a process was killed, and how far it had got
each time.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import select
import signal
import sys
import time
import warnings
from pathlib import Path

import safetensors.torch  # noqa: F401  imported here, once, and not in every child
import torch
import torch._dynamo

from softshare import SimilarityRecorder, files, images, models, training
from softshare.images import Augmentation
from softshare.training import Classification, Settings, checkpoints

STEPS = 21  # 3 epochs of 7 batches


def train(folder: Path | None, ready: int | None = None) -> str:
    """Digest of weights, history and snapshots at the end of a short training."""
    train_set, test = (images.load("digits", split).shrunk(4) for split in ("train", "test"))
    task = Classification(
        train_set.split(130)[0], test.split(50)[0], Augmentation(*train_set.statistics(), flip=False, pad=1)
    )
    torch.manual_seed(0)
    model = models.swrn(16, 1, dropout=0.3)
    recorder = SimilarityRecorder(dense_epochs=2, per_epoch=3)
    settings = Settings(epochs=3, batch_size=20, rate=0.05, milestones=(0.5,))
    if ready is not None:
        os.write(ready, b"r")
    history = training.fit(
        model, task, settings, [recorder], "cpu", progress=False, checkpoints=folder, checkpoint_seconds=0.0
    )
    digest = hashlib.sha256()
    for value in [*model.state_dict().values(), *recorder.state_dict().values()]:
        digest.update(value.detach().contiguous().numpy().tobytes())
    rows = [{name: value for name, value in row.items() if "second" not in name} for row in history]
    digest.update(json.dumps(rows).encode())
    return digest.hexdigest()


def pause_at(place: str, write: int, notify: int) -> None:
    """Make the given write (from 1) report when it is at a place, then hang: "half" written, "flush"ed, or "renamed"."""
    count = 0

    def hang(here: str) -> None:
        if here == place and count == write:
            os.write(notify, b"x")
            time.sleep(60)

    class Halves:
        def __init__(self, file) -> None:
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_) -> None:
            self.file.close()

        def write(self, data) -> None:
            nonlocal count
            count += 1
            self.file.write(data[: len(data) // 2])
            self.file.flush()
            hang("half")
            self.file.write(data[len(data) // 2 :])

        def flush(self) -> None:
            self.file.flush()
            hang("flush")

        def fileno(self) -> int:
            return self.file.fileno()

    files.open = lambda path, mode: Halves(open(path, mode)) if mode == "wb" else open(path, mode)
    prune = checkpoints.prune_checkpoints
    checkpoints.prune_checkpoints = lambda *arguments: (hang("renamed"), prune(*arguments))


def report_checkpoints(notify: int) -> None:
    """Make every finished checkpoint report itself."""
    prune = checkpoints.prune_checkpoints
    checkpoints.prune_checkpoints = lambda *arguments: (os.write(notify, b"c"), prune(*arguments))


def killed(folder: Path, written: int, after: float, pause: tuple[str, int] | None) -> str | None:
    """Train in a child and kill it some seconds after so many new checkpoints; return its digest if it finished first."""
    result, report = os.pipe()
    notified, notify = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if pause:
                pause_at(*pause, notify)
            else:
                report_checkpoints(notify)
            os.write(report, train(folder, notify).encode())
            os._exit(0)
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
            os._exit(1)
    os.close(report)
    os.read(notified, 1)  # data and model are ready, training starts
    if pause:
        os.read(notified, 1)
    else:
        os.close(notify)  # so that reading ends if the child finishes first
        for _ in range(written):
            os.read(notified, 1)
        select.select([result], [], [], after)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) != 0:
        raise SystemExit("the training failed by itself")
    digest = os.read(result, 100).decode()
    for pipe in (result, notified, notify) if pause else (result, notified):
        os.close(pipe)
    return digest or None


def main() -> None:
    folder, mode, seed = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    warnings.simplefilter("error")  # no checkpoint may ever be refused
    torch.set_num_threads(1)
    reading, writing = os.pipe()
    if os.fork() == 0:  # forks and autograd do not mix, so even the undisturbed run is a child
        os.write(writing, train(None, writing).encode())
        os._exit(0)
    os.read(reading, 1)  # it starts to train
    started = time.monotonic()
    expected = os.read(reading, 100).decode()
    os.wait()
    step = (time.monotonic() - started) / STEPS
    moments = random.Random(seed)
    kills, digest = 0, None
    if mode == "writes":
        for place in ("half", "flush", "renamed"):
            for write in (1, 2, 3):
                assert killed(folder, 0, 0.0, (place, write)) is None
                kills += 1
    reached = set()  # the newest checkpoint's step after each kill
    while digest is None:
        # A process gets about one of the 21 steps, however fast the machine is, so that ten kills come before the end.
        if kills < 30:
            digest = killed(folder, moments.randrange(2), moments.uniform(0.0, 1.5 * step), None)
        else:
            digest = killed(folder, STEPS, 60.0, None)
        kills += digest is None
        reached.add(max((int(path.name[5:13]) for path in folder.glob("*.safetensors")), default=0))
    left = sorted(path.name for path in folder.iterdir())
    print(json.dumps({"expected": expected, "found": digest, "kills": kills, "reached": sorted(reached), "left": left}))


if __name__ == "__main__":
    main()
