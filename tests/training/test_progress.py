"""What a training displays: on a terminal, in a log, and during a long epoch."""

from __future__ import annotations

import io

import pytest

from softshare.training import Settings, fit, progress
from softshare.training.progress import Progress


def test_display_shows_epoch_loss_speed_and_time_left(task, capsys, monkeypatch, small_net):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: False, raising=False)
    fit(small_net(), task, Settings(epochs=1), title="a run")
    assert "a run epoch 1/1: loss " in (text := capsys.readouterr().out) and "/s" in text and "s left" in text


def test_a_long_epoch_shows_how_far_it_is(task, capsys, monkeypatch, small_net):
    clock = iter(range(0, 100_000, 40))
    monkeypatch.setattr(progress.time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: False, raising=False)
    fit(small_net(), task, Settings(epochs=1, batch_size=50), title="slow", device="cpu")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("slow epoch 1/1 (25% of it): loss ") and lines[0].endswith(" left") and ":" in lines[0]


@pytest.fixture
def clock(monkeypatch):
    """The time as set by a test: a list of one number, in seconds."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: False, raising=False)
    return now


def row(epoch, **metrics):
    return {"epoch": float(epoch), "loss": 1.25, "examples_per_second": 20.0, **metrics}


def test_lines_come_at_most_once_a_second_and_at_the_end(clock, capsys):
    display = Progress("short", epochs=4, size=10, shown=True)
    for epoch, now in ((1, 0.4), (2, 1.2), (3, 1.9), (4, 2.0)):
        clock[0] = now
        display.add(10)
        display.epoch(row(epoch, held_out_accuracy=87.5, held_out_error=12.5))
    first, last = capsys.readouterr().out.splitlines()
    assert first == "short epoch 2/4: loss 1.250, accuracy 87.5, 20/s, 1 s left"
    assert last == "short epoch 4/4: loss 1.250, accuracy 87.5, 20/s, 0 s left"


def test_time_left_is_estimated_from_what_this_process_has_done(clock, capsys):
    """A run resumed halfway does not count the first half, which took no time here."""
    display = Progress("again", epochs=10, size=100, shown=True)
    display.begin_at(500)
    clock[0] = 30.0
    display.add(100)
    display.epoch(row(6))
    assert capsys.readouterr().out == "again epoch 6/10: loss 1.250, 20/s, 0:02:00 left\n"


def test_nothing_is_shown_if_not_wanted(clock, capsys):
    display = Progress("quiet", epochs=1, size=10, shown=False)
    display.say("something")
    display.add(10)
    clock[0] = 100.0
    display.look(1, 0.5)
    display.epoch(row(1))
    display.close()
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    display = Progress("bar", epochs=2, size=10, shown=True)
    display.begin_at(10)
    display.say("going on")
    display.add(10)
    display.look(2, 0.5)
    display.epoch(row(2, held_out_f1=0.875))
    display.close()
    out, err = capsys.readouterr()
    assert out == "" and "bar: going on" in err
    assert "20.0/20.0" in err and "epoch 2/2, loss 1.250, F1 0.875" in err


class Tee:
    """What some programs put in place of sys.stderr."""

    def write(self, text):
        return len(text)

    def flush(self):
        pass


@pytest.mark.parametrize("stream", [Tee(), None])
def test_a_stream_that_cannot_tell_whether_it_is_a_terminal_counts_as_none(
    task, capsys, monkeypatch, small_net, stream
):
    monkeypatch.setattr(progress.sys, "stderr", stream)
    fit(small_net(), task, Settings(epochs=1), title="a run")
    assert "a run epoch 1/1: loss " in capsys.readouterr().out


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437"])
def test_characters_that_the_terminal_cannot_show_do_not_stop_training(task, monkeypatch, small_net, encoding):
    written = io.BytesIO()
    monkeypatch.setattr(progress.sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: False, raising=False)
    fit(small_net(), task, Settings(epochs=1), title="a \N{GREEK SMALL LETTER LAMDA} run \u4e2d")
    assert b"GREEK SMALL LETTER LAMDA" in written.getvalue() or encoding == "cp437"
    assert b"run \\N{CJK UNIFIED IDEOGRAPH-4E2D} epoch 1/1: loss" in written.getvalue()
