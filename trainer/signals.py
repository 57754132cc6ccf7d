"""What the ranks agree on at a step's end: whether to stop, because a signal asked one of them, so that all save the same
step; and how a save in the background stands."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

from mikoshi.trainer.exit_codes import PREEMPTED

ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""What asks a run to save and end: people, a terminal that goes, and schedulers, Slurm by USR1 or USR2 before its limit."""


def heard() -> list[signal.Signals]:
    """Those of ASKING that this process was not told to ignore, as nohup does."""
    return [number for number in ASKING if signal.getsignal(number) != signal.SIG_IGN]


@contextlib.contextmanager
def stopping_is_no_crash() -> Iterator[None]:
    """While there is no step to finish, before the first and after the last, what asks to stop ends the process at once."""

    def stop(*_: object) -> None:
        with contextlib.suppress(OSError):  # the same Ctrl-C may have ended who reads it
            os.write(2, b"stopped outside of a step: nothing is lost, the same command goes on\n")
        os._exit(PREEMPTED)

    before = {number: signal.signal(number, stop) for number in heard()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StopRequest:
    """Turns a signal into a question that all ranks answer together. A second SIGINT ends at once.
    A context manager: the handlers of before come back at its end."""

    def __init__(self) -> None:
        self.asked = ""

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._ask) for number in heard()}
        return self

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.asked == "SIGINT":
            os._exit(130)
        self.asked = signal.Signals(number).name

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class Agreement:
    """The same on every rank. `failed`, `pending`: of any rank's part of the save under way. `save`: the next one is due."""

    stop: bool
    failed: bool
    pending: bool
    save: bool


def agree(stop: bool, failed: bool = False, pending: bool = False, save: bool = False) -> Agreement:
    """What any rank says, all know. Collective; on CPU tensors, so that no GPU waits for it."""
    import torch
    import torch.distributed as dist

    flags = torch.tensor([stop, failed, pending, save], dtype=torch.int32)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return Agreement(*map(bool, flags.tolist()))
