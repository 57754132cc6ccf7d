"""Where a run's checkpoints lie: what a store lists is committed whole, whoever was killed when and wherever it lies.

    PLACE/
        step-00000030/           committed: its manifest.json was the last to be written, then it appeared at once
        .step-00000040.partial/  one being written, or what a killed save or removal left: the next save clears it
        damaged-step-00000020/   refused and set aside for inspection

A folder commits by one rename; a remote place (checkpoint.storage.bucket), which has none, by the manifest's own upload.
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
