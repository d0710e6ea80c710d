"""Costs follow from multiply-adds."""

from __future__ import annotations

import json

import pytest

from softshare import models
from softshare.studies import costs, folding, make_plan, study_of, train


def test_a_longer_schedule_costs_in_proportion():
    short, paper = (costs.expected_seconds(make_plan("WRN 28-10", profile), gpu=True) for profile in ("short", "paper"))
    assert paper / short == pytest.approx(200 / 30)
    assert study_of(plan := make_plan("WRN 28-10", "gpu")).examples(plan) == 45_000
    assert study_of(plan := make_plan("SWRN 50-2", "paper")).examples(plan) == 1_281_167


def test_a_wide_network_by_hand():
    plan = make_plan("SWRN 28-6-2 cutout", "paper")
    expected = 3 * 1_894_174_464 * 50_000 * 200  # forward multiply-adds of WRN 28-6, counted elsewhere
    assert costs.expected_seconds(plan, gpu=False) == pytest.approx(expected / costs.CPU_SPEED)
    assert costs.expected_seconds(plan, gpu=True, speed=costs.Speed(1e13)) == pytest.approx(expected / 1e13)


def test_small_networks_are_bound_by_launches_on_a_gpu():
    plan = make_plan("SCNN 100 layers", "fast")
    assert costs.expected_seconds(plan, gpu=True) == pytest.approx(9 * 3_000 / 32 * 102 * costs.LAUNCH_SECONDS)


def test_captured_steps_are_bound_less(tmp_path):
    plan = make_plan("SCNN", "paper")
    expected = 250 * 50 * 22 * costs.CAPTURED_SECONDS
    assert costs.expected_seconds(plan, gpu=True, speed=costs.Speed(1e15, captured=True)) == pytest.approx(expected)
    assert costs.expected_seconds(plan, gpu=False, speed=costs.Speed(1e15)) == pytest.approx(3 * expected)


@pytest.mark.parametrize(("name", "tensors"), [("SWRN 28-2-2 cutout", 2), ("SCNN", 3)])
def test_the_size_of_a_checkpoint(name, tensors, tmp_path):
    """Against a real one, but for random states and names."""
    record, _ = train(name, rehearse=True, runs=tmp_path, checkpoints=tmp_path / "c", progress=False, device="cpu")
    (*_, path) = sorted((tmp_path / "c" / record.path.stem).glob("step-*"))
    expected = costs.checkpoint_bytes(make_plan(name, "fast", rehearse=True))
    assert path.stat().st_size == pytest.approx(expected, rel=0.3)


def test_folding_costs_forward_passes(monkeypatch):
    plan = make_plan("SWRN 40-8-8", "short")
    forward = models.multiply_adds("SWRN 40-8-8", 32)
    tests = 2 * (len(folding.THRESHOLDS) + 1)  # each way, before and at each threshold
    assert costs.fold_seconds(plan, True, costs.Speed(1e12)) == pytest.approx(tests * 10_000 * forward / 1e12)


def test_a_measured_speed_comes_from_a_whole_benchmark(tmp_path):
    assert costs.measured_speed(tmp_path / "none.json") is None
    (tmp_path / "bad.json").write_text(json.dumps({"format": "softshare benchmark 3"}))
    assert costs.measured_speed(tmp_path / "bad.json") is None
