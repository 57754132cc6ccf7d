"""The working folder in which a dataset is built, and how work there is interrupted: what is finished stays for the next
call."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mikoshi.data.errors import DataError, storage_error
from mikoshi.data.io.atomic import LOCK, partial_path, write_file
from mikoshi.data.io.progress import Progress, ProgressCallback

_IDENTITY = "recipe.json"


class Stopped(Exception):
    """Stopped on request, by SIGINT or SIGTERM. What is finished is kept, and the same call continues."""


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """SIGINT and SIGTERM raise Stopped in the block, if this is the main thread."""

    def stop(number: int, _frame: object) -> None:
        raise Stopped(f"stopped by {signal.Signals(number).name}; what is finished is kept, the same command goes on")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def write_errors_named(folder: Path) -> Iterator[None]:
    """Turn an OSError in the block into a DataError or StorageError that names the dataset's folder."""
    try:
        yield
    except BlockingIOError:
        raise DataError(
            f"data.path: {folder} is being prepared by another process: wait for it, or give another path"
        ) from None
    except OSError as error:
        kept = os.path.lexists(partial_path(folder))
        outcome = "what is finished is kept, the same command goes on" if kept else "nothing was left behind"
        raise storage_error(error, f"data.path: cannot write {folder}: {error.strerror or error}; {outcome}") from error


def finished_pieces(built: Path) -> int:
    """How many pieces of the source are finished in a working folder, in the pass that is further."""
    return max(sum(1 for _ in built.glob("records/[0-9]*.json")), sum(1 for _ in built.glob("hashes/[0-9]*")))


def open_workspace(built: Path, plain: dict[str, Any], show: ProgressCallback) -> None:
    """Prepare the working folder, keeping what an earlier call of the same recipe finished there.

    Raises DataError if it holds finished work of another recipe. Work that cannot be continued is removed, as is that of an
    earlier version, which did not record the contents of files.
    """
    try:
        before = json.loads((built / _IDENTITY).read_bytes())
    except (FileNotFoundError, ValueError):  # a disk that fails just now says nothing of what is there
        before = None
    if before != plain:
        pieces_there = finished_pieces(built)
        earlier = {name: value for name, value in plain.items() if name != "contents"}  # versions that knew none
        if pieces_there and isinstance(before, dict) and before != earlier:
            names = [name for name in plain if before.get(name) != plain[name]] + [n for n in before if n not in plain]
            difference = (
                f"{names[0]} was {before.get(names[0])!r}" if names[0] not in ("files", "contents") else "the files were others"
            )
            raise DataError(
                f"data.path: {built} holds {pieces_there} finished pieces of a preparation with other settings ({difference}): "
                "remove it, or set them back to go on"
            )
        stale = [path for path in built.iterdir() if path.name != LOCK]
        if stale:
            show(Progress(f"clearing {built}, left by other settings", 0))
        for path in stale:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        write_file(built / _IDENTITY, json.dumps(plain).encode())
    for name in ("records", "parts", "hashes"):
        (built / name).mkdir(exist_ok=True)
