"""A connection to one node's agent through a command's stdin and stdout: JSON objects, one a line. No call blocks."""

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
_MAX_LINE = 64 << 20
_ERROR_TAIL = 2000


class Link:
    """The head's connection to one node.

    last_message: monotonic time of the last message
    closed: whether the agent hung up or close() was called
    """

    def __init__(self, name: str, command: Sequence[str], log: Path) -> None:
        """Start the command.

        log: file for its stderr, and for output that is no message
        """
        self.name, self.log = name, log
        self._offset = log.stat().st_size if log.exists() else 0
        with log.open("ab") as errors:
            # In a session of its own, so that Ctrl-C in a terminal goes to the head alone, which forwards it.
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
        self.started = self.last_message = time.monotonic()
        self.closed = False

    def send(self, message: dict[str, Any]) -> None:
        """Send a message, from any thread. What the pipe cannot take now goes out with the next call; a closed link drops
        it."""
        with self._sending:
            self._unsent += json.dumps(message).encode() + b"\n"
        self.flush()

    def receive(self) -> list[dict[str, Any]]:
        """Return the messages received since the last call. Lines that are no JSON object go to the log."""
        with contextlib.suppress(BlockingIOError):
            while not self.closed:
                chunk = os.read(self._out, _CHUNK)
                self.closed = not chunk or len(self._unread) > _MAX_LINE
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
            self.last_message = time.monotonic()
        return messages

    def flush(self) -> None:
        """Send what could not go out before."""
        with self._sending, contextlib.suppress(BlockingIOError, OSError, ValueError):
            while self._unsent and not self.closed:
                del self._unsent[: os.write(self._in, self._unsent[:_CHUNK])]

    @property
    def silent_seconds(self) -> float:
        """Seconds since the last message."""
        return time.monotonic() - self.last_message

    def last_error_line(self) -> str:
        """The last line that the command wrote to stderr, or ""."""
        lines: list[str] = []
        with contextlib.suppress(OSError), self.log.open("rb") as log:
            log.seek(max(self._offset, log.seek(0, os.SEEK_END) - _ERROR_TAIL))
            lines = log.read().decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")

    def close(self, patience: float = 0.0) -> None:
        """Close the pipes, upon which the agent ends its ranks and itself. After `patience` seconds the command is killed."""
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
