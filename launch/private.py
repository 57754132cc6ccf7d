"""A folder that only this user can read and that does not outlive its owner for long: killed, the next one removes it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from data.atomic import LOCKLESS

_PREFIX = "mikoshi-ranks-"
_YOUNG = 1.0  # seconds in which its owner may not have locked it yet
_ROOM = 1 << 20
_MEMORY = Path("/dev/shm")


@contextlib.contextmanager
def private_folder() -> Iterator[Path]:
    """A fresh folder in this machine's memory, else on its disk, locked as long as its owner lives, gone at the end. Its name
    has the owner's process id. Raises OSError where neither can be written."""
    for place in _places():
        for left in place.glob(f"{_PREFIX}*"):
            _sweep(left)
    folder = _fresh()
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in LOCKLESS:  # where there are no locks, the next one removes nothing either
            raise
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _places() -> tuple[Path, Path]:
    """What ranks write here must not wait for a disk, nor fail because it is full."""
    return _MEMORY, Path(tempfile.gettempdir())


def _fresh() -> Path:
    memory, disk = _places()
    with contextlib.suppress(OSError):  # there is none, or it is not for us to write
        if shutil.disk_usage(memory).free >= _ROOM:
            return Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=memory))
    return Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=disk))


def _sweep(folder: Path) -> None:
    """Remove what the owner, who is dead, could not. Another user's is not ours to judge."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            about = os.fstat(handle)
            if about.st_uid == os.getuid() and about.st_mode & 0o077 == 0 and time.time() - about.st_mtime > _YOUNG:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
        finally:
            os.close(handle)
