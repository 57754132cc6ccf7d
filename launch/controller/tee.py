"""What the pod that leads prints: what its head and rank 0 say into their logs. Where these are on the cluster's disk, it is
all that can be seen from elsewhere."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

_LOOKS = 0.5
_PIECE = 1 << 16


@contextlib.contextmanager
def echoed(logs: Sequence[Path]) -> Iterator[None]:
    """Copy what is written to these files from now on, whole lines, to where this process prints now; all of it at the end."""
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
        while not over.wait(_LOOKS):
            copy(last=False)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(2 * _LOOKS)
        copy(last=True)
        os.close(out)


def _write(out: int, data: bytes) -> None:
    """All of it, unless nobody can read it any more: then it stays in the logs alone."""
    view = memoryview(data)
    with contextlib.suppress(OSError):
        while view:
            view = view[os.write(out, view) :]
