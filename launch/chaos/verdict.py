"""Judges, by the run's events, whether each planned fault was handled as Mikoshi promises."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mikoshi.trainer.chaos.plan import STEP_PHASES, Fault, FaultPlan
from mikoshi.trainer.exit_codes import PREEMPTED

KILL_NOTICED = 2.0
"""Seconds within which a rank's death must be noticed."""

SLOW_NAMED = 20
"""Steps within which a slow rank must be named."""

WORKERS_GONE = 5.0
"""Seconds within which all ranks of a killed launcher must be gone."""

_CAUSES = {"kill": "killed", "corrupt": "killed", "stop": "hang", "raise": "crash"}

Event = Mapping[str, Any]


@dataclass(frozen=True)
class Launch:
    """One launch of the run. Times are Unix times.

    gone: seconds from its end until no process of it was left
    """

    began: float
    ended: float
    code: int
    gone: float


@dataclass(frozen=True)
class FaultRow:
    """The outcome of one fault.

    struck: Unix time; None if it did not occur
    noticed: seconds from the fault until it was noticed
    back: seconds from the fault until the ranks were ready to train again
    good: whether it was handled as promised
    """

    number: int
    fault: Fault
    struck: float | None
    happened: str
    noticed: float | None
    back: float | None
    good: bool


@dataclass(frozen=True)
class _Evidence:
    """What was recorded from a fault to the next one.

    rest: events to the end of the run
    damaged: step of the damaged checkpoint
    older: step of a sound one before it
    """

    fault: Fault
    struck: float
    damaged: int | None
    older: int | None
    events: Sequence[Event]
    rest: Sequence[Event]
    launches: Sequence[Launch]
    stacks: Path

    def first(self, kind: str, **fields: Any) -> Event | None:
        """The first event of a kind with these fields, or None."""
        for event in self.events:
            if event["event"] == kind and all(event.get(key) == value for key, value in fields.items()):
                return event
        return None

    def after(self, event: Event | None) -> float | None:
        """Seconds from the fault to an event."""
        return None if event is None else max(0.0, event["time"] - self.struck)

    def launch(self) -> Launch | None:
        """The launch that the fault struck, once it has ended."""
        return next((one for one in self.launches if one.began <= self.struck <= one.ended), None)


_Verdict = tuple[str, float | None, bool]


def fault_rows(
    plan: FaultPlan, struck: Mapping[int, Event], events: Sequence[Event], launches: Sequence[Launch], stacks: Path
) -> list[FaultRow]:
    """Return a row for every fault of the plan.

    struck: the result of chaos.inject.fired
    """
    order = sorted(record["time"] for record in struck.values())
    found = []
    for number, fault in enumerate(plan.faults):
        if number not in struck:
            found.append(FaultRow(number, fault, None, "did not come to pass: the run was never there", None, None, False))
            continue
        begin = struck[number]["time"]
        end = next((time for time in order if time > begin), float("inf"))
        # Events are rounded to milliseconds.
        rest = [event for event in events if begin - 0.001 <= event["time"]]
        window = [event for event in rest if event["time"] < end - 0.001]
        damaged, older = struck[number].get("step_damaged"), struck[number].get("step_older")
        seen = _Evidence(fault, begin, damaged, older, window, rest, launches, stacks)
        happened, noticed, good = _VERDICTS[fault.kind](seen)
        found.append(FaultRow(number, fault, begin, happened, noticed, seen.after(seen.first("start")), good))
    return found


def _restarted(seen: _Evidence) -> _Verdict:
    """Judge kill, stop, raise and corrupt: the rank must be named, and all ranks restarted."""
    fault = seen.fault
    event = seen.first("fault")
    if event is None:
        return "nobody noticed", None, False
    noticed, right = seen.after(event), event["rank"] == fault.rank and event["cause"] == _CAUSES[fault.kind]
    text = f"{event['cause']}: rank {event['rank']} named"
    again = seen.first("start") is not None
    good = right and again
    if not again:
        text += ", not started again"
    if fault.kind == "kill":
        good &= noticed is not None and noticed <= KILL_NOTICED
    elif fault.kind == "stop":
        dumped = seen.stacks.is_dir() and any(path.stat().st_mtime >= seen.struck for path in seen.stacks.iterdir())
        text, good = text + (", stacks kept" if dumped else ", no stacks"), good and dumped
    elif fault.kind == "corrupt":
        found, sound = _damage_verdict(seen)
        text, good = f"{text}, {found}", good and sound
    return text, noticed, good


def _damage_verdict(seen: _Evidence) -> tuple[str, bool]:
    """Judge a damaged checkpoint: it must be refused, or replaced by a newer one that was being committed."""
    resumed = seen.first("resume")
    if seen.damaged is None:
        return "there was no checkpoint to damage", False
    if resumed is not None and resumed["step"] > seen.damaged:
        return f"step {seen.damaged} damaged, resumed after {resumed['step']}", True
    refused = list(resumed.get("refused", [])) if resumed else []
    if refused:
        return f"refused: {_short(refused[0], seen)}", True
    if resumed is not None:
        return "resumed from the damaged one", False
    if seen.older is not None:
        return f"started from the beginning, though step {seen.older} was there", False
    return "started from the beginning: it was the only one", True


def _short(reason: str, seen: _Evidence) -> str:
    """A reason without the run's folders, short enough for a table."""
    text = reason.replace(f"{seen.stacks.parent}/checkpoints/", "")
    return text if len(text) <= 80 else f"{text[:79]}…"


def _slow(seen: _Evidence) -> _Verdict:
    event = seen.first("straggler", rank=seen.fault.rank)
    if event is None:
        return "not named", None, False
    steps = event["step"] - seen.fault.step
    text = f"named {steps} steps later, as {event.get('ratio', 0):.1f} times as slow"
    return text, seen.after(event), steps <= SLOW_NAMED


def _nan(seen: _Evidence) -> _Verdict:
    step = seen.fault.step
    retry, skip = seen.first("retry", step=step), seen.first("skip", step=step)
    if retry is not None and retry.get("cured"):
        return "not applied; computed again, it was sound", seen.after(retry), True
    if skip is not None:
        return "no rank applied the step", seen.after(skip), True
    return "nobody noticed", None, False


def _flip(seen: _Evidence) -> _Verdict:
    event = seen.first("diverged")
    if event is None:
        return "nobody noticed", None, False
    saved = [e for e in seen.events if e["event"] == "save" and seen.fault.step <= e["step"] and e["time"] < event["time"]]
    text = f"named in step {event['step']}: rank {', '.join(map(str, event['ranks']))}"
    if saved:
        text += f", after step {saved[0]['step']} was saved"
    good = seen.fault.rank in event["ranks"] and not saved and seen.first("start") is not None
    return text, seen.after(event), good


def _fill(seen: _Evidence) -> _Verdict:
    failed = seen.first("save-failed")
    if failed is None:
        return "the save went through", None, False
    later = [e for e in seen.rest if e["event"] == "save" and e["time"] >= failed["time"]]
    broke = seen.first("fault") is not None
    text = f"the save failed, training {'broke off' if broke else 'went on'}"
    text += f", step {later[0]['step']} was saved" if later else ", nothing was saved since"
    return text, seen.after(failed), bool(later) and not broke


def _launcher(seen: _Evidence) -> _Verdict:
    launch = seen.launch()
    if launch is None or launch.code != -9:
        return "the launcher lives", None, False
    text = f"every rank gone after {launch.gone:.1f} s" + ("" if seen.first("start") else ", not started again")
    return text, launch.ended - seen.struck, launch.gone <= WORKERS_GONE and seen.first("start") is not None


def _preempt(seen: _Evidence) -> _Verdict:
    launch, stop, resumed = seen.launch(), seen.first("stop"), seen.first("resume")
    if launch is None or launch.code != PREEMPTED:
        return f"exit code {launch.code}" if launch else "it went on", None, False
    if stop is None:
        return "stopped outside of a step", launch.ended - seen.struck, seen.fault.phase not in STEP_PHASES
    more = stop["step"] - seen.fault.step
    text = f"stopped and saved after step {stop['step']}"
    good = more <= 1 and resumed is not None and resumed["step"] == stop["step"]
    return text + ("" if good else f", resumed after {resumed['step'] if resumed else 'none'}"), seen.after(stop), good


_VERDICTS: dict[str, Callable[[_Evidence], _Verdict]] = {
    "kill": _restarted,
    "stop": _restarted,
    "raise": _restarted,
    "corrupt": _restarted,
    "slow": _slow,
    "nan": _nan,
    "flip": _flip,
    "fill": _fill,
    "launcher": _launcher,
    "node": _launcher,
    "preempt": _preempt,
}
