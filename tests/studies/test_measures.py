"""What is read off records: the three measures of the curriculum, and signs of structure."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from softshare import SimilarityRecorder, models
from softshare.sharing import banks
from softshare.studies import folding, make_plan, measures, study_of, write_record


def curriculum(tmp_path, recipe="SCNN", seed=10, rates=None, before=(0.5, 0.4, 0.3, 0.2), raw=0.9):
    """A record of five phases of 12 epochs with these exact rates (5, 12)."""
    plan = make_plan(recipe, "short", seed)
    identity = study_of(plan).identity(plan, f"grids {seed}")
    rates = np.full((5, 12), 0.5) if rates is None else rates
    history = [
        {
            "epoch": 12 * phase + epoch + 1,
            "phase": float(phase + 1),
            "reestimated_exact": float(rate),
            "held_out_f1": raw,
        }
        for phase, row in enumerate(rates)
        for epoch, rate in enumerate(row)
    ]
    metrics = {f"before{phase}_exact": rate for phase, rate in enumerate(before, start=2)}
    return write_record(identity, metrics, data={"fingerprint": f"grids {seed}"}, history=history, runs=tmp_path)


def test_the_three_measures_of_the_curriculum(tmp_path):
    rates = np.random.default_rng(0).random((5, 12))
    record = curriculum(tmp_path, rates=rates)
    assert measures.adaptation(record) == pytest.approx(100 * rates[1:, :10].mean())
    assert measures.accuracy(record) == pytest.approx(100 * rates[4, 7:].mean())
    assert measures.extrapolation(record) == pytest.approx(100 * 0.35)


def test_raw_f1_of_single_pairs(tmp_path):
    records = [curriculum(tmp_path, recipe, seed, raw=raw) for seed, recipe, raw in (
        (10, "SCNN", 0.9), (10, "CNN", 0.8), (11, "SCNN", 0.7), (11, "CNN", 0.8), (12, "SCNN", 0.9),
    )]  # fmt: skip
    assert measures.raw_f1_wins(records, "SCNN", "CNN") == {("short", 10): True, ("short", 11): False}
    assert measures.raw_f1_wins(records, "CNN", "SCNN") == {("short", 10): False, ("short", 11): True}


def with_snapshots(tmp_path, coefficients, seed=1):
    """A record of SWRN 40-8-8 in profile short whose stages had these coefficients, (10, 8), at the given epochs."""
    plan = make_plan("SWRN 40-8-8", "short", seed)
    names = list(banks(models.swrn(40, 1, 8)))
    recorder = SimilarityRecorder()
    recorder.steps = sorted(coefficients)
    recorder.coefficients = {name: [coefficients[step].numpy() for step in recorder.steps] for name in names}
    identity = study_of(plan).identity(plan, "CIFAR-10")
    history = [{"epoch": epoch} for epoch in range(1, 31)]
    data = {"source": "CIFAR-10", "fingerprint": "CIFAR-10"}
    return write_record(identity, {"error": 6.0}, data=data, history=history, similarity=recorder, runs=tmp_path)


def test_signs_of_structure(tmp_path):
    torch.manual_seed(0)
    start = torch.nn.init.orthogonal_(torch.empty(10, 8))
    moved = start + 0.3 * torch.nn.functional.normalize(torch.randn(10, 8), dim=1)
    chessboard = torch.randn(2, 8)[torch.arange(10) % 2] + 0.02 * torch.randn(10, 8)
    nothing = with_snapshots(tmp_path, {0.0: start, 0.5: moved, 30.0: moved}, 1)
    late = with_snapshots(tmp_path, {0.0: start, 0.5: moved, 1.0: chessboard, 30.0: chessboard}, 2)
    early = with_snapshots(tmp_path, {0.0: start, 0.5: chessboard, 30.0: chessboard}, 3)
    found = {
        name: [measures.sign_of(name, record, []) for record in (nothing, late, early)]
        for name in measures.SIGNS
        if name != "half as many layers"
    }
    assert found == {
        "structure": [False, True, True],
        "structure by 3%": [False, False, True],  # by epoch 0.9 of 30
        "a pair by 2%": [False, False, True],
        "loops": [False, True, True],
    }
    assert measures.similarity(nothing) < measures.similarity(late) and torch.equal(
        next(iter(measures.coefficients_at(late, 0.02).values())), moved
    )
    assert measures.structure_at(late)["largest"].observed == pytest.approx(1.0, abs=0.01)


def test_half_as_many_layers_needs_a_fold(tmp_path):
    torch.manual_seed(0)
    alike = torch.randn(1, 8) + 0.01 * torch.randn(10, 8)
    record = with_snapshots(tmp_path, {0.0: torch.randn(10, 8), 30.0: alike})

    def sign(distinct, change, of=record):
        identity = folding.fold_identity(of.identity, (0.8,))
        metrics = {"layers": 30, "distinct_at_0.8": distinct, "reestimated_change_at_0.8": change}
        fold = write_record(identity, metrics, data=record.data, runs=tmp_path)
        return measures.sign_of("half as many layers", record, [record, fold])

    assert measures.sign_of("half as many layers", record, [record]) is None
    assert sign(15, 0.3) is True and sign(16, 0.0) is False and sign(3, 0.31) is False
    other = with_snapshots(tmp_path, {0.0: torch.randn(10, 8), 30.0: alike}, 2)
    assert sign(3, 0.0, of=other) is None, "the fold of another run"
    (tmp_path / record.path.with_suffix(".npz").name).unlink()
    assert measures.sign_of("structure", record, []) is None
