"""The progress of a training run: a bar on a terminal, plain lines in a notebook or a log."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from typing import Any


def say(text: str) -> None:
    """Print a line; letters that the terminal cannot show are written as ``\\N{NAME}``."""
    try:
        print(text, flush=True)
    except UnicodeEncodeError:
        print(text.encode(sys.stdout.encoding, "namereplace").decode(sys.stdout.encoding), flush=True)


def on_a_terminal(stream: Any) -> bool:
    """Whether a stream, such as sys.stderr, is a terminal; a stream that does not know is not."""
    return bool(getattr(stream, "isatty", lambda: False)())


class Progress:
    """A bar on a terminal; plain lines elsewhere, as in a notebook or a log.

    Lines come at the end of each epoch, but at most one per second, and in long epochs every 30 seconds.
    """

    def __init__(self, title: str, epochs: int, size: int, shown: bool) -> None:
        self.title, self.epochs, self.size, self.shown = title, epochs, size, shown
        self.started = self.last = time.perf_counter()
        self.first = self.done = 0  # examples done before this process, and so far
        self.bar: Any = None
        if shown and on_a_terminal(sys.stderr):
            from tqdm import tqdm

            self.bar = tqdm(total=epochs * size, desc=title, unit=" examples", unit_scale=True, dynamic_ncols=True)

    def begin_at(self, done: int) -> None:
        self.first = self.done = done
        if self.bar is not None:
            self.bar.initial = self.bar.n = done

    def add(self, examples: int) -> None:
        self.done += examples
        if self.bar is not None:
            self.bar.update(examples)

    def say(self, text: str) -> None:
        if self.bar is not None:
            self.bar.write(f"{self.title}: {text}", file=sys.stderr)
        elif self.shown:
            say(f"{self.title}: {text}")

    def look(self, epoch: int, loss: float) -> None:
        """Report progress within an epoch."""
        now = time.perf_counter()
        if self.bar is not None:
            self.bar.set_postfix_str(f"epoch {epoch}/{self.epochs}, loss {loss:.3f}", refresh=False)
        elif self.shown and now - self.last >= 30.0:
            speed = (self.done - self.first) / (now - self.started)
            say(f"{self._place(epoch)}: loss {loss:.3f}, {speed:.0f}/s, {self._left(now)}")
            self.last = now

    def epoch(self, row: dict[str, float]) -> None:
        """Report the end of an epoch."""
        now, epoch = time.perf_counter(), int(row["epoch"])
        names = {"held_out_accuracy": "accuracy", "held_out_f1": "F1", "held_out_exact": "exact"}
        found = [f"{names[name]} {value:.4g}" for name, value in row.items() if name in names]
        text = ", ".join([f"loss {row['loss']:.3f}", *found])
        if self.bar is not None:
            self.bar.set_postfix_str(f"epoch {epoch}/{self.epochs}, {text}")
        elif self.shown and (now - self.last >= 1.0 or epoch == self.epochs):
            say(f"{self._place(epoch)}: {text}, {row['examples_per_second']:.0f}/s, {self._left(now)}")
            self.last = now

    def _place(self, epoch: int) -> str:
        within = self.done - (epoch - 1) * self.size
        part = "" if within >= self.size else f" ({within / self.size:.0%} of it)"
        return f"{self.title} epoch {epoch}/{self.epochs}{part}".strip()

    def _left(self, now: float) -> str:
        rest = self.epochs * self.size - self.done
        seconds = (now - self.started) * rest / max(1, self.done - self.first)
        return f"{seconds:.0f} s left" if seconds < 100 else f"{timedelta(seconds=round(seconds))} left"

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
