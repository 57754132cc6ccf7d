"""Atomic writes: a file or folder appears whole or not at all. It is built beside its place, flushed to disk, and renamed
once."""

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
LOCKS_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What flock says on a file system that knows no locks."""

_LINKS_UNSUPPORTED = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK, errno.EINVAL)
_ABANDONED = 60.0  # seconds after which an empty file is no longer about to be written

_LONGEST = 200  # bytes of a name that a draft's repeats
_STALE_AFTER = 3600.0  # seconds without a byte written
_HOST = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
_swept: set[Path] = set()


def fsync_path(path: Path) -> None:
    """Make a file's bytes or a folder's entries durable. File systems that cannot fsync folders are tolerated."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP) or not path.is_dir():
            raise
    finally:
        os.close(handle)


def partial_path(target: Path) -> Path:
    """The folder in which `target` is built: hidden and beside it, so that the final rename stays on one file system.

    All writers of `target` share it; `locked_folder` admits one at a time.
    """
    return target.with_name(f".{target.name}.partial")


def commit_folder(target: Path, built: Path) -> None:
    """Make the files of `built` durable and rename it to `target`, which must not exist."""
    for path in built.iterdir():
        if path.is_file():
            fsync_path(path)
    fsync_path(built)
    built.rename(target)
    fsync_path(target.parent)


@contextmanager
def locked_folder(target: Path, timeout: float) -> Iterator[tuple[Path, int]]:
    """Yield the folder partial_path(target), created if missing and otherwise unchanged, and the open file that holds its lock.

    Child processes that inherit the file descriptor hold the lock too, for as long as any of them lives.

    timeout: seconds to wait for the lock.

    Raises BlockingIOError if the lock is still taken after that.
    """
    built = partial_path(target)
    handle = _lock(built, time.monotonic() + timeout)
    try:
        yield built, handle
    finally:
        os.close(handle)


@contextmanager
def new_folder_committed(target: Path) -> Iterator[Path]:
    """Yield a new folder that becomes `target` when the block succeeds, and is removed otherwise.

    Raises DataError if another process is building `target` or has just done so.
    """
    reason = "is being written by another process: wait for it, or give another folder"
    with ExitStack() as stack:
        try:
            work, _ = stack.enter_context(locked_folder(target, 0))
        except BlockingIOError:
            raise DataError(f"{target}: {reason}") from None
        stack.callback(shutil.rmtree, work, ignore_errors=True)
        built = work / "built"
        shutil.rmtree(built, ignore_errors=True)  # what a killed process has left
        built.mkdir()
        yield built
        if os.path.lexists(target):
            raise DataError(f"{target}: {reason}")
        commit_folder(target, built)


def _lock(built: Path, deadline: float) -> int:
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
            if time.monotonic() > deadline:
                os.close(handle)
                raise
            time.sleep(0.05)
        os.close(handle)


def _open_lock(built: Path) -> int:
    """Open the lock without following links, since the folder's content is removed and rewritten."""
    folder = os.open(built, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        return os.open(LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666, dir_fd=folder)
    finally:
        os.close(folder)


def _flock(handle: int) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in LOCKS_UNSUPPORTED:  # a file system that knows no locks does without
            raise


def new_file(path: Path, mode: int = 0o666) -> BinaryIO:
    """Open a new file for writing, in place of any file of that name; links are not followed.

    The file stays locked while it is open, so that a sweep of stale files sees that its writer lives.
    """
    while True:
        path.unlink(missing_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
        with suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        if os.fstat(handle).st_nlink:
            return os.fdopen(handle, "wb")
        os.close(handle)  # swept between its making and its locking


def temporary_path(target: Path) -> Path:
    """A hidden path beside `target` that no other writer uses, in which to build the file.

    The first call for a folder also removes what dead writers left there.
    """
    folder = target.parent
    if folder not in _swept:
        _swept.add(folder)
        with suppress(OSError):
            _sweep(folder)
    name = os.fsencode(target.name)[:_LONGEST].decode(errors="ignore")
    return folder / f".{name}.{_HOST}-{secrets.token_hex(6)}.partial"


def _sweep(folder: Path) -> None:
    """Remove temporary files of dead writers. Locks of other hosts may be invisible here, so their files must also be old."""
    with os.scandir(folder) as entries:
        found = [entry for entry in entries if entry.name.startswith(".") and entry.name.endswith(".partial")]
    for entry in found:
        with suppress(OSError):
            idle = time.time() - entry.stat(follow_symlinks=False).st_mtime
            if entry.is_file(follow_symlinks=False) and (f".{_HOST}-" in entry.name or idle > _STALE_AFTER):
                _remove_unlocked(Path(entry.path))


def _remove_unlocked(path: Path) -> None:
    handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()  # while it is locked: who has just made it waits, and makes another
    finally:
        os.close(handle)


@contextmanager
def replaced_file(target: Path, durable: bool = True, mode: int = 0o666) -> Iterator[BinaryIO]:
    """Yield a new file that replaces `target` in one step when the block succeeds, and is removed otherwise.

    Of several concurrent writers, the last to finish wins, and its file is whole.

    durable: also survive a power failure (fsync).
    mode: permission bits of the new file.
    """
    built = temporary_path(target)
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
        fsync_path(target.parent)


def write_file(target: Path, content: bytes, durable: bool = True) -> None:
    """Replace `target` by `content` in one step: a reader sees the old bytes or the new ones, never a mixture.

    durable: without it, this holds when processes die but not when the machine loses power; the file may then be empty or
        damaged.
    """
    with replaced_file(target, durable) as out:
        out.write(content)


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold the lock of a finished folder in order to add to it; waits until no other process holds it.

    Does nothing if the folder is read-only, where nothing can be added either.
    """
    try:
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError:
        yield
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in LOCKS_UNSUPPORTED:
                raise
        yield
    finally:
        os.close(handle)


def create_file(target: Path, content: bytes) -> None:
    """Create `target` with this content, durably, if it does not exist. Of several concurrent processes one succeeds; the
    others get FileExistsError.

    Readers see the whole file or none. On a file system without hard links (GCS FUSE, SMB) they may see an empty file for a
    moment; if its writer dies in that moment, the next writer takes over after a minute.
    """
    built = temporary_path(target)
    try:
        with new_file(built) as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        try:
            os.link(built, target)
        except OSError as error:
            if error.errno not in _LINKS_UNSUPPORTED:
                raise
            _claim_name(target, built.stat().st_mtime)
            built.rename(target)
    finally:
        with suppress(OSError):
            built.unlink()
    fsync_path(target.parent)


def _claim_name(target: Path, now: float) -> None:
    """Create an empty file exclusively, replacing one that a dead writer left empty. `now`: the file system's own clock."""
    with suppress(FileNotFoundError):
        found = target.stat()
        if not found.st_size and now - found.st_mtime > _ABANDONED:
            target.unlink()
    os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666))
