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
_KNOWN, _OFTEN = 1000, 16
_WARM = 2
"""Steps after a start that may take as long as they like: compilation, first touch of memory."""

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
    silence: float = 5.0
    patience: float = 900.0
    slow: frozenset[str] = frozenset()
    phase: str = ""
    step: int = 0
    beats: int = 0
    started: int = 0  # steps begun by this process
    begun: float = 0.0
    plain: bool = False  # nothing but the step itself has been done since
    normal: float = 0.0  # ten times the p99 of the steps known
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
    """How many seconds without a beat are normal from here on, where the first steps are about to come: within steps at
    least, and outside of them, as in the phases `slow`."""
    _pulse.silence, _pulse.patience, _pulse.slow, _pulse.started = silence, patience, frozenset(slow), 0


def phase() -> str:
    """Of the last beat."""
    return _pulse.phase


def beat(phase: str, step: int | None = None) -> None:
    """Say that this rank now begins `phase` (of `step`, from here on, when given)."""
    pulse = _pulse
    if pulse.page is None and pulse.listener is None:
        return
    now = time.monotonic()
    if step is not None and step != pulse.step:
        _begin(step, now)
    pulse.plain &= phase in WITHIN_STEPS
    pulse.beats += 1
    pulse.phase = phase
    if pulse.page is not None:
        steady = phase in WITHIN_STEPS and phase not in pulse.slow and pulse.started > _WARM
        limit = max(pulse.silence, pulse.normal) if steady else max(pulse.patience, pulse.silence)
        _PAGE.pack_into(pulse.page, 0, os.getpid(), pulse.step, pulse.beats, now, limit, phase.encode()[:16], pulse.beats)
    if pulse.listener is not None:
        pulse.listener(pulse.step, phase)


def _begin(step: int, now: float) -> None:
    pulse = _pulse
    if pulse.plain and pulse.started > _WARM:
        pulse.known.append(now - pulse.begun)
        if len(pulse.known) < _OFTEN or pulse.started % _OFTEN == 0:
            pulse.normal = 10 * sorted(pulse.known)[int(0.99 * (len(pulse.known) - 1) + 0.5)]
    pulse.step, pulse.begun, pulse.plain = step, now, True
    pulse.started += 1


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
