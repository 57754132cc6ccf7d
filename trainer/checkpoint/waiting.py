"""Work in threads, waited for in slices: no rank sits in one collective for as long as another's work takes.

A process group gives up a collective after its timeout, ten minutes by default, and an upload may take longer. So every
rank waits for its own thread for a few seconds, then all agree whether any is still at it, and beat: alive.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import chain, repeat
from typing import Any

import torch.distributed as dist

from mikoshi.parallel.process.heartbeat import beat
from mikoshi.trainer.checkpoint.agree import on_first_rank, place
from mikoshi.trainer.signals import agree

SLICE, LONG_SLICE = 1.0, 5.0
"""Seconds of the first wait, and of those after it."""


class Task:
    """Work in a thread of its own, which does not keep the process alive. Whatever ends it is kept in `error`."""

    def __init__(self, work: Callable[[], Any] | None) -> None:
        self.result: Any = None
        self.error: BaseException | None = None
        self._thread: threading.Thread | None = None
        if work is not None:
            self._thread = threading.Thread(target=self._run, args=(work,), name="save", daemon=True)
            self._thread.start()

    @classmethod
    def over(cls, error: BaseException | None) -> Task:
        """One that has ended before it began."""
        task = cls(None)
        task.error, task.result = error, []
        return task

    def _run(self, work: Callable[[], Any]) -> None:
        try:
            self.result = work()
        except BaseException as error:
            self.error = error

    @property
    def done(self) -> bool:
        return self._thread is None or not self._thread.is_alive()

    @property
    def flags(self) -> tuple[bool, bool]:
        """(failed, pending). Looked at in this order, as an error comes before the end of its thread."""
        done = self.done
        return self.error is not None, not done

    def wait(self, seconds: float | None = None) -> None:
        """Until it is done, or `seconds` have passed."""
        if self._thread is not None:
            self._thread.join(seconds)

    def ended(self) -> Any:
        """Its result; raises its error."""
        if self.error is not None:
            raise self.error
        return self.result


def wait_for_all(task: Task, stop: threading.Event | None = None) -> bool:
    """Until no rank's task is at it any more: whether any has failed, when `stop` is set for the others. Collective."""
    for seconds in chain((SLICE,), repeat(LONG_SLICE)):
        task.wait(seconds)
        failed, pending = _agreed(*task.flags)
        if failed and stop is not None:
            stop.set()
        if not pending:
            return failed
        beat("save")
    raise AssertionError("the slices do not end")


def on_first_rank_in_time(action: Callable[[], Any]) -> Any:
    """As checkpoint.agree.on_first_rank, for what may take longer than the process group waits. Collective."""
    task = Task(action if place()[0] == 0 else None)
    wait_for_all(task)
    return on_first_rank(task.ended)


def _agreed(failed: bool, pending: bool) -> tuple[bool, bool]:
    if not dist.is_initialized():
        return failed, pending
    agreed = agree(False, failed=failed, pending=pending)
    return agreed.failed, agreed.pending
