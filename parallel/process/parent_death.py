"""A child process does not outlive its parent."""

from __future__ import annotations

import ctypes
import signal

_PR_SET_PDEATHSIG = 1  # from prctl.h


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies, even by SIGKILL, so that no orphan keeps a GPU
    (PR_SET_PDEATHSIG)."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
