"""Describes the checkpoints in a store without loading them: every fault by name, and why each is kept.

Nothing here is collective. One process looks, while a run may be writing and removing checkpoints.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache

from mikoshi.data.io.cores import cores
from mikoshi.trainer.checkpoint.manifest import FileEntry, Manifest
from mikoshi.trainer.checkpoint.retention import Keep, kept_steps, removable
from mikoshi.trainer.checkpoint.storage.base import Store
from mikoshi.trainer.checkpoint.storage.digests import DigestPair, differing_digests
from mikoshi.trainer.checkpoint.storage.files import read_through
from mikoshi.trainer.checkpoint.verify import read_manifest
from mikoshi.trainer.errors import CheckpointError

_DEGREES = ("tp", "pp", "cp", "ep")

Progress = Callable[[int], None]
"""Called with each further number of bytes read."""


@dataclass(frozen=True)
class Entry:
    """One checkpoint.

    written: seconds since the epoch.
    layout: of the run that saved it.
    problems: what is wrong, judged by names and sizes alone.
    kept: why the next save keeps it; empty if it does not.
    """

    step: int
    written: float | None
    bytes: int
    files: int
    ranks: int | None
    layout: str
    problems: list[str]
    kept: str


def survey(store: Store, keep: Keep) -> list[Entry]:
    """Returns all committed checkpoints, newest first. Those removed in the meantime are left out."""
    found, steps = [], store.steps()
    why = kept_steps(steps, keep)
    for step in steps:
        with suppress(FileNotFoundError):
            found.append(_entry(store, step, why.get(step, "")))
    return found


def _entry(store: Store, step: int, why: str) -> Entry:
    try:
        manifest = _manifest(store, step, tensors=False)
        sizes = store.sizes(step)
    except (CheckpointError, OSError) as error:
        problem, written = _problem(error), None
        with suppress(CheckpointError, OSError):
            written = store.written_at(step)
        return Entry(step, written, 0, 0, None, "", [problem], why)
    ranks, layout = manifest.made.get("ranks"), _layout(manifest.record.get("config", ""))
    return Entry(
        step, store.written_at(step), sum(size for size in sizes.values() if size > 0), len(sizes),
        ranks if type(ranks) is int else None, layout, _mismatches(store, step, manifest, sizes), why,
    )  # fmt: skip


@cache
def _layout(config: str) -> str:
    """Returns the layout in a config. It is cached, as neighbouring checkpoints nearly always have the same config."""
    try:
        parallel = tomllib.loads(config).get("parallel")
    except (tomllib.TOMLDecodeError, RecursionError):
        return ""
    if not isinstance(parallel, dict):
        return ""
    degrees = [f"{name} {parallel[name]}" for name in _DEGREES if type(parallel.get(name)) is int and parallel[name] > 1]
    return ", ".join([*degrees, f"ZeRO {parallel['zero']}"] if type(parallel.get("zero")) is int else degrees)


def _problem(error: CheckpointError | OSError) -> str:
    """Returns what is wrong with a file. Raises errors that are not about a file: a removed checkpoint or a store that
    fails.
    """
    if isinstance(error, CheckpointError):
        return str(error)
    if isinstance(error, FileNotFoundError) or error.errno is None:
        raise error
    return f"{error.filename}: cannot be read: {error.strerror}"


def _manifest(store: Store, step: int, tensors: bool = True) -> Manifest:
    """Returns the manifest. Raises CheckpointError for what is wrong with it, FileNotFoundError if the checkpoint is gone."""
    try:
        return read_manifest(store, step, tensors)
    except CheckpointError:
        if step not in store.steps():
            raise FileNotFoundError(store.describe(step)) from None
        raise


def _mismatches(store: Store, step: int, manifest: Manifest, sizes: Mapping[str, int]) -> list[str]:
    where, found = store.describe(step), []
    for name in sorted(sizes.keys() | manifest.files.keys()):
        if name not in manifest.files:
            found.append(f"{where}/{name}: not in the manifest")
        elif name not in sizes:
            found.append(f"{where}/{name}: missing")
        elif sizes[name] < 0:
            found.append(f"{where}/{name}: not a regular file")
        elif sizes[name] != manifest.files[name]["size"]:
            found.append(f"{where}/{name}: has {sizes[name]} bytes, the manifest says {manifest.files[name]['size']}")
    return found


def bytes_of(store: Store, step: int) -> int:
    """Returns how many bytes `faults` reads; 0 if that is not known."""
    with suppress(CheckpointError, FileNotFoundError):
        return sum(entry["size"] for entry in _manifest(store, step, tensors=False).files.values())
    return 0


def faults(store: Store, step: int, digests: bool = True, progress: Progress | None = None) -> list[str]:
    """Returns everything that is wrong with a checkpoint. Files are read in parallel.

    Raises FileNotFoundError if it was removed in the meantime.

    digests: True compares both digests of each file; False only names and sizes.
    progress: called with each further number of bytes read.
    """
    try:
        manifest = _manifest(store, step)
        sizes = store.sizes(step)
    except (CheckpointError, OSError) as error:
        return [_problem(error)]
    found = _mismatches(store, step, manifest, sizes)
    complete = [name for name, entry in sorted(manifest.files.items()) if sizes.get(name) == entry["size"]] if digests else []

    def fault(name: str) -> str | None:
        return _altered(store, step, name, manifest.files[name], progress or (lambda _: None))

    with ThreadPoolExecutor(min(8, cores())) as pool:
        altered = [problem for problem in pool.map(fault, complete) if problem is not None]
    if altered and step not in store.steps():
        raise FileNotFoundError(store.describe(step))
    return found + altered


def _altered(store: Store, step: int, name: str, expected: FileEntry, progress: Progress) -> str | None:
    digests = DigestPair()

    def update(block: memoryview) -> None:
        digests.update(block)
        progress(len(block))

    try:
        read_through(store.local(step, name, expected["sha256"]), update)
    except (CheckpointError, OSError) as error:
        return _problem(error)
    if not (differ := differing_digests(digests.hexdigests(), expected)):
        return None
    return f"{store.describe(step)}/{name}: altered: its bytes do not match the manifest's {' and '.join(differ)}"


def verified_removable(store: Store, keep: Keep, progress: Progress | None = None) -> tuple[list[int], int | None]:
    """Returns the steps that may be removed, newest first, and the newest step that verifies with digests; that one is kept.

    The second is None if there is no checkpoint. Raises CheckpointError if none verifies.

    progress: called with each further number of bytes read.
    """
    reasons: list[str] = []
    for step in store.steps():
        with suppress(FileNotFoundError):
            if not (found := faults(store, step, progress=progress)):
                return [other for other in removable(store, keep, (step,)) if other != step], step
            reasons += found
    if reasons:
        raise CheckpointError("\n".join([*reasons, f"{store.address}: no checkpoint is valid, so none is removed"]))
    return [], None
