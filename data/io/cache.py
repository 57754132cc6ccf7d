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

from mikoshi.data.errors import DataError, StorageError, of_storage
from mikoshi.data.io.atomic import flush, write_file

FOLDER_KEY, BYTES_KEY = "data.cache.folder", "data.cache.bytes"
_FIRST_PAUSE, _LONGEST_PAUSE = 0.002, 0.2  # seconds between looks at a lock that another has
_DEAD_ELSEWHERE = 3600.0  # seconds after which another host's unlocked part is dead: its locks may not be seen here


_PROCESS = secrets.token_hex(16)


def boot_id() -> str:
    """What tells this start of the machine from others; where the machine does not say, this process from others."""
    try:
        return re.sub(r"[^0-9a-f]", "", Path("/proc/sys/kernel/random/boot_id").read_text())[:32]
    except OSError:
        return _PROCESS


def default_folder() -> Path:
    """Where shards are kept on this node's own disk, for this user: under $TMPDIR, else /var/tmp, else where temporary files
    go."""
    places = (os.environ.get("TMPDIR", ""), "/var/tmp")
    root = next((place for place in places if place and os.access(place, os.W_OK | os.X_OK)), tempfile.gettempdir())
    return Path(root).absolute() / f"mikoshi-{os.getuid()}" / "shards"


def _make_private(folder: Path) -> None:
    """Raises DataError where another user has made the folder, or may write in it; OSError."""
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise DataError(
            f"{FOLDER_KEY}: {folder} is not this user's alone, and others might fill it: remove it, or set {FOLDER_KEY} to a "
            "folder on a local disk"
        )


@dataclass(frozen=True)
class Wanted:
    """A file as an index lists it: its name in the store, its size in bytes, and the SHA-256 (hex) of what follows its
    first `skip` bytes. `check` is given the path of the new copy and raises DataError if it is not what it should be,
    for what no digest covers."""

    name: str
    size: int
    sha256: str
    skip: int = 64
    check: Callable[[Path], None] | None = None


class Part:
    """A file being written. `written` bytes so far, their digest in `sha256`; writes and the end exclude each other."""

    def __init__(self, path: Path, handle: int, skip: int) -> None:
        self.path, self._handle, self._skip = path, handle, skip
        self.written, self._digest, self.inode = 0, hashlib.sha256(), os.fstat(handle).st_ino
        self._open, self._lock = True, threading.Lock()

    def write(self, chunk: bytes) -> None:
        """Append. Does nothing once the part has ended. Raises OSError as the disk does."""
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
        return self._digest.hexdigest()

    def sync(self) -> None:
        """Make what was written durable."""
        with self._lock:
            if self._open:
                os.fsync(self._handle)

    def end(self, target: Path | None) -> None:
        """Become `target`, or nothing; the second time, do nothing."""
        with self._lock:
            if not self._open:
                return
            self._open = False
            try:
                if target is not None:
                    self.path.rename(target)
                    flush(target.parent)
            finally:
                with suppress(FileNotFoundError):
                    self.path.unlink()
                os.close(self._handle)


class Cache:
    """The folder as one process sees it; with `private`, its parent is this user's alone. Thread-safe. Raises DataError where
    the folder cannot be made or locked, StorageError where that may pass."""

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
            with self._alone():
                path = folder / f"{self._host}-{os.getpid()}-{secrets.token_hex(4)}.user"
                self._user = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
                self._user_path = path
                _locked(self._user)
                os.write(self._user, json.dumps({"run": user, "is": me}).encode())
        except OSError as error:
            why = error.strerror or error
            raise of_storage(error, f"{FOLDER_KEY}: cannot use {folder} ({why})", "give a folder on a local disk") from None
        self._run = user

    def close(self) -> None:
        self._user_path.unlink(missing_ok=True)
        with suppress(OSError):
            os.close(self._user)

    def others(self) -> list[str]:
        """The open caches of other runs on this folder, by name, process, host and limit."""
        found = set()
        with self._alone():
            for path in self.folder.glob("*.user"):
                with _opened(path) as handle:
                    if handle is None or path == self._user_path:
                        continue
                    if _locked(handle):
                        path.unlink()
                        continue
                    with suppress(ValueError):
                        told = json.loads(path.read_text())
                        if told["run"] != self._run or not self._run:
                            found.add(told["is"])
        return sorted(found)

    def path(self, wanted: Wanted) -> Path:
        if not re.fullmatch("[0-9a-f]{64}", wanted.sha256):
            raise DataError(f"{wanted.name}: {wanted.sha256!r} is not a SHA-256: the index is damaged; prepare the data again")
        return self.folder / f"{wanted.sha256}.data"

    def hold(self, wanted: Wanted) -> int | None:
        """A handle that keeps the file from eviction until it is closed, and marks it used; None if it is not here."""
        path = self.path(wanted)
        try:
            handle = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        fcntl.flock(handle, fcntl.LOCK_SH)
        found = os.fstat(handle)
        if found.st_nlink and found.st_size == wanted.size and self._right(handle, found.st_ino, wanted):
            with suppress(PermissionError):  # another user's file: as old as they left it
                os.utime(handle)
            return handle
        os.close(handle)
        if found.st_nlink:  # not as it was put here: a disk that was repaired, a hand that edited it
            path.unlink(missing_ok=True)
        return None

    def _right(self, handle: int, inode: int, wanted: Wanted) -> bool:
        """Whether the file is what it should be: each is read once after a start of the machine."""
        with suppress(OSError, ValueError):
            if int(self._note(wanted).read_text()) == inode:
                return True
        digest = hashlib.sha256()
        with os.fdopen(os.dup(handle), "rb") as content:
            content.seek(wanted.skip)
            while block := content.read(1 << 20):
                digest.update(block)
        if digest.hexdigest() != wanted.sha256:
            return False
        if wanted.check is not None:
            try:
                wanted.check(self.path(wanted))
            except DataError:
                return False
        self._mark(wanted, inode)
        return True

    def _note(self, wanted: Wanted) -> Path:
        return self.folder / f"{wanted.sha256}.{self._boot}.boot"

    def _mark(self, wanted: Wanted, inode: int) -> None:
        with suppress(OSError):  # another user's folder: then the file is read again the next time
            write_file(self._note(wanted), str(inode).encode(), durable=False)

    def has(self, wanted: Wanted) -> bool:
        if (handle := self.hold(wanted)) is None:
            return False
        os.close(handle)
        return True

    @contextmanager
    def claim(self, wanted: Wanted) -> Iterator[Callable[[], bool]]:
        """Stand in line for the right to fetch the file: the function yielded says whether it is ours by now. It is given
        back when the block ends."""
        path, ours = self.path(wanted).with_suffix(".lock"), False
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)

        def claimed() -> bool:
            nonlocal ours
            ours = ours or _locked(handle)
            return ours

        try:
            yield claimed
        finally:
            with suppress(OSError):
                if ours and path.stat().st_ino == os.fstat(handle).st_ino:
                    path.unlink()
            os.close(handle)

    def sight(self, wanted: Wanted | None = None) -> list[tuple[str, int]]:
        """What is being written, for `wanted` or at all: equal sights mean that nobody has got on in between."""
        pattern = f"{wanted.sha256}.*.part" if wanted else "*.part"
        found = []
        for path in self.folder.glob(pattern):
            with suppress(FileNotFoundError):
                found.append((path.name, path.stat().st_mtime_ns))
        return sorted(found)

    def reserve(self, wanted: Wanted) -> Part | None:
        """A part with room for the whole file, made by evicting what was used longest ago; None where too much is being
        written or opened just now for it to fit. Raises OSError as the disk does."""
        with self._alone():
            self._sweep()
            used = sum(size for _, size, _ in self._files("*.data")) + sum(size for _, size, _ in self._files("*.part"))
            short = used + wanted.size - self.limit
            if short > 0 and self._evict(short, partly=False) < short:
                return None
            path = self.folder / f"{wanted.sha256}.{self._host}.{secrets.token_hex(8)}.part"
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
            part = Part(path, handle, wanted.skip)
            try:
                _locked(handle)
                os.ftruncate(handle, wanted.size)  # sparse: the size is what others count
            except OSError:
                part.end(None)
                raise
            return part

    def commit(self, part: Part, wanted: Wanted) -> None:
        """Let the part, whole and verified, be the file."""
        part.sync()  # before the folder is locked: it takes as long as the disk does
        with self._alone():
            part.end(self.path(wanted))
        self._mark(wanted, part.inode)

    def make_room(self, size: int) -> int:
        """Evict about `size` bytes, or what there is: the disk is fuller than the limit knows. Returns bytes evicted."""
        with self._alone():
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
            with _opened(path) as handle:
                ours = path.name.split(".")[1] == self._host
                if handle is not None and _locked(handle) and (ours or time.time() - modified / 1e9 > _DEAD_ELSEWHERE):
                    path.unlink()

        for note in self.folder.glob("*.boot"):
            digest, boot, _ = note.name.split(".")
            if boot != self._boot or not (self.folder / f"{digest}.data").exists():
                note.unlink(missing_ok=True)

    def _evict(self, size: int, partly: bool) -> int:
        """Remove files that nobody holds, oldest first, until `size` bytes are free; none unless that can be, or `partly`."""
        taken: list[tuple[int, int, Path]] = []  # handle, bytes, path: locked, so that nobody opens them meanwhile
        try:
            for _, held, path in self._files("*.data"):
                if sum(got for _, got, _ in taken) >= size:
                    break
                with suppress(OSError):
                    handle = os.open(path, os.O_RDWR)
                    if _locked(handle):
                        taken.append((handle, held, path))
                    else:
                        os.close(handle)
            freed = sum(got for _, got, _ in taken)
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
    def _alone(self) -> Iterator[None]:
        """No other process or thread counts, evicts or reserves meanwhile."""
        handle = os.open(self.folder / "folder.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            deadline, pause = time.monotonic() + self._patience, _FIRST_PAUSE
            while not _locked(handle):
                if time.monotonic() > deadline:
                    told = f"{self.folder} has been locked by another process for {self._patience:g} s"
                    raise StorageError(
                        f"{FOLDER_KEY}: {told}: end it (`fuser {self.folder}/folder.lock`) or give another folder"
                    )
                time.sleep(pause * random.SystemRandom().uniform(0.5, 1))  # a run's random state is not touched
                pause = min(2 * pause, _LONGEST_PAUSE)
            yield
        finally:
            os.close(handle)


def _locked(handle: int) -> bool:
    """Lock it exclusively; False where another has it. Raises OSError on a file system without locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def _opened(path: Path) -> Iterator[int | None]:
    """A handle for as long as the block lasts; None if the file is gone or not ours to open."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        yield None
        return
    try:
        yield handle
    finally:
        os.close(handle)
