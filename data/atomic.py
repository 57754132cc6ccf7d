"""A folder or file appears whole or not at all: built aside, flushed to disk, then put in place by one rename."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

LOCK = ".lock"
LOCKLESS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What flock says on a file system that knows no locks."""

_LINKLESS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK, errno.EINVAL)
_ABANDONED = 60.0  # seconds after which an empty file is no longer about to be written


def flush(path: Path) -> None:
    """Make a file's bytes, or a folder's names, durable (fsync), as far as the file system knows that of folders."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP) or not path.is_dir():
            raise
    finally:
        os.close(handle)


def partial_path(target: Path) -> Path:
    """Where `target` is built before it exists: hidden, beside it, so that the rename stays on one file system."""
    return target.with_name(f".{target.name}.partial")


def commit_folder(target: Path, built: Path | None = None) -> None:
    """Put the folder built at `built` (partial_path(target), unless given) in place. `target` must not exist."""
    built = built or partial_path(target)
    for path in built.iterdir():
        if path.is_file():
            flush(path)
    flush(built)
    built.rename(target)
    flush(target.parent)


@contextmanager
def locked_folder(target: Path, patience: float) -> Iterator[tuple[Path, int]]:
    """Yield the folder partial_path(target), made if need be with all that is in it left as it is, and the open file
    whose lock says that someone is at work there. Processes that inherit it hold the lock too, for as long as any lives.

    Waits `patience` seconds for the lock. Raises BlockingIOError when it is still held then.
    """
    built = partial_path(target)
    handle = _lock(built, time.monotonic() + patience)
    try:
        yield built, handle
    finally:
        os.close(handle)


def _lock(built: Path, until: float) -> int:
    while True:
        built.mkdir(parents=True, exist_ok=True)
        try:
            handle = _open_lock(built)
        except FileNotFoundError:  # the one who held the lock has just removed the folder
            continue
        try:
            with suppress(FileNotFoundError):  # removed between opening and locking
                _flock(handle)
                if os.fstat(handle).st_ino == (built / LOCK).stat().st_ino:
                    return handle
        except BlockingIOError:
            if time.monotonic() > until:
                os.close(handle)
                raise
            time.sleep(0.05)
        os.close(handle)


def _open_lock(built: Path) -> int:
    """Neither the folder nor the lock may be a link that someone left there: what is in it is cleared and written."""
    folder = os.open(built, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        return os.open(LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666, dir_fd=folder)
    finally:
        os.close(folder)


def _flock(handle: int) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in LOCKLESS:  # a file system that knows no locks does without
            raise


def new_file(path: Path) -> BinaryIO:
    """Open a file that is new, to write in: what has its name is removed, and a link is not followed."""
    path.unlink(missing_ok=True)
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666), "wb")


def write_file(target: Path, content: bytes, durable: bool = True) -> None:
    """Replace `target` by `content` in one step: a reader sees the old bytes or the new, never a part.

    Without `durable` that holds for processes that end at any moment, but not for a machine that loses its power: then the
    file may be there empty or damaged.
    """
    built = partial_path(target)
    try:
        with new_file(built) as out:
            out.write(content)
            out.flush()
            if durable:
                os.fsync(out.fileno())
        built.rename(target)
    except BaseException:
        with suppress(OSError):
            built.unlink()
        raise
    if durable:
        flush(target.parent)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold the lock of a finished folder, to add to it: of several processes one does so at a time. Waits for it; without
    effect where the folder cannot be written, as what is added then cannot be either."""
    try:
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError:
        yield
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in LOCKLESS:
                raise
        yield
    finally:
        os.close(handle)


def create_file(target: Path, content: bytes) -> None:
    """Make `target` with this content where there is none, durably. Of several processes at once one does; the others get
    FileExistsError.

    A reader sees the file whole or not at all. On a file system without hard links, such as GCS FUSE or SMB, it may see an
    empty one for a moment; if its maker is killed in that moment, the next one takes its place after a minute.
    """
    built = target.with_name(f".{target.name}.{secrets.token_hex(8)}.partial")
    try:
        with new_file(built) as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        try:
            os.link(built, target)
        except OSError as error:
            if error.errno not in _LINKLESS:
                raise
            _take_name(target, built.stat().st_mtime)
            built.rename(target)
    finally:
        with suppress(OSError):
            built.unlink()
    flush(target.parent)


def _take_name(target: Path, now: float) -> None:
    """Make an empty file, which no one else then can. `now`: by the clock of the file system."""
    with suppress(FileNotFoundError):
        found = target.stat()
        if not found.st_size and now - found.st_mtime > _ABANDONED:
            target.unlink()
    os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666))
