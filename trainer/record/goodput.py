"""Where a run's time went: every second of its life is training that counts, or lost to one cause that has a name.

Goodput is the share that counts. All is read off events.jsonl and metrics.jsonl, over any number of kills and restarts.
What was computed by steps whose records a restart dropped is told by the event of that restart ("repeated").
"""

from __future__ import annotations

import bisect
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from mikoshi.trainer.record.run_folder import RunFolder, read_jsonl

CAUSES = {
    "start-up": "from the start of the processes to the first step, of every start",
    "restarts": "from the last sign of life of a run that broke off to the start that followed",
    "stopped": "the same after a stop on request, such as a preemption",
    "repeated": "steps computed after the checkpoint that a restart went back to",
    "skipped": "steps that no rank applied, those that predict nothing among them",
    "retried": "steps computed a second time because their figures could not be trusted",
    "saves": "training stood still while the state was copied or written",
    "evaluation": "held-out text",
    "data": "steps waited for their batch",
    "other": "what remains: records, agreement, loading after going back",
}
"""What time is lost to, and what each means."""

_NO_LIFE = ("fault", "restart")  # the supervisor's words: the ranks were dead or silent by then


@dataclass(frozen=True)
class Goodput:
    """Seconds. wall: from the first start to the last record, without the time between a finished run and its next start.
    training: of steps that count. lost: by cause, every one of CAUSES. `wall` is the sum of it all.
    starts, steps: how often the run was started, steps that count; repeated, skipped, retried: numbers of steps.
    """

    wall: float
    training: float
    lost: dict[str, float]
    starts: int = 0
    steps: int = 0
    repeated: int = 0
    skipped: int = 0
    retried: int = 0

    @property
    def share(self) -> float:
        """Effective training time over wall time."""
        return self.training / self.wall if self.wall else 0.0

    def figures(self) -> dict[str, float]:
        """For metrics and events: flat, in seconds but the first."""
        return {"goodput": self.share, "wall_seconds": self.wall, "training_seconds": self.training} | {
            f"lost_seconds.{cause}": seconds for cause, seconds in self.lost.items()
        }

    def words(self) -> str:
        """One line: the share, and the causes that took a hundredth of the time or more."""
        worst = sorted(self.lost.items(), key=lambda item: -item[1])
        told = ", ".join(f"{cause} {seconds / self.wall:.1%}" for cause, seconds in worst if seconds >= self.wall / 100 > 0)
        return f"goodput {self.share:.1%} of {self.wall:,.1f} s" + (f"; lost to {told}" if told else "")


def goodput(folder: RunFolder) -> Goodput:
    """Of a run, so far. All zero before its first start."""
    return account(read_jsonl(folder.events), read_jsonl(folder.metrics))


def process_began() -> float:
    """When this process was started or forked (unix seconds), to a hundredth of a second where there is a /proc.

    psutil's create_time is off by up to a second: it adds whole seconds of the machine's start.
    """
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        return psutil.Process().create_time()
    return time.time() - age


def repetition(folder: RunFolder, step: int) -> dict[str, Any]:
    """What a start after `step` is about to drop from the metrics, as fields of its event: `repeated_steps`,
    `repeated_seconds`, `last_seen`. Call it before they are dropped."""
    dropped = [r for r in read_jsonl(folder.metrics) if r.get("step", 0) > step]
    steps = [r for r in dropped if "step_seconds" in r]
    fields = {"repeated_steps": len(steps), "repeated_seconds": round(sum(r["step_seconds"] for r in steps), 6)}
    return fields | ({"last_seen": max(r["time"] for r in dropped)} if dropped else {})


@dataclass
class _Ledger:
    """What is known while the events are gone through in their order."""

    times: Sequence[float]  # of the metrics, ascending
    lost: dict[str, float] = field(default_factory=lambda: dict.fromkeys(CAUSES, 0.0))
    origin: float | None = None
    last: float = 0.0  # sign of life
    off: float = 0.0  # between a finished run and its next start
    ended: str = ""  # the cause to which time counts from here to the next start; "" while it runs or broke off
    resumed: dict[str, Any] = field(default_factory=dict)  # the event of a resume whose start is still to come
    skipped: set[int] = field(default_factory=set)
    retried: dict[int, float] = field(default_factory=dict)
    starts: int = 0
    repeated: int = 0

    def take(self, event: Mapping[str, Any]) -> None:
        kind = event["event"]
        if kind in _NO_LIFE:
            return
        if kind == "resume":
            self.resumed = dict(event)
            self._repeat(event)
            self._forget(event["step"])
            return
        if kind == "start":
            self._start(event)
            return
        self.last, self.resumed = max(self.last, event["time"]), {}
        if kind in ("save", "save-failed"):
            self.lost["saves"] += event.get("stall_seconds", 0.0)
        elif kind == "eval":
            self.lost["evaluation"] += event.get("seconds", 0.0)
        elif kind in ("skip", "empty"):
            self.skipped.add(event["step"])
        elif kind == "retry":
            self.retried[event["step"]] = self.retried.get(event["step"], 0.0) + event.get("seconds", 0.0)
        elif kind == "rewind":
            self._forget(event["to"])
        elif kind == "end":
            self.ended = "off" if event.get("finished") else "stopped"

    def _start(self, event: Mapping[str, Any]) -> None:
        began = min(event.get("began", self.resumed.get("time", event["time"])), event["time"])
        if not self.resumed:  # there was nothing to resume from
            self._repeat(event)
        told = self.resumed or event
        if self.origin is None:
            self.origin = began
        else:
            known = bisect.bisect_right(self.times, began)
            last = max(self.last, self.times[known - 1] if known else self.last)
            last = max(last, told.get("last_seen", last + told.get("repeated_seconds", 0.0)))
            gap = max(0.0, began - last)
            if self.ended == "off":
                self.off += gap
            else:
                self.lost[self.ended or "restarts"] += gap
        if not event.get("step"):
            self._forget(0)
        self.lost["start-up"] += event["time"] - began
        self.last, self.ended, self.resumed = event["time"], "", {}
        self.starts += 1

    def _repeat(self, event: Mapping[str, Any]) -> None:
        self.lost["repeated"] += event.get("repeated_seconds", 0.0)
        self.repeated += event.get("repeated_steps", 0)

    def _forget(self, step: int) -> None:
        """Steps beyond this one are made again."""
        self.skipped = {s for s in self.skipped if s <= step}
        self.retried = {s: seconds for s, seconds in self.retried.items() if s <= step}


def account(events: Sequence[Mapping[str, Any]], metrics: Sequence[Mapping[str, Any]]) -> Goodput:
    """From the records of both logs, in their order. Fields that an older log lacks count as nothing."""
    steps = [r for r in metrics if "step_seconds" in r]
    found = _Ledger(sorted(r["time"] for r in metrics if "time" in r))
    for event in events:
        found.take(event)
    if found.origin is None:
        return Goodput(0.0, 0.0, dict.fromkeys(CAUSES, 0.0))
    training, lost, counted = 0.0, found.lost, 0
    for record in steps:
        seconds = record["step_seconds"]
        waited = min(seconds, record.get("data_seconds", 0.0))
        again = min(seconds - waited, found.retried.get(record["step"], 0.0))
        lost["data"] += waited
        lost["retried"] += again
        if record["step"] in found.skipped:
            lost["skipped"] += seconds - waited - again
        else:
            training, counted = training + seconds - waited - again, counted + 1
    wall = max([found.last, *found.times[-1:]]) - found.origin - found.off
    lost["other"] = max(0.0, wall - training - sum(lost.values()))
    return Goodput(
        wall=training + sum(lost.values()), training=training, lost=lost, starts=found.starts, steps=counted,
        repeated=found.repeated, skipped=len(steps) - counted, retried=len(found.retried),
    )  # fmt: skip
