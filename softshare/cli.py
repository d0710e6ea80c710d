"""The ``softshare`` command: list recipes, run them, fold trained networks, report, measure."""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from .files import user_path, write_together
from .folded import fold
from .folding import plan_fold
from .speed import benchmark
from .studies import (
    PROFILES,
    RECIPES,
    STUDIES,
    costs,
    find_records,
    folding,
    gpu_list,
    jobs,
    make_plan,
    read_record,
    run,
    runs_folder,
    study_of,
    tables,
    trained,
)
from .studies.records import record_path
from .training import distributed
from .training.devices import NoSuchDevice, pick_device
from .training.distributed import Disagreement
from .training.streaming import WorkerDied

_REPORTED = (ValueError, OSError, FloatingPointError, NoSuchDevice, Disagreement, WorkerDied)
"""Errors that are reported by their message alone; others, such as CUDA errors, come with a traceback."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="softshare", description="Soft parameter sharing: recipes, records, folding.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def recipe_command(name: str, help: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help, description=help)
        command.add_argument("name", metavar="NAME", nargs="+", help="a recipe's name, as `softshare list` shows it")
        command.add_argument("--profile", choices=PROFILES, default="fast", help="default: fast")
        command.add_argument("--seed", type=int, default=0, help="default: 0")
        command.add_argument("--data", help="data set by name or path; default: the recipe's first one")
        command.add_argument("--device", help="cpu or cuda; default: cuda if available")
        command.add_argument(
            "--runs", default="", help="folder of records; default: data/runs of a checkout, else ./runs"
        )
        command.add_argument("--checkpoints", default="", help="folder for checkpoints, such as one on a mounted drive")
        command.add_argument("--rehearse", action="store_true", help="toy sizes, to try every step in seconds")
        return command

    commands.add_parser("list", help="show all recipes and what they cost")
    command = recipe_command("run", "train a recipe and write its record, or find the record; a killed run resumes")
    command.add_argument("--download", action="store_true", help="fetch the data set if no copy is found")
    command.add_argument(
        "--checkpoint-seconds", type=float, default=120.0, help="time between checkpoints; default: 120"
    )
    command.add_argument("--quiet", action="store_true", help="show no progress")
    command = recipe_command("fold", "fold the network that `run` trained: which layers become one, and what it costs")
    command.add_argument("--threshold", type=float, default=0.9, help="least similarity of tied layers; default: 0.9")
    command.add_argument("--sweep", action="store_true", help="also record the costs at every threshold from 0.2 to 1")
    command.add_argument("--output", help="write OUTPUT.json (the plan) and OUTPUT.safetensors (folded weights)")
    report = commands.add_parser("report", help="show the poster's tables and the verdicts on its claims, from records")
    report.add_argument("--runs", default="", help="folder of records")
    commands.add_parser("bench", help="measure speed, pair by pair (softshare bench --help)", add_help=False)
    what = "run what is worth a GPU's time, in order of value, as far as time allows; a second call goes on"
    gpu = commands.add_parser("gpu", help=what, description=what)
    gpu.add_argument("--minutes", type=float, default=0.0, help="how much time is available; needed unless with --dry")
    gpu.add_argument("--dry", action="store_true", help="tell what there is to do and how long it takes; start nothing")
    gpu.add_argument(
        "--rehearse",
        action="store_true",
        help="the same list at toy sizes, to try every step",
    )
    gpu.add_argument(
        "--carry",
        type=float,
        default=gpu_list.CARRY,
        metavar="MB",
        help="largest checkpoint that outlives this machine (up to two are kept per run); runs with larger ones are begun "
        "only if they fit into the time left; default: 12",
    )
    gpu.add_argument("--device", help="cpu or cuda; default: cuda if available")
    gpu.add_argument("--runs", default="", help="folder of records")
    gpu.add_argument("--checkpoints", default="", help="folder for checkpoints")
    gpu.add_argument("--download", action="store_true", help="fetch data sets if no copy is found")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 0, 1 after an error reported in one line, 130 if stopped by hand."""
    for stream in (sys.stdout, sys.stderr):  # a letter that the terminal cannot show must not cost a result
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="namereplace")
    argv = list(sys.argv[1:] if argv is None else argv)
    bench = argv[:1] == ["bench"]
    arguments = argparse.Namespace(command="bench") if bench else _parser().parse_args(argv)
    if hasattr(arguments, "name"):
        arguments.name = " ".join(arguments.name)  # a name of several words needs no quotation marks
    commands = {"list": _list, "run": _run, "fold": _fold, "report": _report, "gpu": _gpu}
    try:
        return benchmark.main(argv[1:]) if bench else commands[arguments.command](arguments)
    except BrokenPipeError:  # the reader of the output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except _REPORTED as error:
        print(f"softshare {arguments.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        hint = "" if bench else "; the same command resumes from the last checkpoint, if there is one"
        print(f"\nstopped{hint}", file=sys.stderr)
        return 130


def _list(arguments: argparse.Namespace) -> int:
    print(
        "Estimated time by profile, on one CPU thread / on one GPU such as a T4. CPU times follow from a measured speed, GPU"
    )
    print("times from an assumed one, not measured. * means dropout 0.3. Small profiles use narrower networks.\n")
    width = max(map(len, RECIPES))
    print(f"{'recipe':{width}} {'data':18} {'fast':>8} {'gpu':>17} {'short':>17} {'paper':>17}  shows")
    for name, recipe in RECIPES.items():
        plans = [make_plan(name, profile) for profile in PROFILES]
        cpu, gpu = ([costs.duration(costs.expected_seconds(plan, which)) for plan in plans] for which in (False, True))
        data = STUDIES[recipe.study].data_told(recipe)
        both = " ".join(f"{f'{mine} / {theirs}':>17}" for mine, theirs in zip(cpu[1:], gpu[1:], strict=True))
        print(f"{name:{width}} {data:18} {cpu[0]:>8} {both}  {recipe.shows}")
    return 0


def _run(arguments: argparse.Namespace) -> int:
    record = run(
        arguments.name,
        arguments.profile,
        arguments.seed,
        arguments.data,
        device=arguments.device,
        runs=arguments.runs,
        checkpoints=arguments.checkpoints,
        download=arguments.download,
        progress=not arguments.quiet,
        checkpoint_seconds=arguments.checkpoint_seconds,
        rehearse=arguments.rehearse,
    )
    if distributed.rank() == 0:
        took = timedelta(seconds=round(record.execution["seconds"]))
        print(f"{record.recipe}, profile {record.profile}, seed {record.seed}, {record.data['source']}: trained in {took} "
              f"on {record.execution['hardware']}")  # fmt: skip
        for name in ("error", "exact", "f1", "hard_f1", "parameters"):
            if name in record.metrics:
                print(f"  {name:10} {record.metrics[name]:.6g}")
        print(f"  record     {record.path}")
    return 0


def _fold(arguments: argparse.Namespace) -> int:
    device = pick_device(arguments.device)
    plan = make_plan(arguments.name, arguments.profile, arguments.seed, arguments.rehearse)
    study, name = study_of(plan), plan.recipe.name
    tasks = study.tasks(plan, arguments.data)
    path = record_path(study.identity(plan, tasks.data["fingerprint"]), arguments.runs)
    if not path.exists():
        raise FileNotFoundError(
            f"no record of {name}, profile {plan.profile}, seed {plan.seed}, on {tasks.data['source']}; train it first: "
            f"softshare run {name!r} --profile {plan.profile} --seed {plan.seed}"
        )
    record = read_record(path)
    model = trained(record, arguments.checkpoints).to(device)
    folds = plan_fold(model, arguments.threshold)
    thresholds = sorted({arguments.threshold, *(folding.THRESHOLDS if arguments.sweep else ())})
    found = folding.fold_costs(record, model, tasks, thresholds, runs=arguments.runs)
    rows = {way: folding.row_at(rows, arguments.threshold) for way, rows in folding.rows_by_way(found).items()}
    kept, fresh = rows[folding.KEPT], rows[folding.REESTIMATED]
    before = sum(parameter.numel() for parameter in model.parameters())
    print(folds)
    for what, layers, parameters, error in (
        ("as trained", folds.total_layers, before, kept["value"] - kept["change"]),
        ("folded", folds.distinct_layers, kept["parameters"], kept["value"]),
        ("as trained, statistics re-estimated", folds.total_layers, before, fresh["value"] - fresh["change"]),
        ("folded, statistics re-estimated", folds.distinct_layers, fresh["parameters"], fresh["value"]),
    ):
        print(f"{what:36} {layers:3} distinct layers of groups, {parameters:>12,} parameters, test error {error:.4g}%")
    print(f"record {found.path}")
    if arguments.output:
        from safetensors.torch import save

        state = {name: value.cpu().contiguous() for name, value in fold(model, folds).state_dict().items()}
        text, output = folds.to_json().encode(), user_path(arguments.output)
        plan_path, weights_path = (Path(f"{output}{end}") for end in (".json", ".safetensors"))
        # The weights hold the checksum of their plan, so that a mismatched pair can be recognised.
        weights = save(state, {"plan": hashlib.sha256(text).hexdigest()})
        write_together([(plan_path, text), (weights_path, weights)])
        print(f"written: {plan_path}, {weights_path}")
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from .studies import verdicts  # here, since it needs scipy

    folder = runs_folder(arguments.runs, "paper")
    records = find_records(folder, bundled=not arguments.runs)
    places = ", ".join(sorted({str(record.path.parent) for record in records})) or folder
    print(f"{len(records)} records in {places}; only those of profile paper fill a cell\n")
    captions = {"cifar": "Error (%), standard augmentation", "search": "CIFAR-10 error (%) with cutout",
                "imagenet": "ImageNet error (%)"}  # fmt: skip
    for name, caption in captions.items():
        print(tables.as_text(tables.paper_beside_ours(name, records), caption), end="\n\n")
    print(tables.as_text(tables.others_at_the_papers_schedule(records), "Not on the poster"), end="\n\n")
    print(
        tables.as_text(tables.paths_at_the_papers_schedule(records), "Grids solved exactly (share) by phase"),
        end="\n\n",
    )
    found = verdicts.as_rows(verdicts.verdicts(records))
    print(tables.as_text(found, "Verdicts on the poster's claims, by the rules in data/paper/claims.csv"))
    return 0


def _gpu(arguments: argparse.Namespace) -> int:
    device = str(pick_device(arguments.device))
    names = ("runs", "checkpoints", "download", "rehearse")
    places = jobs.Places(device, **{name: getattr(arguments, name) for name in names})
    if arguments.dry:
        gpu_list.tell_costs(places)
        return 0
    return gpu_list.run_list(arguments.minutes, places, arguments.carry)
