"""Exports a committed checkpoint's weights as a torch_dist checkpoint that Megatron-core loads in any of its layouts.

It is written as Megatron-core does by default: the layers of a kind stacked in one tensor, one chunk a layer, so that only a
layer and the embedding are in memory. The folder of the iteration appears whole or not at all.
"""

from __future__ import annotations

import io
import json
import struct
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_saver import save

from mikoshi.data.io.atomic import new_folder_committed, write_file
from mikoshi.trainer.engines.megatron.names import names_of, rows_of
from mikoshi.trainer.errors import CheckpointError
from mikoshi.trainer.interop.committed import Committed
from mikoshi.trainer.interop.megatron.torch_dist import CONFIG, LAYERS, TRACKER, VOCABULARY, check_supported, shapes_of
from mikoshi.trainer.interop.model_file import write_model
from mikoshi.trainer.model.config import ModelConfig

COMMON = "common.pt"


def export_megatron(source: Committed, target: Path, vocabulary: int | None = None) -> Path:
    """Write the weights, in fp32, into the folder `target` as the iteration of their step; returns the new folder.

    Raises CheckpointError for a model that Megatron's dense GPT cannot represent, an iteration that exists already, or a
    vocabulary that is too small.

    vocabulary: rows of embedding and head, padded with zeros; Megatron-LM needs a multiple of --make-vocab-size-divisible-by
      times its tensor-parallel ranks.
    """
    model, step = source.config.model, source.manifest.step
    check_supported(model)
    rows = vocabulary or model.vocab
    if rows < model.vocab:
        raise CheckpointError(f"--vocab {rows}: the model has {model.vocab} rows: give as many or more")
    folder = target / f"iter_{step:07d}"
    if folder.exists():
        raise CheckpointError(f"{folder}: exists already: give another folder, or remove it")
    with new_folder_committed(folder) as built:
        _write_tensors(built, stacks_of(model, rows, source.read), extra_states(model))
        (built / CONFIG).write_text(json.dumps(_FORMAT))
        write_model(built, model)
        (built / COMMON).write_bytes(saved_plain({"checkpoint_version": 3.0, "iteration": step}))
    write_file(target / TRACKER, str(step).encode())
    return folder


_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


@dataclass(frozen=True)
class Stack:
    """A tensor on disk: one parameter, or that of all layers.

    shape: of the whole tensor.
    read: returns the part of a layer by its number, or the whole if there are no layers.
    """

    name: str
    shape: tuple[int, ...]
    stacked: bool
    read: Callable[[int], Tensor]

    def items(self) -> list[WriteItem]:
        """Returns DCP's write items: one chunk a layer, or one."""
        size = (1, *self.shape[1:]) if self.stacked else self.shape
        properties, whole = TensorProperties(dtype=torch.float32), torch.Size(self.shape)
        made = []
        for layer in range(self.shape[0] if self.stacked else 1):
            offset = torch.Size((layer, *(0 for _ in self.shape[1:])) if self.stacked else (0 for _ in self.shape))
            data = TensorWriteData(ChunkStorageMetadata(offset, torch.Size(size)), properties, whole)
            made.append(WriteItem(MetadataIndex(self.name, offset, layer), WriteItemType.SHARD, tensor_data=data))
        return made


def stacks_of(model: ModelConfig, rows: int, read: Callable[[str], Tensor]) -> dict[str, Stack]:
    """Returns the tensors to write by name. They are read when they are written.

    rows: rows of embedding and head.
    """
    shapes, found = shapes_of(model), dict[str, Stack]()
    for name in names_of(model):
        runs = rows_of(name, model)
        shape = (sum(run.count for run in runs), *shapes[runs[0].name][1:])
        if not name.startswith(LAYERS):
            padded = rows if name in VOCABULARY else shape[0]
            found[name] = Stack(name, (padded, *shape[1:]), False, _read_unstacked(name, model, padded, read))
        elif name.startswith(LAYERS + "0."):
            kind = name.removeprefix(LAYERS + "0.")
            found[LAYERS + kind] = Stack(LAYERS + kind, (model.layers, *shape), True, _read_layer(kind, model, read))
    return found


def _read_layer(kind: str, model: ModelConfig, read: Callable[[str], Tensor]) -> Callable[[int], Tensor]:
    return lambda layer: _joined(f"{LAYERS}{layer}.{kind}", model, read)[None]


def _read_unstacked(name: str, model: ModelConfig, rows: int, read: Callable[[str], Tensor]) -> Callable[[int], Tensor]:
    def padded(_: int) -> Tensor:
        tensor = _joined(name, model, read)
        more = rows - len(tensor)
        return torch.cat((tensor, tensor.new_zeros(more, *tensor.shape[1:]))) if more else tensor

    return padded


def _joined(name: str, model: ModelConfig, read: Callable[[str], Tensor]) -> Tensor:
    """Returns Megatron's parameter `name`, made of rows of ours."""
    runs = rows_of(name, model)
    tensors = {run.name: read(run.name) for run in runs}
    return torch.cat([tensors[run.name][run.first : run.first + run.count] for run in runs]).float()


_STATEFUL_MODULES = (
    "input_layernorm", "self_attention.linear_qkv", "self_attention.q_layernorm", "self_attention.k_layernorm",
    "self_attention.core_attention", "self_attention.linear_proj", "pre_mlp_layernorm", "mlp.linear_fc1", "mlp.linear_fc2",
)  # fmt: skip


def extra_states(model: ModelConfig) -> list[str]:
    """Returns the names of empty objects that Megatron's modules look for beside their parameters.

    They would hold FP8 scales. Megatron reads only those that its modules ask for.
    """
    inside = [
        f"{LAYERS}{module}._extra_state/shard_{n}_{model.layers}" for module in _STATEFUL_MODULES for n in range(model.layers)
    ]
    return [*inside, "decoder.final_layernorm._extra_state/shard_0_1"]


class _Planner(DefaultSavePlanner):
    """DCP's planner for tensors that are not there until they are written."""

    def __init__(self, stacks: dict[str, Stack], empty: list[str]) -> None:
        super().__init__(flatten_state_dict=False)
        self.stacks, self.empty = stacks, empty

    def create_local_plan(self) -> SavePlan:
        objects = [WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO) for name in self.empty]
        self.plan = SavePlan([*objects, *(item for stack in self.stacks.values() for item in stack.items())])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        if index.fqn not in self.stacks:
            return [None]
        stack = self.stacks[index.fqn]
        return stack.read(index.offset[0] if stack.stacked and index.offset else 0)


def _write_tensors(folder: Path, stacks: dict[str, Stack], empty: list[str]) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        save({}, storage_writer=FileSystemWriter(folder, thread_count=1), planner=_Planner(stacks, empty), no_dist=True)


def saved_plain(values: dict[str, int | float]) -> bytes:
    """Returns what torch.save writes for a dict of numbers: a ZIP file with a small pickle."""
    body = b""
    for key, value in values.items():
        text = key.encode()
        body += b"X" + struct.pack("<I", len(text)) + text
        if isinstance(value, float):
            body += b"G" + struct.pack(">d", value)
        else:
            encoded = value.to_bytes(9, "little", signed=True)
            body += b"\x8a" + bytes((len(encoded),)) + encoded
    entries = {"data.pkl": b"\x80\x02}(" + body + b"u.", "byteorder": b"little", "version": b"3\n"}
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for name, content in entries.items():
            archive.writestr(f"common/{name}", content)
    return out.getvalue()
