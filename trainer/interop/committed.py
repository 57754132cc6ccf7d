"""The weights of a committed checkpoint, read a tensor at a time. Every byte is verified first; no process group is needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mikoshi.trainer.checkpoint.manifest import Manifest
from mikoshi.trainer.checkpoint.of_run import checkpoints_of
from mikoshi.trainer.checkpoint.pieces import dtype_named
from mikoshi.trainer.checkpoint.restore import load, newest_valid
from mikoshi.trainer.checkpoint.storage.base import step_of
from mikoshi.trainer.checkpoint.verify import Saved, checkpoint_at, verify
from mikoshi.trainer.config.run import RunConfig, load_config, parse_config
from mikoshi.trainer.errors import CheckpointError
from mikoshi.trainer.record.run_folder import open_run


@dataclass(frozen=True)
class Committed:
    """A checkpoint that has been verified byte by byte.

    read: returns a parameter by its canonical name, whole, on the CPU.
    rejected: why newer checkpoints of the run were not taken.
    """

    saved: Saved
    manifest: Manifest
    config: RunConfig
    read: Callable[[str], Tensor]
    rejected: tuple[str, ...] = ()


def open_committed(place: Path) -> Committed:
    """Returns the checkpoint at a step's folder, or the newest valid one of a run.

    Raises CheckpointError or RunError.
    """
    rejected: list[str] = []
    if step_of(place.name) is not None:
        saved = checkpoint_at(place)
        manifest = verify(saved)
    else:
        folder = open_run(place)
        found = newest_valid(checkpoints_of(folder, load_config(folder.path), reader=True), set_aside=False)
        if found is None:
            raise CheckpointError(f"{place}: there is no checkpoint yet: train first, or wait for one")
        saved, manifest, rejected = found

    def read(name: str) -> Tensor:
        entry = manifest.tensors.get(f"model.{name}")
        if entry is None:
            raise CheckpointError(f"{saved}: it has no model.{name}, which its config's model needs")
        tensor = torch.empty(entry["shape"], dtype=dtype_named(entry["dtype"]))
        load(saved, manifest, {f"model.{name}": tensor})
        return tensor

    config = parse_config(manifest.record.get("config", ""), str(saved))
    return Committed(saved, manifest, config, read, tuple(rejected))
