"""Whether a run that met a fault is started again, and after how long: a function of the faults so far."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal

from trainer.exit_codes import FAULT, HANG, USER_ERROR
from trainer.sections import RecoverySection

Cause = Literal["killed", "crash", "hang", "diverged", "lost"]
_LONGEST = 60.0


@dataclass(frozen=True)
class Fault:
    """What ended an attempt. how: in words, after "rank N". step, phase: where that rank was, -1 and "" if it never said.
    error: what a crash was of, as far as that is known: the exception and its message, or the signal.
    refused: a rank ended with USER_ERROR, in an attempt whose like has started before."""

    cause: Cause
    rank: int
    step: int
    phase: str
    how: str
    error: str = ""
    refused: bool = False

    @property
    def where(self) -> str:
        if self.step < 1:
            return f" before its first step{f', in {self.phase}' if self.phase else ''}"
        return f" at step {self.step}, in {self.phase}"


@dataclass(frozen=True)
class Streak:
    """Faults in a row, with no checkpoint saved in between. last: the fault before, progress or not."""

    counts: Mapping[Cause, int] = field(default_factory=lambda: MappingProxyType({}))
    last: Fault | None = None


@dataclass(frozen=True)
class Verdict:
    """restart: after `pause` seconds, the `number`th for this cause; otherwise the run ends with `code`, because of `why`."""

    restart: bool
    number: int = 0
    pause: float = 0.0
    code: int = FAULT
    why: str = ""


def judge(streak: Streak, fault: Fault, saved: bool, policy: RecoverySection) -> tuple[Streak, Verdict]:
    """What follows from a fault, where `saved` says whether a checkpoint was since the one before. A bug is not a fault: it
    comes back. A user's error that was none at the first start is an outage, of a disk or a store."""
    counts = {} if saved else dict(streak.counts)
    counts[fault.cause] = number = counts.get(fault.cause, 0) + 1
    now = replace(streak, counts=MappingProxyType(counts), last=fault)
    if policy.restarts and streak.last is not None and _same_bug(streak.last, fault):
        told = f"step {fault.step}" if fault.step > 0 else "the start"
        return now, Verdict(False, why=f"{told} failed twice with {fault.error}: this is a bug, not a fault of a machine")
    if number > policy.restarts:
        why = f"recovery.restarts = {policy.restarts}: used up for this cause, with no checkpoint saved in between"
        code = USER_ERROR if fault.refused else HANG if fault.cause == "hang" else FAULT
        return now, Verdict(False, code=code, why=why if policy.restarts else "")
    return now, Verdict(True, number, pause_before(sum(counts.values()), policy.backoff))


def pause_before(number: int, backoff: float) -> float:
    """Seconds before the `number`th restart in a row: the first at once, then doubled from one to the next."""
    return 0.0 if number <= 1 else min(_LONGEST, backoff * 2.0 ** min(number - 2, 60))


def _same_bug(one: Fault, other: Fault) -> bool:
    crashes = one.cause == other.cause == "crash" and bool(other.error) and not (one.refused or other.refused)
    return crashes and one.step == other.step and _plain(one.error) == _plain(other.error)


def _plain(error: str) -> str:
    """An error without its numbers: addresses, ports, process ids, seconds and losses differ from one attempt to the next."""
    return re.sub(r"0x[0-9a-fA-F]+|\d+(?:\.\d+)?(?:[eE][-+]?\d+)?", "…", error)
