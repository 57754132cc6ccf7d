"""One node's agent, reached through a command's standard input and output: JSON objects, a line each, and never a wait."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_CHUNK = 1 << 16
_LONGEST = 64 << 20
_LAST_WORDS = 2000


class Link:
    """From the process that leads a run to one node. `heard`: when it last said something, of CLOCK_MONOTONIC."""

    def __init__(self, name: str, command: Sequence[str], log: Path) -> None:
        self.name, self.log = name, log
        self._offset = log.stat().st_size if log.exists() else 0
        with log.open("ab") as errors:
            # A session of its own: Ctrl-C at a terminal is for the leader, which passes it on.
            self.process = subprocess.Popen(
                list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, start_new_session=True
            )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._in, self._out = self.process.stdin.fileno(), self.process.stdout.fileno()
        for handle in (self._in, self._out):
            os.set_blocking(handle, False)
        self._unread, self._unsent = bytearray(), bytearray()
        self._sending = threading.Lock()
        self.began = self.heard = time.monotonic()
        self.closed = False

    def send(self, message: dict[str, Any]) -> None:
        """From any thread. What cannot go out now does so with the next call; a link that is closed swallows it."""
        with self._sending:
            self._unsent += json.dumps(message).encode() + b"\n"
        self.flush()

    def receive(self) -> list[dict[str, Any]]:
        """What has come since. Lines that are no JSON objects are some program's chatter, and end in the log."""
        with contextlib.suppress(BlockingIOError):
            while not self.closed:
                chunk = os.read(self._out, _CHUNK)
                self.closed = not chunk or len(self._unread) > _LONGEST
                self._unread += chunk
        *lines, rest = bytes(self._unread).split(b"\n")
        self._unread = bytearray(rest)
        messages = []
        for line in lines:
            try:
                message = json.loads(line)
            except ValueError:
                message = None
            if isinstance(message, dict):
                messages.append(message)
            elif line:
                with contextlib.suppress(OSError), self.log.open("ab") as log:
                    log.write(line + b"\n")
        if messages:
            self.heard = time.monotonic()
        return messages

    def flush(self) -> None:
        """Send what could not go out before."""
        with self._sending, contextlib.suppress(BlockingIOError, OSError, ValueError):
            while self._unsent and not self.closed:
                del self._unsent[: os.write(self._in, self._unsent[:_CHUNK])]

    @property
    def silent(self) -> float:
        """Seconds without a word."""
        return time.monotonic() - self.heard

    def last_words(self) -> str:
        """The last line that the command wrote on stderr; empty if none."""
        lines: list[str] = []
        with contextlib.suppress(OSError), self.log.open("rb") as log:
            log.seek(max(self._offset, log.seek(0, os.SEEK_END) - _LAST_WORDS))
            lines = log.read().decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")

    def close(self, patience: float = 0.0) -> None:
        """Hang up, upon which the agent ends its ranks and itself; the command is killed if it outlives `patience` seconds."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with self._sending:
            self.closed = True
            with contextlib.suppress(OSError):
                self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(patience)
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
