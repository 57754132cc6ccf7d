"""Decides whether a run is restarted after a fault, and after which pause, from the faults so far alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal

from mikoshi.trainer.config.data import RecoverySection
from mikoshi.trainer.exit_codes import FAULT, HANG, USER_ERROR

Cause = Literal["killed", "crash", "hang", "diverged", "lost", "node"]
_MAX_PAUSE = 60.0
_OF_A_NODE = ("killed", "crash", "hang", "diverged")
FAULTS_TO_BLAME = 2
"""Faults in a row on one node after which the node is avoided."""


@dataclass(frozen=True)
class Fault:
    """What ended an attempt.

    how: description that follows "rank N"
    step, phase: where the rank was last; -1 and "" if it never reported
    error: the exception with its message, or the signal, of a crash
    refused: a rank ended with USER_ERROR in a run that had started before
    node: the rank's node, if the run has several
    """

    cause: Cause
    rank: int
    step: int
    phase: str
    how: str
    error: str = ""
    refused: bool = False
    node: str = ""

    @property
    def who(self) -> str:
        """The rank at fault, with its node if there are several."""
        return f"rank {self.rank} on {self.node}" if self.node else f"rank {self.rank}"

    @property
    def where(self) -> str:
        """The step and phase of the fault, as the end of a sentence."""
        if self.step < 1:
            return f" before its first step{f', in {self.phase}' if self.phase else ''}"
        return f" at step {self.step}, in {self.phase}"


@dataclass(frozen=True)
class FaultStreak:
    """Faults in a row, without a checkpoint saved in between.

    counts: faults by cause
    last: the fault before, whether or not a checkpoint was saved since
    alike: how many faults before the last were the same crash on the same node of several
    """

    counts: Mapping[Cause, int] = field(default_factory=lambda: MappingProxyType({}))
    last: Fault | None = None
    alike: int = 0


@dataclass(frozen=True)
class RestartDecision:
    """Whether to restart: after `pause` seconds, as restart `number` for this cause; else the run ends with `code`.

    why: the reason for the end
    bug: the fault is a bug, so that no other machine would help
    """

    restart: bool
    number: int = 0
    pause: float = 0.0
    code: int = FAULT
    why: str = ""
    bug: bool = False


def decide(streak: FaultStreak, fault: Fault, saved: bool, policy: RecoverySection) -> tuple[FaultStreak, RestartDecision]:
    """Decide what follows a fault, and return the new streak with the decision.

    The same crash at the same step is a bug, which would come back, and ends the run. A user error that did not occur at
    the first start is an outage of a disk or a store, and is retried.

    saved: whether a checkpoint was saved since the fault before
    """
    counts = {} if saved else dict(streak.counts)
    counts[fault.cause] = number = counts.get(fault.cause, 0) + 1
    same = streak.last is not None and _same_crash(streak.last, fault)
    here = same and streak.last is not None and bool(fault.node) and fault.node == streak.last.node
    alike = streak.alike + 1 if here else 0
    now = replace(streak, counts=MappingProxyType(counts), last=fault, alike=alike)
    # After two crashes on one node of several, the node may be at fault; a third crash, or another node, decides.
    if policy.restarts and same and (not here or alike > 1):
        place, count = f"step {fault.step}" if fault.step > 0 else "the start", "twice" if not here else "three times"
        why = f"{place} failed {count} with {fault.error}: this is a bug, not a fault of a machine"
        return now, RestartDecision(False, why=why, bug=True)
    if number > policy.restarts:
        why = f"recovery.restarts = {policy.restarts}: used up for this cause, with no checkpoint saved in between"
        code = USER_ERROR if fault.refused else HANG if fault.cause == "hang" else FAULT
        return now, RestartDecision(False, code=code, why=why if policy.restarts else "")
    return now, RestartDecision(True, number, pause_before(sum(counts.values()), policy.backoff))


def bad_node(faults: Sequence[Fault]) -> str | None:
    """Return the node that all of the last FAULTS_TO_BLAME faults were on, or None.

    faults: faults without a checkpoint in between, oldest first
    """
    last = faults[-FAULTS_TO_BLAME:]
    nodes = {fault.node for fault in last}
    blamed = (
        len(last) == FAULTS_TO_BLAME
        and len(nodes) == 1
        and all(fault.cause in _OF_A_NODE and not fault.refused for fault in last)
    )
    return (nodes.pop() or None) if blamed else None


def pause_before(number: int, backoff: float) -> float:
    """Seconds before restart `number` in a row: none before the first, then exponential backoff up to a minute."""
    return 0.0 if number <= 1 else min(_MAX_PAUSE, backoff * 2.0 ** min(number - 2, 60))


def _same_crash(one: Fault, other: Fault) -> bool:
    crashes = one.cause == other.cause == "crash" and bool(other.error) and not (one.refused or other.refused)
    return crashes and one.step == other.step and _without_numbers(one.error) == _without_numbers(other.error)


def _without_numbers(error: str) -> str:
    """An error without its numbers. Addresses, ports, process ids, times and losses differ between attempts."""
    return re.sub(r"0x[0-9a-fA-F]+|\d+(?:\.\d+)?(?:[eE][-+]?\d+)?", "…", error)
