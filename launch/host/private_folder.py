"""Makes temporary folders that only this user can read. The folder of a killed process is removed by the next one."""

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

from mikoshi.data.io.atomic import LOCKS_UNSUPPORTED

_PREFIX = "mikoshi-ranks-"
_MIN_AGE = 1.0  # seconds: a younger folder may not be locked yet
_MIN_FREE = 1 << 20
_PAGE = 1 << 16
_MEMORY = Path("/dev/shm")
_SHORT_PATHS = (Path("/tmp"), Path("/var/tmp"))
_MAX_SOCKET_PATH = 107
"""Maximum bytes of a local socket's path on Linux."""

_NAME_BYTES = len(f"/{_PREFIX}4194304-12345678/listener-12345678")
"""Bytes of the folder's name and of multiprocessing's socket in it."""


@contextlib.contextmanager
def private_folder(sockets: bool = False) -> Iterator[Path]:
    """Make a folder in this machine's memory, else on its disk, and remove it at the end of the block.

    Its name has the process id, and it is locked while its owner lives. Raises OSError if no place can be written to.

    sockets: the folder also holds local sockets, whose paths must be short, so that a long TMPDIR is not used
    """
    for place in _candidates(sockets):
        for left in place.glob(f"{_PREFIX}*"):
            _remove_stale(left)
    folder = _create(sockets)
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in LOCKS_UNSUPPORTED:  # without locks, no folder is removed either
            raise
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _candidates(sockets: bool) -> list[Path]:
    """Folders to try. Memory comes first: ranks must not wait for a disk, nor fail because it is full."""
    places = dict.fromkeys((_MEMORY, Path(tempfile.gettempdir()), *_SHORT_PATHS))
    return [place for place in places if not sockets or len(os.fsencode(place)) + _NAME_BYTES <= _MAX_SOCKET_PATH]


def _create(sockets: bool) -> Path:
    why: OSError | None = None
    for place in _candidates(sockets):
        try:
            folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=place))
        except OSError as error:  # it does not exist, or cannot be written to
            why = why or error
            continue
        try:
            if place == _MEMORY and shutil.disk_usage(place).free < _MIN_FREE:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(place))
            (folder / "room").write_bytes(bytes(_PAGE))
            (folder / "room").unlink()
            return folder
        except OSError as error:
            why = why or error
            shutil.rmtree(folder, ignore_errors=True)
    raise why or OSError(errno.ENOENT, "no folder for temporary files", tempfile.gettempdir())


def _remove_stale(folder: Path) -> None:
    """Remove the folder of a dead process. Folders of other users are left alone."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            about = os.fstat(handle)
            if about.st_uid == os.getuid() and about.st_mode & 0o077 == 0 and time.time() - about.st_mtime > _MIN_AGE:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
        finally:
            os.close(handle)
