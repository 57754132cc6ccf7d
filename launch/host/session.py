"""A command of ours in a session of its own: once it has ended, or is no longer waited for, no process of it is left."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

_MARK = "MIKOSHI_APART"
_PATIENCE = 10.0
"""Seconds until processes that outlive the command are ended."""


@dataclass(frozen=True)
class Ran:
    """How a command went. emptied: seconds from its end until none of its processes was left. outlived: those that had to
    be ended."""

    began: float
    ended: float
    code: int
    emptied: float
    outlived: list[str]


def run_apart(command: Sequence[str], out: Path, look: Callable[[], None]) -> Ran:
    """Run a command, which appends what it says to `out`, and call `look` until it ends. What `look` raises ends it at once."""
    mark = uuid.uuid4().hex
    began = time.time()
    with out.open("ab") as said:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, env=os.environ | {_MARK: mark}, start_new_session=True
        )
    try:
        while child.poll() is None:
            look()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(0.2)
    finally:
        child.kill()
        code = child.wait()
        ended = time.time()
        outlived = _wait_for_all(mark)
    look()
    return Ran(began, ended, code, time.time() - ended, outlived)


def _wait_for_all(mark: str) -> list[str]:
    """Until no process of a command is left; those that had to be ended."""
    deadline = time.monotonic() + _PATIENCE
    while alive := _marked(mark):
        if time.monotonic() > deadline:
            told = [f"{process.pid} {process.name()}" for process in alive]
            for process in alive:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            return told
        time.sleep(0.05)
    return []


def _marked(mark: str) -> list[psutil.Process]:
    """Running processes of a command, wherever they hang in the tree: each has the mark in its environment."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(_MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found
