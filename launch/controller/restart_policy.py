"""Whether a run that met a fault is started again, and after how long: a function of the faults so far."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal

from mikoshi.trainer.config.data import RecoverySection
from mikoshi.trainer.exit_codes import FAULT, HANG, USER_ERROR

Cause = Literal["killed", "crash", "hang", "diverged", "lost", "node"]
_LONGEST = 60.0
_OF_A_NODE = ("killed", "crash", "hang", "diverged")
BLAMED = 2
"""Faults in a row on one node after which it is left out."""


@dataclass(frozen=True)
class Fault:
    """What ended an attempt. how: in words, after "rank N". step, phase: where that rank was, -1 and "" if it never said.
    error: what a crash was of, as far as that is known: the exception and its message, or the signal.
    refused: a rank ended with USER_ERROR, in an attempt whose like has started before. node: of that rank, among several.
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
        return f"rank {self.rank} on {self.node}" if self.node else f"rank {self.rank}"

    @property
    def where(self) -> str:
        if self.step < 1:
            return f" before its first step{f', in {self.phase}' if self.phase else ''}"
        return f" at step {self.step}, in {self.phase}"


@dataclass(frozen=True)
class Streak:
    """Faults in a row, with no checkpoint saved in between. last: the fault before, progress or not; alike: how many before it
    were the same crash on the same node of several."""

    counts: Mapping[Cause, int] = field(default_factory=lambda: MappingProxyType({}))
    last: Fault | None = None
    alike: int = 0


@dataclass(frozen=True)
class Verdict:
    """restart: after `pause` seconds, the `number`th for this cause; otherwise the run ends with `code`, because of `why`. bug:
    no other machine would help."""

    restart: bool
    number: int = 0
    pause: float = 0.0
    code: int = FAULT
    why: str = ""
    bug: bool = False


def judge(streak: Streak, fault: Fault, saved: bool, policy: RecoverySection) -> tuple[Streak, Verdict]:
    """What follows from a fault, where `saved` says whether a checkpoint was since the one before. A bug is not a fault: it
    comes back. A user's error that was none at the first start is an outage, of a disk or a store."""
    counts = {} if saved else dict(streak.counts)
    counts[fault.cause] = number = counts.get(fault.cause, 0) + 1
    same = streak.last is not None and _same_crash(streak.last, fault)
    here = same and streak.last is not None and bool(fault.node) and fault.node == streak.last.node
    alike = streak.alike + 1 if here else 0
    now = replace(streak, counts=MappingProxyType(counts), last=fault, alike=alike)
    # Twice on one node of several it may be that node, which a third time or another node shows.
    if policy.restarts and same and (not here or alike > 1):
        told, often = f"step {fault.step}" if fault.step > 0 else "the start", "twice" if not here else "three times"
        why = f"{told} failed {often} with {fault.error}: this is a bug, not a fault of a machine"
        return now, Verdict(False, why=why, bug=True)
    if number > policy.restarts:
        why = f"recovery.restarts = {policy.restarts}: used up for this cause, with no checkpoint saved in between"
        code = USER_ERROR if fault.refused else HANG if fault.cause == "hang" else FAULT
        return now, Verdict(False, code=code, why=why if policy.restarts else "")
    return now, Verdict(True, number, pause_before(sum(counts.values()), policy.backoff))


def bad_node(faults: Sequence[Fault]) -> str | None:
    """The node that the last faults in a row were all on, if there were BLAMED of them: other nodes run the same. Of faults
    without a checkpoint in between."""
    last = faults[-BLAMED:]
    nodes = {fault.node for fault in last}
    blamed = len(last) == BLAMED and len(nodes) == 1 and all(fault.cause in _OF_A_NODE and not fault.refused for fault in last)
    return (nodes.pop() or None) if blamed else None


def pause_before(number: int, backoff: float) -> float:
    """Seconds before the `number`th restart in a row: the first at once, then doubled from one to the next."""
    return 0.0 if number <= 1 else min(_LONGEST, backoff * 2.0 ** min(number - 2, 60))


def _same_crash(one: Fault, other: Fault) -> bool:
    crashes = one.cause == other.cause == "crash" and bool(other.error) and not (one.refused or other.refused)
    return crashes and one.step == other.step and _plain(one.error) == _plain(other.error)


def _plain(error: str) -> str:
    """An error without its numbers: addresses, ports, process ids, seconds and losses differ from one attempt to the next."""
    return re.sub(r"0x[0-9a-fA-F]+|\d+(?:\.\d+)?(?:[eE][-+]?\d+)?", "…", error)
