"""Who writes which piece of which tensor, and which pieces make up what a rank asks for: DCP's planning, for any layout.

torch.distributed.checkpoint (DCP) knows where each rank's shards lie in the whole tensors; of replicas one rank writes,
so that the bytes are shared out evenly. Files and how they are read and written are ours (checkpoint.pieces).
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
from mikoshi.trainer.checkpoint.agree import cause, from_first_rank, place, to_first_rank
from mikoshi.trainer.checkpoint.manifest import DTYPES, Manifest, PieceEntry, TensorEntry
from mikoshi.trainer.checkpoint.pieces import Contents, PieceFile, dtype_name, dtype_named, lay_out, piece_file
from mikoshi.trainer.errors import CheckpointError

_BoxTold = tuple[str, Sequence[int], Sequence[int], str]
_ItemTold = tuple[str, str, tuple[list[int], list[int], str, list[int]] | None]

FILE_BYTES = 256 << 20
"""About how much goes into a file before the next is begun: files are what is written, digested and verified at once."""


@dataclass(frozen=True)
class Box:
    """A piece that a rank writes: of which tensor, and where in it."""

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
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Written:
    """A file that this rank writes, and which boxes are the pieces in it, in their order."""

    contents: Contents
    boxes: tuple[Box, ...]


@dataclass(frozen=True)
class Share:
    """What this rank writes of every save of a run. `tensors`: of all ranks, for the manifest; empty but on rank 0."""

    files: tuple[Written, ...]
    tensors: dict[str, TensorEntry]


def plan_save(state: dict[str, Tensor]) -> Share:
    """Share out the state among the ranks. Collective. Raises CheckpointError on all ranks for what cannot be saved."""
    rank, _ = place()
    planner = DefaultSavePlanner(flatten_state_dict=False)
    plans = to_first_rank(_described(planner, state, rank))
    tensors: dict[str, TensorEntry] = {}

    def share_out() -> list[list[_BoxTold]]:
        assert plans is not None
        try:
            boxes, metadata = _shared_out(planner, [_plan(told) for told in plans])
        except (CheckpointError, ValueError, AssertionError) as error:
            raise CheckpointError(f"the state cannot be saved: {error}") from error
        tensors.update(_entries(boxes, metadata))
        return [[(box.name, box.offset, box.shape, dtype_name(box.dtype)) for box in group] for group in boxes]

    mine: list[_BoxTold] = from_first_rank(share_out)
    boxes = [Box(name, tuple(offset), tuple(shape), dtype_named(dtype)) for name, offset, shape, dtype in mine]
    return Share(_files(rank, boxes), tensors)


def _described(planner: DefaultSavePlanner, state: dict[str, Tensor], rank: int) -> dict[str, Any]:
    """DCP's plan for what this rank holds, as plain lists: fqn, kind, then of a tensor offsets, sizes, dtype and the whole's
    size. An error is told instead of raised, as the other ranks already wait for the plan."""
    try:
        planner.set_up_planner(state, is_coordinator=rank == 0)
        items: list[_ItemTold] = []
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


def _plan(told: dict[str, Any]) -> SavePlan:
    """What `_described` has described."""
    if "error" in told:
        raise CheckpointError(told["error"])
    items = []
    for fqn, kind, box in told["items"]:
        if box is None:
            items.append(WriteItem(MetadataIndex(fqn), WriteItemType[kind]))
            continue
        offsets, sizes, dtype, whole = box
        chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        data = TensorWriteData(chunk, TensorProperties(dtype_named(dtype)), torch.Size(whole))
        items.append(WriteItem(MetadataIndex(fqn, chunk.offsets), WriteItemType[kind], tensor_data=data))
    return SavePlan(items)


def _shared_out(planner: DefaultSavePlanner, plans: list[SavePlan]) -> tuple[list[list[Box]], Metadata]:
    """Each rank's boxes, every element once. Empty ones are left out."""
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


def _files(rank: int, boxes: Sequence[Box]) -> tuple[Written, ...]:
    """A rank's boxes, shared out to files that the same boxes always lead to."""
    groups: list[list[Box]] = []
    room = 0
    for box in boxes:
        if not groups or box.bytes > room:
            groups.append([])
            room = FILE_BYTES
        groups[-1].append(box)
        room -= box.bytes
    files = []
    for number, group in enumerate(groups):
        by_key = {box.key: box for box in group}
        file = f"rank-{rank:05d}{f'-{number}' if number else ''}.safetensors"
        contents = lay_out(file, [(box.key, box.dtype, box.shape) for box in group])
        files.append(Written(contents, tuple(by_key[piece.key] for piece in contents.pieces)))
    return tuple(files)


def _entries(boxes: list[list[Box]], metadata: Metadata) -> dict[str, TensorEntry]:
    entries: dict[str, TensorEntry] = {}
    for name, whole in metadata.state_dict_metadata.items():
        assert isinstance(whole, TensorStorageMetadata)
        entries[name] = {"dtype": dtype_name(whole.properties.dtype), "shape": list(whole.size), "pieces": []}
    for rank, group in enumerate(boxes):
        for file in _files(rank, group):
            for box in file.boxes:
                entry: PieceEntry = {"offset": list(box.offset), "shape": list(box.shape), "file": file.contents.name}
                entries[box.name]["pieces"].append(entry)
    return entries


def _key(name: str, offset: Sequence[int]) -> str:
    """Name of a piece in its file: the tensor's, and where in it the piece begins."""
    return f"{name}@{','.join(map(str, offset))}"


def fill(state: dict[str, Tensor], manifest: Manifest, path_of: Callable[[str], Path]) -> None:
    """Fill the tensors of `state` from the pieces that overlap them. Collective if a process group exists: the ranks exchange
    DCP's own plans for loading, as pickles from process to process.

    Raises DCP's CheckpointException, with every rank's error.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load_planned(state, storage_reader=_Reader(manifest, path_of), planner=DefaultLoadPlanner())


@dataclass
class _Reader(StorageReader):
    """DCP's reader: the index comes from the manifest, the bytes straight from the files into place."""

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
        with ExitStack() as held, ThreadPoolExecutor(min(4, cores()), "load") as pool:
            files: dict[str, PieceFile] = {}
            for item in plan.items:
                name = self._piece(item.storage_index)["file"]
                if name not in files:
                    files[name] = held.enter_context(piece_file(self.path_of(name)))
                self._check(files[name], item.storage_index)
                target = planner.resolve_tensor(item).detach()
                key = _key(item.storage_index.fqn, item.storage_index.offset or ())
                reads.append(_bind(files[name], key, tuple(item.storage_offsets), tuple(item.lengths), target))
            list(pool.map(lambda read: read(), reads))
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _piece(self, index: MetadataIndex) -> PieceEntry:
        return self._pieces[index.fqn, tuple(index.offset or ())]

    def _check(self, file: PieceFile, index: MetadataIndex) -> None:
        """What the file's own header says of a piece must be what the manifest says."""
        wanted, key = self._piece(index), _key(index.fqn, index.offset or ())
        found, dtype = file.pieces.get(key), self.manifest.tensors[index.fqn]["dtype"]
        if found is None or list(found.shape) != wanted["shape"] or dtype_name(found.dtype) != dtype:
            told = "is missing" if found is None else f"is {dtype_name(found.dtype)} of {list(found.shape)}"
            raise CheckpointError(f"{file.path}: {key} {told}, the manifest says {dtype} of {wanted['shape']}")

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


def _bind(file: PieceFile, key: str, offset: tuple[int, ...], shape: tuple[int, ...], target: Tensor) -> Callable[[], None]:
    return lambda: file.fill(key, offset, shape, target)
