"""Progress of long work: bytes done and in total, the rate, and the time left."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


@dataclass
class Progress:
    """Passed to a ProgressCallback again and again.

    phase: what is being done.
    resumed_bytes: the part of `done_bytes` that an earlier call had done.
    started: time.monotonic() at the start.
    """

    phase: str
    total_bytes: int
    done_bytes: int = 0
    tokens: int = 0
    started: float = field(default_factory=time.monotonic)
    resumed_bytes: int = 0

    @property
    def bytes_per_second(self) -> float:
        """Average rate of this call."""
        return (self.done_bytes - self.resumed_bytes) / max(1e-3, time.monotonic() - self.started)


ProgressCallback = Callable[[Progress], None]


def no_progress(_: Progress) -> None:
    """A ProgressCallback that shows nothing."""


class Meter:
    """Progress of jobs of known sizes, which also moves within a job.

    Within a job, progress is counted in characters of text and converted to bytes at the rate of the finished jobs.
    """

    def __init__(self, phase: str, sizes: Sequence[int], done_before: int, show: ProgressCallback) -> None:
        total = sum(sizes) + done_before
        self.progress = Progress(phase, total, done_before, resumed_bytes=done_before)
        self._show, self._sizes, self._ended = show, sizes, done_before
        self._within: dict[int, int] = {}
        self._characters = self._bytes = 1  # of ended jobs
        show(self.progress)

    def advance(self, job: int, characters: int, tokens: int) -> None:
        """Add characters and tokens that a running job has processed."""
        self._within[job] = self._within.get(job, 0) + characters
        self.progress.tokens += tokens
        self._update()

    def finish(self, job: int) -> None:
        """Count a job as done."""
        self._characters += self._within.pop(job, 0)
        self._bytes += self._sizes[job]
        self._ended += self._sizes[job]
        self._update()

    def _update(self) -> None:
        ratio = self._bytes / self._characters
        under_way = sum(min(self._sizes[job], int(characters * ratio)) for job, characters in self._within.items())
        self.progress.done_bytes = max(self.progress.done_bytes, self._ended + under_way)
        self._show(self.progress)
