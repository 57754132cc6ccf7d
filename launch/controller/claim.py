"""Which attempt a process may lead: never one that another leads, and none that was cancelled.

A scheduler may start a job whose submission nobody heard the end of, or start one once more after a cancel.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from mikoshi.launch.runs.record import Attempt, Result, Submitted
from mikoshi.trainer.errors import LaunchError
from mikoshi.trainer.exit_codes import PREEMPTED


def given(arguments: list[str]) -> Path:
    """The run folder that controller.head was started for, by its arguments. Raises LaunchError."""
    if arguments[:1] != ["--list"]:
        return Path(arguments[0])
    try:
        folders = json.loads(Path(arguments[1]).read_text(encoding="utf-8"))
        return Path(folders[int(os.environ["SLURM_ARRAY_TASK_ID"])])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise LaunchError(f"{arguments[1]}: which run this task of a sweep is cannot be read: {error}") from None


def job_here(run: Submitted) -> str:
    """What the scheduler calls the job that this process is in; empty where that tells nothing."""
    if run.spec.cluster.kind != "slurm":
        return ""
    from mikoshi.launch.backends.slurm.commands import own_job

    return own_job(os.environ.get("SLURM_JOB_ID", ""))


def next_attempt(run: Submitted, job: str = "") -> Attempt:
    """The newest attempt if it has not been started, else another like it, without the nodes that were bad. job: what the
    scheduler calls the job that asks. Raises LaunchError for one that is not this run's, or that was told to stop: a scheduler
    may start a job of which nobody knew, or once more after a cancel."""
    if not run.attempts:
        raise LaunchError(f"{run.folder.path}: nothing of this run was asked for: `mikoshi resume` does so")
    newest = run.attempts[-1]
    known = newest.job.get("id", "")
    if job and known and job != known:
        raise LaunchError(f"{newest.path}: it is job {known} that leads it: job {job} ends")
    if (stop := newest.stop) is not None:
        if newest.started is None:  # so that the record says what became of it, also where whoever cancelled it had no answer
            why = f"asked to by {stop.by}, before it had started"
            newest.write(Result(state="cancelled", code=PREEMPTED, why=why, time=time.time()))
        raise LaunchError(f"{newest.path}: {stop.by} has cancelled it: `mikoshi resume` goes on")
    if newest.started is None:
        return newest
    again = run.add(newest.request.model_copy(update={"cause": "requeue", "bad": newest.found_bad, "time": time.time()}))
    again.write_job(newest.job)
    return again
