"""The `Store` protocol: what a store lists is a whole, committed checkpoint, whenever a process was killed.

    PLACE/
        step-00000030/           committed: its manifest.json was written last, then it appeared at once
        .step-00000040.partial/  being written, or left by a killed save or removal: the next save clears it
        damaged-step-00000020/   refused and set aside for inspection

A folder commits by one rename. An object store (checkpoint.storage.bucket) has no rename and commits by the manifest's
upload.
"""

from __future__ import annotations

import errno
import re
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO, Protocol

from mikoshi.trainer.errors import CheckpointError

MANIFEST = "manifest.json"
DAMAGED = "damaged-"
_STEP = re.compile(r"step-(\d{8,15})")
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")
LARGEST_MANIFEST = 1 << 31
NO_FILE = (errno.ELOOP, errno.ENXIO, errno.ENODEV)
"""Errors of opening a link, a socket or a device without a driver. Any other error is the storage's, not the file's."""


class Store(Protocol):
    """The checkpoints of one run in one place. Every method is local to the calling process; none is collective.

    All raise OSError if the storage fails or does not answer, which says nothing about a checkpoint, and CheckpointError,
    with the name, for what is not as it must be.
    """

    @property
    def address(self) -> str:
        """Folder or URL, for messages."""

    def steps(self) -> list[int]:
        """Returns the committed steps, newest first."""

    def leftovers(self) -> list[str]:
        """Returns the names of partial checkpoints and of those set aside."""

    def begin(self, step: int) -> None:
        """Clear what killed saves left and prepare a new partial checkpoint. For rank 0, before any `create`.

        Raises CheckpointError if `step` is committed already.
        """

    def create(self, step: int, name: str) -> AbstractContextManager[BinaryIO]:
        """Write a file of the partial checkpoint: durable if the block ends well, removed if it ends in an exception."""

    def commit(self, step: int, manifest: bytes) -> None:
        """Write the manifest last, which makes everything visible at once. For rank 0, after every rank's `create`."""

    def abandon(self, step: int) -> None:
        """Remove the partial checkpoint as far as possible. For rank 0. Raises nothing: the next `begin` clears the rest."""

    def manifest(self, step: int) -> bytes:
        """Returns the bytes of the manifest. Raises FileNotFoundError if it does not exist."""

    def written_at(self, step: int) -> float:
        """Returns when the manifest was written, in seconds since the epoch. Raises FileNotFoundError."""

    def sizes(self, step: int) -> dict[str, int]:
        """Returns the bytes of every entry beside the manifest; -1 for what is not a regular file (link, FIFO, folder)."""

    def local(self, step: int, name: str, sha256: str | None = None) -> Path:
        """Returns a path on this machine with the file's bytes, valid until another step is requested.

        A file that must be fetched is fetched once for the ranks of a node, and once more if it does not match `sha256`; then
        it raises CheckpointError.
        """

    def release(self) -> None:
        """Remove what `local` has fetched, when no rank of this node reads it any more."""

    def remove(self, step: int) -> None:
        """Hide the checkpoint, then remove its bytes: a kill in between leaves a partial, never a torn checkpoint.

        Does nothing if it is gone already.
        """

    def set_aside(self, step: int) -> str:
        """Take a damaged checkpoint out of `steps` and keep it for inspection; returns its new name."""

    def describe(self, step: int) -> str:
        """Returns path or URL of a step, for messages."""


def step_name(step: int) -> str:
    """Returns the name of a step's checkpoint, such as step-00000030."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """Returns the step of a checkpoint's name, or None for any other name."""
    found = _STEP.fullmatch(name)
    return int(found[1]) if found and step_name(int(found[1])) == name else None


def checked_name(where: str, name: str) -> str:
    """Returns the name of a file in a checkpoint. Raises CheckpointError if it could be anything else, such as a path."""
    if not _FILE.fullmatch(name) or name == MANIFEST:
        raise CheckpointError(f"{where}: {name!r} is not the name of a file in the checkpoint")
    return name
