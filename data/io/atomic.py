"""A folder or file appears whole or not at all: built aside, flushed to disk, then put in place by one rename."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from mikoshi.data.errors import DataError

LOCK = ".lock"
LOCKLESS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What flock says on a file system that knows no locks."""

_LINKLESS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK, errno.EINVAL)
_ABANDONED = 60.0  # seconds after which an empty file is no longer about to be written

_LONGEST = 200  # bytes of a name that a draft's repeats
_DEAD = 3600.0  # seconds without a byte written
_HOST = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
_swept: set[Path] = set()


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
    """Where the folder `target` is built before it exists: hidden, beside it, so that the rename stays on one file system.
    Every writer has the same; `locked_folder` lets one at a time have it."""
    return target.with_name(f".{target.name}.partial")


def commit_folder(target: Path, built: Path) -> None:
    """Put the folder built at `built` in place. `target` must not exist."""
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


@contextmanager
def built_alone(target: Path) -> Iterator[Path]:
    """Yield a new folder that becomes `target` when the block ends well, and is gone otherwise. Raises DataError where another
    process is building it, or has just done so."""
    told = "is being written by another process: wait for it, or give another folder"
    with ExitStack() as stack:
        try:
            work, _ = stack.enter_context(locked_folder(target, 0))
        except BlockingIOError:
            raise DataError(f"{target}: {told}") from None
        stack.callback(shutil.rmtree, work, ignore_errors=True)
        built = work / "built"
        shutil.rmtree(built, ignore_errors=True)  # what a killed process has left
        built.mkdir()
        yield built
        if os.path.lexists(target):
            raise DataError(f"{target}: {told}")
        commit_folder(target, built)


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


def new_file(path: Path, mode: int = 0o666) -> BinaryIO:
    """Open a file that is new, to write in: what has its name is removed, and a link is not followed. It is locked while it
    is open, so that a sweep knows that its writer lives."""
    while True:
        path.unlink(missing_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
        with suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        if os.fstat(handle).st_nlink:
            return os.fdopen(handle, "wb")
        os.close(handle)  # swept between its making and its locking


def draft_path(target: Path) -> Path:
    """Where one writer builds the file `target`: hidden, beside it, under a name that no other writer has. What dead writers
    left in the folder is swept the first time that this process writes there."""
    folder = target.parent
    if folder not in _swept:
        _swept.add(folder)
        with suppress(OSError):
            _sweep(folder)
    name = os.fsencode(target.name)[:_LONGEST].decode(errors="ignore")
    return folder / f".{name}.{_HOST}-{secrets.token_hex(6)}.partial"


def _sweep(folder: Path) -> None:
    """Remove drafts of files whose writers are dead. Locks of other hosts may not be seen here, so what they left must have
    been left alone for long."""
    with os.scandir(folder) as entries:
        found = [entry for entry in entries if entry.name.startswith(".") and entry.name.endswith(".partial")]
    for entry in found:
        with suppress(OSError):
            idle = time.time() - entry.stat(follow_symlinks=False).st_mtime
            if entry.is_file(follow_symlinks=False) and (f".{_HOST}-" in entry.name or idle > _DEAD):
                _remove_unlocked(Path(entry.path))


def _remove_unlocked(path: Path) -> None:
    handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()  # while it is locked: who has just made it waits, and makes another
    finally:
        os.close(handle)


@contextmanager
def replacing(target: Path, durable: bool = True, mode: int = 0o666) -> Iterator[BinaryIO]:
    """Yield a new file that is put in the place of `target` in one step when the block ends well, and is gone otherwise. Of
    several writers at once, the last has written it, whole."""
    built = draft_path(target)
    try:
        with new_file(built, mode) as out:
            yield out
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


def write_file(target: Path, content: bytes, durable: bool = True) -> None:
    """Replace `target` by `content` in one step: a reader sees the old bytes or the new, never a part.

    Without `durable` that holds for processes that end at any moment, but not for a machine that loses its power: then the
    file may be there empty or damaged.
    """
    with replacing(target, durable) as out:
        out.write(content)


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
    built = draft_path(target)
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
