"""Copies the logs of the head and of rank 0 to the output of the leading pod, where `kubectl logs` shows them.

If the run folder is on the cluster's disk, nothing else can be seen from outside.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

_POLL_INTERVAL = 0.5
_PIECE = 1 << 16


@contextlib.contextmanager
def tee(logs: Sequence[Path]) -> Iterator[None]:
    """Copy whole lines that are appended to these files to this process's current stdout, until the end of the block."""
    out, over = os.dup(1), threading.Event()
    at = {log: log.stat().st_size if log.exists() else 0 for log in logs}

    def copy(last: bool) -> None:
        for log in logs:
            with contextlib.suppress(OSError), log.open("rb") as file:
                file.seek(at[log])
                while piece := file.read(_PIECE):
                    whole = piece if last or len(piece) == _PIECE else piece[: piece.rfind(b"\n") + 1]
                    at[log] += len(whole)
                    _write(out, whole)
                    if len(whole) < len(piece):
                        break

    def watch() -> None:
        while not over.wait(_POLL_INTERVAL):
            copy(last=False)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(2 * _POLL_INTERVAL)
        copy(last=True)
        os.close(out)


def _write(out: int, data: bytes) -> None:
    """Write all data. If nobody can read the output any more, the logs alone keep it."""
    view = memoryview(data)
    with contextlib.suppress(OSError):
        while view:
            view = view[os.write(out, view) :]
