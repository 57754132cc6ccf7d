"""What starts, watches and starts again the ranks of this machine: a fault costs seconds, and no process is left behind."""

from __future__ import annotations

import contextlib
import itertools
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from mikoshi.launch.agent.fork_server import warm
from mikoshi.launch.agent.outcome import MILD, Ended
from mikoshi.launch.agent.rendezvous import Meeting
from mikoshi.launch.agent.requests import Requests
from mikoshi.launch.agent.worker_group import NURSERY_GONE, Attempt, Ranks
from mikoshi.launch.controller.restart_policy import Fault, Streak, Verdict, judge
from mikoshi.launch.host.private_folder import private_folder
from mikoshi.trainer.config.data import RecoverySection
from mikoshi.trainer.exit_codes import DIVERGED, DONE, FAULT, LOST_PEER, PREEMPTED, USER_ERROR
from mikoshi.trainer.record.run_folder import RunFolder, read_jsonl
from mikoshi.trainer.signals import ASKING, heard

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
    """Run a job to its end on this machine, over faults; its exit code: DONE, PREEMPTED, USER_ERROR, FAULT or HANG. For the
    main thread.

    The signals of signals.ASKING go on to every rank, which have `policy.grace` seconds to save; a second SIGINT ends
    them at once. A rank that dies or falls silent ends its peers, and all start again as the policy has it.
    """
    requests = Requests(job.policy.grace)
    with asked(requests), warm(job.ranks), private_folder() as private:

        def carry(number: int) -> Ended:
            meeting = Meeting()  # open for as long as the attempt lasts
            place = meeting.alone(job.ranks)
            return Ranks(Attempt(number, place, job.work, job.arguments, job.policy, job.folder, private), requests).run()

        return persist(carry, requests, job.folder, job.policy)


def persist(
    carry: Callable[[int], Ended],
    requests: Requests,
    folder: RunFolder | None,
    policy: RecoverySection,
    note: Callable[[Fault, bool, Verdict], None] = lambda *_: None,
    again: bool = False,
    idle: Callable[[], None] = lambda: time.sleep(0.05),
) -> int:
    """Carry a run to its end, attempt after attempt as the policy has it, wherever its ranks are; the run's exit code.

    carry: one attempt, by its number. Its faults and restarts go into the run's events and onto stderr. note: called with each
    fault, whether a checkpoint was saved since the one before, and what follows. again: its like has started before. idle: what
    is done in a pause, again and again, a moment each.
    """
    streak = Streak()
    for number in itertools.count():
        if requests.asked:
            return PREEMPTED
        before = len(_events(folder))
        ended = carry(number)
        if not requests.asked and _made_way(ended):
            continue
        code, fault = outcome(ended, number or int(again), requests)
        if code is not None:
            return code
        assert fault is not None
        events = _events(folder)[before:]
        saved = bool(_steps(events, "save"))
        streak, verdict = judge(streak, fault, saved, policy)
        note(fault, saved, verdict)
        _record(folder, ended, fault)
        if requests.asked:
            return _stopped(fault, events)
        _say(fault, verdict, policy.restarts)
        if not verdict.restart:
            return verdict.code
        if folder is not None:
            folder.event("restart", number=number + 1, pause=verdict.pause)
        pause(verdict.pause, requests, idle)
    raise AssertionError("an endless count has ended")


def _made_way(ended: Ended) -> bool:
    """Whether an attempt was ended for one on more nodes, and by nothing else, however far each rank had come."""
    mild = {*MILD} - {USER_ERROR}
    return ended.regroup and not ended.lost and ended.silent is None and set(ended.codes.values()) <= mild and not _done(ended)


def _done(ended: Ended) -> bool:
    return len(ended.codes) == ended.ranks and not any(ended.codes.values())


def outcome(ended: Ended, number: int, requests: Requests) -> tuple[int | None, Fault | None]:
    """The exit code of attempt `number`, or what went wrong in it. A user's error is one only at the very first start."""
    codes = ended.codes
    refused = USER_ERROR in codes.values()
    if refused and not number:
        if codes.get(0) != USER_ERROR:  # else rank 0 has said it itself
            tell(f"error: {ended.said.get(next(rank for rank, code in codes.items() if code == USER_ERROR), '')}")
        return USER_ERROR, None
    if ended.lost and not refused:
        node, why = next(iter(ended.lost.items()))
        rank = min((rank for rank, at in ended.nodes.items() if at == node), default=0)
        return None, _fault(ended, "node", rank, f"was lost with its node: {why}")
    if ended.silent is not None and not refused:  # else it is one that waits for those that ended
        kind = "is stopped (SIGSTOP, or a debugger)" if ended.silent.stopped else "fell silent"
        seconds = ended.silent.seconds
        return None, _fault(ended, "hang", ended.silent.rank, f"{kind}: no sign of life for {seconds:.1f} s")
    stopped = {PREEMPTED, *(-number for number in ASKING)}
    wrong = [rank for rank, code in codes.items() if code != DONE and code not in stopped]
    # One that is asked to stop before its first step ends there and then, and those that have come further lose it.
    if wrong and not (stopped & set(codes.values()) and all(codes[rank] == LOST_PEER for rank in wrong)):
        return None, _first(ended, wrong)
    if ended.overdue:
        if requests.at_once:
            tell("error: ended at once at the second Ctrl-C; the newest checkpoint is what there is")
        else:
            who = ", ".join(map(str, ended.overdue))
            tell(f"error: rank {who}: not ended {requests.grace:g} s after a signal to stop (recovery.grace): killed")
        return FAULT, None
    if not codes:  # ended before any rank could say something
        return (PREEMPTED if requests.asked else FAULT), None
    return (PREEMPTED if any(codes.values()) else DONE), None


def _first(ended: Ended, wrong: list[int]) -> Fault:
    """The fault that the others follow from."""
    rank = ended.first(wrong, LOST_PEER, -signal.SIGKILL)
    code, said = ended.codes[rank], ended.said.get(rank, "")
    if code == LOST_PEER:
        return _fault(ended, "lost", rank, "lost its connection to another rank, none of which had died")
    if code == DIVERGED:
        return _fault(ended, "diverged", rank, f"ended: {said}" if said else "ended: replicas of the same weights differ")
    if code == NURSERY_GONE:
        return _fault(ended, "killed", rank, "was killed with the process that all ranks are forked from")
    if code == -signal.SIGKILL:
        return _fault(ended, "killed", rank, "was killed (SIGKILL)")
    line = said.splitlines()[0][:300] if said else ""
    if code == USER_ERROR:  # in a restart: what was fine at the first start is an outage now
        told = f"exit code {code} ({line})" if line else f"exit code {code}, as it has said"
        return replace(_fault(ended, "crash", rank, f"ended with {told}", line), refused=True)
    how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
    return _fault(ended, "crash", rank, f"ended with {how}{f' ({line})' if line else ''}", line or (how if code < 0 else ""))


def _fault(ended: Ended, cause: Any, rank: int, how: str, error: str = "") -> Fault:
    step, phase = ended.at.get(rank, (-1, ""))
    return Fault(cause, rank, step, phase, how, error, node=ended.nodes.get(rank, ""))


def _record(folder: RunFolder | None, ended: Ended, fault: Fault) -> None:
    """Into the run's events; where stacks were kept, the user is told."""
    if folder is None:
        return
    more: dict[str, Any] = {} if ended.silent is None else {"seconds": round(ended.silent.seconds, 1)}
    if fault.node:
        more["node"] = fault.node
    folder.event("fault", cause=fault.cause, rank=fault.rank, step=fault.step, phase=fault.phase, how=fault.how, **more)
    if ended.stacks:
        tell(f"stacks of every rank: {ended.stacks}")


def _say(fault: Fault, verdict: Verdict, restarts: int) -> None:
    told = f"{fault.who} {fault.how}{fault.where}"
    if verdict.restart:
        when = f"in {verdict.pause:g} s" if verdict.pause else "now"
        tell(f"{told}; restart {verdict.number} of {restarts} {when}")
    else:
        tell(f"error: {told}; the other ranks were ended{f'. {verdict.why}' if verdict.why else ''}")


def _stopped(fault: Fault, events: list[dict[str, Any]]) -> int:
    """The exit code of a run in which something went wrong while it stopped, with the events of that attempt. PREEMPTED only
    where nothing is lost: the step it stopped after is saved, or there was none yet."""
    saved = _steps(events, "save") & (_steps(events, "stop") | _steps(events, "end"))
    rest = f"step {max(saved)} is saved" if saved else "the newest checkpoint is what there is"
    tell(f"error: {fault.who} {fault.how}{fault.where}, after a signal to stop; {rest}")
    if saved or (fault.step < 1 and fault.cause not in ("crash", "diverged")):
        return PREEMPTED
    return USER_ERROR if fault.refused else FAULT


def _events(folder: RunFolder | None) -> list[dict[str, Any]]:
    return [] if folder is None else read_jsonl(folder.events)


def _steps(events: list[dict[str, Any]], kind: str) -> set[int]:
    """Of the events of a kind."""
    return {event["step"] for event in events if event.get("event") == kind and "step" in event}


def pause(seconds: float, requests: Requests, idle: Callable[[], None]) -> None:
    """Do nothing but `idle`, until a signal asks to stop at the latest."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and not requests.asked:
        idle()


def tell(text: str) -> None:
    """On stderr."""
    with contextlib.suppress(OSError):  # whoever reads it may be gone; the ranks are not
        print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def asked(requests: Requests) -> Iterator[None]:
    """Signals to stop are requests from here on; the handlers of before come back at the end."""
    before = {number: signal.signal(number, requests.ask) for number in heard()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
