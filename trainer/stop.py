"""Stopping on request: a signal asks, the ranks agree at a step's end, so that all save the same step."""

from __future__ import annotations

import os
import signal
from types import FrameType

import torch
import torch.distributed as dist

ASKING = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Turns SIGTERM and SIGINT into a question that all ranks answer together. A second SIGINT ends at once.
    A context manager: the handlers of before come back at its end."""

    def __init__(self) -> None:
        self.asked = ""

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._ask) for number in ASKING}
        return self

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.asked == "SIGINT":
            os._exit(130)
        self.asked = signal.Signals(number).name

    def agreed(self) -> bool:
        """Whether any rank was asked to stop. Collective; on CPU tensors, so that no GPU waits for it."""
        flag = torch.tensor(int(bool(self.asked)))
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
