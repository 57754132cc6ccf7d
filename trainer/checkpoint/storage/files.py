"""Opens and reads files of a checkpoint safely: only regular files are opened, and a FIFO never blocks."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from mikoshi.trainer.checkpoint.storage.base import NO_FILE
from mikoshi.trainer.errors import CheckpointError

_READ = 512 << 10  # bytes read, then digested while they are in a core's own cache


@contextmanager
def regular_file(path: Path) -> Iterator[tuple[int, int]]:
    """Yields handle and size of a regular file.

    Raises CheckpointError for a link, a FIFO or a folder, and OSError if it cannot be opened, which says nothing about the
    file.
    """
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


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """Yields the handle of a regular file.

    Raises CheckpointError for anything else and for a missing file, and OSError if it cannot be opened, which says nothing
    about the file.
    """
    with ExitStack() as stack:
        try:
            handle, _ = stack.enter_context(regular_file(path))
        except FileNotFoundError:
            raise CheckpointError(f"{path}: missing") from None
        yield handle


def read_through(path: Path, update: Callable[[memoryview], object]) -> None:
    """Call `update` with every byte of a regular file, a block at a time.

    It reads instead of mapping, though that is somewhat slower: a disk that fails under a mapping kills the process. Raises
    CheckpointError if it is not a regular file, and OSError if it cannot be read, which says nothing about the file.
    """
    buffer = memoryview(bytearray(_READ))
    with opened(path) as handle:
        try:
            while count := os.readv(handle, [buffer]):
                update(buffer[:count])
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from None
