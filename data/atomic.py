"""A folder or file appears whole or not at all: built aside, flushed to disk, then put in place by one rename."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def flush(path: Path) -> None:
    """Make a file's bytes, or a folder's names, durable (fsync)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def partial_path(target: Path) -> Path:
    """Where `target` is built before it exists: hidden, beside it, so that the rename stays on one file system."""
    return target.with_name(f".{target.name}.partial")


def commit_folder(target: Path) -> None:
    """Put the folder built at partial_path(target) in place. `target` must not exist."""
    built = partial_path(target)
    for path in built.iterdir():
        if path.is_file():
            flush(path)
    flush(built)
    built.rename(target)
    flush(target.parent)


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Yield a fresh folder that becomes `target` when the block ends well, and is removed when it raises.

    A partial folder that a killed process left behind is cleared first. Raises FileExistsError if `target` exists.
    """
    if target.exists():
        raise FileExistsError(f"{target} exists already")
    built = partial_path(target)
    shutil.rmtree(built, ignore_errors=True)
    built.mkdir(parents=True)
    try:
        yield built
        commit_folder(target)
    except BaseException:
        shutil.rmtree(built, ignore_errors=True)
        raise


def write_file(target: Path, content: bytes) -> None:
    """Replace `target` by `content` in one step: a reader sees the old bytes or the new, never a part."""
    built = partial_path(target)
    try:
        built.write_bytes(content)
        flush(built)
        built.rename(target)
    except BaseException:
        with suppress(OSError):
            built.unlink()
        raise
    flush(target.parent)
