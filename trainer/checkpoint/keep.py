"""Which checkpoints stay: the newest few and every so many steps, and whatever is asked, the last one that is valid."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from trainer.checkpoint.restore import Saved, verify
from trainer.checkpoint.store import Store
from trainer.errors import CheckpointError


@dataclass(frozen=True)
class Keep:
    """`last`: how many of the newest. `every`: steps that this divides stay too; 0: none for that."""

    last: int
    every: int = 0

    def __post_init__(self) -> None:
        if self.last < 1 or self.every < 0:
            raise CheckpointError(f"keep the newest {self.last} and every {self.every}: at least 1, and at least 0")


def surplus(store: Store, keep: Keep, valid: Collection[int] = (), new: int | None = None) -> list[int]:
    """The steps that may go, newest first. `valid`: those known to be so; of others the sizes of their files are compared
    before they count as the last valid one. `new`: one that has just been saved, which stays."""
    steps = store.steps()
    kept = {step for number, step in enumerate(steps) if number < keep.last or (keep.every and step % keep.every == 0)}
    kept |= {step for step in steps if step == new}
    gone = [step for step in steps if step not in kept]

    def good(step: int) -> bool:
        return step in valid or _whole(store, step)

    if not any(good(step) for step in sorted(kept, reverse=True)):
        last = next((step for step in gone if good(step)), None)
        gone = [step for step in gone if step != last]
    return gone


def prune(store: Store, keep: Keep, valid: Collection[int] = (), new: int | None = None) -> list[int]:
    """Remove what `surplus` finds, the oldest first; returns it. For one process at a time."""
    gone = surplus(store, keep, valid, new)
    for step in reversed(gone):
        store.remove(step)
    return gone


def _whole(store: Store, step: int) -> bool:
    try:
        verify(Saved(store, step), digests=False)
    except (CheckpointError, FileNotFoundError):
        return False
    return True
