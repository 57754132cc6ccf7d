"""Where a run's checkpoints lie: what a store lists is committed whole, whoever was killed when and wherever it lies.

    PLACE/
        step-00000030/           committed: its manifest.json was the last to be written, then it appeared at once
        .step-00000040.partial/  one being written, or what a killed save or removal left: the next save clears it
        damaged-step-00000020/   refused and set aside for inspection

A folder commits by one rename; a remote place (trainer.checkpoint.remote), which has none, by the manifest's own upload.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Protocol
from urllib.parse import urlsplit
from urllib.request import url2pathname

from data.atomic import flush, partial_path
from trainer.errors import CheckpointError

MANIFEST = "manifest.json"
DAMAGED = "damaged-"
_STEP = re.compile(r"step-(\d{8,15})")
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")
LARGEST_MANIFEST = 1 << 31
NO_FILE = (errno.ELOOP, errno.ENXIO, errno.ENODEV)
"""What opening a link, a socket or a device without a driver ends with. Any other error is of the storage, not of the file."""


class Store(Protocol):
    """One run's checkpoints in one place. Every method is local to the calling process; none is collective.

    All raise OSError where the storage fails or does not answer, which says nothing against a checkpoint, and
    CheckpointError for what is not as it must be, by name.
    """

    @property
    def place(self) -> str:
        """Folder or URL, for messages."""

    def steps(self) -> list[int]:
        """The committed ones, newest first."""

    def others(self) -> list[str]:
        """What else of ours is there, by name: partial ones and those set aside."""

    def begin(self, step: int) -> None:
        """Clear what killed saves left behind and make room for a new partial. For rank 0, before any `create`. Raises
        CheckpointError if `step` is committed already."""

    def create(self, step: int, name: str) -> AbstractContextManager[BinaryIO]:
        """Write a file of the partial: durable when the block ends well, not there when it ends in an exception."""

    def commit(self, step: int, manifest: bytes) -> None:
        """The manifest last, then all is visible at once. For rank 0, after every rank's `create`."""

    def abandon(self, step: int) -> None:
        """Remove the partial, or as much of it as there is. For rank 0. Raises nothing: the next `begin` clears the rest."""

    def manifest(self, step: int) -> bytes:
        """Raises FileNotFoundError if it is not there."""

    def written(self, step: int) -> float:
        """When the manifest was written, in seconds since the epoch. Raises FileNotFoundError."""

    def sizes(self, step: int) -> dict[str, int]:
        """Bytes of every entry beside the manifest; -1 for what is not a regular file (link, FIFO, folder)."""

    def local(self, step: int, name: str, sha256: str | None = None) -> Path:
        """A path on this machine with the file's bytes, for as long as no other step is asked for. Where they have to be
        fetched first, that is once for the ranks of a node, and once more if they arrive without the digest `sha256`;
        CheckpointError if they do so again."""

    def release(self) -> None:
        """Remove what `local` has fetched: no rank of this node looks at it any more."""

    def remove(self, step: int) -> None:
        """First out of sight, then the bytes: a kill in between leaves a partial, never a torn checkpoint. Nothing happens
        if it is gone already."""

    def set_aside(self, step: int) -> str:
        """Take a damaged one out of `steps`, kept for inspection; returns its new name."""

    def describe(self, step: int) -> str:
        """Path or URL of a step, for messages."""


def open_store(place: str | Path, scratch: Path, options: Mapping[str, str] | None = None) -> Store:
    """The store at a folder, file:///... or a URL (s3:// gs:// az://). Nothing is made or requested yet.

    `scratch`: a folder of this machine, shared by a run's ranks and by nobody else, for files that must be fetched.
    `options` go to a remote store as they are (endpoint, region, ...); what they leave out comes from the environment or
    the machine's role, as for data. Raises CheckpointError for an address that cannot be used.
    """
    if isinstance(place, Path) or "://" not in place:
        return LocalStore(Path(place))
    if not place.startswith("file://"):
        from trainer.checkpoint.remote import open_remote_store

        return open_remote_store(place, scratch, options or {})
    parts = urlsplit(place)
    if parts.netloc not in ("", "localhost") or len(parts.path) < 2 or parts.query or parts.fragment:
        raise CheckpointError(f"checkpoint.folder = {place!r}: give a folder of this machine as file:///path/to/folder")
    return LocalStore(Path(url2pathname(parts.path)))


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step of a checkpoint's name; None for any other name."""
    found = _STEP.fullmatch(name)
    return int(found[1]) if found and step_name(int(found[1])) == name else None


def checked(where: str, name: str) -> str:
    """The name of a file of a checkpoint, as it is. Raises CheckpointError for one that could be anything else."""
    if not _FILE.fullmatch(name) or name == MANIFEST:
        raise CheckpointError(f"{where}: {name!r} is not the name of a file in the checkpoint")
    return name


class LocalStore:
    """A folder. Nothing in it is followed that is a link, nor opened that is not a regular file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def place(self) -> str:
        return str(self.folder)

    def steps(self) -> list[int]:
        return sorted((step for step in map(step_of, self._names()) if step is not None), reverse=True)

    def others(self) -> list[str]:
        ours = (f"{DAMAGED}step-", ".step-")
        return sorted(name for name in self._names() if name.startswith(ours))

    def begin(self, step: int) -> None:
        if os.path.lexists(self._path(step)):
            raise CheckpointError(f"{self._path(step)} exists already; a checkpoint is never written over another")
        for name in self._names():
            if name.startswith(".step-") and ".partial" in name:
                _discard(self.folder / name)
        new = not self.folder.exists()
        partial_path(self._path(step)).mkdir(parents=True)
        if new:
            flush(self.folder.parent)

    @contextmanager
    def create(self, step: int, name: str) -> Iterator[BinaryIO]:
        partial = partial_path(self._path(step))
        with _created(partial / checked(str(partial), name)) as file:
            yield file

    def commit(self, step: int, manifest: bytes) -> None:
        target = self._path(step)
        partial = partial_path(target)
        if os.path.lexists(target):  # a rename would replace an empty folder
            raise CheckpointError(f"{target} exists already; a checkpoint is never written over another")
        with _created(partial / MANIFEST) as file:
            file.write(manifest)
        flush(partial)
        partial.rename(target)
        try:
            flush(self.folder)
        except OSError:  # the caller is told that it failed: then it must not be there either
            with suppress(OSError):
                target.rename(partial)
            raise

    def abandon(self, step: int) -> None:
        with suppress(OSError):
            _discard(partial_path(self._path(step)))

    def manifest(self, step: int) -> bytes:
        file = self._whole(step) / MANIFEST
        with _opened(file) as (handle, size):
            if size > LARGEST_MANIFEST:
                raise CheckpointError(f"{file}: damaged: {size} bytes are more than any manifest has")
            with os.fdopen(os.dup(handle), "rb") as content:
                return content.read()

    def written(self, step: int) -> float:
        return (self._whole(step) / MANIFEST).lstat().st_mtime

    def sizes(self, step: int) -> dict[str, int]:
        with os.scandir(self._whole(step)) as entries:
            found = {entry.name: entry.stat(follow_symlinks=False) for entry in entries if entry.name != MANIFEST}
        return {name: status.st_size if stat.S_ISREG(status.st_mode) else -1 for name, status in found.items()}

    def local(self, step: int, name: str, sha256: str | None = None) -> Path:
        folder = self._whole(step)
        file = folder / checked(str(folder), name)
        try:
            with _opened(file):
                return file
        except FileNotFoundError:
            raise CheckpointError(f"{file}: missing") from None

    def release(self) -> None:
        """Nothing was fetched."""

    def remove(self, step: int) -> None:
        path = self._path(step)
        gone = partial_path(path)
        if os.path.lexists(gone):
            _discard(gone)
        with suppress(FileNotFoundError):
            path.rename(gone)
        with suppress(OSError):  # what a reader still holds open goes before the next save
            _discard(gone)

    def set_aside(self, step: int) -> str:
        name, taken = f"{DAMAGED}{step_name(step)}", set(self._names())
        free = next(n for n in (name, *(f"{name}.{n}" for n in range(1, len(taken) + 2))) if n not in taken)
        self._path(step).rename(self.folder / free)
        flush(self.folder)
        return free

    def describe(self, step: int) -> str:
        return str(self._path(step))

    def _path(self, step: int) -> Path:
        return self.folder / step_name(step)

    def _whole(self, step: int) -> Path:
        """The folder of a step. Raises CheckpointError if it is a link or a file; FileNotFoundError."""
        path = self._path(step)
        if not stat.S_ISDIR(path.lstat().st_mode):
            raise CheckpointError(f"{path}: damaged: a {'link' if path.is_symlink() else 'file'}, not a folder")
        return path

    def _names(self) -> list[str]:
        try:
            return os.listdir(self.folder)  # noqa: PTH208 - ten thousand names, none of which need be a path
        except FileNotFoundError:
            return []
        except NotADirectoryError:
            raise CheckpointError(f"{self.folder}: not a folder: give another checkpoint.folder") from None


@contextmanager
def _created(path: Path) -> Iterator[BinaryIO]:
    """A new file, durable when the block has ended well, gone if it has not."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    file = os.fdopen(handle, "wb")
    try:
        yield file
        file.flush()
        os.fsync(handle)
        file.close()
    except BaseException:
        with suppress(OSError):  # it tries to write what is in its buffer, as it could not before
            file.close()
        with suppress(OSError):
            path.unlink()
        raise


@contextmanager
def _opened(path: Path) -> Iterator[tuple[int, int]]:
    """Handle and size of a regular file. Raises CheckpointError for a link, a FIFO or a folder; OSError where it cannot be
    opened, which says nothing against it."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)  # a FIFO would wait for a writer
    except OSError as error:
        if error.errno not in NO_FILE:
            raise
        raise CheckpointError(f"{path}: not a regular file") from None
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path}: not a regular file")
        yield handle, status.st_size
    finally:
        os.close(handle)


def _discard(path: Path) -> None:
    """Remove a partial: at once out of the way under its name, even where some of it is still held open."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    if path.suffix == ".partial":
        path = path.rename(path.with_name(f"{path.name}.{secrets.token_hex(4)}"))
    shutil.rmtree(path, ignore_errors=True)
