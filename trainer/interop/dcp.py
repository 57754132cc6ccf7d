"""Reads a folder that torch.distributed.checkpoint (DCP) has written as data: no byte of it is executed, whoever wrote it.

    .metadata        a pickle: which tensors there are, how they are split into chunks, and where each chunk lies
    __0_0.distcp     chunks one after another, each as torch.save writes a tensor: a ZIP file with a pickle and the bytes

Both pickles are only parsed (interop.pickled). The sizes and positions in them are checked against the files before memory is
allocated.
"""

from __future__ import annotations

import io
import math
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from mikoshi.trainer.checkpoint.manifest import DTYPES, overlap
from mikoshi.trainer.checkpoint.pieces import dtype_named
from mikoshi.trainer.checkpoint.storage.base import checked_name
from mikoshi.trainer.checkpoint.storage.files import opened
from mikoshi.trainer.errors import CheckpointError
from mikoshi.trainer.interop.pickled import Made, Named, read_pickle

METADATA = ".metadata"
_LARGEST_METADATA = 1 << 31
_LARGEST = 1 << 62

_DCP = "torch.distributed.checkpoint."
_TORCH = {f"torch.{dtype}" for dtype in DTYPES} | {"torch.strided", "torch.Size", "torch.serialization._get_layout"}
_METADATA_NAMES = frozenset(
    {_DCP + "metadata." + name for name in (
        "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
        "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING",
    )}
    | {_DCP + "planner." + name for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData")}
    | {_DCP + "filesystem._StorageInfo", _DCP + "filesystem._StoragePrefix", "collections.OrderedDict"}
    | {f"torch.distributed._shard.sharded_tensor.metadata.{name}" for name in ("TensorProperties", "MEM_FORMAT_ENCODING")}
    | {f"{module}.{name}" for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "PurePosixPath")}
    | _TORCH
)  # fmt: skip
_STORAGES = {
    "torch.DoubleStorage": "float64", "torch.FloatStorage": "float32", "torch.HalfStorage": "float16",
    "torch.BFloat16Storage": "bfloat16", "torch.LongStorage": "int64", "torch.IntStorage": "int32",
    "torch.ShortStorage": "int16", "torch.CharStorage": "int8", "torch.ByteStorage": "uint8", "torch.BoolStorage": "bool",
}  # fmt: skip
_REBUILD = "torch._utils._rebuild_"
_TENSOR_NAMES = frozenset({*_STORAGES, "collections.OrderedDict", _REBUILD + "tensor_v2", _REBUILD + "parameter"} | _TORCH)

T = TypeVar("T")


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor: where it lies in the tensor, and where in which file."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    start: int
    length: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the folder. Its chunks make it up exactly."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class DCPFolder:
    """The tensors of a DCP folder by name.

    objects: names of entries that are not tensors; they are not read.
    """

    path: Path
    tensors: dict[str, StoredTensor]
    objects: tuple[str, ...] = field(default=())
    _last: dict[Chunk, Tensor] = field(default_factory=dict, repr=False)
    """The chunk read last, kept because the next read usually takes more of its rows."""

    def read(self, name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """Returns the box of a tensor with `shape` at `offset`.

        Raises CheckpointError if a file does not match the folder's metadata.
        """
        stored = self.tensors[name]
        found = torch.empty(shape, dtype=stored.dtype)
        for chunk in stored.chunks:
            first = [max(a, b) for a, b in zip(offset, chunk.offset, strict=True)]
            last = [min(a + n, b + m) for a, n, b, m in zip(offset, shape, chunk.offset, chunk.shape, strict=True)]
            if all(a < b for a, b in zip(first, last, strict=True)):
                values = self._chunk(name, chunk, stored.dtype)
                into = tuple(slice(a - o, b - o) for a, b, o in zip(first, last, offset, strict=True))
                box = tuple(slice(a - o, b - o) for a, b, o in zip(first, last, chunk.offset, strict=True))
                found[into] = values[box]
        return found

    def _chunk(self, name: str, chunk: Chunk, dtype: torch.dtype) -> Tensor:
        if chunk in self._last:
            return self._last[chunk]
        self._last.clear()
        path = self.path / chunk.file
        with opened(path) as handle:
            data = _bytes(handle, chunk)
        if data is None:
            raise CheckpointError(f"{path}: ends before {name}: it was cut short")
        tensor = _checked_read(f"{path}: {name}", lambda: saved_tensor(data))
        if tuple(tensor.shape) != chunk.shape or tensor.dtype != dtype:
            raise CheckpointError(
                f"{path}: {name} is {tensor.dtype} of {list(tensor.shape)}, {METADATA} says {dtype} of {list(chunk.shape)}"
            )
        self._last[chunk] = tensor
        return tensor


def _bytes(handle: int, chunk: Chunk) -> bytearray | None:
    """Returns a chunk's bytes, or None if the file ends before them."""
    data, done = bytearray(chunk.length), 0
    with memoryview(data) as view:
        while done < chunk.length:
            count = os.preadv(handle, [view[done : done + (1 << 30)]], chunk.start + done)
            if not count:
                return None
            done += count
    return data


def open_folder(path: Path) -> DCPFolder:
    """Returns what a DCP folder holds.

    Raises CheckpointError if `.metadata` is missing, refers to classes that no checkpoint has, or cannot be right.
    """
    file = path / METADATA
    with opened(file) as handle:
        size = os.fstat(handle).st_size
        if size > _LARGEST_METADATA:
            raise CheckpointError(f"{file}: {size} bytes are more than any has")
        with os.fdopen(os.dup(handle), "rb") as content:
            data = content.read()
    return _checked_read(str(file), lambda: _folder(path, _fields(read_pickle(data, _METADATA_NAMES), "Metadata")))


def _checked_read(where: str, read: Callable[[], T]) -> T:
    """Returns what `read` returns; errors become a CheckpointError of one line with the file's name."""
    try:
        return read()
    except CheckpointError:
        raise
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        RecursionError,
        OverflowError,
        RuntimeError,
        zipfile.BadZipFile,
    ) as error:
        raise CheckpointError(f"{where}: cannot be read: {str(error)[:300] or type(error).__name__}") from None


def _fields(value: Any, kind: str) -> dict[str, Any]:
    """Returns the fields of a data class of that name."""
    if not isinstance(value, Made) or not value.kind.endswith("." + kind) or not isinstance(value.state or {}, dict):
        raise ValueError(f"no {kind} where there should be one")
    return value.state or {}


def _counts(value: Any) -> tuple[int, ...]:
    """Returns the counts in a torch.Size, a tuple or a list."""
    if isinstance(value, Made) and value.kind == "torch.Size" and len(value.args) == 1:
        value = value.args[0]
    counts = tuple(value) if isinstance(value, (tuple, list)) else None
    if counts is None or len(counts) > 64 or not all(type(n) is int and 0 <= n < _LARGEST for n in counts):
        raise ValueError("a size that is none")
    return counts


def _folder(path: Path, metadata: dict[str, Any]) -> DCPFolder:
    locations: dict[tuple[str, tuple[int, ...]], tuple[str, int, int]] = {}
    sizes: dict[str, int] = {}
    for index, info in metadata["storage_data"].items():
        at = _fields(index, "MetadataIndex")
        if at.get("offset") is not None:
            locations[_name(at["fqn"]), _counts(at["offset"])] = _location(path, _fields(info, "_StorageInfo"), sizes)
    tensors, objects = {}, []
    for key, entry in metadata["state_dict_metadata"].items():
        name = _name(key)
        if isinstance(entry, Made) and entry.kind.endswith(".BytesStorageMetadata"):
            objects.append(name)
        else:
            tensors[name] = _stored(name, _fields(entry, "TensorStorageMetadata"), locations)
    return DCPFolder(path, tensors, tuple(objects))


def _name(value: Any) -> str:
    """Returns a name. Raises ValueError for anything but a string.

    The text of nested tuples that share their parts could be larger than any memory.
    """
    if not isinstance(value, str):
        raise ValueError("a name that is no text")
    return value


def _location(path: Path, info: dict[str, Any], sizes: dict[str, int]) -> tuple[str, int, int]:
    """Returns file, first byte and length of a chunk, which is all there.

    sizes: of the files seen so far.
    """
    name = info["relative_path"]
    if not isinstance(name, str):
        raise ValueError("a file's name that is no text")
    checked_name(str(path), name)
    start, length = _counts((info["offset"], info["length"]))
    if info.get("transform_descriptors"):
        raise ValueError(f"{name}: written with an extension of DCP (compressed or encrypted): save it without")
    if name not in sizes:
        with opened(path / name) as handle:
            sizes[name] = os.fstat(handle).st_size
    if start + length > sizes[name]:
        raise CheckpointError(f"{path / name}: bytes {start} to {start + length} of {sizes[name]}: it was cut short")
    return name, start, length


def _stored(
    name: str, entry: dict[str, Any], locations: dict[tuple[str, tuple[int, ...]], tuple[str, int, int]]
) -> StoredTensor:
    properties = entry["properties"]
    state = properties.state if isinstance(properties, Made) else None
    named = state.get("dtype") if isinstance(state, dict) else state[0] if isinstance(state, tuple) and state else None
    kind = named.kind.removeprefix("torch.") if isinstance(named, Named) else ""
    if kind not in DTYPES:
        raise ValueError(f"{name[:200]}: of no type that is known")
    dtype, shape, chunks = dtype_named(kind), _counts(entry["size"]), []
    for chunk in entry["chunks"]:
        fields = _fields(chunk, "ChunkStorageMetadata")
        offset, size = _counts(fields["offsets"]), _counts(fields["sizes"])
        if not len(offset) == len(size) == len(shape) or any(o + n > w for o, n, w in zip(offset, size, shape, strict=True)):
            raise ValueError(f"{name[:200]}: a chunk of {list(size)} at {list(offset)} reaches out of {list(shape)}")
        if not math.prod(size):
            continue
        file, start, length = locations[name, offset]
        if math.prod(size) * dtype.itemsize > length:
            raise ValueError(f"{name[:200]}: {length} bytes of {file} are too few for {kind} of {list(size)}")
        chunks.append(Chunk(offset, size, file, start, length))
    if sum(math.prod(c.shape) for c in chunks) != math.prod(shape) or overlap([(c.offset, c.shape) for c in chunks]):
        raise ValueError(f"{name[:200]}: its chunks do not make up {list(shape)}")
    return StoredTensor(dtype, shape, tuple(chunks))


def saved_tensor(data: bytearray) -> Tensor:
    """Returns the tensor that torch.save has written, in the memory of `data`.

    Raises ValueError or BadZipFile.
    """
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = {info.filename: info for info in archive.infolist()}
        if any(info.compress_type != zipfile.ZIP_STORED for info in entries.values()):
            raise ValueError("a compressed ZIP file, which torch.save does not write")
        (head,) = [name for name in entries if name.endswith("/data.pkl")] or [""]
        if not head:
            raise ValueError("no tensor as torch.save writes it")
        root = head.removesuffix("data.pkl")
        if entries[head].file_size > 1 << 20:
            raise ValueError("more than a tensor")
        if root + "byteorder" in entries and archive.read(root + "byteorder") != b"little":
            raise ValueError("written on a machine of the other byte order")
        made = read_pickle(archive.read(head), _TENSOR_NAMES)
    if isinstance(made, Made) and made.kind == _REBUILD + "parameter":
        made = made.args[0]
    if not isinstance(made, Made) or made.kind != _REBUILD + "tensor_v2":
        raise ValueError("no plain tensor")
    storage, first, shape, stride = made.args[0], *map(_counts, ((made.args[1],), made.args[2], made.args[3]))
    if not isinstance(storage, Made) or storage.kind != "persistent" or storage.args[0][0] != "storage":
        raise ValueError("no plain tensor")
    _, kind, key, *_ = storage.args[0]
    return _viewed(data, entries[f"{root}data/{key}"], dtype_named(_STORAGES[kind.kind]), first[0], shape, stride)


def _viewed(
    data: bytearray, entry: zipfile.ZipInfo, dtype: torch.dtype, first: int, shape: tuple[int, ...], stride: tuple[int, ...]
) -> Tensor:
    """Returns a tensor over a ZIP entry's bytes.

    The checksum is not compared, as some writers leave it out.
    """
    header = entry.header_offset
    names = int.from_bytes(data[header + 26 : header + 28], "little") + int.from_bytes(
        data[header + 28 : header + 30], "little"
    )
    start = header + 30 + names
    count = entry.file_size // dtype.itemsize
    if data[header : header + 4] != b"PK\x03\x04" or start + entry.file_size > len(data):
        raise ValueError("its bytes are not where the ZIP file says")
    elements = math.prod(shape)
    reach = first + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    if elements and (reach >= count or elements > count):
        raise ValueError("a tensor that reaches out of its bytes")
    if not elements:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype, count=count, offset=start).as_strided(shape, stride, first)
