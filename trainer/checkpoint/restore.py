"""The newest checkpoint that can be trusted, and its state in any layout: what is damaged is refused by name, by all ranks.

A disk or a store that fails is no damage: then nothing is refused, nothing set aside, and no older state loaded instead.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from xxhash import xxh3_128

from data.cores import cores
from trainer.checkpoint.agree import cause, of_all_ranks, on_first_rank, place
from trainer.checkpoint.manifest import FileEntry, Manifest, file_of, parse
from trainer.checkpoint.pieces import read_through
from trainer.checkpoint.plan import fill
from trainer.checkpoint.store import LocalStore, Store, step_name, step_of
from trainer.errors import CheckpointError

T = TypeVar("T")


_PAUSES = (0.2, 1.0, 3.0)
"""Seconds before a store that has failed is asked again."""


@dataclass(frozen=True)
class Saved:
    """A committed checkpoint: in which store, and of which step."""

    store: Store
    step: int

    @property
    def name(self) -> str:
        return step_name(self.step)

    def __str__(self) -> str:
        return self.store.describe(self.step)


def at(where: Store | Saved | Path, step: int | None = None) -> Saved:
    """The checkpoint of `step` in a store or a folder of checkpoints; without `step`, the one whose own folder it is."""
    if isinstance(where, Saved):
        return where
    if isinstance(where, Path):
        named = step_of(where.name) if step is None else None
        where, step = LocalStore(where if named is None else where.parent), step if named is None else named
    if step is None:
        raise CheckpointError(f"{where.place}: not a checkpoint: its name is not of the form {step_name(30)}")
    return Saved(where, step)


def step_folder(folder: Path, step: int) -> Path:
    return folder / step_name(step)


def steps_in(folder: Path) -> list[Path]:
    """Committed checkpoints, newest first. A partial one, being hidden, is not among them."""
    return [step_folder(folder, step) for step in LocalStore(folder).steps()]


def read_manifest(where: Store | Saved | Path, step: int | None = None, tensors: bool = True) -> Manifest:
    """Raises CheckpointError if the manifest is missing, altered, of another format or step, or says what cannot be. Without
    `tensors` it is quick: they are left out."""
    saved = at(where, step)
    file = file_of(saved)
    try:
        manifest = parse(saved.store.manifest(saved.step), file, tensors)
    except FileNotFoundError:
        raise CheckpointError(f"{file}: missing") from None
    if manifest.step != saved.step:
        raise CheckpointError(f"{file}: of step {manifest.step}, not {saved.step}: it was put here from another checkpoint")
    return manifest


def verify(
    where: Store | Saved | Path,
    share: int = 0,
    shares: int = 1,
    digests: bool = True,
    step: int | None = None,
) -> Manifest:
    """Compare every byte with the manifest, by XXH3, or of `shares` parts of the files only number `share`; without
    `digests`, only which files there are and their sizes. That finds accidents; see trainer.checkpoint.digests.

    Raises CheckpointError that names the first file that differs, is missing, or is there without being listed; OSError
    where the store fails, which says nothing against the checkpoint.
    """
    saved = at(where, step)
    manifest = read_manifest(saved)
    there = saved.store.sizes(saved.step)
    if stray := sorted(there.keys() - manifest.files.keys()):
        raise CheckpointError(f"{saved}/{stray[0]}: not in the manifest")
    mine = sorted(manifest.files.items())[share::shares]
    for name, entry in mine:
        _check_size(f"{saved}/{name}", there.get(name), entry["size"])
    if digests:
        with ThreadPoolExecutor(min(8, cores()), "verify") as pool:
            list(pool.map(lambda item: _check_bytes(saved, *item), mine))
    return manifest


def _check_size(file: str, found: int | None, expected: int) -> None:
    if found is None:
        raise CheckpointError(f"{file}: missing")
    if found < 0:
        raise CheckpointError(f"{file}: not a regular file")
    if found != expected:
        raise CheckpointError(f"{file}: has {found} bytes, the manifest says {expected}")


def _check_bytes(saved: Saved, name: str, entry: FileEntry) -> None:
    digest = xxh3_128()
    read_through(saved.store.local(saved.step, name, entry["sha256"]), digest.update)
    if digest.hexdigest() != entry["xxh3"]:
        raise CheckpointError(f"{saved}/{name}: altered: its bytes do not match the manifest's XXH3")


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
