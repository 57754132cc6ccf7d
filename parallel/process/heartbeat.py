"""The heartbeat of this rank: what it is doing, since when, and how long it may be silent now, on a page of shared memory
that its supervisor reads.

One process is one rank, so the state is global to the process. Without a page, a heartbeat costs next to nothing.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

# pid, step, count, time of the last heartbeat, silence that is normal, phase. The count of heartbeats stands at both ends, so
# that a reader who comes while it is written sees that the two differ.
_PAGE = struct.Struct("<qqqdd16sq")
_KNOWN, _ENOUGH = 256, 8
"""Undisturbed steps that a rank remembers, and how many it must know before silence is judged by them."""
_FACTOR = 12.0
"""Times the longest of them: a step that takes ten times as long as ever before is slow, and no hang."""
_WARM = 2
"""Steps after a start that may take as long as they like: compilation, first touch of memory. One such step follows
whatever else interrupts training: caches and the allocator's blocks have to be filled again."""

WITHIN_STEPS = frozenset(("data", "forward", "backward", "reduce", "update", "agree"))
"""Phases that come in every step. The others: start, load, compile, save, evaluate, end."""


@dataclass(frozen=True)
class Page:
    """A rank's last heartbeat.

    pid: of the process.
    step: the current step, 0 before the first.
    count: number of heartbeats so far.
    time: of this one, by CLOCK_MONOTONIC, in seconds.
    limit: how many seconds without a heartbeat are normal from here on.
    phase: what the rank is doing.
    """

    pid: int
    step: int
    count: int
    time: float
    limit: float
    phase: str


@dataclass
class _HeartbeatState:
    page: mmap.mmap | None = None
    listener: Callable[[int, str], None] | None = None
    silence: float = 60.0
    patience: float = 900.0
    slow: frozenset[str] = frozenset()
    phase: str = ""
    step: int = 0
    count: int = 0
    time: float = 0.0  # of the last beat
    begun: float = 0.0  # when the step was, plus what it has spent in slow phases since
    calm: int = -_WARM  # positive: this step is like the others, so far
    normal: float = 0.0  # silence that the steps known make normal; 0 while they are too few
    known: deque[float] = field(default_factory=lambda: deque(maxlen=_KNOWN))


_state = _HeartbeatState()


def open_page(path: Path) -> None:
    """Write heartbeats to this page from now on. Raises OSError if there is no room for it."""
    with path.open("w+b") as file:
        os.posix_fallocate(file.fileno(), 0, _PAGE.size)  # a hole that cannot be filled later would be a crash
        _state.page = mmap.mmap(file.fileno(), _PAGE.size)
    send_heartbeat("start")


def set_listener(listener: Callable[[int, str], None] | None) -> None:
    """Call `listener` with step and phase at every heartbeat; None: call nothing."""
    _state.listener = listener


def set_limits(silence: float, patience: float, slow: Collection[str] = ()) -> None:
    """Set how long a rank may be silent, at the start or before steps of a new kind.

    silence: seconds without a heartbeat that are normal within a step.
    patience: the same outside of steps, in `slow` phases, and within steps until enough undisturbed steps are known.
    slow: phases within steps that `patience` applies to.

    Once enough steps are known, the limit within a step is `silence`, or a multiple of the longest recent step if that is more.
    """
    state = _state
    state.silence, state.patience, state.slow = silence, patience, frozenset(slow)
    state.calm, state.normal = -_WARM, 0.0
    state.known.clear()


def current_phase() -> str:
    """The phase of the last heartbeat."""
    return _state.phase


def send_heartbeat(phase: str, step: int | None = None) -> None:
    """Record that this rank begins `phase`, and from here on `step` if it is given."""
    state = _state
    if state.page is None and state.listener is None:
        return
    now = time.monotonic()
    if state.phase in state.slow:
        state.begun += now - state.time
    if step is not None and step != state.step:
        _begin_step(step, now)
    if phase not in WITHIN_STEPS:
        if state.phase == "agree":  # the step itself has come to its end
            _record_step(now)
        state.calm = min(state.calm, -1)
    state.count += 1
    state.phase, state.time = phase, now
    if state.page is not None:
        limit = _limit(phase)
        _PAGE.pack_into(state.page, 0, os.getpid(), state.step, state.count, now, limit, phase.encode()[:16], state.count)
    if state.listener is not None:
        state.listener(state.step, phase)


def _limit(phase: str) -> float:
    state = _state
    if state.normal and state.calm > 0 and phase in WITHIN_STEPS and phase not in state.slow:
        return max(state.silence, state.normal)
    return max(state.patience, state.silence, state.normal)


def _record_step(now: float) -> None:
    """Remember the duration of the step that ends, if nothing disturbed it."""
    state = _state
    if state.calm > 0:
        state.known.append(now - state.begun)
        if len(state.known) >= _ENOUGH:
            state.normal = _FACTOR * max(state.known)


def _begin_step(step: int, now: float) -> None:
    state = _state
    _record_step(now)
    state.step, state.begun = step, now
    state.calm += 1


def read_page(path: Path) -> Page | None:
    """The last heartbeat on the page; None if there is none yet."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    if len(content) < _PAGE.size:
        return None
    pid, step, count, when, limit, phase, count_at_end = _PAGE.unpack(content[: _PAGE.size])
    if not count or count_at_end != count:  # nothing said yet, or being written: the next look will tell
        return None
    return Page(pid, step, count, when, limit, phase.rstrip(b"\0").decode())
