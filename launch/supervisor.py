"""What starts, watches and starts again the ranks of this machine: a fault costs seconds, and no process is left behind."""

from __future__ import annotations

import contextlib
import itertools
import logging
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from launch.agent import NURSERY_GONE, Attempt, Ranks, Requests
from launch.forked import warm
from launch.policy import Fault, Streak, Verdict, judge
from launch.private import private_folder
from launch.watch import keep_stacks
from trainer.exit_codes import DIVERGED, DONE, FAULT, LOST_PEER, PREEMPTED, USER_ERROR
from trainer.runfolder import RunFolder, read_jsonl
from trainer.sections import RecoverySection
from trainer.stop import ASKING, heard

__all__ = ["Job", "supervise", "warm"]


@dataclass(frozen=True)
class Job:
    """What to run. work: an importable function, called in every rank as work(*arguments), which returns its exit code;
    its place is in the environment as torchrun puts it there, this process's id in MIKOSHI_SUPERVISOR.
    folder: where events and stacks go, and whose saves count as progress; without one, silence is no fault.
    """

    ranks: int
    work: Callable[..., int]
    arguments: tuple[Any, ...] = ()
    folder: RunFolder | None = None
    policy: RecoverySection = field(default_factory=lambda: RecoverySection(restarts=0))


def supervise(job: Job) -> int:
    """Run a job to its end, over faults; its exit code: DONE, PREEMPTED, USER_ERROR, FAULT or HANG. For the main thread.

    The signals of trainer.stop.ASKING go on to every rank, which have `policy.grace` seconds to save; a second SIGINT ends
    them at once. A rank that dies or falls silent ends its peers, and all start again as the policy has it.
    """
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # how the ranks end is told below, in our words
    requests = Requests(job.policy.grace)
    with _asked(requests), warm(job.ranks), private_folder() as private:
        streak = Streak()
        for number in itertools.count():
            if requests.asked:
                return PREEMPTED
            attempt = Attempt(number, job.ranks, job.work, job.arguments, job.policy, job.folder is not None, private)
            ranks, before = Ranks(attempt, requests), len(_events(job.folder))
            ranks.run()
            code, fault = outcome(ranks)
            if code is not None:
                return code
            assert fault is not None
            events = _events(job.folder)[before:]
            streak, verdict = judge(streak, fault, bool(_steps(events, "save")), job.policy)
            _record(job.folder, ranks, fault)
            if requests.asked:
                return _stopped(fault, events)
            _say(fault, verdict, job.policy.restarts)
            if not verdict.restart:
                return verdict.code
            if job.folder is not None:
                job.folder.event("restart", number=number + 1, pause=verdict.pause)
            _wait(verdict.pause, requests)
    raise AssertionError("an endless count has ended")


def outcome(ranks: Ranks) -> tuple[int | None, Fault | None]:
    """An attempt's exit code, or what went wrong in it."""
    codes = ranks.codes
    refused = USER_ERROR in codes.values()
    if refused and not ranks.attempt.number:
        if codes.get(0) != USER_ERROR:  # else rank 0 has said it itself
            _tell(f"error: {ranks.said(next(rank for rank, code in codes.items() if code == USER_ERROR))}")
        return USER_ERROR, None
    if ranks.hang is not None and not refused:  # else it is one that waits for those that ended
        kind = "is stopped (SIGSTOP, or a debugger)" if ranks.hang.stopped else "fell silent"
        return None, _fault(ranks, "hang", ranks.hang.rank, f"{kind}: no sign of life for {ranks.hang.seconds:.1f} s")
    stopped = {PREEMPTED, *(-number for number in ASKING)}
    wrong = [rank for rank, code in codes.items() if code != DONE and code not in stopped]
    # One that is asked to stop before its first step ends there and then, and those that have come further lose it.
    if wrong and not (stopped & set(codes.values()) and all(codes[rank] == LOST_PEER for rank in wrong)):
        return None, _first(ranks, wrong)
    if ranks.overdue:
        if ranks.requests.at_once:
            _tell("error: ended at once at the second Ctrl-C; the newest checkpoint is what there is")
        else:
            who = ", ".join(map(str, ranks.overdue))
            _tell(f"error: rank {who}: not ended {ranks.requests.grace:g} s after a signal to stop (recovery.grace): killed")
        return FAULT, None
    return (PREEMPTED if any(codes.values()) else DONE), None


def _first(ranks: Ranks, wrong: list[int]) -> Fault:
    """The fault that the others follow from: a rank that dies takes its peers' connections with it."""
    codes = ranks.codes
    own = [rank for rank in wrong if codes[rank] != LOST_PEER]
    rank = min(own, key=lambda r: (codes[r] != -signal.SIGKILL, codes[r] >= 0, ranks.said_at(r))) if own else wrong[0]
    code, said = codes[rank], ranks.said(rank)
    if code == LOST_PEER:
        return _fault(ranks, "lost", rank, "lost its connection to another rank, none of which had died")
    if code == DIVERGED:
        return _fault(ranks, "diverged", rank, f"ended: {said}" if said else "ended: replicas of the same weights differ")
    if code == NURSERY_GONE:
        return _fault(ranks, "killed", rank, "was killed with the process that all ranks are forked from")
    if code == -signal.SIGKILL:
        return _fault(ranks, "killed", rank, "was killed (SIGKILL)")
    line = said.splitlines()[0][:300] if said else ""
    if code == USER_ERROR:  # in a restart: what was fine at the first start is an outage now
        told = f"exit code {code} ({line})" if line else f"exit code {code}, as it has said"
        return replace(_fault(ranks, "crash", rank, f"ended with {told}", line), refused=True)
    how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
    return _fault(ranks, "crash", rank, f"ended with {how}{f' ({line})' if line else ''}", line or (how if code < 0 else ""))


def _fault(ranks: Ranks, cause: Any, rank: int, how: str, error: str = "") -> Fault:
    hang = ranks.hang
    page = hang.page if hang and hang.rank == rank else ranks.watch.read(rank, ranks.attempt.files(rank).page)
    return Fault(cause, rank, page.step if page else -1, page.phase if page else "", how, error)


def _record(folder: RunFolder | None, ranks: Ranks, fault: Fault) -> None:
    """Into the run's events; of a hang the stacks as well, which the user is told of."""
    if folder is None:
        return
    more = {} if ranks.hang is None else {"seconds": round(ranks.hang.seconds, 1)}
    folder.event("fault", cause=fault.cause, rank=fault.rank, step=fault.step, phase=fault.phase, how=fault.how, **more)
    if ranks.hang is not None:
        number = ranks.attempt.number
        files = {rank: ranks.attempt.files(rank).stacks for rank in ranks.processes if rank not in ranks.codes}
        header = f"{time.strftime('%F %T')}: rank {fault.rank} {fault.how}{fault.where}"
        _tell(f"stacks of every rank: {keep_stacks(folder, files, number, header)}/attempt-{number}-rank-*.txt")


def _say(fault: Fault, verdict: Verdict, restarts: int) -> None:
    told = f"rank {fault.rank} {fault.how}{fault.where}"
    if verdict.restart:
        when = f"in {verdict.pause:g} s" if verdict.pause else "now"
        _tell(f"{told}; restart {verdict.number} of {restarts} {when}")
    else:
        _tell(f"error: {told}; the other ranks were ended{f'. {verdict.why}' if verdict.why else ''}")


def _stopped(fault: Fault, events: list[dict[str, Any]]) -> int:
    """The exit code of a run in which something went wrong while it stopped, with the events of that attempt. PREEMPTED only
    where nothing is lost: the step it stopped after is saved, or there was none yet."""
    saved = _steps(events, "save") & (_steps(events, "stop") | _steps(events, "end"))
    rest = f"step {max(saved)} is saved" if saved else "the newest checkpoint is what there is"
    _tell(f"error: rank {fault.rank} {fault.how}{fault.where}, after a signal to stop; {rest}")
    if saved or (fault.step < 1 and fault.cause not in ("crash", "diverged")):
        return PREEMPTED
    return USER_ERROR if fault.refused else FAULT


def _events(folder: RunFolder | None) -> list[dict[str, Any]]:
    return [] if folder is None else read_jsonl(folder.events)


def _steps(events: list[dict[str, Any]], kind: str) -> set[int]:
    """Of the events of a kind."""
    return {event["step"] for event in events if event.get("event") == kind and "step" in event}


def _wait(seconds: float, requests: Requests) -> None:
    """A pause, which a signal to stop ends."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and not requests.asked:
        time.sleep(0.05)


def _tell(text: str) -> None:
    with contextlib.suppress(OSError):  # whoever reads it may be gone; the ranks are not
        print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _asked(requests: Requests) -> Iterator[None]:
    """Signals to stop are requests from here on; the handlers of before come back at the end."""
    before = {number: signal.signal(number, requests.ask) for number in heard()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
