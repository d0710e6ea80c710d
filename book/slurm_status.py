"""Tells Snakemake what became of a job in Slurm's queue: running, success or failed.

Asks `scontrol`, which knows a job until some minutes after its end, and then `sacct`, where there is accounting. Without a
word from either, a job counts as running as long as the controller cannot be reached, and as failed if it does not know it.
"""

from __future__ import annotations

import re
import subprocess
import sys

DONE = {"COMPLETED"}
RUNNING = {"PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "RESIZING",
           "STAGE_OUT", "SIGNALING", "SPECIAL_EXIT", "STOPPED"}  # fmt: skip


def word(state: str) -> str:
    """The state of a job in the words that Snakemake knows."""
    state = state.split()[0].rstrip("+") if state.split() else ""
    return "success" if state in DONE else "running" if state in RUNNING else "failed"


def status(job: str) -> str:
    """What became of a job, by its number as `sbatch --parsable` prints it."""
    job = job.strip().partition(";")[0]
    shown = asked("scontrol", "show", "job", "--oneliner", job)
    state = re.search(r"\bJobState=(\S+)", shown.stdout)
    if state:
        return word(state[1])
    kept = asked("sacct", "--jobs", job, "--allocations", "--noheader", "--parsable2", "--format=State")
    if kept.stdout.strip():
        return word(kept.stdout.strip().splitlines()[0])
    return "failed" if "Invalid job id" in shown.stderr else "running"


def asked(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))


if __name__ == "__main__":
    print(status(sys.argv[1]))
