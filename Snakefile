"""The reproduction as a pipeline: recipes x seeds x data sets -> records -> folds -> verdicts -> executed chapters -> the site.

`make reproduce` writes the plan that this carries out and starts it, here or through a cluster's queue; the page "From one
GPU to a cluster" of the book explains both. A record's name stands for everything that decides its outcome, so a job is up to
date if its record exists, and times of files mean nothing.
"""

from pathlib import Path

if "runs" not in config:
    raise WorkflowError("there is no plan; call `make reproduce PROFILE=fast`, which writes one and starts this")

RUNS, FOLDS, CHAPTERS = ({each["name"]: each for each in config[kind]} for kind in ("runs", "folds", "chapters"))
JOBS = RUNS | FOLDS | CHAPTERS


def of(field):
    """What the plan says of a job."""
    return lambda wildcards: JOBS[wildcards.name][field]


def minutes(wildcards, attempt):
    """As planned, and once more with every attempt, up to the longest that a job may take."""
    return min(attempt * JOBS[wildcards.name]["minutes"], config["longest"])


def memory(wildcards, attempt):
    """As planned, and once more for every attempt that ran out of it, as Slurm then says in the job's log."""
    log = Path(JOBS[wildcards.name]["log"]).with_suffix(".slurm")
    killed = re.findall("exceeded memory limit|oom.kill", log.read_text(errors="replace") if log.exists() else "", re.I)
    return (1 + min(len(killed), attempt - 1)) * JOBS[wildcards.name]["memory"]


def among(jobs):
    """The pattern of these jobs' names."""
    return "|".join(map(re.escape, jobs)) or "none"


localrules: records, verdicts, site


rule records:
    input: [each["output"] for each in (RUNS | FOLDS).values()]


rule run:
    output: config["folder"] + "/{name," + among(RUNS) + "}.json"
    # Not `log:`, since Snakemake empties such a file before each attempt.
    params: command=of("command"), log=of("log"), logs=config["logs"]
    threads: of("threads")
    priority: of("priority")
    resources: runtime=minutes, mem_mb=memory, gpu=of("gpus"), devices=of("devices"), slot=1
    shell:
        "{params.command} >> {params.log:q} 2>&1 || {{ status=$?; "
        "[ $status -le 128 ] || echo killed by signal $((status - 128)) >> {params.log:q}; exit $status; }}"


use rule run as fold with:
    input: lambda wildcards: ancient(FOLDS[wildcards.name]["needs"])
    output: config["folder"] + "/{name," + among(FOLDS) + "}.json"


use rule run as chapter with:
    input: lambda wildcards: ancient(CHAPTERS[wildcards.name]["needs"])
    output: touch(config["pages"] + "/{name," + among(CHAPTERS) + "}.done")


rule verdicts:
    output: config["verdicts"]["output"]
    params: command=config["verdicts"]["command"], log=config["verdicts"]["log"]
    shell: "{params.command} > {output:q}.part 2>> {params.log:q} && mv {output:q}.part {output:q}"


rule site:
    input: [each["output"] for each in CHAPTERS.values()], rules.verdicts.output
    output: touch(config["site"]["output"])
    params: command=config["site"]["command"], log=config["site"]["log"]
    shell: "{params.command} >> {params.log:q} 2>&1"
