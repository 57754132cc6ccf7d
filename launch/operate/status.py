"""In which state a run is: a function of what its newest attempt has left in its folder, and of what the scheduler says."""

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
"""States in which nothing happens any more unless someone resumes the run."""

SIGN = 60.0
"""Seconds without a sign of life, which is given every two, after which a run that no scheduler answers for counts as lost:
shared file systems may show an old file for up to so long."""


@dataclass(frozen=True)
class Records:
    """What an attempt has left in its folder. handed_over: whether there is a record of its job, also a damaged one."""

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
    """`ended`: the job and the result of one that has ended for good, where they are known: who asked it to stop then tells
    nothing more. Raises LaunchError where a record is damaged."""
    request, started, status = attempt.request, attempt.started, attempt.status
    job, result = (attempt.job, attempt.result) if ended is None else ended
    stop = attempt.stop if ended is None else None
    handed_over = started is not None or (attempt.path / "job.json").exists()
    return Records(attempt.number, request, job, started, status, stop, result, handed_over)


def state_of(records: Records | None, job: JobState | None, now: float) -> tuple[State, str]:
    """The state of a run whose newest attempt has these records, and why, "" where there is nothing to say. job: what the
    scheduler says of it, asked before the records were read; None where nobody could be asked. now: seconds, as time.time().
    """
    if records is None:
        return "lost", "it was never handed to the cluster"
    if records.result is not None:
        return _ended(records, records.result, job)
    said = job.state if job is not None else "unknown"
    why = job.why if job is not None else ""
    if said == "queued":
        return ("requeued" if records.started else "queued"), why
    if said == "running" and _apart(records) and records.stop is None:
        return "running", why or "its progress is in the run folder on the cluster's disk"
    if said == "running":
        return _alive(records), why
    if said == "ended":
        return _vanished(records, why)
    return _unanswered(records, now, why)


def _ended(records: Records, result: Result, job: JobState | None) -> tuple[State, str]:
    state: State = "failed" if result.state == "refused" else result.state
    if result.next != "requeued":
        return state, result.why
    if job is None or job.state != "ended":
        return "requeued", (job.why if job is not None and job.why else result.why)
    if records.stop is not None:
        return "cancelled", f"by {records.stop.by}, while it was queued again"
    return state, f"{result.why}; it was queued again, and left the queue without a start"


def _apart(records: Records) -> bool:
    """Whether the run's folder is on a disk of the cluster's: what the JobSet says is then all there is."""
    return records.job.get("kind") == "kubernetes" and records.started is None and bool(records.job.get("apart", "yes"))


def _alive(records: Records) -> State:
    if records.stop is not None:
        return "stopping"
    return records.status.phase if records.status is not None else "starting"


def _vanished(records: Records, why: str) -> tuple[State, str]:
    """The scheduler knows of no such job any more, and there is no result."""
    more = f" ({why})" if why else ""
    if _apart(records) and why == "Completed":
        return "done", ""
    if _apart(records) and records.stop is None and "deleted" not in why:
        return "failed", why
    if records.stop is not None:
        how = "at once" if records.stop.now else "before it had saved"
        return "cancelled", f"by {records.stop.by}; ended {how}{more}" if records.started else f"by {records.stop.by}{more}"
    if records.started is None:
        return "lost", f"it left the queue without a start{more}"
    return "lost", f"its head on {records.started.host} ended without a word{more}"


def _unanswered(records: Records, now: float, why: str) -> tuple[State, str]:
    """No scheduler can tell: what the folder's last sign of life is worth."""
    if records.started is None and not records.handed_over and now - records.request.time > SIGN:
        # Should there be a job of it all the same, it ends where another attempt is led: see controller.claim.
        return "lost", "it was cut off while it was handed to the cluster"
    if records.started is None:
        return "queued", why
    last = max(records.started.time, records.status.time if records.status is not None else 0.0)
    if now - last > SIGN:
        return "lost", why or f"no sign of life from {records.started.host}"
    return _alive(records), why


def state_of_plain(held: bool, events: Sequence[Mapping[str, Any]], now: float) -> tuple[State, str]:
    """The same of a run that `mikoshi train` started here. held: whether a process holds its lock; events: its last ones."""
    kinds = [str(event.get("event")) for event in events]
    last = events[-1] if events else {}
    if held and kinds[-1:] == ["stop"]:
        return "stopping", ""
    if held and kinds[-1:] != ["restart"]:
        return "running", ""
    if held:
        return "starting", "after a fault"
    if not events:
        return "lost", "it has recorded nothing"
    if kinds[-1] == "end":
        return ("done", "") if last.get("finished") else ("stopped", "saved on request")
    if kinds[-1] == "restart" and now - _number(last.get("time")) < SIGN:
        return "starting", "after a fault"
    if kinds[-1] == "fault":
        return "failed", f"rank {last.get('rank')} {last.get('how', 'failed')}"
    return "lost", "its process ended without a word"


def held(folder: Path) -> bool:
    """Whether a process trains in this run folder now. Looks, and takes nothing from a run that is about to start."""
    try:
        with (folder / ".lock").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # there is none, or it is not ours to read
        return False
    return False


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0
