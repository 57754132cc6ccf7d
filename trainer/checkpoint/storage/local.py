"""Checkpoints in a folder of a local or shared file system: each appears by one rename."""

from __future__ import annotations

import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from mikoshi.data.io.atomic import flush, partial_path
from mikoshi.trainer.checkpoint.storage.base import DAMAGED, LARGEST_MANIFEST, MANIFEST, NO_FILE, checked, step_name, step_of
from mikoshi.trainer.errors import CheckpointError


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
