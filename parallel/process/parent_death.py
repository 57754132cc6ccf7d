"""A process that another one started does not outlive it."""

from __future__ import annotations

import ctypes
import signal

_PR_SET_PDEATHSIG = 1  # from prctl.h


def die_with_parent() -> None:
    """Have the kernel kill this process when the one that started it dies, even by SIGKILL: no orphan keeps a GPU."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
