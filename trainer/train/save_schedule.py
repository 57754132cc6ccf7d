"""Decides when a run is saved: every N steps, or by time at the interval with the least expected cost.

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
    """Decides after each step whether to save. The caller passes the time as `now`, in seconds of one clock."""

    def __init__(self, config: RunConfig, ranks: int) -> None:
        section = config.checkpoint
        self.by_time = section.every is None
        self.every, self.steps = section.regular, config.train.steps
        self.keep_every = section.keep_every if self.by_time else 0
        self.mtbf = 3600.0 * (config.recovery.mtbf or min(_LONGEST_MTBF, _RANK_HOURS / ranks))
        self.interval = SOONEST
        self._start, self._started, self._last, self._written = 0, 0.0, 0.0, 0.0
        self._reported = 0.0

    def start_at(self, step: int, now: float) -> None:
        """Start after `step`, which is saved or is 0."""
        self._start, self._started, self._last, self._reported = step, now, now, 0.0

    def due(self, done: int, now: float) -> bool:
        """Whether step `done`, which has just ended, is to be saved. By time it is the first rank's answer that counts.
        Steps that are kept for good are saved in any case."""
        if self.by_time:
            return now - self._last >= self.interval or (bool(self.keep_every) and done % self.keep_every == 0)
        return bool(self.every) and done % self.every == 0

    def save_started(self, now: float) -> None:
        """Note that a save starts."""
        self._last = now

    def measured(self, stall: float, seconds: float) -> None:
        """Note a finished save and update the interval.

        stall: seconds for which training stopped. seconds: duration of the save.
        """
        self._written = seconds
        self.interval = max(SOONEST, seconds, math.sqrt(2 * stall * self.mtbf))

    def at_start(self) -> tuple[str, dict[str, float]]:
        """How often the run will be saved and what a fault could lose, as text and as figures for the event."""
        left = max(0, self.steps - self._start)
        if self.by_time:
            return (
                f"saves by time, the first one after {_minutes(SOONEST)}, then as often as costs least with a fault every "
                f"{self.mtbf / 3600:,.3g} h (recovery.mtbf); a fault before the first would lose all since step {self._start}",
                {"seconds": SOONEST, "mtbf_seconds": round(self.mtbf, 3)},
            )
        if not self.every:
            text = f"saves only at the end (checkpoint.every = 0): a fault would lose all since step {self._start}"
            return text, {"at_most_lost_steps": left}
        lost = min(self.every, left)
        text = f"saves every {self.every:,} steps: a fault would lose at most {lost:,} steps"
        return text, {"every": self.every, "at_most_lost_steps": lost}

    def interval_change(self, done: int, now: float) -> tuple[str, dict[str, float]] | None:
        """The new interval, as text and figures, where it differs by a quarter or more from the last report; else None."""
        made = done - self._start
        if made < 1 or not (self.by_time or self.every):
            return None
        step_seconds = (now - self._started) / made
        seconds = self.interval if self.by_time else self.every * step_seconds
        enough = self._written > 0 if self.by_time else made >= min(self.every, 20)
        if not enough or seconds < 60 or (self._reported and 0.8 < seconds / self._reported < 1.25):
            return None
        self._reported = seconds
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
