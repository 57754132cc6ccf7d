"""A run is saved on schedule, again after a failed save, and at its end; never while replicas differ."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from mikoshi.parallel.process.heartbeat import send_heartbeat
from mikoshi.trainer.checkpoint.saver import Outcome, Saver
from mikoshi.trainer.config.run import RunConfig
from mikoshi.trainer.errors import CheckpointError
from mikoshi.trainer.signals import Agreement
from mikoshi.trainer.train.save_schedule import SaveSchedule
from mikoshi.trainer.train.step_log import RunLog

_LAST_TRIES = (1.0, 5.0)
"""Seconds of pause before a save that must not be lost is tried again."""


class Saves:
    """The saves of one run. Every method is collective.

    state: returns the tensors to save. record: returns what goes with them. check: raises where the ranks' replicas differ.
    """

    def __init__(
        self, config: RunConfig, saver: Saver, log: RunLog, state: Callable[[], dict[str, Any]], check: Callable[[int], None]
    ) -> None:
        self.saver, self.log, self.state, self.check = saver, log, state, check
        self.schedule = SaveSchedule(config, log.layout.world)
        self.background, self.saved = config.checkpoint.background, 0
        self._under_way: dict[str, Any] = {}
        self._failures, self._again, self._done = 0, 0, 0
        self._why, self._stall, self._since = "", 0.0, 0.0

    def start_at(self, step: int) -> None:
        """Start after `step`, which is saved."""
        self.saved, self._failures, self._again = step, 0, 0
        self.schedule.start_at(step, time.perf_counter())

    def flags(self, done: int) -> tuple[bool, bool, bool]:
        """(failed here, pending here, due by this rank's clock), for all ranks to agree on. By time, rank 0's clock decides."""
        decides = not (self.schedule.by_time and self.log.silent)
        return *self.saver.flags(), decides and self.schedule.due(done, time.perf_counter())

    def after_step(self, done: int, agreed: Agreement, record: Callable[[int], dict[str, Any]], sound: bool = True) -> None:
        """What is to be done about saving after step `done`. Not `sound`: it was not applied, nor perhaps others before it,
        so that what there is may be worth less than the checkpoints that a save would make room for."""
        with self._stalled():
            self._done = done
            self._ended(self.saver.advance(agreed.failed, agreed.pending))
            if not sound:
                self._again = self._again or (done + 1 if agreed.save else 0)
            elif agreed.save:
                self._wait()  # slower than the steps between two saves
                self._begin(done, record)
            elif self._again and self._again <= done and not self.saver.busy:
                self._begin(done, record)  # the one before has failed, or was not to be
        news = self.schedule.interval_change(done, time.perf_counter())
        if news is not None:
            self.log.save_plan(*news)

    def advance(self, agreed: Agreement) -> None:
        """Advance the save in progress between two batches of an evaluation. Its time belongs to the evaluation."""
        self._since = time.perf_counter()
        self._ended(self.saver.advance(agreed.failed, agreed.pending))

    def save_now(self, done: int, record: Callable[[int], dict[str, Any]], sound: bool = True) -> None:
        """Save step `done` and wait until it is safe. Not `sound`: see `after_step`; then nothing has to go for it. Raises
        CheckpointError when that cannot be done."""
        with self._stalled():
            self._wait()
            for pause in (*_LAST_TRIES, None):
                if self.saved == done:
                    return
                self._begin(done, record, prune=sound)
                self._wait()
                if self.saved != done:
                    if pause is None:
                        raise CheckpointError(
                            f"step {done} cannot be saved: {self._why}; the newest checkpoint is of step {self.saved}: make "
                            "room, then start the same command again"
                        )
                    time.sleep(pause)

    def wait_for_save(self) -> None:
        """Wait for the save in progress, whether it succeeds or fails."""
        with self._stalled():
            self._wait()

    @contextlib.contextmanager
    def _stalled(self) -> Iterator[None]:
        """What passes meanwhile is time that training stood still for the save under way."""
        self._since = time.perf_counter()
        try:
            yield
        finally:
            self._stall += time.perf_counter() - self._since
            self.log.restart_clock()

    def _begin(self, done: int, record: Callable[[int], dict[str, Any]], prune: bool = True) -> None:
        send_heartbeat("save")
        self.schedule.save_started(time.perf_counter())
        self.check(done)
        self._under_way = record(done)
        self.saver.begin(done, self.state(), self._under_way, prune)
        if not self.background:
            self._wait()

    def _wait(self) -> None:
        send_heartbeat("save")
        self._ended(self.saver.conclude())

    def _ended(self, outcome: Outcome | None) -> None:
        if outcome is None:
            return
        now = time.perf_counter()
        stall = self._stall + now - self._since
        self.log.saved(outcome, stall, self._under_way)
        self._stall, self._since = 0.0, now
        if outcome.error is None:
            self.schedule.measured(stall, outcome.seconds)
            self.saved, self._failures, self._again = outcome.step, 0, 0
        else:  # soon, then later and later: a disk that is full does not stay so for one step only
            self._why, self._again = outcome.error, self._done + 2**self._failures - 1
            self._failures = min(self._failures + 1, 10)
