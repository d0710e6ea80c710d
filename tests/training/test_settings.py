"""Settings: the schedule, which decides the outcome, as distinct from the execution; rates; what is refused."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from softshare.training import Schedule, Settings

EXECUTION = {"precision": "float16", "tf32": False, "channels_last": False, "capture": True, "compile": True}


def test_the_schedule_is_json_and_holds_nothing_of_the_execution():
    settings = Settings(epochs=3, rate=0.05, milestones=(0.5,), seed=4, **EXECUTION)
    found = settings.schedule()
    assert json.loads(json.dumps(found)) == found
    assert set(found) == {field.name for field in dataclasses.fields(Schedule)}
    assert found["milestones"] == [0.5] and (found["epochs"], found["rate"], found["seed"]) == (3, 0.05, 4)
    assert set(EXECUTION) == {field.name for field in dataclasses.fields(Settings)} - set(found)
    assert Settings(**found).schedule() == Schedule(**found).schedule() == found
    assert Settings(**found) == dataclasses.replace(
        settings, precision="auto", tf32=True, channels_last=True, capture=None, compile=None
    )


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Schedule)])
def test_every_part_of_the_schedule_distinguishes_runs(name):
    start = Settings(epochs=2)
    others = {"optimizer": "adam", "milestones": (0.1,), "annealing": "cosine", "nesterov": False}
    other = others[name] if name in others else getattr(start, name) + 1
    assert dataclasses.replace(start, **{name: other}).schedule() != start.schedule()


def test_the_defaults_are_those_of_the_authors_code():
    schedule = Schedule(epochs=200)
    assert [schedule.rate_of(epoch) for epoch in (0, 59, 60, 119, 120, 159, 160, 199)] == pytest.approx(
        [0.1, 0.1, 0.02, 0.02, 0.004, 0.004, 0.0008, 0.0008]
    )
    assert (schedule.batch_size, schedule.optimizer, schedule.weight_decay) == (128, "sgd", 5e-4)
    assert (schedule.cycle, schedule.penalty) == (0, 0.0)


@given(
    st.integers(1, 40),
    st.integers(0, 12),
    st.lists(st.floats(0, 1), max_size=3),
    st.sampled_from([0.1, 0.2, 0.5]),
)
def test_rates_by_hand(epochs, cycle, milestones, factor):
    """The rate falls at each milestone, from the epoch of that number on but never before the first epoch is over."""
    settings = Settings(epochs=epochs, rate=0.4, milestones=milestones, factor=factor, cycle=cycle)
    length = cycle or epochs
    falls = [max(1, round(milestone * length)) for milestone in milestones]
    expected, rate = [], 0.4
    for epoch in range(epochs):
        if epoch % length == 0:
            rate = 0.4
        for _ in range(falls.count(epoch % length)):
            rate *= factor
        expected.append(rate)
    assert [settings.rate_of(epoch) for epoch in range(epochs)] == pytest.approx(expected)


def test_rates_restart_with_each_cycle():
    settings = Settings(epochs=12, rate=1.0, milestones=(0.5, 0.75), factor=0.1, cycle=4)
    assert [settings.rate_of(epoch) for epoch in range(12)] == pytest.approx([1.0, 1.0, 0.1, 0.01] * 3)
    without = dataclasses.replace(settings, cycle=0)
    assert [without.rate_of(epoch) for epoch in range(12)] == pytest.approx([1.0] * 6 + [0.1] * 3 + [0.01] * 3)
    beyond = dataclasses.replace(settings, epochs=2)  # a run that ends within its first cycle
    assert beyond.rate_of(1) == 1.0


def test_numpy_numbers_become_plain_ones():
    settings = Settings(
        epochs=np.int64(3), rate=np.float32(0.5), milestones=np.array([0.25, 0.5]), seed=np.int64(7), cycle=np.int32(2)
    )
    assert json.loads(json.dumps(settings.schedule()))["milestones"] == [0.25, 0.5]
    assert all(type(getattr(settings, name)) is int for name in ("epochs", "seed", "cycle"))
    assert type(settings.rate) is float and settings == Settings(
        epochs=3, rate=0.5, milestones=(0.25, 0.5), seed=7, cycle=2
    )


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"epochs": 0}, ValueError),
        ({"epochs": 1.5}, TypeError),
        ({"batch_size": -1}, ValueError),
        ({"evaluate_every": 0}, ValueError),
        ({"cycle": -1}, ValueError),
        ({"cycle": 1.5}, TypeError),
        ({"precision": "int8"}, ValueError),
        ({"precision": None}, ValueError),
        ({"optimizer": "lion"}, ValueError),
        ({"rate": 0.0}, ValueError),
        ({"rate": math.nan}, ValueError),
        ({"rate": "0.1"}, TypeError),
        ({"rate": True}, TypeError),
        ({"factor": 0.0}, ValueError),
        ({"penalty": -1.0}, ValueError),
        ({"penalty": math.inf}, ValueError),
        ({"weight_decay": -1.0}, ValueError),
        ({"milestones": "0.5"}, TypeError),
        ({"milestones": ("0.5",)}, TypeError),
        ({"seed": 1.0}, TypeError),
        ({"seed": True}, TypeError),
    ],
)
def test_bad_settings_are_refused(change, error):
    with pytest.raises(error, match=next(iter(change)).split("_")[0]):
        dataclasses.replace(Settings(epochs=1), **change)


def test_settings_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings(epochs=1).rate = 0.2


@pytest.mark.parametrize("cycle", [0.0, False, None, -1, 2.5])
def test_a_cycle_is_a_whole_number_of_epochs_or_none(cycle):
    with pytest.raises((TypeError, ValueError), match="cycle"):
        Settings(epochs=3, cycle=cycle)
    assert Settings(epochs=3, cycle=0).cycle == 0


@pytest.mark.parametrize("milestones", [0.5, None, "0.5", {0.5}, [0.5, "x"]])
def test_milestones_that_are_not_fractions_are_named(milestones):
    with pytest.raises(TypeError, match="milestones must be fractions of the epochs, such as"):
        Settings(epochs=3, milestones=milestones)


@pytest.mark.parametrize("seed", [2**62, -(2**63), 2**70])
def test_seeds_that_no_generator_accepts_are_refused(seed):
    with pytest.raises(ValueError, match="seed must be from"):
        Settings(epochs=3, seed=seed)


@given(st.integers(1, 30), st.integers(1, 3), st.integers(0, 200))
def test_cycles_that_grow_restart_one_after_another(cycle, growth, epoch):
    """A plain walk through the cycles."""
    schedule = Schedule(epochs=201, rate=0.5, annealing="cosine", least_rate=0.1, cycle=cycle, growth=growth)
    start, length = 0, cycle
    while start + length <= epoch:
        start, length = start + length, length * growth
    expected = 0.1 + 0.4 * (1 + math.cos(math.pi * (epoch - start) / length)) / 2
    assert schedule.rate_of(epoch) == pytest.approx(expected)


def test_a_cosine_starts_at_the_rate_and_ends_near_the_least():
    schedule = Schedule(epochs=100, rate=0.4, annealing="cosine")
    rates = [schedule.rate_of(epoch) for epoch in range(100)]
    assert rates[0] == 0.4 and rates[50] == pytest.approx(0.2) and 0 < rates[-1] < 1e-3
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"annealing": "linear"}, ValueError, "unknown annealing 'linear'; known: steps, cosine"),
        ({"least_rate": -1.0}, ValueError, "least_rate must be finite and at least 0"),
        ({"clip": float("inf")}, ValueError, "clip must be finite"),
        ({"growth": 0}, ValueError, "growth must be at least 1"),
        ({"nesterov": 1}, TypeError, "nesterov must be True or False, got 1"),
    ],
)
def test_wrong_ways_to_anneal_are_named(wrong, error, message):
    with pytest.raises(error, match=message):
        Schedule(epochs=3, **wrong)
