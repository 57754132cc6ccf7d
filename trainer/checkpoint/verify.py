"""Whether a checkpoint is what was saved, judged by its manifest: which files, their sizes, every byte. Needs no torch."""

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
    """A committed checkpoint: its store and its step."""

    store: Store
    step: int

    @property
    def name(self) -> str:
        """Its name in the store."""
        return step_name(self.step)

    def __str__(self) -> str:
        return self.store.describe(self.step)


def checkpoint_at(where: Store | Saved | Path, step: int | None = None) -> Saved:
    """Returns the checkpoint of `step` in a store or a folder of checkpoints; without `step`, the one whose folder `where`
    is.

    Raises CheckpointError if `where` is not a checkpoint.
    """
    if isinstance(where, Saved):
        return where
    if isinstance(where, Path):
        named = step_of(where.name) if step is None else None
        where, step = LocalStore(where if named is None else where.parent), step if named is None else named
    if step is None:
        raise CheckpointError(f"{where.address}: not a checkpoint: its name is not of the form {step_name(30)}")
    return Saved(where, step)


def step_folder(folder: Path, step: int) -> Path:
    """Returns the folder of a step."""
    return folder / step_name(step)


def steps_in(folder: Path) -> list[Path]:
    """Returns the folders of committed checkpoints, newest first. A partial one is hidden and not among them."""
    return [step_folder(folder, step) for step in LocalStore(folder).steps()]


def read_manifest(where: Store | Saved | Path, step: int | None = None, tensors: bool = True) -> Manifest:
    """Returns the manifest of a checkpoint.

    Raises CheckpointError if it is missing, altered, of another format or step, or cannot be right.

    tensors: False leaves them out, which is quick.
    """
    saved = checkpoint_at(where, step)
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
    """Compare a checkpoint with its manifest; returns the manifest. XXH3 finds accidents; see checkpoint.storage.digests.

    Raises CheckpointError that names the first file that differs, is missing or is not listed, and OSError if the store
    fails, which says nothing about the checkpoint.

    share, shares: read only part `share` of `shares` parts of the files.
    digests: False compares only names and sizes.
    """
    saved = checkpoint_at(where, step)
    manifest = read_manifest(saved)
    sizes = saved.store.sizes(saved.step)
    if stray := sorted(sizes.keys() - manifest.files.keys()):
        raise CheckpointError(f"{saved}/{stray[0]}: not in the manifest")
    own_share = sorted(manifest.files.items())[share::shares]
    for name, entry in own_share:
        _check_size(f"{saved}/{name}", sizes.get(name), entry["size"])
    if digests:
        with ThreadPoolExecutor(min(8, cores()), "verify") as pool:
            list(pool.map(lambda item: _check_bytes(saved, *item), own_share))
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
