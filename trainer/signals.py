"""The ranks agree at the end of each step whether to stop, so that all save the same step, and on the state of the background
save."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

from mikoshi.trainer.exit_codes import PREEMPTED

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that ask a run to save and stop: from people, a closed terminal, or a scheduler (Slurm sends USR1 or USR2 before its
time limit)."""


def handled_signals() -> list[signal.Signals]:
    """The STOP_SIGNALS that this process does not ignore; nohup ignores SIGHUP."""
    return [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]


@contextlib.contextmanager
def exit_on_stop_signal() -> Iterator[None]:
    """Before the first step and after the last one, a stop signal ends the process at once with exit code PREEMPTED."""

    def stop(*_: object) -> None:
        with contextlib.suppress(OSError):  # the same Ctrl-C may have ended who reads it
            os.write(2, b"stopped outside of a step: nothing is lost, the same command goes on\n")
        os._exit(PREEMPTED)

    before = {number: signal.signal(number, stop) for number in handled_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StopRequest:
    """Records a stop signal, so that all ranks can agree to stop at the end of a step.

    A second SIGINT ends the process at once. As a context manager it restores the earlier handlers on exit. received: name of
    the signal, empty if there was none.
    """

    def __init__(self) -> None:
        self.received = ""

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._ask) for number in handled_signals()}
        return self

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == "SIGINT":
            os._exit(130)
        self.received = signal.Signals(number).name

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
    """Combine flags over all ranks: each is true if it is true on any. Collective, on CPU tensors, so that no GPU waits."""
    import torch
    import torch.distributed as dist

    flags = torch.tensor([stop, failed, pending, save], dtype=torch.int32)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return Agreement(*map(bool, flags.tolist()))
