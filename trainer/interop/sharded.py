"""Weights as sharded safetensors: out of a checkpoint that has been verified, and in from what accelerate and others write.

    model-00001-of-00003.safetensors ...   or model.safetensors where there is one file
    model.safetensors.index.json           which file each tensor is in
    config.json                            the model's shape, as [model] of a run's config has it

Neither way holds more than one tensor in memory, and nothing that is read is a pickle.
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

from mikoshi.data.io.atomic import built_alone, new_file, write_file
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
    """What was written: files of weights, their bytes, those of the largest, and the step that they are of."""

    files: int
    bytes: int
    largest: int
    step: int


def parse_size(text: str) -> int:
    """Bytes of "5GB", "500MiB" or "1000000". Raises ConfigError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = None if found is None else _UNITS.get(found[2].upper())
    if found is None or unit is None or float(found[1]) * unit < 1:
        raise ConfigError(f"--max-shard-size {text}: give a number of bytes above 0, such as 500MB or 5GB")
    return int(float(found[1]) * unit)


def export(committed: Committed, folder: Path, largest: int) -> Exported:
    """Write a checkpoint's weights in files of at most `largest` bytes; a tensor that is larger has one of its own. Whole or
    not there. Raises CheckpointError or ConfigError."""
    if folder.exists() or folder.is_symlink():
        raise ConfigError(f"{folder}: exists already: remove it, or give another folder")
    weights = {name.removeprefix("model."): e for name, e in committed.manifest.tensors.items() if name.startswith("model.")}
    shards = shared_out({name: _size(entry) for name, entry in weights.items()}, largest)
    with built_alone(folder) as built:
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


def shared_out(sizes: dict[str, int], largest: int) -> list[list[str]]:
    """Names in their order, in as many groups as it takes for none to be larger than `largest` unless it is of one."""
    groups: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not groups or size > room:
            groups.append([])
            room = largest
        groups[-1].append(name)
        room -= size
    return groups


def _size(entry: TensorEntry) -> int:
    return math.prod(entry["shape"]) * dtype_named(entry["dtype"]).itemsize


@contextmanager
def open_weights(folder: Path, model: ModelConfig) -> Iterator[Callable[[str], Tensor]]:
    """Gives the function that reads a tensor by its name, KeyError for one that is not there. Raises CheckpointError for a
    folder that has no safetensors, files that say what cannot be, names that the model has no place for, and a config.json
    of ours that is of another model."""
    check_model(folder, model)
    with ExitStack() as held:
        pieces: dict[str, PieceFile] = {}
        for name, names in _files(folder).items():
            file = held.enter_context(piece_file(folder / name))
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
    """The files of a folder and the names that are looked for in each; None: all that are in it."""
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
    """Nothing is dropped in silence. What is missing, begin_run says."""
    from mikoshi.trainer.model.gpt import GPT

    with torch.device("meta"):
        wanted = {name for name, _ in GPT(model).named_parameters()}
    if unknown := sorted(found.keys() - wanted):
        more = f" and {len(unknown) - 1} more" * (len(unknown) > 1)
        raise CheckpointError(f"{folder}: the config's model has no {unknown[0]}{more}: import into the config it was made by")
