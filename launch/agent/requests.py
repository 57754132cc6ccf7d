"""What a run was asked by signals, kept until it can be answered."""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass, field


@dataclass
class Requests:
    """The signals that this process was asked to stop with, since when, and by when the ranks must have done so."""

    grace: float
    asked: list[int] = field(default_factory=list)
    deadline: float = float("inf")

    def ask(self, number: int, _frame: object = None) -> None:
        if not self.asked:
            self.deadline = time.monotonic() + self.grace
        self.asked.append(number)

    def start(self, grace: float) -> None:
        """From now on as many seconds as this are left after a request, also after one that has come already."""
        self.grace = grace
        if self.asked:
            self.deadline = time.monotonic() + grace

    @property
    def at_once(self) -> bool:
        """Whether Ctrl-C came twice."""
        return self.asked.count(signal.SIGINT) > 1
