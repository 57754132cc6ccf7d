"""Runs a command in a session of its own. Once it has ended or was given up, none of its processes is left."""

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

_MARKER = "MIKOSHI_APART"
_EXIT_TIMEOUT = 10.0
"""Seconds until processes that outlive the command are killed."""


@dataclass(frozen=True)
class SessionResult:
    """How a command ended.

    began, ended: Unix times
    emptied: seconds from its end until none of its processes was left
    outlived: processes that had to be killed
    """

    began: float
    ended: float
    code: int
    emptied: float
    outlived: list[str]


def run_in_session(command: Sequence[str], out: Path, poll: Callable[[], None]) -> SessionResult:
    """Run a command, append its output to `out`, and call `poll` until it ends. An exception from `poll` ends it at once."""
    marker = uuid.uuid4().hex
    began = time.time()
    with out.open("ab") as log:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=os.environ | {_MARKER: marker},
            start_new_session=True,
        )
    try:
        while child.poll() is None:
            poll()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(0.2)
    finally:
        child.kill()
        code = child.wait()
        ended = time.time()
        outlived = _end_survivors(marker)
    poll()
    return SessionResult(began, ended, code, time.time() - ended, outlived)


def _end_survivors(marker: str) -> list[str]:
    """Wait until no process of a command is left; kill those that take too long, and return them."""
    deadline = time.monotonic() + _EXIT_TIMEOUT
    while alive := _marked(marker):
        if time.monotonic() > deadline:
            names = [f"{process.pid} {process.name()}" for process in alive]
            for process in alive:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            return names
        time.sleep(0.05)
    return []


def _marked(marker: str) -> list[psutil.Process]:
    """Running processes of a command, wherever they are in the process tree: each has the marker in its environment."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(_MARKER) == marker and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found
