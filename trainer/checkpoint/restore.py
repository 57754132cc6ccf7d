"""Finds the newest valid checkpoint and loads its state into any layout. All ranks refuse a damaged one, by name.

A disk or a store that fails is not damage: nothing is refused or set aside, and no older state is loaded instead.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from mikoshi.trainer.checkpoint.agree import all_gather_json, cause, on_first_rank, rank_and_world
from mikoshi.trainer.checkpoint.manifest import Manifest
from mikoshi.trainer.checkpoint.plan import fill
from mikoshi.trainer.checkpoint.storage.base import Store
from mikoshi.trainer.checkpoint.storage.local import LocalStore
from mikoshi.trainer.checkpoint.verify import Saved, checkpoint_at, verify
from mikoshi.trainer.errors import CheckpointError

T = TypeVar("T")


_PAUSES = (0.2, 1.0, 3.0)
"""Seconds before each retry of a store that has failed."""


def problem_of(where: Store | Saved | Path, step: int | None = None, digests: bool = True) -> str | None:
    """Returns what is wrong with a checkpoint, or None. Collective: each rank reads its share of the bytes.

    Raises OSError on every rank if the store fails on any.

    digests: False compares only names and sizes.
    """
    return _verdict(checkpoint_at(where, step), digests)[0]


def _verdict(saved: Saved, digests: bool) -> tuple[str | None, Manifest | None]:
    """Returns what is wrong with a checkpoint, or its manifest if nothing is. Collective."""
    rank, world = rank_and_world()
    own_verdict: tuple[str, str] | None = None
    manifest: Manifest | None = None
    try:
        manifest = verify(saved, rank, world, digests)
    except CheckpointError as error:
        own_verdict = ("damaged", str(error))
    except FileNotFoundError:  # removed meanwhile by the run that owns it
        own_verdict = ("damaged", f"{saved}: missing")
    except OSError as error:
        own_verdict = ("failed", f"{saved}: cannot be verified: {cause(error)}")
    verdicts = [verdict for verdict in all_gather_json(own_verdict) if verdict is not None]
    for kind, reason in verdicts:
        if kind == "failed":
            raise OSError(reason)
    return (verdicts[0][1], None) if verdicts else (None, manifest)


def newest_valid(place: Store | Path, set_aside: bool = True, digests: bool = True) -> tuple[Saved, Manifest, list[str]] | None:
    """Returns the newest checkpoint that verifies, its manifest, and why newer ones did not; None if there is no checkpoint.
    Collective.

    Refused checkpoints are renamed to damaged-... unless `set_aside` is False, for a reader beside a live run. Raises
    CheckpointError if there are checkpoints and none is valid; they are left as they are. If the store fails on any rank, it
    is tried a few times more; then all ranks raise OSError and everything is left as it is.

    place: a store or a folder of checkpoints.
    digests: False compares only names and sizes.
    """
    store = LocalStore(place) if isinstance(place, Path) else place
    rejected: dict[int, str] = {}
    for step in _with_retries(lambda: list[int](on_first_rank(store.steps))):
        saved = Saved(store, step)
        problem, manifest = _with_retries(partial(_verdict, saved, digests))
        if problem is None and manifest is not None:
            if set_aside:
                on_first_rank(lambda: _set_aside(store, list(rejected)))
            return saved, manifest, list(rejected.values())
        rejected[step] = problem or ""
    if rejected:
        reasons = "; ".join(rejected.values())
        raise CheckpointError(f"{store.address}: no valid checkpoint is left: {reasons}; remove them to start from step 0")
    return None


def _with_retries(action: Callable[[], T]) -> T:
    """Returns the result of `action`, tried again if the store fails, which all ranks see alike. Collective if `action` is."""
    for pause in _PAUSES:
        with suppress(OSError):
            return action()
        time.sleep(pause)
    return action()


def _set_aside(store: Store, steps: list[int]) -> None:
    for step in steps:
        store.set_aside(step)


def load(where: Store | Saved | Path, manifest: Manifest, state: dict[str, Tensor]) -> None:
    """Fill the tensors of `state` in place, whatever layout saved them. Collective if a process group exists.

    Call newest_valid or verify first: this trusts the bytes. Raises CheckpointError for a tensor that the checkpoint lacks or
    has in another shape, and OSError if a file cannot be read.

    state: may be a part of what was saved.
    """
    saved = checkpoint_at(where, None if isinstance(where, Path) else manifest.step)

    def path_of(name: str) -> Path:
        return saved.store.local(saved.step, name, manifest.files[name]["sha256"])

    try:
        fill(state, manifest, path_of)
    except CheckpointException as error:
        failed = [inner for inner, _ in error.failures.values()]
        if any(isinstance(inner, OSError) for inner in failed) and not any(isinstance(e, CheckpointError) for e in failed):
            raise OSError(f"{saved}: cannot be read: {cause(error)}") from None
        raise CheckpointError(f"{saved}: cannot be loaded: {cause(error)}") from None
