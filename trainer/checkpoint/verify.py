"""Whether a checkpoint is what was saved, by its manifest alone: which files, how large, every byte. Needs no torch."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from xxhash import xxh3_128

from mikoshi.data.io.cores import cores
from mikoshi.trainer.checkpoint.manifest import FileEntry, Manifest, file_of, parse
from mikoshi.trainer.checkpoint.storage.base import Store, step_name, step_of
from mikoshi.trainer.checkpoint.storage.files import read_through
from mikoshi.trainer.checkpoint.storage.local import LocalStore
from mikoshi.trainer.errors import CheckpointError


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
    `digests`, only which files there are and their sizes. That finds accidents; see checkpoint.storage.digests.

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
