"""Files of a checkpoint, opened and read with care: what is not a regular file is refused, and nothing waits for a FIFO."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mikoshi.trainer.checkpoint.storage.base import NO_FILE
from mikoshi.trainer.errors import CheckpointError

_READ = 512 << 10  # bytes read, then digested while they are in a core's own cache


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """A handle of a regular file. Raises CheckpointError for anything else, and does not wait for what a FIFO has to say;
    OSError where it cannot be opened, which says nothing against it."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing") from None
    except OSError as error:
        if error.errno not in NO_FILE:
            raise
        raise CheckpointError(f"{path}: not a regular file") from None
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise CheckpointError(f"{path}: not a regular file")
        yield handle
    finally:
        os.close(handle)


def read_through(path: Path, update: Callable[[memoryview], object]) -> None:
    """Show `update` every byte of a regular file, a block at a time. Raises CheckpointError if it is none; OSError where it
    cannot be read, which says nothing against it.

    Not through a mapping, though that is somewhat faster: a disk that fails under one kills the process.
    """
    buffer = memoryview(bytearray(_READ))
    with opened(path) as handle:
        try:
            while count := os.readv(handle, [buffer]):
                update(buffer[:count])
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from None
