"""A bounded folder of whole files named by their digests, shared by the ranks and runs of a node: what stands under a
name is complete and verified, whoever is killed when.

Nothing but the folder and file locks is shared, and the kernel lets go of a dead process's locks:

- `<digest>.data`     a whole file, locked shared while someone opens it, exclusively to be evicted;
- `<digest>.*.boot`   says that the file was put here, or read again and found right, since the machine was started: what a
                      power cut left of a file may have its length and not its bytes;
- `<digest>.*.part`   one being written, locked by its writer: one that is not locked is a dead process's, and is removed;
- `<digest>.lock`     held by who fetches the file. An economy only: without it two would fetch it, each to its own part,
                      and the second rename would put the same bytes in place of the first;
- `*.user`            an open cache, locked while it is open, with the name of its run;
- `folder.lock`       held for the milliseconds it takes to count, evict and reserve.

The folder belongs on a disk of the node. On NFS flock holds between nodes only where the mount's locks do; where they
do not, files are still whole, but nodes may fetch one twice, and the bound holds a node at a time.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import random
import re
import secrets
import socket
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from mikoshi.data.errors import DataError, StorageError, storage_error
from mikoshi.data.io.atomic import fsync_path, write_file

FOLDER_KEY, BYTES_KEY = "data.cache.folder", "data.cache.bytes"
_FIRST_PAUSE, _LONGEST_PAUSE = 0.002, 0.2  # seconds between looks at a lock that another has
_DEAD_ELSEWHERE = 3600.0  # seconds after which another host's unlocked part is dead: its locks may not be seen here


_PROCESS = secrets.token_hex(16)


def boot_id() -> str:
    """An id of the machine's current boot; if the machine does not provide one, an id of this process."""
    try:
        return re.sub(r"[^0-9a-f]", "", Path("/proc/sys/kernel/random/boot_id").read_text())[:32]
    except OSError:
        return _PROCESS


def default_folder() -> Path:
    """The cache folder on this node's own disk for this user: under $TMPDIR, else /var/tmp, else the default for temporary
    files."""
    places = (os.environ.get("TMPDIR", ""), "/var/tmp")
    root = next((place for place in places if place and os.access(place, os.W_OK | os.X_OK)), tempfile.gettempdir())
    return Path(root).absolute() / f"mikoshi-{os.getuid()}" / "shards"


def _make_private(folder: Path) -> None:
    """Create the folder for this user alone. Raises DataError if another user owns it or may write to it; OSError."""
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise DataError(
            f"{FOLDER_KEY}: {folder} is not this user's alone, and others might fill it: remove it, or set {FOLDER_KEY} to a "
            "folder on a local disk"
        )


@dataclass(frozen=True)
class IndexedFile:
    """A file as an index lists it.

    name: its name in the store.
    size: bytes.
    sha256: hex digest of what follows the first `skip` bytes.
    check: called with the path of a new copy; raises DataError if the copy is wrong in a way that no digest covers.
    """

    name: str
    size: int
    sha256: str
    skip: int = 64
    check: Callable[[Path], None] | None = None


class PartialFile:
    """A file being written, with the bytes written so far and their digest. Thread-safe."""

    def __init__(self, path: Path, handle: int, skip: int) -> None:
        self.path, self._handle, self._skip = path, handle, skip
        self.written, self._digest, self.inode = 0, hashlib.sha256(), os.fstat(handle).st_ino
        self._open, self._lock = True, threading.Lock()

    def write(self, chunk: bytes) -> None:
        """Append a chunk. Does nothing once the file has ended. Raises OSError."""
        with self._lock:
            if not self._open:
                return
            view = memoryview(chunk)
            self._digest.update(view[max(0, self._skip - self.written) :])
            self.written += len(view)
            while view:
                view = view[os.write(self._handle, view) :]

    @property
    def sha256(self) -> str:
        """Hex digest of what was written, without the first `skip` bytes."""
        return self._digest.hexdigest()

    def sync(self) -> None:
        """Make what was written durable."""
        with self._lock:
            if self._open:
                os.fsync(self._handle)

    def end(self, target: Path | None) -> None:
        """Rename the file to `target`, or remove it if that is None. A second call does nothing."""
        with self._lock:
            if not self._open:
                return
            self._open = False
            try:
                if target is not None:
                    self.path.rename(target)
                    fsync_path(target.parent)
            finally:
                with suppress(FileNotFoundError):
                    self.path.unlink()
                os.close(self._handle)


class Cache:
    """The cache folder as one process sees it. Thread-safe.

    folder: where the files are.
    limit: bytes of all files in it.
    user: name of the run, shown to other runs.
    patience: seconds to wait for the folder's lock.
    private: the parent folder must belong to this user alone.

    Raises DataError if the folder cannot be created or locked, StorageError if that may be transient.
    """

    def __init__(self, folder: Path, limit: int, user: str, patience: float, private: bool = False) -> None:
        self.folder, self.limit, self.evicted = folder, limit, 0
        self._patience = patience
        self._boot = boot_id()
        self._host = re.sub(r"[^0-9A-Za-z-]", "-", socket.gethostname())
        me = f"{user or 'a run'} (pid {os.getpid()} on {self._host}, {BYTES_KEY} {limit})"
        try:
            if private:
                _make_private(folder.parent)
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self._exclusive():
                path = folder / f"{self._host}-{os.getpid()}-{secrets.token_hex(4)}.user"
                self._user = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
                self._user_path = path
                _try_lock(self._user)
                os.write(self._user, json.dumps({"run": user, "is": me}).encode())
        except OSError as error:
            why = error.strerror or error
            raise storage_error(error, f"{FOLDER_KEY}: cannot use {folder} ({why})", "give a folder on a local disk") from None
        self._run = user

    def close(self) -> None:
        """Stop using the folder. Its files stay."""
        self._user_path.unlink(missing_ok=True)
        with suppress(OSError):
            os.close(self._user)

    def other_users(self) -> list[str]:
        """The other runs that have this cache open: name, process, host and limit of each."""
        found = set()
        with self._exclusive():
            for path in self.folder.glob("*.user"):
                with _open_existing(path) as handle:
                    if handle is None or path == self._user_path:
                        continue
                    if _try_lock(handle):
                        path.unlink()
                        continue
                    with suppress(ValueError):
                        owner = json.loads(path.read_text())
                        if owner["run"] != self._run or not self._run:
                            found.add(owner["is"])
        return sorted(found)

    def path(self, entry: IndexedFile) -> Path:
        """Where the file is, or will be, in the cache. Raises DataError if its digest is not a SHA-256."""
        if not re.fullmatch("[0-9a-f]{64}", entry.sha256):
            raise DataError(f"{entry.name}: {entry.sha256!r} is not a SHA-256: the index is damaged; prepare the data again")
        return self.folder / f"{entry.sha256}.data"

    def open_shared(self, entry: IndexedFile) -> int | None:
        """A file descriptor that protects the file from eviction until it is closed, and marks it as used. None if it is not
        cached."""
        path = self.path(entry)
        try:
            handle = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        fcntl.flock(handle, fcntl.LOCK_SH)
        found = os.fstat(handle)
        if found.st_nlink and found.st_size == entry.size and self._is_intact(handle, found.st_ino, entry):
            with suppress(PermissionError):  # another user's file: as old as they left it
                os.utime(handle)
            return handle
        os.close(handle)
        if found.st_nlink:  # not as it was put here: a disk that was repaired, a hand that edited it
            path.unlink(missing_ok=True)
        return None

    def _is_intact(self, handle: int, inode: int, entry: IndexedFile) -> bool:
        """Whether the file's content is right. Each file is read in full once after a boot of the machine."""
        with suppress(OSError, ValueError):
            if int(self._marker_path(entry).read_text()) == inode:
                return True
        digest = hashlib.sha256()
        with os.fdopen(os.dup(handle), "rb") as content:
            content.seek(entry.skip)
            while block := content.read(1 << 20):
                digest.update(block)
        if digest.hexdigest() != entry.sha256:
            return False
        if entry.check is not None:
            try:
                entry.check(self.path(entry))
            except DataError:
                return False
        self._write_marker(entry, inode)
        return True

    def _marker_path(self, entry: IndexedFile) -> Path:
        return self.folder / f"{entry.sha256}.{self._boot}.boot"

    def _write_marker(self, entry: IndexedFile, inode: int) -> None:
        with suppress(OSError):  # another user's folder: then the file is read again the next time
            write_file(self._marker_path(entry), str(inode).encode(), durable=False)

    def has(self, entry: IndexedFile) -> bool:
        """Whether the file is cached and intact. Marks it as used."""
        if (handle := self.open_shared(entry)) is None:
            return False
        os.close(handle)
        return True

    @contextmanager
    def claim(self, entry: IndexedFile) -> Iterator[Callable[[], bool]]:
        """Compete for the right to fetch the file. Yields a function that says whether this process has it by now; the claim
        is released when the block ends."""
        path, acquired = self.path(entry).with_suffix(".lock"), False
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)

        def claimed() -> bool:
            nonlocal acquired
            acquired = acquired or _try_lock(handle)
            return acquired

        try:
            yield claimed
        finally:
            with suppress(OSError):
                if acquired and path.stat().st_ino == os.fstat(handle).st_ino:
                    path.unlink()
            os.close(handle)

    def write_progress(self, entry: IndexedFile | None = None) -> list[tuple[str, int]]:
        """Names and modification times of the partial files of `entry`, or of all. Two equal results mean that no writer
        made progress in between."""
        pattern = f"{entry.sha256}.*.part" if entry else "*.part"
        found = []
        for path in self.folder.glob(pattern):
            with suppress(FileNotFoundError):
                found.append((path.name, path.stat().st_mtime_ns))
        return sorted(found)

    def reserve(self, entry: IndexedFile) -> PartialFile | None:
        """A partial file with space for the whole of `entry`, made by evicting the least recently used files.

        Returns None if files being written or in use leave too little space. Raises OSError.
        """
        with self._exclusive():
            self._sweep()
            used = sum(size for _, size, _ in self._files("*.data")) + sum(size for _, size, _ in self._files("*.part"))
            short = used + entry.size - self.limit
            if short > 0 and self._evict(short, partly=False) < short:
                return None
            path = self.folder / f"{entry.sha256}.{self._host}.{secrets.token_hex(8)}.part"
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
            part = PartialFile(path, handle, entry.skip)
            try:
                _try_lock(handle)
                os.ftruncate(handle, entry.size)  # sparse: the size is what others count
            except OSError:
                part.end(None)
                raise
            return part

    def commit(self, part: PartialFile, entry: IndexedFile) -> None:
        """Put a partial file that is whole and verified in its place."""
        part.sync()  # before the folder is locked: it takes as long as the disk does
        with self._exclusive():
            part.end(self.path(entry))
        self._write_marker(entry, part.inode)

    def make_room(self, size: int) -> int:
        """Evict about `size` bytes, or whatever there is, because the disk is fuller than the limit assumes. Returns the
        bytes evicted."""
        with self._exclusive():
            self._sweep()
            return self._evict(size, partly=True)

    def _files(self, pattern: str) -> list[tuple[int, int, Path]]:
        """(time of last use in ns, bytes, path), oldest first."""
        found = []
        for path in self.folder.glob(pattern):
            with suppress(FileNotFoundError):
                stat = path.stat()
                found.append((stat.st_mtime_ns, stat.st_size, path))
        return sorted(found)

    def _sweep(self) -> None:
        for modified, _, path in self._files("*.part"):
            with _open_existing(path) as handle:
                ours = path.name.split(".")[1] == self._host
                if handle is not None and _try_lock(handle) and (ours or time.time() - modified / 1e9 > _DEAD_ELSEWHERE):
                    path.unlink()

        for note in self.folder.glob("*.boot"):
            digest, boot, _ = note.name.split(".")
            if boot != self._boot or not (self.folder / f"{digest}.data").exists():
                note.unlink(missing_ok=True)

    def _evict(self, size: int, partly: bool) -> int:
        """Remove unused files, oldest first, until `size` bytes are free. Removes none if that is impossible, unless
        `partly`."""
        taken: list[tuple[int, int, Path]] = []  # handle, bytes, path: locked, so that nobody opens them meanwhile
        try:
            for _, size_on_disk, path in self._files("*.data"):
                if sum(size_taken for _, size_taken, _ in taken) >= size:
                    break
                with suppress(OSError):
                    handle = os.open(path, os.O_RDWR)
                    if _try_lock(handle):
                        taken.append((handle, size_on_disk, path))
                    else:
                        os.close(handle)
            freed = sum(size_taken for _, size_taken, _ in taken)
            if freed < size and not partly:
                return 0
            for _, _, path in taken:
                path.unlink(missing_ok=True)
            self.evicted += len(taken)
            return freed
        finally:
            for handle, _, _ in taken:
                os.close(handle)

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Hold the folder's lock: no other process or thread counts, evicts or reserves meanwhile."""
        handle = os.open(self.folder / "folder.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            deadline, pause = time.monotonic() + self._patience, _FIRST_PAUSE
            while not _try_lock(handle):
                if time.monotonic() > deadline:
                    reason = f"{self.folder} has been locked by another process for {self._patience:g} s"
                    raise StorageError(
                        f"{FOLDER_KEY}: {reason}: end it (`fuser {self.folder}/folder.lock`) or give another folder"
                    )
                time.sleep(pause * random.SystemRandom().uniform(0.5, 1))  # a run's random state is not touched
                pause = min(2 * pause, _LONGEST_PAUSE)
            yield
        finally:
            os.close(handle)


def _try_lock(handle: int) -> bool:
    """Lock the file exclusively. Returns False if another process holds it. Raises OSError on a file system without locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def _open_existing(path: Path) -> Iterator[int | None]:
    """Yield a file descriptor, or None if the file is gone or may not be opened."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        yield None
        return
    try:
        yield handle
    finally:
        os.close(handle)
