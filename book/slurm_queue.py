"""Stands between Snakemake and Slurm's queue.

    python slurm_queue.py submit OPTIONS SCRIPT    sbatch, unless the job is in the queue already; prints its number
    python slurm_queue.py status NUMBER            prints running, success or failed

A job stays in the queue when the machine that sent it goes down. The same command, given again, then finds it by its name
and folder instead of sending it a second time.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence

DONE = {"COMPLETED"}
RUNNING = {"PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "RESIZING",
           "STAGE_OUT", "SIGNALING", "SPECIAL_EXIT", "STOPPED"}  # fmt: skip


def submit(arguments: Sequence[str]) -> int:
    """Print the number of the job with that name that was sent from this folder, or send it; returns sbatch's status."""
    (name,) = (text.removeprefix("--job-name=") for text in arguments if text.startswith("--job-name="))
    waiting = ["squeue", "--me", "--states=PENDING,RUNNING,CONFIGURING,SUSPENDED", f"--name={name}"]
    for line in asked(*waiting, "--noheader", "--format=%A|%Z").stdout.splitlines():
        number, _, folder = line.strip().partition("|")
        if os.path.realpath(folder) == os.path.realpath(os.getcwd()):
            print(number)
            return 0
    return subprocess.run(["sbatch", "--parsable", *arguments], check=False).returncode


def status(number: str) -> str:
    """What became of a job, by its number as `sbatch --parsable` prints it, in the words that Snakemake knows.

    Asks `scontrol`, which knows a job until some minutes after its end, and then `sacct`, where there is accounting. Without
    a word from either, a job counts as running as long as the controller cannot be reached, and as failed if that does not
    know the job.
    """
    number = number.strip().partition(";")[0]
    shown = asked("scontrol", "show", "job", "--oneliner", number)
    state = re.search(r"\bJobState=(\S+)", shown.stdout)
    if state:
        return word(state[1])
    kept = asked("sacct", "--jobs", number, "--allocations", "--noheader", "--parsable2", "--format=State")
    if kept.stdout.strip():
        return word(kept.stdout.strip().splitlines()[0])
    return "failed" if "Invalid job id" in shown.stderr else "running"


def word(state: str) -> str:
    state = state.split()[0].rstrip("+") if state.split() else ""
    return "success" if state in DONE else "running" if state in RUNNING else "failed"


def asked(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))


if __name__ == "__main__":
    if sys.argv[1] == "submit":
        sys.exit(submit(sys.argv[2:]))
    print(status(sys.argv[2]))
