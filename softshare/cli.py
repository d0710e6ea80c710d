"""The command ``softshare``: list recipes, run them, fold what was trained, report, measure."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from . import experiments, recipes
from .records import PROFILES, find_records, runs_folder


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="softshare", description="Soft parameter sharing: recipes, records, folding.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def recipe_command(name: str, help: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help, description=help)
        command.add_argument("name", metavar="NAME", help="a recipe's name, as `softshare list` shows it")
        command.add_argument("--profile", choices=PROFILES, default="fast", help="default: fast")
        command.add_argument("--seed", type=int, default=0, help="default: 0")
        command.add_argument("--data", help="data set by name or path; default: the recipe's first one")
        command.add_argument("--device", help="cpu or cuda; default: cuda where there is one")
        command.add_argument(
            "--runs", default="", help="folder of records; default: data/runs of a checkout, else ./runs"
        )
        command.add_argument("--checkpoints", default="", help="folder for checkpoints, say one on a mounted drive")
        return command

    commands.add_parser("list", help="show all recipes with what they cost")
    run = recipe_command("run", "train a recipe and write its record, or find the record; a killed run goes on")
    run.add_argument("--download", action="store_true", help="fetch the data set where no copy is at hand")
    run.add_argument("--checkpoint-seconds", type=float, default=120.0, help="time between checkpoints; default: 120")
    run.add_argument("--quiet", action="store_true", help="show no progress")
    fold = recipe_command("fold", "fold the network that `run` has trained: what becomes one layer, and what it costs")
    fold.add_argument("--threshold", type=float, default=0.9, help="least similarity of tied layers; default: 0.9")
    fold.add_argument(
        "--output", type=Path, help="write OUTPUT.json (the plan) and OUTPUT.safetensors (folded weights)"
    )
    report = commands.add_parser("report", help="the poster's tables beside what records hold")
    report.add_argument("--runs", default="", help="folder of records")
    commands.add_parser("bench", help="measure speed, pair by pair (softshare bench --help)", add_help=False)
    gpu = commands.add_parser("gpu", help="run what is worth a GPU's time, in order of value, as far as time allows")
    gpu.add_argument("--hours", type=float, required=True, help="how much time there is")
    gpu.add_argument("--rehearse", action="store_true", help="the same list at toy sizes, on any machine")
    gpu.add_argument("--parallel", type=int, default=5, help="small networks that train side by side; default: 5")
    gpu.add_argument("--device", help="cpu or cuda; default: cuda where there is one")
    gpu.add_argument("--runs", default="", help="folder of records")
    gpu.add_argument("--checkpoints", default="", help="folder for checkpoints")
    gpu.add_argument("--download", action="store_true", help="fetch data sets of which no copy is at hand")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 0, 1 after an error that is told in a line, 130 if stopped by hand."""
    argv = list(sys.argv[1:] if argv is None else argv)
    bench = argv[:1] == ["bench"]
    arguments = argparse.Namespace(command="bench") if bench else _parser().parse_args(argv)
    commands = {"list": _list, "run": _run, "fold": _fold, "report": _report, "gpu": _gpu}
    try:
        if bench:
            from . import benchmark

            return benchmark.main(argv[1:])
        return commands[arguments.command](arguments)
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, FloatingPointError, RuntimeError) as error:
        print(f"softshare {arguments.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        told = "" if bench else "; the same command goes on from the last checkpoint, if there is one"
        print(f"\nstopped{told}", file=sys.stderr)
        return 130


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if seconds < 5400:
        return f"{round(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.0f} days"


def _list(arguments: argparse.Namespace) -> int:
    print(
        "Estimated time by profile, on one CPU thread / one GPU of a T4's class. CPU: from a measured speed; GPU: from an"
    )
    print("assumed one, not measured. * is dropout 0.3. In profile fast networks are narrow relatives.\n")
    print(f"{'recipe':20} {'data':18} {'fast':>8} {'gpu':>17} {'paper':>17}  shows")
    for name, recipe in recipes.RECIPES.items():
        plans = [recipes.plan(name, profile) for profile in PROFILES]
        cpu, gpu = ([_duration(recipes.expected_seconds(plan, which)) for plan in plans] for which in (False, True))
        data = ", ".join(recipe.data) or {"paths": "generated", "imagenet": "--data FOLDER"}[recipe.task]
        both = [f"{mine} / {theirs}" for mine, theirs in zip(cpu[1:], gpu[1:], strict=True)]
        fast = "-" if recipe.task == "imagenet" else cpu[0]
        print(f"{name:20} {data:18} {fast:>8} {both[0]:>17} {both[1]:>17}  {recipe.shows}")
    return 0


def _run(arguments: argparse.Namespace) -> int:
    from . import distributed

    record = experiments.run(
        arguments.name,
        arguments.profile,
        arguments.seed,
        arguments.data,
        arguments.device,
        arguments.runs,
        arguments.checkpoints,
        arguments.download,
        not arguments.quiet,
        arguments.checkpoint_seconds,
    )
    if distributed.rank() == 0:
        took = timedelta(seconds=round(record.environment["seconds"]))
        print(f"{record.recipe}, profile {record.profile}, seed {record.seed}, {record.data['source']}: trained in {took} "
              f"on {record.environment['hardware']}")  # fmt: skip
        for name in ("error", "exact", "f1", "hard_f1", "parameters"):
            if name in record.metrics:
                print(f"  {name:10} {record.metrics[name]:.6g}")
        print(f"  record     {record.path}")
    return 0


def _fold(arguments: argparse.Namespace) -> int:
    import torch

    from .folding import fold, plan_fold
    from .training import evaluate, pick_device

    device = pick_device(arguments.device)
    recipe = recipes.find_recipe(arguments.name).name
    records = find_records(runs_folder(arguments.runs, arguments.profile), recipe, arguments.profile)
    test, source = experiments.test_task(recipe, arguments.profile, arguments.seed, arguments.data)
    found = [record for record in records if record.seed == arguments.seed and record.data == source]
    if not found:
        raise FileNotFoundError(
            f"no record of {recipe}, profile {arguments.profile}, seed {arguments.seed} on {source['source']}; train it "
            f"first: softshare run {recipe!r} --profile {arguments.profile} --seed {arguments.seed}"
        )
    model = experiments.trained(found[0], arguments.checkpoints).to(device)
    plan = plan_fold(model, arguments.threshold)
    folded = fold(model, plan)
    print(plan)
    key = "error" if "error" in found[0].metrics else "exact"
    # What reaches a BatchNorm after a fold is not what its running statistics were taken of.
    some = torch.arange(min(test.size, 1_000)).split(250)
    inputs = torch.cat([inputs for inputs, _ in test.batches(some, arguments.seed, 1)]).float()
    anew = experiments.settled(folded, inputs)
    for name, network in (("as trained", model), ("folded", folded), ("BatchNorm anew", anew)):
        parameters = sum(parameter.numel() for parameter in network.parameters())
        layers = plan.total_layers if network is model else plan.distinct_layers
        score = evaluate(network, test)[key]
        print(f"{name:14} {layers:3} distinct layers of groups, {parameters:>12,} parameters, test {key} {score:.4g}")
    if arguments.output:
        from safetensors.torch import save_file

        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.with_suffix(".json").write_text(plan.to_json() + "\n", encoding="utf-8")
        state = {name: value.cpu().contiguous() for name, value in folded.state_dict().items()}
        save_file(state, arguments.output.with_suffix(".safetensors"))
        print(f"written: {arguments.output.with_suffix('.json')}, {arguments.output.with_suffix('.safetensors')}")
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from . import report

    folder = runs_folder(arguments.runs, "paper")
    records = find_records(folder, brought=not arguments.runs)
    places = ", ".join(sorted({str(record.path.parent) for record in records})) or folder
    print(f"{len(records)} records in {places}; only those of profile paper fill a cell\n")
    captions = {"cifar": "Error (%), standard augmentation", "search": "CIFAR-10 error (%) with cutout",
                "imagenet": "ImageNet error (%)"}  # fmt: skip
    for name, caption in captions.items():
        print(report.as_text(report.paper_beside_ours(name, records), caption), end="\n\n")
    print(report.as_text(report.others_at_the_papers_schedule(records), "Not on the poster"), end="\n\n")
    print(report.as_text(report.paths_at_the_papers_schedule(records), "Grids solved exactly (share) by phase"))
    return 0


def _gpu(arguments: argparse.Namespace) -> int:
    from .gpu_list import run_list
    from .training import pick_device

    device = str(pick_device(arguments.device))
    return run_list(
        arguments.hours,
        arguments.rehearse,
        device,
        arguments.runs,
        arguments.checkpoints,
        arguments.parallel,
        arguments.download,
    )
