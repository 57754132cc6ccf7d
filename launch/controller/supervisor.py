"""Starts, watches and restarts the ranks of this machine, and leaves no process behind."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from mikoshi.launch.agent.fork_server import running_fork_server
from mikoshi.launch.agent.outcome import BENIGN_CODES, RanksOutcome
from mikoshi.launch.agent.rendezvous import Rendezvous
from mikoshi.launch.agent.stop_requests import StopRequests
from mikoshi.launch.agent.worker_group import FORK_SERVER_GONE, WorkerGroup, WorkerGroupSpec
from mikoshi.launch.controller.restart_policy import Fault, FaultStreak, RestartDecision, decide
from mikoshi.launch.host.private_folder import private_folder
from mikoshi.trainer.config.data import RecoverySection
from mikoshi.trainer.exit_codes import DIVERGED, DONE, FAULT, LOST_PEER, PREEMPTED, USER_ERROR
from mikoshi.trainer.record.run_folder import RunFolder, read_jsonl
from mikoshi.trainer.signals import STOP_SIGNALS, handled_signals

__all__ = ["Job", "running_fork_server", "supervise"]


@dataclass(frozen=True)
class Job:
    """What to run.

    function: an importable function, called in every rank as function(*arguments), that returns the exit code. The
        environment has the rank's place as torchrun sets it, and this process's id in MIKOSHI_SUPERVISOR.
    folder: the run folder for events and stacks, whose checkpoints count as progress; without one, hangs are not detected
    """

    ranks: int
    function: Callable[..., int]
    arguments: tuple[Any, ...] = ()
    folder: RunFolder | None = None
    policy: RecoverySection = field(default_factory=lambda: RecoverySection(restarts=0))


def supervise(job: Job) -> int:
    """Run a job to its end on this machine, with restarts after faults. Call it from the main thread.

    Returns DONE, PREEMPTED, USER_ERROR, FAULT or HANG. The signals in STOP_SIGNALS are forwarded to every rank, and the ranks
    have `policy.grace` seconds to save; a second SIGINT ends them at once. If a rank dies or hangs, its peers are ended, and
    all restart as the policy allows.
    """
    requests = StopRequests(job.policy.grace)
    with collect_signals(requests), running_fork_server(job.ranks), private_folder() as private:

        def run_attempt(number: int) -> RanksOutcome:
            rendezvous = Rendezvous()  # stays open during the attempt
            placement = rendezvous.single_node(job.ranks)
            return WorkerGroup(
                WorkerGroupSpec(number, placement, job.function, job.arguments, job.policy, job.folder, private), requests
            ).run()

        return run_with_restarts(run_attempt, requests, job.folder, job.policy)


def run_with_restarts(
    run_attempt: Callable[[int], RanksOutcome],
    requests: StopRequests,
    folder: RunFolder | None,
    policy: RecoverySection,
    on_fault: Callable[[Fault, bool, RestartDecision], None] = lambda *_: None,
    is_restart: bool = False,
    idle: Callable[[], None] = lambda: time.sleep(0.05),
) -> int:
    """Run attempt after attempt until the run ends or the policy gives up, and return the exit code.

    Faults and restarts go into the run's events and to stderr.

    run_attempt: runs one attempt, given its number
    on_fault: called with each fault, whether a checkpoint was saved since the one before, and the decision
    is_restart: whether the run has started before
    idle: called again and again during a pause
    """
    streak, number = FaultStreak(), -1
    while True:
        number += 1
        if requests.signals:
            return PREEMPTED
        before = len(_events(folder))
        outcome = run_attempt(number)
        if not requests.signals and _was_regrouped(outcome):
            continue
        code, fault = classify(outcome, number or int(is_restart), requests)
        if code is not None:
            return code
        assert fault is not None
        events = _events(folder)[before:]
        saved = bool(_steps(events, "save"))
        streak, decision = decide(streak, fault, saved, policy)
        on_fault(fault, saved, decision)
        _record(folder, outcome, fault)
        if requests.signals:
            return _code_when_stopped(fault, events)
        _report(fault, decision, policy.restarts)
        if not decision.restart:
            return decision.code
        if folder is not None:
            folder.event("restart", number=number + 1, pause=decision.pause)
        pause(decision.pause, requests, idle)


def _was_regrouped(outcome: RanksOutcome) -> bool:
    """Whether an attempt was ended for one on more nodes, and for no other reason."""
    mild = {*BENIGN_CODES} - {USER_ERROR}
    return (
        outcome.regroup
        and not outcome.lost
        and outcome.silent is None
        and set(outcome.codes.values()) <= mild
        and not _all_done(outcome)
    )


def _all_done(outcome: RanksOutcome) -> bool:
    return len(outcome.codes) == outcome.ranks and not any(outcome.codes.values())


def classify(outcome: RanksOutcome, number: int, requests: StopRequests) -> tuple[int | None, Fault | None]:
    """Return the exit code of attempt `number`, or the fault that ended it. A user error counts as one only at the first
    start."""
    codes = outcome.codes
    refused = USER_ERROR in codes.values()
    if refused and not number:
        if codes.get(0) != USER_ERROR:  # otherwise rank 0 has printed it
            print_stderr(f"error: {outcome.said.get(next(rank for rank, code in codes.items() if code == USER_ERROR), '')}")
        return USER_ERROR, None
    if outcome.lost and not refused:
        node, why = next(iter(outcome.lost.items()))
        rank = min((rank for rank, at in outcome.nodes.items() if at == node), default=0)
        return None, _fault(outcome, "node", rank, f"was lost with its node: {why}")
    if outcome.silent is not None and not refused:  # otherwise the silent rank waits for those that ended
        kind = "is stopped (SIGSTOP, or a debugger)" if outcome.silent.stopped else "fell silent"
        seconds = outcome.silent.seconds
        return None, _fault(outcome, "hang", outcome.silent.rank, f"{kind}: no sign of life for {seconds:.1f} s")
    stopped = {PREEMPTED, *(-number for number in STOP_SIGNALS)}
    wrong = [rank for rank, code in codes.items() if code != DONE and code not in stopped]
    # A rank that is stopped before its first step ends at once, and ranks that are ahead lose their peer.
    if wrong and not (stopped & set(codes.values()) and all(codes[rank] == LOST_PEER for rank in wrong)):
        return None, _root_fault(outcome, wrong)
    if outcome.overdue:
        if requests.immediate:
            print_stderr("error: ended at once at the second Ctrl-C; the newest checkpoint is what there is")
        else:
            who = ", ".join(map(str, outcome.overdue))
            print_stderr(f"error: rank {who}: not ended {requests.grace:g} s after a signal to stop (recovery.grace): killed")
        return FAULT, None
    if not codes:  # ended before any rank reported
        return (PREEMPTED if requests.signals else FAULT), None
    return (PREEMPTED if any(codes.values()) else DONE), None


def _root_fault(outcome: RanksOutcome, wrong: list[int]) -> Fault:
    """The fault that caused the others."""
    rank = outcome.root_cause(wrong, LOST_PEER, -signal.SIGKILL)
    code, said = outcome.codes[rank], outcome.said.get(rank, "")
    if code == LOST_PEER:
        return _fault(outcome, "lost", rank, "lost its connection to another rank, none of which had died")
    if code == DIVERGED:
        return _fault(outcome, "diverged", rank, f"ended: {said}" if said else "ended: replicas of the same weights differ")
    if code == FORK_SERVER_GONE:
        return _fault(outcome, "killed", rank, "was killed with the process that all ranks are forked from")
    if code == -signal.SIGKILL:
        return _fault(outcome, "killed", rank, "was killed (SIGKILL)")
    line = said.splitlines()[0][:300] if said else ""
    if code == USER_ERROR:  # after a restart: what worked at the first start is an outage now
        text = f"exit code {code} ({line})" if line else f"exit code {code}, as it has said"
        return replace(_fault(outcome, "crash", rank, f"ended with {text}", line), refused=True)
    how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
    return _fault(outcome, "crash", rank, f"ended with {how}{f' ({line})' if line else ''}", line or (how if code < 0 else ""))


def _fault(outcome: RanksOutcome, cause: Any, rank: int, how: str, error: str = "") -> Fault:
    step, phase = outcome.at.get(rank, (-1, ""))
    return Fault(cause, rank, step, phase, how, error, node=outcome.nodes.get(rank, ""))


def _record(folder: RunFolder | None, outcome: RanksOutcome, fault: Fault) -> None:
    """Write a fault into the run's events, and print where stacks were saved."""
    if folder is None:
        return
    more: dict[str, Any] = {} if outcome.silent is None else {"seconds": round(outcome.silent.seconds, 1)}
    if fault.node:
        more["node"] = fault.node
    folder.event("fault", cause=fault.cause, rank=fault.rank, step=fault.step, phase=fault.phase, how=fault.how, **more)
    if outcome.stacks:
        print_stderr(f"stacks of every rank: {outcome.stacks}")


def _report(fault: Fault, decision: RestartDecision, restarts: int) -> None:
    text = f"{fault.who} {fault.how}{fault.where}"
    if decision.restart:
        when = f"in {decision.pause:g} s" if decision.pause else "now"
        print_stderr(f"{text}; restart {decision.number} of {restarts} {when}")
    else:
        print_stderr(f"error: {text}; the other ranks were ended{f'. {decision.why}' if decision.why else ''}")


def _code_when_stopped(fault: Fault, events: list[dict[str, Any]]) -> int:
    """The exit code of a run that failed while it was stopping; PREEMPTED only if no step is lost.

    events: the events of that attempt
    """
    saved = _steps(events, "save") & (_steps(events, "stop") | _steps(events, "end"))
    rest = f"step {max(saved)} is saved" if saved else "the newest checkpoint is what there is"
    print_stderr(f"error: {fault.who} {fault.how}{fault.where}, after a signal to stop; {rest}")
    if saved or (fault.step < 1 and fault.cause not in ("crash", "diverged")):
        return PREEMPTED
    return USER_ERROR if fault.refused else FAULT


def _events(folder: RunFolder | None) -> list[dict[str, Any]]:
    return [] if folder is None else read_jsonl(folder.events)


def _steps(events: list[dict[str, Any]], kind: str) -> set[int]:
    """The steps of the events of one kind."""
    return {event["step"] for event in events if event.get("event") == kind and "step" in event}


def pause(seconds: float, requests: StopRequests, idle: Callable[[], None]) -> None:
    """Call `idle` for `seconds`, or until a signal asks to stop."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and not requests.signals:
        idle()


def print_stderr(text: str) -> None:
    """Print a line on stderr. A closed stderr is no error, since the ranks still run."""
    with contextlib.suppress(OSError):  # the reader may be gone while the ranks still run
        print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def collect_signals(requests: StopRequests) -> Iterator[None]:
    """Collect signals to stop in `requests` inside the block; afterwards the earlier handlers are back."""
    before = {number: signal.signal(number, requests.add) for number in handled_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
