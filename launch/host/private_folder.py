"""A folder that only this user can read and that does not outlive its owner for long: killed, the next one removes it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from mikoshi.data.io.atomic import LOCKLESS

_PREFIX = "mikoshi-ranks-"
_YOUNG = 1.0  # seconds in which its owner may not have locked it yet
_ROOM = 1 << 20
_PAGE = 1 << 16
_MEMORY = Path("/dev/shm")
_SHORT = (Path("/tmp"), Path("/var/tmp"))
_SOCKET = 107
"""Bytes of a local socket's path, as Linux has it."""

_NAMES = len(f"/{_PREFIX}4194304-12345678/listener-12345678")
"""Bytes that the folder's name takes of them, and the socket's of multiprocessing in it."""


@contextlib.contextmanager
def private_folder(sockets: bool = False) -> Iterator[Path]:
    """A fresh folder in this machine's memory, else on its disk, locked as long as its owner lives, gone at the end. Its name
    has the owner's process id. sockets: it is for local ones too, whose paths are short: a long TMPDIR does not serve.
    Raises OSError where nothing can be written anywhere."""
    for place in _places(sockets):
        for left in place.glob(f"{_PREFIX}*"):
            _sweep(left)
    folder = _fresh(sockets)
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


def _places(sockets: bool) -> list[Path]:
    """What ranks write here must not wait for a disk, nor fail because it is full."""
    places = dict.fromkeys((_MEMORY, Path(tempfile.gettempdir()), *_SHORT))
    return [place for place in places if not sockets or len(os.fsencode(place)) + _NAMES <= _SOCKET]


def _fresh(sockets: bool) -> Path:
    why: OSError | None = None
    for place in _places(sockets):
        try:
            folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=place))
        except OSError as error:  # there is none, or it is not for us to write
            why = why or error
            continue
        try:
            if place == _MEMORY and shutil.disk_usage(place).free < _ROOM:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(place))
            (folder / "room").write_bytes(bytes(_PAGE))
            (folder / "room").unlink()
            return folder
        except OSError as error:
            why = why or error
            shutil.rmtree(folder, ignore_errors=True)
    raise why or OSError(errno.ENOENT, "no folder for temporary files", tempfile.gettempdir())


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
