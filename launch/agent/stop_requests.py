"""Keeps the signals that asked this process to stop, until they can be handled."""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass, field


@dataclass
class StopRequests:
    """Signals to stop, in the order received.

    grace: seconds that ranks have to stop after the first
    deadline: monotonic time by which they must have stopped
    """

    grace: float
    signals: list[int] = field(default_factory=list)
    deadline: float = float("inf")

    def add(self, number: int, _frame: object = None) -> None:
        """Record a signal; usable as a signal handler. The first one sets the deadline."""
        if not self.signals:
            self.deadline = time.monotonic() + self.grace
        self.signals.append(number)

    def set_grace(self, grace: float) -> None:
        """Set the grace time. It counts from now if a signal has already been received."""
        self.grace = grace
        if self.signals:
            self.deadline = time.monotonic() + grace

    @property
    def immediate(self) -> bool:
        """Whether Ctrl-C was pressed twice."""
        return self.signals.count(signal.SIGINT) > 1
