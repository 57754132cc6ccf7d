"""What can be said of the checkpoints in a store without loading one, for people: every fault by name, and what is kept why.

Nothing here is collective: one process looks, beside a run that may be writing and removing checkpoints meanwhile.
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
from mikoshi.trainer.checkpoint.retention import Keep, kept
from mikoshi.trainer.checkpoint.retention import surplus as beside_sizes
from mikoshi.trainer.checkpoint.storage.base import Store
from mikoshi.trainer.checkpoint.storage.digests import Both, differing
from mikoshi.trainer.checkpoint.storage.files import read_through
from mikoshi.trainer.checkpoint.verify import read_manifest
from mikoshi.trainer.errors import CheckpointError

_DEGREES = ("tp", "pp", "cp", "ep")

Seen = Callable[[int], None]
"""Told of each further number of bytes that was read."""


@dataclass(frozen=True)
class Entry:
    """One checkpoint. `written`: seconds since the epoch. `layout`: of the run that saved it. `problems`: what is wrong by
    names and sizes alone. `kept`: why the next save leaves it; empty if it does not."""

    step: int
    written: float | None
    bytes: int
    files: int
    ranks: int | None
    layout: str
    problems: list[str]
    kept: str


def survey(store: Store, keep: Keep) -> list[Entry]:
    """All committed checkpoints, newest first. Those that are removed meanwhile are left out."""
    found, steps = [], store.steps()
    why = kept(steps, keep)
    for step in steps:
        with suppress(FileNotFoundError):
            found.append(_entry(store, step, why.get(step, "")))
    return found


def _entry(store: Store, step: int, why: str) -> Entry:
    try:
        manifest = _manifest(store, step, tensors=False)
        sizes = store.sizes(step)
    except (CheckpointError, OSError) as error:
        told, written = _told(error), None
        with suppress(CheckpointError, OSError):
            written = store.written(step)
        return Entry(step, written, 0, 0, None, "", [told], why)
    ranks, layout = manifest.made.get("ranks"), _layout(manifest.record.get("config", ""))
    return Entry(
        step, store.written(step), sum(size for size in sizes.values() if size > 0), len(sizes),
        ranks if type(ranks) is int else None, layout, _mismatches(store, step, manifest, sizes), why,
    )  # fmt: skip


@cache
def _layout(config: str) -> str:
    """Of a config as a checkpoint has it, which is nearly always that of its neighbours."""
    try:
        parallel = tomllib.loads(config).get("parallel")
    except (tomllib.TOMLDecodeError, RecursionError):
        return ""
    if not isinstance(parallel, dict):
        return ""
    degrees = [f"{name} {parallel[name]}" for name in _DEGREES if type(parallel.get(name)) is int and parallel[name] > 1]
    return ", ".join([*degrees, f"ZeRO {parallel['zero']}"] if type(parallel.get("zero")) is int else degrees)


def _told(error: CheckpointError | OSError) -> str:
    """What is wrong with a file. Raises what is not about one: the checkpoint is gone, or its store does not answer."""
    if isinstance(error, CheckpointError):
        return str(error)
    if isinstance(error, FileNotFoundError) or error.errno is None:
        raise error
    return f"{error.filename}: cannot be read: {error.strerror}"


def _manifest(store: Store, step: int, tensors: bool = True) -> Manifest:
    """Raises CheckpointError for what is wrong with it; FileNotFoundError if the whole checkpoint is gone."""
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
    """Bytes that `faults` reads; 0 where that cannot be said."""
    with suppress(CheckpointError, FileNotFoundError):
        return sum(entry["size"] for entry in _manifest(store, step, tensors=False).files.values())
    return 0


def faults(store: Store, step: int, digests: bool = True, seen: Seen | None = None) -> list[str]:
    """Everything that is wrong with a checkpoint, by name: without `digests`, by names and sizes alone. The files are read
    in parallel, and both digests of each compared. Raises FileNotFoundError if it was removed meanwhile."""
    try:
        manifest = _manifest(store, step)
        sizes = store.sizes(step)
    except (CheckpointError, OSError) as error:
        return [_told(error)]
    found = _mismatches(store, step, manifest, sizes)
    whole = [name for name, entry in sorted(manifest.files.items()) if sizes.get(name) == entry["size"]] if digests else []

    def fault(name: str) -> str | None:
        return _altered(store, step, name, manifest.files[name], seen or (lambda _: None))

    with ThreadPoolExecutor(min(8, cores())) as pool:
        altered = [told for told in pool.map(fault, whole) if told is not None]
    if altered and step not in store.steps():
        raise FileNotFoundError(store.describe(step))
    return found + altered


def _altered(store: Store, step: int, name: str, expected: FileEntry, seen: Seen) -> str | None:
    digests = Both()

    def update(block: memoryview) -> None:
        digests.update(block)
        seen(len(block))

    try:
        read_through(store.local(step, name, expected["sha256"]), update)
    except (CheckpointError, OSError) as error:
        return _told(error)
    if not (differ := differing(digests.hexdigests(), expected)):
        return None
    return f"{store.describe(step)}/{name}: altered: its bytes do not match the manifest's {' and '.join(differ)}"


def surplus(store: Store, keep: Keep, seen: Seen | None = None) -> tuple[list[int], int | None]:
    """The steps that may go, newest first, and the newest one that verifies, digests and all, which is never among them
    (None where there is no checkpoint). Raises CheckpointError if none verifies."""
    reasons: list[str] = []
    for step in store.steps():
        with suppress(FileNotFoundError):
            if not (found := faults(store, step, seen=seen)):
                return [other for other in beside_sizes(store, keep, (step,)) if other != step], step
            reasons += found
    if reasons:
        raise CheckpointError("\n".join([*reasons, f"{store.place}: no checkpoint is valid, so none is removed"]))
    return [], None
