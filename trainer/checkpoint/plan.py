"""Plans which rank writes which piece of which tensor, and which pieces a rank reads, for any layout.

torch.distributed.checkpoint (DCP) knows where each rank's shards lie in the whole tensors. Of replicas one rank writes, so
that the bytes are spread evenly. Files, reading and writing are ours (checkpoint.pieces).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_loader import load as load_planned
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from mikoshi.data.io.cores import cores
from mikoshi.trainer.checkpoint.agree import cause, gather_json, rank_and_world, scatter_json
from mikoshi.trainer.checkpoint.manifest import DTYPES, Manifest, PieceEntry, TensorEntry
from mikoshi.trainer.checkpoint.pieces import Contents, PieceFile, dtype_name, dtype_named, lay_out, piece_file
from mikoshi.trainer.errors import CheckpointError

_BoxRecord = tuple[str, Sequence[int], Sequence[int], str]
_ItemRecord = tuple[str, str, tuple[list[int], list[int], str, list[int]] | None]

FILE_BYTES = 256 << 20
"""About how many bytes a file gets before the next begins. Files are written, digested and verified in parallel."""


@dataclass(frozen=True)
class Box:
    """A piece that a rank writes: which tensor, and where in it."""

    name: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def key(self) -> str:
        """Its name in its file."""
        return _key(self.name, self.offset)

    @property
    def bytes(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class PlannedFile:
    """A file that this rank writes, and the boxes in it, in their order."""

    contents: Contents
    boxes: tuple[Box, ...]


@dataclass(frozen=True)
class RankFiles:
    """What this rank writes in every save of a run.

    tensors: entries of all ranks for the manifest; empty except on rank 0.
    """

    files: tuple[PlannedFile, ...]
    tensors: dict[str, TensorEntry]


def plan_save(state: dict[str, Tensor]) -> RankFiles:
    """Assign the pieces of the state to the ranks. Collective.

    Raises CheckpointError on all ranks if something cannot be saved.
    """
    rank, _ = rank_and_world()
    planner = DefaultSavePlanner(flatten_state_dict=False)
    plans = gather_json(_local_plan(planner, state, rank))
    tensors: dict[str, TensorEntry] = {}

    def share_out() -> list[list[_BoxRecord]]:
        assert plans is not None
        try:
            boxes, metadata = _global_plan(planner, [_decoded_plan(record) for record in plans])
        except (CheckpointError, ValueError, AssertionError) as error:
            raise CheckpointError(f"the state cannot be saved: {error}") from error
        tensors.update(_tensor_entries(boxes, metadata))
        return [[(box.name, box.offset, box.shape, dtype_name(box.dtype)) for box in group] for group in boxes]

    records: list[_BoxRecord] = scatter_json(share_out)
    boxes = [Box(name, tuple(offset), tuple(shape), dtype_named(dtype)) for name, offset, shape, dtype in records]
    return RankFiles(_files(rank, boxes), tensors)


def _local_plan(planner: DefaultSavePlanner, state: dict[str, Tensor], rank: int) -> dict[str, Any]:
    """Returns DCP's plan for what this rank holds, as plain lists.

    An item is fqn and kind, and for a tensor offsets, sizes, dtype and the size of the whole. An error is returned and not
    raised, as the other ranks already wait for the plan.
    """
    try:
        planner.set_up_planner(state, is_coordinator=rank == 0)
        items: list[_ItemRecord] = []
        for item in planner.create_local_plan().items:
            data = item.tensor_data
            box = None
            if data is not None:
                chunk, dtype = data.chunk, dtype_name(data.properties.dtype)
                box = (list(chunk.offsets), list(chunk.sizes), dtype, list(data.size))
            items.append((item.index.fqn, item.type.name, box))
        return {"items": items}
    except Exception as error:
        return {"error": f"rank {rank}: {cause(error)}"}


def _decoded_plan(record: dict[str, Any]) -> SavePlan:
    """Returns the plan that `_local_plan` has described, or raises its error."""
    if "error" in record:
        raise CheckpointError(record["error"])
    items = []
    for fqn, kind, box in record["items"]:
        if box is None:
            items.append(WriteItem(MetadataIndex(fqn), WriteItemType[kind]))
            continue
        offsets, sizes, dtype, whole = box
        chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        data = TensorWriteData(chunk, TensorProperties(dtype_named(dtype)), torch.Size(whole))
        items.append(WriteItem(MetadataIndex(fqn, chunk.offsets), WriteItemType[kind], tensor_data=data))
    return SavePlan(items)


def _global_plan(planner: DefaultSavePlanner, plans: list[SavePlan]) -> tuple[list[list[Box]], Metadata]:
    """Returns each rank's boxes, every element once. Empty boxes are left out."""
    finished, metadata = planner.create_global_plan(plans)
    boxes: list[list[Box]] = []
    for plan in finished:
        boxes.append([])
        for item in plan.items:
            data = item.tensor_data
            if data is None or data.chunk is None:
                raise CheckpointError(f"{item.index.fqn}: only tensors are saved")
            dtype = data.properties.dtype
            if dtype_name(dtype) not in DTYPES:
                raise CheckpointError(f"{item.index.fqn}: {dtype_name(dtype)} is not one of {', '.join(DTYPES)}")
            if math.prod(data.chunk.sizes):
                boxes[-1].append(Box(item.index.fqn, tuple(data.chunk.offsets), tuple(data.chunk.sizes), dtype))
    return boxes, metadata


def _files(rank: int, boxes: Sequence[Box]) -> tuple[PlannedFile, ...]:
    """Returns a rank's boxes grouped into files; the same boxes always give the same files."""
    groups: list[list[Box]] = []
    remaining = 0
    for box in boxes:
        if not groups or box.bytes > remaining:
            groups.append([])
            remaining = FILE_BYTES
        groups[-1].append(box)
        remaining -= box.bytes
    files = []
    for number, group in enumerate(groups):
        by_key = {box.key: box for box in group}
        file = f"rank-{rank:05d}{f'-{number}' if number else ''}.safetensors"
        contents = lay_out(file, [(box.key, box.dtype, box.shape) for box in group])
        files.append(PlannedFile(contents, tuple(by_key[piece.key] for piece in contents.pieces)))
    return tuple(files)


def _tensor_entries(boxes: list[list[Box]], metadata: Metadata) -> dict[str, TensorEntry]:
    entries: dict[str, TensorEntry] = {}
    for name, stored in metadata.state_dict_metadata.items():
        assert isinstance(stored, TensorStorageMetadata)
        entries[name] = {"dtype": dtype_name(stored.properties.dtype), "shape": list(stored.size), "pieces": []}
    for rank, group in enumerate(boxes):
        for file in _files(rank, group):
            for box in file.boxes:
                entry: PieceEntry = {"offset": list(box.offset), "shape": list(box.shape), "file": file.contents.name}
                entries[box.name]["pieces"].append(entry)
    return entries


def _key(name: str, offset: Sequence[int]) -> str:
    """Returns the name of a piece in its file: the tensor's name and where in the tensor the piece begins."""
    return f"{name}@{','.join(map(str, offset))}"


def fill(state: dict[str, Tensor], manifest: Manifest, path_of: Callable[[str], Path]) -> None:
    """Fill the tensors of `state` from the pieces that overlap them. Collective if a process group exists.

    The ranks exchange DCP's own load plans, as pickles from process to process. Raises DCP's CheckpointException with every
    rank's error.

    path_of: returns the local path of a file of the checkpoint.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load_planned(state, storage_reader=_Reader(manifest, path_of), planner=DefaultLoadPlanner())


@dataclass
class _Reader(StorageReader):
    """DCP's storage reader: the index comes from the manifest, the bytes straight from the files."""

    manifest: Manifest
    path_of: Callable[[str], Path]
    _pieces: dict[tuple[str, tuple[int, ...]], PieceEntry] = field(default_factory=dict)

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        tensors = {}
        for name, entry in self.manifest.tensors.items():
            chunks = [ChunkStorageMetadata(torch.Size(p["offset"]), torch.Size(p["shape"])) for p in entry["pieces"]]
            properties = TensorProperties(dtype=dtype_named(entry["dtype"]))
            tensors[name] = TensorStorageMetadata(properties, torch.Size(entry["shape"]), chunks)
            self._pieces.update({(name, tuple(p["offset"])): p for p in entry["pieces"]})
        return Metadata(tensors)  # type: ignore[arg-type]

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        reads: list[Callable[[], None]] = []
        with ExitStack() as open_files, ThreadPoolExecutor(min(4, cores()), "load") as pool:
            files: dict[str, PieceFile] = {}
            for item in plan.items:
                name = self._piece(item.storage_index)["file"]
                if name not in files:
                    files[name] = open_files.enter_context(piece_file(self.path_of(name)))
                self._check(files[name], item.storage_index)
                target = planner.resolve_tensor(item).detach()
                key = _key(item.storage_index.fqn, item.storage_index.offset or ())
                reads.append(_bound_read(files[name], key, tuple(item.storage_offsets), tuple(item.lengths), target))
            list(pool.map(lambda read: read(), reads))
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _piece(self, index: MetadataIndex) -> PieceEntry:
        return self._pieces[index.fqn, tuple(index.offset or ())]

    def _check(self, file: PieceFile, index: MetadataIndex) -> None:
        """Raises CheckpointError if the file's own header and the manifest disagree about a piece."""
        expected, key = self._piece(index), _key(index.fqn, index.offset or ())
        found, dtype = file.pieces.get(key), self.manifest.tensors[index.fqn]["dtype"]
        if found is None or list(found.shape) != expected["shape"] or dtype_name(found.dtype) != dtype:
            problem = "is missing" if found is None else f"is {dtype_name(found.dtype)} of {list(found.shape)}"
            raise CheckpointError(f"{file.path}: {key} {problem}, the manifest says {dtype} of {expected['shape']}")

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


def _bound_read(
    file: PieceFile, key: str, offset: tuple[int, ...], shape: tuple[int, ...], target: Tensor
) -> Callable[[], None]:
    return lambda: file.fill(key, offset, shape, target)
