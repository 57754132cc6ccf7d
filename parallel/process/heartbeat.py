"""The pulse of this rank: what it is doing, and since when, on a page of shared memory that its supervisor reads.

One process is one rank, so the page is the process's own. Without a page, a beat costs next to nothing and says nothing.
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

# pid, step, beats, time of the last beat, silence that is normal, phase. The count of beats stands at both ends, so that a
# reader who comes while it is written sees that the two differ.
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
    """A rank's last sign of life. step: the one being worked on, 0 before the first. time: of CLOCK_MONOTONIC.
    limit: how many seconds of silence are normal there."""

    pid: int
    step: int
    beats: int
    time: float
    limit: float
    phase: str


@dataclass
class _Pulse:
    page: mmap.mmap | None = None
    listener: Callable[[int, str], None] | None = None
    silence: float = 60.0
    patience: float = 900.0
    slow: frozenset[str] = frozenset()
    phase: str = ""
    step: int = 0
    beats: int = 0
    time: float = 0.0  # of the last beat
    begun: float = 0.0  # when the step was, plus what it has spent in slow phases since
    calm: int = -_WARM  # positive: this step is like the others, so far
    normal: float = 0.0  # silence that the steps known make normal; 0 while they are too few
    known: deque[float] = field(default_factory=lambda: deque(maxlen=_KNOWN))


_pulse = _Pulse()


def open_page(path: Path) -> None:
    """Beat on this page from now on. Raises OSError where there is no room for it."""
    with path.open("w+b") as file:
        os.posix_fallocate(file.fileno(), 0, _PAGE.size)  # a hole that cannot be filled later would be a crash
        _pulse.page = mmap.mmap(file.fileno(), _PAGE.size)
    beat("start")


def listen(listener: Callable[[int, str], None] | None) -> None:
    """Have `listener` called with step and phase at every beat."""
    _pulse.listener = listener


def limits(silence: float, patience: float, slow: Collection[str] = ()) -> None:
    """How many seconds without a beat are normal from here on, where steps of a new kind are about to come, the first ones
    or others than before: within steps at least, and outside of them, as in the phases `slow`.

    Within a step `patience` holds too until enough undisturbed steps are known. From then on it is `silence`, or as long as
    the longest of the latest steps makes normal if that is more.
    """
    pulse = _pulse
    pulse.silence, pulse.patience, pulse.slow = silence, patience, frozenset(slow)
    pulse.calm, pulse.normal = -_WARM, 0.0
    pulse.known.clear()


def phase() -> str:
    """Of the last beat."""
    return _pulse.phase


def beat(phase: str, step: int | None = None) -> None:
    """Say that this rank now begins `phase` (of `step`, from here on, when given)."""
    pulse = _pulse
    if pulse.page is None and pulse.listener is None:
        return
    now = time.monotonic()
    if pulse.phase in pulse.slow:
        pulse.begun += now - pulse.time
    if step is not None and step != pulse.step:
        _begin(step, now)
    if phase not in WITHIN_STEPS:
        if pulse.phase == "agree":  # the step itself has come to its end
            _know(now)
        pulse.calm = min(pulse.calm, -1)
    pulse.beats += 1
    pulse.phase, pulse.time = phase, now
    if pulse.page is not None:
        limit = _limit(phase)
        _PAGE.pack_into(pulse.page, 0, os.getpid(), pulse.step, pulse.beats, now, limit, phase.encode()[:16], pulse.beats)
    if pulse.listener is not None:
        pulse.listener(pulse.step, phase)


def _limit(phase: str) -> float:
    pulse = _pulse
    if pulse.normal and pulse.calm > 0 and phase in WITHIN_STEPS and phase not in pulse.slow:
        return max(pulse.silence, pulse.normal)
    return max(pulse.patience, pulse.silence, pulse.normal)


def _know(now: float) -> None:
    """Remember the step that ends, if it is like the others."""
    pulse = _pulse
    if pulse.calm > 0:
        pulse.known.append(now - pulse.begun)
        if len(pulse.known) >= _ENOUGH:
            pulse.normal = _FACTOR * max(pulse.known)


def _begin(step: int, now: float) -> None:
    pulse = _pulse
    _know(now)
    pulse.step, pulse.begun = step, now
    pulse.calm += 1


def read_page(path: Path) -> Page | None:
    """What the page says; None where there is none yet."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    if len(content) < _PAGE.size:
        return None
    pid, step, beats, when, limit, phase, again = _PAGE.unpack(content[: _PAGE.size])
    if not beats or again != beats:  # nothing said yet, or being written: the next look will tell
        return None
    return Page(pid, step, beats, when, limit, phase.rstrip(b"\0").decode())
