"""A committed checkpoint's weights as a torch_dist checkpoint that Megatron-core loads, in any of its layouts.

Written as Megatron-core itself does by default: the layers of a kind stacked in one tensor, a chunk a layer, so that a layer
and the embedding are all that is in memory. The folder of the iteration appears whole or not at all.
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

from mikoshi.data.io.atomic import built_alone, write_file
from mikoshi.trainer.engines.megatron.names import names_of, rows_of
from mikoshi.trainer.errors import CheckpointError
from mikoshi.trainer.interop.committed import Committed
from mikoshi.trainer.interop.megatron.torch_dist import CONFIG, LAYERS, TRACKER, VOCABULARY, check_alike, shapes_of
from mikoshi.trainer.interop.model_file import write_model
from mikoshi.trainer.model.config import ModelConfig

COMMON = "common.pt"


def export_megatron(source: Committed, target: Path, vocabulary: int | None = None) -> Path:
    """Write the weights, in fp32, into the folder `target`, as of the iteration of their step; returns the new folder there.

    vocabulary: rows that embedding and head are to have, those that are added being zeros; Megatron-LM wants a multiple of
    --make-vocab-size-divisible-by times its tensor-parallel ranks. Raises CheckpointError for a model that Megatron's dense
    GPT cannot be, an iteration that is there already, or a vocabulary that is too small.
    """
    model, step = source.config.model, source.manifest.step
    check_alike(model)
    rows = vocabulary or model.vocab
    if rows < model.vocab:
        raise CheckpointError(f"--vocab {rows}: the model has {model.vocab} rows: give as many or more")
    folder = target / f"iter_{step:07d}"
    if folder.exists():
        raise CheckpointError(f"{folder}: exists already: give another folder, or remove it")
    with built_alone(folder) as built:
        _write_tensors(built, stored(model, rows, source.read), extra_states(model))
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
    """A tensor on disk: the parameter of that name, or that of all layers. shape: of all; read: of the layer of a number, or
    of all where there are none."""

    name: str
    shape: tuple[int, ...]
    stacked: bool
    read: Callable[[int], Tensor]

    def items(self) -> list[WriteItem]:
        """A chunk a layer, or one."""
        size = (1, *self.shape[1:]) if self.stacked else self.shape
        properties, whole = TensorProperties(dtype=torch.float32), torch.Size(self.shape)
        made = []
        for layer in range(self.shape[0] if self.stacked else 1):
            offset = torch.Size((layer, *(0 for _ in self.shape[1:])) if self.stacked else (0 for _ in self.shape))
            data = TensorWriteData(ChunkStorageMetadata(offset, torch.Size(size)), properties, whole)
            made.append(WriteItem(MetadataIndex(self.name, offset, layer), WriteItemType.SHARD, tensor_data=data))
        return made


def stored(model: ModelConfig, rows: int, read: Callable[[str], Tensor]) -> dict[str, Stack]:
    """What is to be on disk, by name, read when it is asked for."""
    shapes, found = shapes_of(model), dict[str, Stack]()
    for name in names_of(model):
        runs = rows_of(name, model)
        shape = (sum(run.count for run in runs), *shapes[runs[0].name][1:])
        if not name.startswith(LAYERS):
            padded = rows if name in VOCABULARY else shape[0]
            found[name] = Stack(name, (padded, *shape[1:]), False, _whole(name, model, padded, read))
        elif name.startswith(LAYERS + "0."):
            kind = name.removeprefix(LAYERS + "0.")
            found[LAYERS + kind] = Stack(LAYERS + kind, (model.layers, *shape), True, _layer(kind, model, read))
    return found


def _layer(kind: str, model: ModelConfig, read: Callable[[str], Tensor]) -> Callable[[int], Tensor]:
    return lambda layer: _joined(f"{LAYERS}{layer}.{kind}", model, read)[None]


def _whole(name: str, model: ModelConfig, rows: int, read: Callable[[str], Tensor]) -> Callable[[int], Tensor]:
    def padded(_: int) -> Tensor:
        tensor = _joined(name, model, read)
        more = rows - len(tensor)
        return torch.cat((tensor, tensor.new_zeros(more, *tensor.shape[1:]))) if more else tensor

    return padded


def _joined(name: str, model: ModelConfig, read: Callable[[str], Tensor]) -> Tensor:
    """Megatron's parameter `name`, from the rows of ours that it is."""
    runs = rows_of(name, model)
    ours = {run.name: read(run.name) for run in runs}
    return torch.cat([ours[run.name][run.first : run.first + run.count] for run in runs]).float()


_STATED = (
    "input_layernorm", "self_attention.linear_qkv", "self_attention.q_layernorm", "self_attention.k_layernorm",
    "self_attention.core_attention", "self_attention.linear_proj", "pre_mlp_layernorm", "mlp.linear_fc1", "mlp.linear_fc2",
)  # fmt: skip


def extra_states(model: ModelConfig) -> list[str]:
    """Objects that Megatron's modules look for beside their parameters, with or without Transformer Engine: of FP8 scales,
    none here. It reads what its modules ask for and no more."""
    inside = [f"{LAYERS}{module}._extra_state/shard_{n}_{model.layers}" for module in _STATED for n in range(model.layers)]
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
    """What torch.save makes of a dict of numbers: a ZIP file with a pickle, which for these is a dozen instructions."""
    body = b""
    for key, value in values.items():
        text = key.encode()
        body += b"X" + struct.pack("<I", len(text)) + text
        if isinstance(value, float):
            body += b"G" + struct.pack(">d", value)
        else:
            whole = value.to_bytes(9, "little", signed=True)
            body += b"\x8a" + bytes((len(whole),)) + whole
    entries = {"data.pkl": b"\x80\x02}(" + body + b"u.", "byteorder": b"little", "version": b"3\n"}
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for name, content in entries.items():
            archive.writestr(f"common/{name}", content)
    return out.getvalue()
