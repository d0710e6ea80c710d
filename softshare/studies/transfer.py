"""How far does what was learned extend: to larger grids, and to longer distances than in training?

An analysis: it takes the records of curriculum runs and their trained networks, and writes its own record. Findings so far:
see chapter 4 of the book and the page Results.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..shortest_path import rectangle_rule, scores_beside_the_rule
from ..training.devices import convolution_kernels, device_of, standard_defaults
from ..training.environment import execution_facts
from ..training.evaluation import evaluate, with_reestimated_statistics
from ..training.tasks import ShortestPaths
from .paths import SCORES, grids_of
from .records import Identity, Record, write_record
from .running import plan_of
from .study import Tasks

VERSION = 1


@standard_defaults()
def transfer(
    records: Mapping[str, Record],
    networks: Mapping[str, nn.Module],
    tasks: Tasks,
    places: Iterable[tuple[int, int]],
    grids: int = 200,
    runs: str | Path = "",
) -> Record:
    """Score trained networks, with re-estimated BatchNorm statistics, on grids unlike those they were trained on.

    Args:
        records: the runs that trained the networks, by the names of the networks; all with the same plan except for the
            recipe.
        networks: the trained networks; convolutions run on grids of any side.
        tasks: the tasks of these runs; statistics are re-estimated on grids of their last phase.
        places: pairs of side and box.
        grids: number of grids per place.
        runs: folder of records.

    Returns:
        A record whose history has one row per place and network, and for the "rectangle rule": side, box, network and
        the `softshare.studies.paths.SCORES`. `scores_at` reads it.
    """
    study, plan = plan_of(next(iter(records.values())))
    places, precision = list(places), plan.settings.precision
    chosen = {
        "of": {name: record.identity.hash for name, record in records.items()},
        "places": [list(place) for place in places],
        "grids": grids,
    }
    name = f"transfer of {', '.join(record.recipe for record in records.values())}"
    identity = Identity("transfer", VERSION, name, plan.profile, plan.seed, "", chosen, tasks.data["fingerprint"])
    device = device_of(next(iter(networks.values())))
    rows: list[dict[str, Any]] = []
    with convolution_kernels(device, plan.settings.tf32):
        sample = study.sample(plan, tasks)
        fresh = {name: with_reestimated_statistics(network, sample, precision) for name, network in networks.items()}
        for side, box in places:
            drawn = grids_of(plan, grids, box, 2**62 + 2**33, side)
            visit = ShortestPaths(drawn, drawn)
            found = {name: evaluate(network, visit, precision) for name, network in fresh.items()}
            found["rectangle rule"] = scores_beside_the_rule(rectangle_rule(drawn.inputs), drawn)
            for name, scores in found.items():
                rows.append({"side": side, "box": box, "network": name} | {key: scores[key] for key in SCORES})
    where = execution_facts(device, plan.settings)
    return write_record(identity, {"places": len(places)}, data=tasks.data, history=rows, execution=where, runs=runs)


def scores_at(record: Record, side: int, box: int) -> dict[str, dict[str, float]]:
    """The scores at one place by network, from a record of `transfer`."""
    rows = [row for row in record.history if (row["side"], row["box"]) == (side, box)]
    return {row["network"]: {key: row[key] for key in SCORES} for row in rows}
