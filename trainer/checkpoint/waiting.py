"""Threads that are waited for in slices, so that no collective lasts as long as another rank's work.

A process group aborts a collective after its timeout, ten minutes by default, and an upload may take longer. So every rank
waits for its own thread for a few seconds, then all agree whether any is still working, and each sends a heartbeat.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import chain, repeat
from typing import Any

import torch.distributed as dist

from mikoshi.parallel.process.heartbeat import send_heartbeat
from mikoshi.trainer.checkpoint.agree import on_first_rank, rank_and_world
from mikoshi.trainer.signals import agree

FIRST_WAIT, LATER_WAITS = 1.0, 5.0
"""Seconds of the first wait, and of those after it."""


class Task:
    """Work in a daemon thread. Whatever exception ends it is kept in `error`."""

    def __init__(self, work: Callable[[], Any] | None) -> None:
        self.result: Any = None
        self.error: BaseException | None = None
        self._thread: threading.Thread | None = None
        if work is not None:
            self._thread = threading.Thread(target=self._run, args=(work,), name="save", daemon=True)
            self._thread.start()

    @classmethod
    def finished(cls, error: BaseException | None) -> Task:
        """Returns a task that has ended already, with or without an error."""
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
        """Whether the thread has ended."""
        return self._thread is None or not self._thread.is_alive()

    @property
    def flags(self) -> tuple[bool, bool]:
        """(failed, pending), read in an order that never misses an error of a thread that has ended."""
        done = self.done
        return self.error is not None, not done

    def wait(self, seconds: float | None = None) -> None:
        """Wait until it is done, or for at most `seconds`."""
        if self._thread is not None:
            self._thread.join(seconds)

    def result_or_raise(self) -> Any:
        """Returns its result or raises its error."""
        if self.error is not None:
            raise self.error
        return self.result


def wait_for_all(task: Task, stop: threading.Event | None = None) -> bool:
    """Wait until no rank's task is running; returns whether any has failed. Collective.

    stop: set as soon as any has failed, to stop this rank's task.
    """
    for seconds in chain((FIRST_WAIT,), repeat(LATER_WAITS)):
        task.wait(seconds)
        failed, pending = _agreed(*task.flags)
        if failed and stop is not None:
            stop.set()
        if not pending:
            return failed
        send_heartbeat("save")
    raise AssertionError("the slices do not end")


def on_first_rank_unhurried(action: Callable[[], Any]) -> Any:
    """Does what `on_first_rank` does, for actions that may outlast the process group's timeout. Collective."""
    task = Task(action if rank_and_world()[0] == 0 else None)
    wait_for_all(task)
    return on_first_rank(task.result_or_raise)


def _agreed(failed: bool, pending: bool) -> tuple[bool, bool]:
    if not dist.is_initialized():
        return failed, pending
    agreed = agree(False, failed=failed, pending=pending)
    return agreed.failed, agreed.pending
