"""One thread computes the next few results ahead of their use; they come in order."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")

_PATIENCE = 5.0
"""Seconds that the end of the iterator waits for a `make` under way: a store may keep one for much longer."""


def prefetched(make: Callable[[int], T], start: int, stop: int, ahead: int) -> Generator[T, None, None]:
    """make(start) .. make(stop - 1), of which up to `ahead` are computed while an earlier one is in use.

    An error of `make` is raised where its result was due. The thread ends with the iterator, or after the `make` that is
    running then.
    """
    results: SimpleQueue[tuple[T | None, BaseException | None]] = SimpleQueue()
    room = threading.Semaphore(ahead + 1)
    ended = threading.Event()

    def work() -> None:
        for number in range(start, stop):
            room.acquire()
            if ended.is_set():
                return
            try:
                results.put((make(number), None))
            except BaseException as error:
                results.put((None, error))
                return

    if start >= stop:
        return
    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        for _ in range(start, stop):
            result, error = results.get()
            if error is not None:
                raise error
            room.release()
            yield result  # type: ignore[misc]
    finally:
        ended.set()
        room.release()
        thread.join(_PATIENCE)
