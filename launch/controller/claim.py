"""Decides which attempt a head process may lead: never one that another head leads, and never a cancelled one.

A scheduler may start a job although its submission seemed to fail, or start a job again after it was cancelled.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from mikoshi.launch.runs.record import Attempt, Result, SubmittedRun
from mikoshi.trainer.errors import LaunchError
from mikoshi.trainer.exit_codes import PREEMPTED


def folder_from_arguments(arguments: list[str]) -> Path:
    """Return the run folder that `controller.head` was started for, from its arguments. Raises LaunchError."""
    if arguments[:1] != ["--list"]:
        return Path(arguments[0])
    try:
        folders = json.loads(Path(arguments[1]).read_text(encoding="utf-8"))
        return Path(folders[int(os.environ["SLURM_ARRAY_TASK_ID"])])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise LaunchError(f"{arguments[1]}: which run this task of a sweep is cannot be read: {error}") from None


def current_job(run: SubmittedRun) -> str:
    """Return the scheduler's id of the job that this process runs in, or "" outside of Slurm."""
    if run.spec.cluster.kind != "slurm":
        return ""
    from mikoshi.launch.backends.slurm.commands import own_job_id

    return own_job_id(os.environ.get("SLURM_JOB_ID", ""))


def claim_attempt(run: SubmittedRun, job: str = "") -> Attempt:
    """Return the newest attempt if it has not started yet, else a new one without the nodes that were found bad.

    Raises LaunchError if the attempt belongs to another job or was cancelled.

    job: the scheduler's id of the job that claims the attempt
    """
    if not run.attempts:
        raise LaunchError(f"{run.folder.path}: nothing of this run was asked for: `mikoshi resume` does so")
    newest = run.attempts[-1]
    known = newest.job.get("id", "")
    if job and known and job != known:
        raise LaunchError(f"{newest.path}: it is job {known} that leads it: job {job} ends")
    if (stop := newest.stop) is not None:
        if newest.started is None:  # record the result, even if the canceller got no answer
            why = f"asked to by {stop.by}, before it had started"
            newest.write(Result(state="cancelled", code=PREEMPTED, why=why, time=time.time()))
        raise LaunchError(f"{newest.path}: {stop.by} has cancelled it: `mikoshi resume` goes on")
    if newest.started is None:
        return newest
    again = run.add(newest.request.model_copy(update={"cause": "requeue", "bad": newest.nodes_to_avoid, "time": time.time()}))
    again.write_job(newest.job)
    return again
