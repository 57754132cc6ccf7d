"""Weights as sharded safetensors: exported from a verified checkpoint, and imported from what accelerate and others write.

    model-00001-of-00003.safetensors ...   or model.safetensors if there is one file
    model.safetensors.index.json           which file each tensor is in
    config.json                            the model's shape, as [model] of a run's config has it

Both ways hold one tensor in memory at a time, and no pickle is read.
"""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mikoshi.data.io.atomic import new_file, new_folder_committed, write_file
from mikoshi.trainer.checkpoint.manifest import TensorEntry
from mikoshi.trainer.checkpoint.pieces import PieceFile, bytes_of, dtype_named, lay_out, piece_file, write
from mikoshi.trainer.checkpoint.storage.base import step_of
from mikoshi.trainer.errors import CheckpointError, ConfigError
from mikoshi.trainer.interop.committed import Committed
from mikoshi.trainer.interop.dcp import METADATA
from mikoshi.trainer.interop.megatron.torch_dist import TRACKER
from mikoshi.trainer.interop.model_file import check_model, read_json, write_model
from mikoshi.trainer.model.config import ModelConfig

ONE, INDEX = "model.safetensors", "model.safetensors.index.json"
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_PLAIN = re.compile(r"[A-Za-z0-9][\w.-]{0,200}\.safetensors")


@dataclass(frozen=True)
class Exported:
    """What was written.

    files: number of files of weights.
    bytes: bytes of all tensors.
    largest: bytes of the tensors in the largest file.
    step: the step of the weights.
    """

    files: int
    bytes: int
    largest: int
    step: int


def parse_size(text: str) -> int:
    """Returns the bytes of "5GB", "500MiB" or "1000000". Raises ConfigError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = None if found is None else _UNITS.get(found[2].upper())
    if found is None or unit is None or float(found[1]) * unit < 1:
        raise ConfigError(f"--max-shard-size {text}: give a number of bytes above 0, such as 500MB or 5GB")
    return int(float(found[1]) * unit)


def export(committed: Committed, folder: Path, largest: int) -> Exported:
    """Write a checkpoint's weights into a new folder, which appears whole or not at all.

    Raises CheckpointError or ConfigError.

    largest: bytes of a file at most; a larger tensor has a file of its own.
    """
    if folder.exists() or folder.is_symlink():
        raise ConfigError(f"{folder}: exists already: remove it, or give another folder")
    weights = {name.removeprefix("model."): e for name, e in committed.manifest.tensors.items() if name.startswith("model.")}
    shards = split_into_shards({name: _size(entry) for name, entry in weights.items()}, largest)
    with new_folder_committed(folder) as built:
        where: dict[str, str] = {}
        sizes: list[int] = []
        for number, names in enumerate(shards, 1):
            file = ONE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            wanted = ((name, dtype_named(weights[name]["dtype"]), tuple(weights[name]["shape"])) for name in names)
            contents = lay_out(file, wanted)
            with new_file(built / file) as out:
                parts = (bytes_of(committed.read(piece.key)) for piece in contents.pieces)
                write(out, contents.header, parts, threading.Event())
            where |= dict.fromkeys(names, file)
            sizes.append(contents.bytes)
        if len(shards) > 1:
            index = {"metadata": {"total_size": sum(sizes)}, "weight_map": where}
            write_file(built / INDEX, json.dumps(index, indent=2).encode())
        write_model(built, committed.config.model)
    return Exported(len(shards), sum(sizes), max(sizes, default=0), committed.manifest.step)


def split_into_shards(sizes: dict[str, int], largest: int) -> list[list[str]]:
    """Returns names in their order, in groups of at most `largest` bytes; a larger tensor is a group of its own.

    sizes: bytes by name.
    """
    groups: list[list[str]] = []
    remaining = 0
    for name, size in sizes.items():
        if not groups or size > remaining:
            groups.append([])
            remaining = largest
        groups[-1].append(name)
        remaining -= size
    return groups


def _size(entry: TensorEntry) -> int:
    return math.prod(entry["shape"]) * dtype_named(entry["dtype"]).itemsize


@contextmanager
def open_weights(folder: Path, model: ModelConfig) -> Iterator[Callable[[str], Tensor]]:
    """Yields the function that reads a tensor by its name; it raises KeyError for a name that does not exist.

    Raises CheckpointError for a folder without safetensors, files that cannot be right, names that the model does not have,
    and a config.json of ours for another model.
    """
    check_model(folder, model)
    with ExitStack() as open_files:
        pieces: dict[str, PieceFile] = {}
        for name, names in _files(folder).items():
            file = open_files.enter_context(piece_file(folder / name))
            if names is not None and (missing := sorted(names - file.pieces.keys())):
                raise CheckpointError(f"{folder / name}: it has no {missing[0]}, which {INDEX} says is there: copy it again")
            for key in sorted(file.pieces.keys() if names is None else names):
                pieces[key] = file
        _check_names(folder, pieces, model)

        def read(name: str) -> Tensor:
            file = pieces[name]
            piece = file.pieces[name]
            tensor = torch.empty(piece.shape, dtype=piece.dtype)
            file.fill(name, [0] * len(piece.shape), piece.shape, tensor)
            return tensor

        yield read


def _files(folder: Path) -> dict[str, set[str] | None]:
    """Returns the files of a folder and the names to read from each; None means all that are in it."""
    if (folder / INDEX).exists():
        table = read_json(folder / INDEX).get("weight_map")
        if not isinstance(table, dict) or not table:
            raise CheckpointError(f"{folder / INDEX}: weight_map: not a table of names")
        found: dict[str, set[str] | None] = {}
        for name, file in table.items():
            if not isinstance(file, str) or not _PLAIN.fullmatch(file):
                raise CheckpointError(
                    f"{folder / INDEX}: weight_map.{name[:80]!r}: {str(file)[:80]!r} is no name of a file here"
                )
            names = found.setdefault(file, set())
            assert names is not None
            names.add(name)
        return found
    if (folder / ONE).exists():
        return {ONE: None}
    if any(folder.glob("*.bin")):
        raise CheckpointError(
            f"{folder}: its weights are a pickle, which is never loaded: save them with safe_serialization=True"
        )
    if (folder / "checkpoints").is_dir() or step_of(folder.name) is not None:
        raise CheckpointError(f"{folder}: a run's own checkpoints: `mikoshi checkpoint export` writes what can be imported")
    if (folder / TRACKER).exists() or (folder / METADATA).exists():
        raise CheckpointError(f"{folder}: Megatron-core's checkpoints: `mikoshi checkpoint import-megatron` reads them")
    raise CheckpointError(f"{folder}: neither {INDEX} nor {ONE} is there: give the folder that save_model or export wrote")


def _check_names(folder: Path, found: dict[str, PieceFile], model: ModelConfig) -> None:
    """Raises CheckpointError for names that the model does not have. begin_run reports missing ones."""
    from mikoshi.trainer.model.gpt import GPT

    with torch.device("meta"):
        wanted = {name for name, _ in GPT(model).named_parameters()}
    if unknown := sorted(found.keys() - wanted):
        more = f" and {len(unknown) - 1} more" * (len(unknown) > 1)
        raise CheckpointError(f"{folder}: the config's model has no {unknown[0]}{more}: import into the config it was made by")
