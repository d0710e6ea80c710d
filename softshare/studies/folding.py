"""What does a fold cost, at which threshold, and how much of the cost is stale BatchNorm?

An analysis: it takes the record of a run and its trained network, folds the network at each threshold, tests every folded
network twice, with BatchNorm statistics kept and re-estimated, and writes its own record. No weight is trained.
``softshare fold "SWRN 40-8-8" --profile paper --threshold 0.8``. Findings so far: see the page Results.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import files, models
from ..folded import sweep
from ..folding import FoldPlan, exploring, plan_fold
from ..models import Network
from ..sharing import banks
from ..training.devices import convolution_kernels, device_of, standard_defaults
from ..training.environment import execution_facts
from ..training.evaluation import evaluate, with_reestimated_statistics
from .recipes import study_of
from .records import Identity, Record, write_record
from .running import plan_of
from .study import Plan, Tasks

VERSION = 1
THRESHOLDS = tuple(round(0.2 + 0.05 * n, 2) for n in range(17))

KEPT, REESTIMATED = "statistics kept", "statistics re-estimated"
"""The two ways to test a folded network."""


def measures(plan: Plan, tasks: Tasks) -> dict[str, Callable[[nn.Module], float]]:
    """A function for each way to test a folded network: test error in %; for grids, the share not solved exactly, in %."""
    precision = plan.settings.precision
    sample = study_of(plan).sample(plan, tasks)

    def kept(model: nn.Module) -> float:
        with convolution_kernels(device_of(model), plan.settings.tf32):
            found = evaluate(model, tasks.test, precision)
        return found["error"] if "error" in found else 100.0 * (1.0 - found["exact"])

    def reestimated(model: nn.Module) -> float:
        return kept(with_reestimated_statistics(model, sample, precision))

    return {REESTIMATED: reestimated, KEPT: kept}


def fold_identity(of: Identity, thresholds: Sequence[float] = THRESHOLDS) -> Identity:
    """What decides the outcome of `fold_costs` for the run with that identity."""
    return Identity(
        "folding",
        VERSION,
        f"fold of {of.recipe}",
        of.profile,
        of.seed,
        of.network,
        {"of": of.hash, "thresholds": list(thresholds)},
        of.fingerprint,
    )


@standard_defaults()
def fold_costs(
    record: Record,
    model: nn.Module,
    tasks: Tasks,
    thresholds: Sequence[float] = THRESHOLDS,
    runs: str | Path = "",
) -> Record:
    """Fold the trained network of a record at each threshold and write a record of what each fold costs.

    Networks are tested in the precision of the record's plan. The new record's history has one row per threshold and way
    (see `rows_by_way`); its metrics are the errors before folding and, by threshold, the layers left and the change in
    error.
    """
    _, plan = plan_of(record)
    identity = fold_identity(record.identity, thresholds)
    rows: list[dict[str, Any]] = []
    metrics: dict[str, Any] = {}
    for way, measure in measures(plan, tasks).items():
        found = sweep(model, measure, thresholds)
        rows += [{"way": way, **row} for row in found]
        short = "kept" if way == KEPT else "reestimated"
        metrics[f"{short}_before"] = found[0]["value"] - found[0]["change"]
        for row in found:
            metrics[f"distinct_at_{row['threshold']:g}"] = row["distinct"]
            metrics[f"{short}_change_at_{row['threshold']:g}"] = row["change"]
    metrics["layers"] = rows[0]["total"]
    where = execution_facts(device_of(model), plan.settings) | {"record folded": files.file_checksum(record.path)}
    return write_record(identity, metrics, data=record.data, history=rows, execution=where, runs=runs)


def rows_by_way(record: Record) -> dict[str, list[dict[str, Any]]]:
    """The rows of a record of `fold_costs` by the way of testing, each as `softshare.folded.sweep` returns it.

    Values are test errors in %; for grids, the share not solved exactly.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for row in record.history:
        found.setdefault(row["way"], []).append(row)
    return found


def row_at(rows: Sequence[Mapping[str, Any]], threshold: float) -> Mapping[str, Any]:
    """The row of one threshold. Raises ValueError if there is none."""
    for row in rows:
        if row["threshold"] == threshold:
            return row
    raise ValueError(f"no row at threshold {threshold}; there are {[row['threshold'] for row in rows]}")


def plan_from_snapshots(record: Record, threshold: float) -> FoldPlan:
    """The fold plan of a record's network from its last snapshot of coefficients; the weights are not needed.

    Clusters, schedule and loops are those of the network; the scales are not, since they depend on templates.
    """
    model = models.build(Network.parse(record.network).narrowed())
    last = {name: snapshots[-1] for name, snapshots in record.similarity().coefficients.items()}
    with torch.no_grad():
        for name, bank in banks(model).items():
            bank.coefficients.copy_(torch.from_numpy(last[name]))
    with exploring():  # tables put chance beside it
        return plan_fold(model, threshold)
