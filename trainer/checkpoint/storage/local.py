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

from mikoshi.data.io.atomic import fsync_path, partial_path
from mikoshi.trainer.checkpoint.storage.base import (
    DAMAGED,
    LARGEST_MANIFEST,
    MANIFEST,
    checked_name,
    step_name,
    step_of,
)
from mikoshi.trainer.checkpoint.storage.files import regular_file
from mikoshi.trainer.errors import CheckpointError


class LocalStore:
    """`Store` in a folder. Links are never followed, and only regular files are opened."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def address(self) -> str:
        """See `Store.address`."""
        return str(self.folder)

    def steps(self) -> list[int]:
        """See `Store.steps`."""
        return sorted((step for step in map(step_of, self._names()) if step is not None), reverse=True)

    def leftovers(self) -> list[str]:
        """See `Store.leftovers`."""
        ours = (f"{DAMAGED}step-", ".step-")
        return sorted(name for name in self._names() if name.startswith(ours))

    def begin(self, step: int) -> None:
        """See `Store.begin`."""
        if os.path.lexists(self._path(step)):
            raise CheckpointError(f"{self._path(step)} exists already; a checkpoint is never written over another")
        for name in self._names():
            if name.startswith(".step-") and ".partial" in name:
                _discard(self.folder / name)
        new = not self.folder.exists()
        partial_path(self._path(step)).mkdir(parents=True)
        if new:
            fsync_path(self.folder.parent)

    @contextmanager
    def create(self, step: int, name: str) -> Iterator[BinaryIO]:
        """See `Store.create`."""
        partial = partial_path(self._path(step))
        with _created(partial / checked_name(str(partial), name)) as file:
            yield file

    def commit(self, step: int, manifest: bytes) -> None:
        """See `Store.commit`."""
        target = self._path(step)
        partial = partial_path(target)
        if os.path.lexists(target):  # a rename would replace an empty folder
            raise CheckpointError(f"{target} exists already; a checkpoint is never written over another")
        with _created(partial / MANIFEST) as file:
            file.write(manifest)
        fsync_path(partial)
        partial.rename(target)
        try:
            fsync_path(self.folder)
        except OSError:  # the caller sees a failure, so the checkpoint must not exist
            with suppress(OSError):
                target.rename(partial)
            raise

    def abandon(self, step: int) -> None:
        """See `Store.abandon`."""
        with suppress(OSError):
            _discard(partial_path(self._path(step)))

    def manifest(self, step: int) -> bytes:
        """See `Store.manifest`."""
        file = self._step_folder(step) / MANIFEST
        with regular_file(file) as (handle, size):
            if size > LARGEST_MANIFEST:
                raise CheckpointError(f"{file}: damaged: {size} bytes are more than any manifest has")
            with os.fdopen(os.dup(handle), "rb") as content:
                return content.read()

    def written_at(self, step: int) -> float:
        """See `Store.written_at`."""
        return (self._step_folder(step) / MANIFEST).lstat().st_mtime

    def sizes(self, step: int) -> dict[str, int]:
        """See `Store.sizes`."""
        with os.scandir(self._step_folder(step)) as entries:
            found = {entry.name: entry.stat(follow_symlinks=False) for entry in entries if entry.name != MANIFEST}
        return {name: status.st_size if stat.S_ISREG(status.st_mode) else -1 for name, status in found.items()}

    def local(self, step: int, name: str, sha256: str | None = None) -> Path:
        """See `Store.local`."""
        folder = self._step_folder(step)
        file = folder / checked_name(str(folder), name)
        try:
            with regular_file(file):
                return file
        except FileNotFoundError:
            raise CheckpointError(f"{file}: missing") from None

    def release(self) -> None:
        """Does nothing: no file is fetched."""

    def remove(self, step: int) -> None:
        """See `Store.remove`."""
        path = self._path(step)
        partial = partial_path(path)
        if os.path.lexists(partial):
            _discard(partial)
        with suppress(FileNotFoundError):
            path.rename(partial)
        with suppress(OSError):  # what a reader still has open is removed before the next save
            _discard(partial)

    def set_aside(self, step: int) -> str:
        """See `Store.set_aside`."""
        name, taken = f"{DAMAGED}{step_name(step)}", set(self._names())
        free = next(n for n in (name, *(f"{name}.{n}" for n in range(1, len(taken) + 2))) if n not in taken)
        self._path(step).rename(self.folder / free)
        fsync_path(self.folder)
        return free

    def describe(self, step: int) -> str:
        """See `Store.describe`."""
        return str(self._path(step))

    def _path(self, step: int) -> Path:
        return self.folder / step_name(step)

    def _step_folder(self, step: int) -> Path:
        """Returns the folder of a step. Raises CheckpointError if it is a link or a file, FileNotFoundError if it does not
        exist.
        """
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
    """Open a new file: durable if the block ends well, removed if it does not."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    file = os.fdopen(handle, "wb")
    try:
        yield file
        file.flush()
        os.fsync(handle)
        file.close()
    except BaseException:
        with suppress(OSError):  # closing tries to write the buffer once more
            file.close()
        with suppress(OSError):
            path.unlink()
        raise


def _discard(path: Path) -> None:
    """Remove a partial checkpoint. It is renamed first, so that its name is free even while some of it is still open."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    if path.suffix == ".partial":
        path = path.rename(path.with_name(f"{path.name}.{secrets.token_hex(4)}"))
    shutil.rmtree(path, ignore_errors=True)
