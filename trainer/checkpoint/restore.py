"""The newest checkpoint that can be trusted, and its state in any layout: what is damaged is refused by name, by all ranks.

A disk or a store that fails is no damage: then nothing is refused, nothing set aside, and no older state loaded instead.
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

from mikoshi.trainer.checkpoint.agree import cause, of_all_ranks, on_first_rank, place
from mikoshi.trainer.checkpoint.manifest import Manifest
from mikoshi.trainer.checkpoint.plan import fill
from mikoshi.trainer.checkpoint.storage.base import Store
from mikoshi.trainer.checkpoint.storage.local import LocalStore
from mikoshi.trainer.checkpoint.verify import Saved, at, verify
from mikoshi.trainer.errors import CheckpointError

T = TypeVar("T")


_PAUSES = (0.2, 1.0, 3.0)
"""Seconds before a store that has failed is asked again."""


def problem_of(where: Store | Saved | Path, step: int | None = None, digests: bool = True) -> str | None:
    """What is wrong with a checkpoint, found by all ranks together, each reading its share of the bytes. Collective.
    Raises OSError, on every rank, where the store fails on any."""
    return _judged(at(where, step), digests)[0]


def _judged(saved: Saved, digests: bool) -> tuple[str | None, Manifest | None]:
    """What is wrong with a checkpoint, and if nothing is, its manifest. Collective."""
    rank, world = place()
    mine: tuple[str, str] | None = None
    manifest: Manifest | None = None
    try:
        manifest = verify(saved, rank, world, digests)
    except CheckpointError as error:
        mine = ("damaged", str(error))
    except FileNotFoundError:  # removed under a reader's eyes by the run that owns it
        mine = ("damaged", f"{saved}: missing")
    except OSError as error:
        mine = ("failed", f"{saved}: cannot be verified: {cause(error)}")
    found = [verdict for verdict in of_all_ranks(mine) if verdict is not None]
    for kind, told in found:
        if kind == "failed":
            raise OSError(told)
    return (found[0][1], None) if found else (None, manifest)


def newest_valid(place: Store | Path, set_aside: bool = True, digests: bool = True) -> tuple[Saved, Manifest, list[str]] | None:
    """The newest checkpoint that verifies, and why newer ones did not. Collective: the ranks share out the files.

    The ones refused are renamed to damaged-..., unless `set_aside` is False, for a reader beside a live run. None when
    there is none at all. Raises CheckpointError when there are some and none is valid; those are left as they are. Where the
    store fails on any rank, it is asked a few times more; then OSError on all, and everything is left as it is.
    """
    store = LocalStore(place) if isinstance(place, Path) else place
    rejected: dict[int, str] = {}
    for step in _patiently(lambda: list[int](on_first_rank(store.steps))):
        saved = Saved(store, step)
        problem, manifest = _patiently(partial(_judged, saved, digests))
        if problem is None and manifest is not None:
            if set_aside:
                on_first_rank(lambda: _set_aside(store, list(rejected)))
            return saved, manifest, list(rejected.values())
        rejected[step] = problem or ""
    if rejected:
        reasons = "; ".join(rejected.values())
        raise CheckpointError(f"{store.place}: no valid checkpoint is left: {reasons}; remove them to start from step 0")
    return None


def _patiently(ask: Callable[[], T]) -> T:
    """The answer of a store that may fail in passing, as it then does on all ranks alike. Collective if `ask` is."""
    for pause in _PAUSES:
        with suppress(OSError):
            return ask()
        time.sleep(pause)
    return ask()


def _set_aside(store: Store, steps: list[int]) -> None:
    for step in steps:
        store.set_aside(step)


def load(where: Store | Saved | Path, manifest: Manifest, state: dict[str, Tensor]) -> None:
    """Fill the tensors of `state` in place, whatever layout saved them. Collective if a process group exists.

    `state` may be a part of what was saved. Call newest_valid or verify first: this trusts the bytes. Raises
    CheckpointError for a tensor that the checkpoint lacks or holds in another shape; OSError where a file cannot be read.
    """
    saved = at(where, None if isinstance(where, Path) else manifest.step)

    def path_of(name: str) -> Path:
        return saved.store.local(saved.step, name, manifest.files[name]["sha256"])

    try:
        fill(state, manifest, path_of)
    except CheckpointException as error:
        failed = [inner for inner, _ in error.failures.values()]
        if any(isinstance(inner, OSError) for inner in failed) and not any(isinstance(e, CheckpointError) for e in failed):
            raise OSError(f"{saved}: cannot be read: {cause(error)}") from None
        raise CheckpointError(f"{saved}: cannot be loaded: {cause(error)}") from None
