"""Output never decides how a run ends: a closed pipe or stream, a lost terminal or a full disk loses text, not the run."""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import os
import select
import sys
import threading
from typing import Any

from mikoshi.trainer.errors import OutputError
from mikoshi.trainer.exit_codes import DONE

_GONE = (errno.EPIPE, errno.EIO)
"""The reader of a pipe has gone, or the terminal has."""

_ESCAPE = "mikoshi.escape"
_NAMES = {1: "standard output", 2: "standard error"}
_kept: list[Any] = []  # the streams of before, whose end would close the descriptors


def open_streams(unread: bool = False) -> None:
    """Make standard input, output and error safe, before anything else is opened. To be called first in a process of ours.

    A descriptor that is closed becomes /dev/null: else the next file or socket would take its number, and be printed into. What
    an encoding lacks is escaped; bytes of a file name that are no text are printed as they are.

    Without `unread` a command ends quietly with code 0 once the reader of its output has gone, and OutputError is raised where
    output cannot be written otherwise. With it, or after `go_on_unread`, the work goes on to its own end in either case.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free, which is this one
            os.set_inheritable(number, True)
    if sys.stdin is None:
        sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    codecs.register_error(_ESCAPE, _escape)
    sys.stdout = _wrapped(sys.stdout, 1)
    sys.stderr = _wrapped(sys.stderr, 2)
    if unread:
        go_on_unread()


def go_on_unread() -> None:
    """From here on the work matters more than what is printed of it."""
    if isinstance(raw := _raw(sys.stdout), _Output):
        raw.unread = True


def reader_has_gone() -> bool:
    """Whether standard output could not be written."""
    raw = _raw(sys.stdout)
    return isinstance(raw, _Output) and raw.failed


def _wrapped(stream: Any, number: int) -> Any:
    """The same stream over a safe descriptor. One that is not the process's own, as in tests, stays."""
    if stream is None:
        return io.TextIOWrapper(io.BufferedWriter(_Output(number)), "utf-8", _ESCAPE, line_buffering=number == 2)
    raw = _raw(stream)
    if isinstance(raw, _Output) or not isinstance(raw, io.FileIO) or raw.fileno() != number:
        return stream
    with contextlib.suppress(OSError):
        stream.flush()
    _kept.append(stream)
    # Unbuffered, as PYTHONUNBUFFERED has it, text goes to the descriptor at once.
    below: Any = _Output(number)
    if not isinstance(stream.buffer, io.FileIO):
        below = io.BufferedWriter(below)
    return io.TextIOWrapper(
        below, stream.encoding, _ESCAPE, line_buffering=stream.line_buffering, write_through=stream.write_through
    )


def _raw(stream: Any) -> Any:
    buffer = getattr(stream, "buffer", None)
    return getattr(buffer, "raw", buffer)


def _escape(error: UnicodeError) -> tuple[str | bytes, int]:
    """Of what cannot be encoded: bytes that were no text go back to what they were, the rest is escaped."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    one = error.object[error.start]
    if "\udc80" <= one <= "\udcff":
        return bytes([ord(one) - 0xDC00]), error.start + 1
    return one.encode("ascii", "backslashreplace"), error.start + 1


class _Output(io.RawIOBase):
    """A descriptor for output that is written to whole, and whose failure is told at most once."""

    def __init__(self, number: int) -> None:
        self.number, self.name, self.mode = number, _NAMES[number], "wb"
        self.unread = number == 2  # that words of an error cannot be read is no error itself
        self.failed = False

    def fileno(self) -> int:
        return self.number

    def isatty(self) -> bool:
        return os.isatty(self.number)

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        view = memoryview(data).cast("B")
        size, done = len(view), 0
        while done < size:
            try:
                done += os.write(self.number, view[done:])
            except BlockingIOError:  # somebody who shares the terminal or pipe has set it so
                select.select([], [self.number], [])
            except OSError as error:
                self._lost(error)
                return size
        return size

    def _lost(self, error: OSError) -> None:
        if self.failed or (not self.unread and threading.current_thread() is not threading.main_thread()):
            return
        self.failed = True
        if not self.unread and error.errno in _GONE:
            raise SystemExit(DONE)
        if not self.unread:
            raise OutputError(f"{self.name}: {error.strerror}: what was to be printed there is lost")
        if error.errno not in _GONE and self.number == 1:
            print(f"warning: {self.name}: {error.strerror}: what is printed there may be lost", file=sys.stderr, flush=True)
