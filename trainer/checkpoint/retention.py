"""Which checkpoints are kept: the newest few, every so many steps, those to rewind to, and always the last valid one."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from mikoshi.trainer.checkpoint.storage.base import Store
from mikoshi.trainer.checkpoint.verify import Saved, verify
from mikoshi.trainer.errors import CheckpointError


@dataclass(frozen=True)
class Keep:
    """A retention policy.

    last: number of newest checkpoints to keep.
    every: keep steps that this divides; 0 means none for that reason.
    rewind: how many steps the run may go back.
    rewind_every: keep steps that this divides and that lie at most `rewind` steps behind the newest, and the last such step
      before them; 0 means none.
    """

    last: int
    every: int = 0
    rewind: int = 0
    rewind_every: int = 0

    def __post_init__(self) -> None:
        if self.last < 1 or self.every < 0:
            raise CheckpointError(f"keep the newest {self.last} and every {self.every}: at least 1, and at least 0")
        if self.rewind < 0 or self.rewind_every < 0:
            raise CheckpointError(f"keep every {self.rewind_every} of the last {self.rewind} steps: at least 0 both")


def kept_steps(steps: Sequence[int], keep: Keep) -> dict[int, str]:
    """Returns the steps that `keep` keeps, each with the reason for people.

    steps: newest first.
    """
    reasons: dict[int, str] = {}
    if keep.rewind and keep.rewind_every and steps:
        regular = [step for step in steps if step % keep.rewind_every == 0]
        within = sum(step >= steps[0] - keep.rewind for step in regular)
        reasons |= dict.fromkeys(regular[: within + 1], "for going back")
    if keep.every:
        reasons |= {step: f"a multiple of {keep.every}" for step in steps if step % keep.every == 0}
    return reasons | dict.fromkeys(steps[: keep.last], "the newest" if keep.last == 1 else f"one of the newest {keep.last}")


def removable(store: Store, keep: Keep, valid: Collection[int] = (), new: int | None = None) -> list[int]:
    """Returns the steps that may be removed, newest first.

    valid: steps known to be valid; for others the sizes of their files are compared before one counts as the last valid one.
    new: a step that has just been saved, which is kept.
    """
    steps = store.steps()
    kept = {*kept_steps(steps, keep), *(step for step in steps if step == new)}
    removable_steps = [step for step in steps if step not in kept]

    def is_valid(step: int) -> bool:
        return step in valid or _sizes_match(store, step)

    if not any(is_valid(step) for step in sorted(kept, reverse=True)):
        last = next((step for step in removable_steps if is_valid(step)), None)
        removable_steps = [step for step in removable_steps if step != last]
    return removable_steps


def prune(store: Store, keep: Keep, valid: Collection[int] = (), new: int | None = None) -> list[int]:
    """Remove what `removable` finds, the oldest first; returns it, newest first. For one process at a time."""
    steps = removable(store, keep, valid, new)
    for step in reversed(steps):
        store.remove(step)
    return steps


def _sizes_match(store: Store, step: int) -> bool:
    try:
        verify(Saved(store, step), digests=False)
    except (CheckpointError, FileNotFoundError):
        return False
    return True
