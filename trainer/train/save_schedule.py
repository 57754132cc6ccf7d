"""When a run is saved on its way: every so many steps, or by time, as often as costs least.

By time, saves stand sqrt(2 x the stall of a save x the mean time between faults) apart: what they cost and what a fault
repeats are then equal, and least together (Young 1974, "A first order approximation to the optimum checkpoint interval";
Daly 2006, "A higher order estimate of the optimum checkpoint interval for restart dumps"). What a restart itself costs is
the same for every interval, and so has no part in it.
"""

from __future__ import annotations

import math

from mikoshi.trainer.config.run import RunConfig

SOONEST = 300.0
"""Least seconds between saves by time, and from a start to the first one, which measures what a save costs."""

_LONGEST_MTBF = 24.0
_RANK_HOURS = 50_000.0
"""Hours of one GPU between faults, as in the training of Llama 3 405B: 419 in 54 days on 16,384 GPUs (Grattafiori et al.
2024, "The Llama 3 Herd of Models", section 3.3.4)."""


class SaveSchedule:
    """Seconds are of one clock, whose readings the caller gives as `now`."""

    def __init__(self, config: RunConfig, ranks: int) -> None:
        section = config.checkpoint
        self.by_time = section.every is None
        self.every, self.steps = section.regular, config.train.steps
        self.keep_every = section.keep_every if self.by_time else 0
        self.mtbf = 3600.0 * (config.recovery.mtbf or min(_LONGEST_MTBF, _RANK_HOURS / ranks))
        self.interval = SOONEST
        self._start, self._begun, self._last, self._written = 0, 0.0, 0.0, 0.0
        self._told = 0.0

    def begin_at(self, step: int, now: float) -> None:
        """The run goes on after `step`, which is saved or the first."""
        self._start, self._begun, self._last, self._told = step, now, now, 0.0

    def due(self, done: int, now: float) -> bool:
        """Whether step `done`, which has just ended, is to be saved. By time it is the first rank's answer that counts.
        Steps that are kept for good are saved in any case."""
        if self.by_time:
            return now - self._last >= self.interval or (bool(self.keep_every) and done % self.keep_every == 0)
        return bool(self.every) and done % self.every == 0

    def begun(self, now: float) -> None:
        """A save begins."""
        self._last = now

    def measured(self, stall: float, seconds: float) -> None:
        """A save is safe: for how long training stood still, and how long it took."""
        self._written = seconds
        self.interval = max(SOONEST, seconds, math.sqrt(2 * stall * self.mtbf))

    def at_start(self) -> tuple[str, dict[str, float]]:
        """How often this run is going to be saved, and what a fault would cost it, in words and as figures."""
        left = max(0, self.steps - self._start)
        if self.by_time:
            return (
                f"saves by time, the first one after {_minutes(SOONEST)}, then as often as costs least with a fault every "
                f"{self.mtbf / 3600:,.3g} h (recovery.mtbf); a fault before the first would lose all since step {self._start}",
                {"seconds": SOONEST, "mtbf_seconds": round(self.mtbf, 3)},
            )
        if not self.every:
            told = f"saves only at the end (checkpoint.every = 0): a fault would lose all since step {self._start}"
            return told, {"at_most_lost_steps": left}
        lost = min(self.every, left)
        told = f"saves every {self.every:,} steps: a fault would lose at most {lost:,} steps"
        return told, {"every": self.every, "at_most_lost_steps": lost}

    def news(self, done: int, now: float) -> tuple[str, dict[str, float]] | None:
        """What the interval has come to, in words and as figures, where it is not what was last told by a quarter or more.
        Of steps that take no minute together there is nothing to tell."""
        made = done - self._start
        if made < 1 or not (self.by_time or self.every):
            return None
        step_seconds = (now - self._begun) / made
        seconds = self.interval if self.by_time else self.every * step_seconds
        enough = self._written > 0 if self.by_time else made >= min(self.every, 20)
        if not enough or seconds < 60 or (self._told and 0.8 < seconds / self._told < 1.25):
            return None
        self._told = seconds
        steps = max(1, round(seconds / step_seconds)) if self.by_time else self.every
        lost = seconds + self._written + step_seconds
        about = "about " if self.by_time else ""
        return (
            f"saves every {about}{steps:,} steps, about {_minutes(seconds)}; a fault would lose at most {_minutes(lost + 30)}",
            {"every": steps, "seconds": round(seconds, 3), "at_most_lost_seconds": round(lost, 3)},
        )


def _minutes(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes:,} minute{'' if minutes == 1 else 's'}"
