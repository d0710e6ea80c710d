"""The reproduction as a pipeline: recipes x seeds x data sets -> records -> folds -> verdicts -> executed chapters -> the site.

`make reproduce` writes the plan that this carries out and starts it, here or through a cluster's queue; the page "From one
GPU to a cluster" of the book explains both. A record's name stands for everything that decides its outcome, so a job is up to
date if its record exists, and times of files mean nothing.
"""

import json
from pathlib import Path

PLAN = json.loads(Path(config["plan"]).read_text(encoding="utf-8"))
RUNS, FOLDS, CHAPTERS = ({each["name"]: each for each in PLAN[kind]} for kind in ("runs", "folds", "chapters"))
JOBS = RUNS | FOLDS | CHAPTERS


def of(field):
    """What the plan says of a job."""
    return lambda wildcards: JOBS[wildcards.name][field]


def growing(field):
    """The same, once more with every attempt."""
    return lambda wildcards, attempt: attempt * JOBS[wildcards.name][field]


def among(jobs):
    """The pattern of these jobs' names."""
    return "|".join(map(re.escape, jobs)) or "none"


localrules: records, verdicts, site


rule records:
    input: [each["output"] for each in (RUNS | FOLDS).values()]


rule run:
    output: PLAN["folder"] + "/{name," + among(RUNS) + "}.json"
    # Not `log:`, since Snakemake empties such a file before each attempt.
    params: command=of("command"), log=of("log"), logs=PLAN["logs"]
    threads: of("threads")
    priority: of("priority")
    resources: runtime=growing("minutes"), mem_mb=growing("memory"), gpu=of("gpus"), devices=of("devices")
    shell: "{params.command} >> {params.log:q} 2>&1"


use rule run as fold with:
    input: lambda wildcards: ancient(FOLDS[wildcards.name]["needs"])
    output: PLAN["folder"] + "/{name," + among(FOLDS) + "}.json"


use rule run as chapter with:
    input: lambda wildcards: ancient(CHAPTERS[wildcards.name]["needs"])
    output: touch(PLAN["pages"] + "/{name," + among(CHAPTERS) + "}.done")


rule verdicts:
    output: PLAN["verdicts"]["output"]
    log: PLAN["verdicts"]["log"]
    params: command=PLAN["verdicts"]["command"]
    shell: "{params.command} > {output:q} 2>> {log:q}"


rule site:
    input: [each["output"] for each in CHAPTERS.values()], rules.verdicts.output
    output: touch(PLAN["site"]["output"])
    log: PLAN["site"]["log"]
    params: command=PLAN["site"]["command"]
    shell: "{params.command} >> {log:q} 2>&1"
