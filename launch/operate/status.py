"""Derives the state of a run from the records of its newest attempt and the scheduler's answer."""

from __future__ import annotations

import fcntl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mikoshi.launch.backends.base import JobState
from mikoshi.launch.runs.record import Attempt, Request, Result, Started, Status, Stop

State = Literal[
    "queued", "starting", "running", "stopping", "requeued", "done", "cancelled", "stopped", "failed", "lost"
]  # fmt: skip
FINAL: tuple[State, ...] = ("done", "cancelled", "stopped", "failed", "lost")
"""States that a run only leaves when someone resumes it."""

LIVENESS_TIMEOUT = 60.0
"""Seconds without a new status.json after which a run counts as lost, if no scheduler can be asked. The file is rewritten every
two seconds, but shared file systems may show an old one for so long."""


@dataclass(frozen=True)
class Records:
    """The records of an attempt.

    handed_over: whether its job was recorded, even if that record is damaged
    """

    number: int
    request: Request
    job: Mapping[str, str]
    started: Started | None = None
    status: Status | None = None
    stop: Stop | None = None
    result: Result | None = None
    handed_over: bool = True

    @property
    def open(self) -> bool:
        """Whether the scheduler may know more than the folder."""
        return self.result is None or self.result.next == "requeued"


def records_of(attempt: Attempt, ended: tuple[Mapping[str, str], Result] | None = None) -> Records:
    """Read the records of an attempt. Raises LaunchError where one is damaged.

    ended: job and result of an attempt that has ended for good, if they are known
    """
    request, started, status = attempt.request, attempt.started, attempt.status
    job, result = (attempt.job, attempt.result) if ended is None else ended
    stop = attempt.stop if ended is None else None
    handed_over = started is not None or (attempt.path / "job.json").exists()
    return Records(attempt.number, request, job, started, status, stop, result, handed_over)


def state_of(records: Records | None, job: JobState | None, now: float) -> tuple[State, str]:
    """Return the state of a run and the reason, which may be "".

    records: of the newest attempt; None if there is none
    job: the scheduler's answer, asked for before the records were read; None if it could not be asked
    now: Unix time
    """
    if records is None:
        return "lost", "it was never handed to the cluster"
    if records.result is not None:
        return _state_after_result(records, records.result, job)
    job_state = job.state if job is not None else "unknown"
    why = job.why if job is not None else ""
    if job_state == "queued":
        return ("requeued" if records.started else "queued"), why
    if job_state == "running" and _is_remote(records) and records.stop is None:
        return "running", why or "its progress is in the run folder on the cluster's disk"
    if job_state == "running":
        return _live_state(records), why
    if job_state == "ended":
        return _state_without_job(records, why)
    return _state_from_folder(records, now, why)


def _state_after_result(records: Records, result: Result, job: JobState | None) -> tuple[State, str]:
    state: State = "failed" if result.state == "refused" else result.state
    if result.next != "requeued":
        return state, result.why
    if job is None or job.state != "ended":
        return "requeued", (job.why if job is not None and job.why else result.why)
    if records.stop is not None:
        return "cancelled", f"by {records.stop.by}, while it was queued again"
    return state, f"{result.why}; it was queued again, and left the queue without a start"


def _is_remote(records: Records) -> bool:
    """Whether the run folder is on a disk of the cluster, so that the JobSet's state is all that is known."""
    return records.job.get("kind") == "kubernetes" and records.started is None and bool(records.job.get("apart", "yes"))


def _live_state(records: Records) -> State:
    if records.stop is not None:
        return "stopping"
    return records.status.phase if records.status is not None else "starting"


def _state_without_job(records: Records, why: str) -> tuple[State, str]:
    """The state if the scheduler no longer knows the job, and there is no result."""
    more = f" ({why})" if why else ""
    if _is_remote(records) and why == "Completed":
        return "done", ""
    if _is_remote(records) and records.stop is None and "deleted" not in why:
        return "failed", why
    if records.stop is not None:
        how = "at once" if records.stop.now else "before it had saved"
        return "cancelled", f"by {records.stop.by}; ended {how}{more}" if records.started else f"by {records.stop.by}{more}"
    if records.started is None:
        return "lost", f"it left the queue without a start{more}"
    return "lost", f"its head on {records.started.host} ended without a word{more}"


def _state_from_folder(records: Records, now: float, why: str) -> tuple[State, str]:
    """The state if no scheduler can be asked, from the last sign of life in the folder."""
    if records.started is None and not records.handed_over and now - records.request.time > LIVENESS_TIMEOUT:
        # If it has a job after all, that job ends as soon as another attempt is led: see controller.claim.
        return "lost", "it was cut off while it was handed to the cluster"
    if records.started is None:
        return "queued", why
    last = max(records.started.time, records.status.time if records.status is not None else 0.0)
    if now - last > LIVENESS_TIMEOUT:
        return "lost", why or f"no sign of life from {records.started.host}"
    return _live_state(records), why


def state_of_plain(locked: bool, events: Sequence[Mapping[str, Any]], now: float) -> tuple[State, str]:
    """The same for a run that `mikoshi train` started here.

    locked: whether a process holds the run's lock
    events: its last events
    """
    kinds = [str(event.get("event")) for event in events]
    last = events[-1] if events else {}
    if locked and kinds[-1:] == ["stop"]:
        return "stopping", ""
    if locked and kinds[-1:] != ["restart"]:
        return "running", ""
    if locked:
        return "starting", "after a fault"
    if not events:
        return "lost", "it has recorded nothing"
    if kinds[-1] == "end":
        return ("done", "") if last.get("finished") else ("stopped", "saved on request")
    if kinds[-1] == "restart" and now - _number(last.get("time")) < LIVENESS_TIMEOUT:
        return "starting", "after a fault"
    if kinds[-1] == "fault":
        return "failed", f"rank {last.get('rank')} {last.get('how', 'failed')}"
    return "lost", "its process ended without a word"


def is_locked(folder: Path) -> bool:
    """Whether a process trains in this run folder now. The check does not delay a run that is about to start."""
    try:
        with (folder / ".lock").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # it does not exist, or cannot be read
        return False
    return False


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0
