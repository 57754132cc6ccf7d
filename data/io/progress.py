"""How far a long work is: bytes done and to do, how fast, and how long it still takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


@dataclass
class Progress:
    """Handed to the caller's `show` again and again. `resumed_bytes`: of those done, what was done before this call."""

    phase: str
    total_bytes: int
    done_bytes: int = 0
    tokens: int = 0
    started: float = field(default_factory=time.monotonic)
    resumed_bytes: int = 0

    @property
    def bytes_per_second(self) -> float:
        return (self.done_bytes - self.resumed_bytes) / max(1e-3, time.monotonic() - self.started)


Show = Callable[[Progress], None]


def quiet(_: Progress) -> None:
    """Show nothing."""


class Meter:
    """The progress of jobs of known bytes, that moves within a job too: what a job tells of itself is in characters of
    text, which are taken for as many bytes of its source as they were in the jobs that ended."""

    def __init__(self, phase: str, sizes: Sequence[int], done_before: int, show: Show) -> None:
        total = sum(sizes) + done_before
        self.progress = Progress(phase, total, done_before, resumed_bytes=done_before)
        self._show, self._sizes, self._ended = show, sizes, done_before
        self._within: dict[int, int] = {}
        self._characters = self._bytes = 1  # of ended jobs
        show(self.progress)

    def told(self, job: int, characters: int, tokens: int) -> None:
        self._within[job] = self._within.get(job, 0) + characters
        self.progress.tokens += tokens
        self._update()

    def ended(self, job: int) -> None:
        self._characters += self._within.pop(job, 0)
        self._bytes += self._sizes[job]
        self._ended += self._sizes[job]
        self._update()

    def _update(self) -> None:
        ratio = self._bytes / self._characters
        under_way = sum(min(self._sizes[job], int(told * ratio)) for job, told in self._within.items())
        self.progress.done_bytes = max(self.progress.done_bytes, self._ended + under_way)
        self._show(self.progress)
