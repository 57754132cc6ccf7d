"""Which checkpoints stay: the newest few, every so many steps, what going back may need; and in any case the last valid one."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from mikoshi.trainer.checkpoint.storage.base import Store
from mikoshi.trainer.checkpoint.verify import Saved, verify
from mikoshi.trainer.errors import CheckpointError


@dataclass(frozen=True)
class Keep:
    """`last`: how many of the newest. `every`: steps that this divides stay too; 0: none for that.

    For a run that may go back `back` steps: of the steps that `of` divides those that lie no further behind the newest stay
    too, and the last one before them; 0: none for that.
    """

    last: int
    every: int = 0
    back: int = 0
    of: int = 0

    def __post_init__(self) -> None:
        if self.last < 1 or self.every < 0:
            raise CheckpointError(f"keep the newest {self.last} and every {self.every}: at least 1, and at least 0")
        if self.back < 0 or self.of < 0:
            raise CheckpointError(f"keep every {self.of} of the last {self.back} steps: at least 0 both")


def kept(steps: Sequence[int], keep: Keep) -> dict[int, str]:
    """Of `steps`, newest first, those that `keep` asks for, and for people why."""
    reasons: dict[int, str] = {}
    if keep.back and keep.of and steps:
        regular = [step for step in steps if step % keep.of == 0]
        within = sum(step >= steps[0] - keep.back for step in regular)
        reasons |= dict.fromkeys(regular[: within + 1], "for going back")
    if keep.every:
        reasons |= {step: f"a multiple of {keep.every}" for step in steps if step % keep.every == 0}
    return reasons | dict.fromkeys(steps[: keep.last], "the newest" if keep.last == 1 else f"one of the newest {keep.last}")


def surplus(store: Store, keep: Keep, valid: Collection[int] = (), new: int | None = None) -> list[int]:
    """The steps that may go, newest first. `valid`: those known to be so; of others the sizes of their files are compared
    before they count as the last valid one. `new`: one that has just been saved, which stays."""
    steps = store.steps()
    stay = {*kept(steps, keep), *(step for step in steps if step == new)}
    gone = [step for step in steps if step not in stay]

    def good(step: int) -> bool:
        return step in valid or _whole(store, step)

    if not any(good(step) for step in sorted(stay, reverse=True)):
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
