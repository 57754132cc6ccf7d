"""Pieces of tensors in safetensors files: written and digested in one pass, and read straight into place without a copy.

A file is eight bytes for the header's length (little-endian), the header in JSON, and the pieces' bytes without gaps. Larger
elements come first, so that every piece is aligned. Format: https://github.com/huggingface/safetensors
"""

from __future__ import annotations

import json
import math
import mmap
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from mikoshi.trainer.checkpoint.manifest import DTYPES
from mikoshi.trainer.checkpoint.storage.digests import DigestPair, Digests
from mikoshi.trainer.checkpoint.storage.files import opened
from mikoshi.trainer.errors import CheckpointError

_BLOCK = 8 << 20  # bytes written, then digested while they are in the processor's cache
_LARGEST_HEADER = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class Piece:
    """A box of a tensor in a file.

    start, end: byte positions, counted from the end of the header.
    """

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Contents:
    """What a file will hold, in the order of its bytes."""

    name: str
    header: bytes
    pieces: tuple[Piece, ...]

    @property
    def bytes(self) -> int:
        """Bytes of all pieces, without the header."""
        return self.pieces[-1].end if self.pieces else 0


def dtype_named(name: str) -> torch.dtype:
    """Returns the torch dtype of a name, such as "float32"."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """Returns the name of a dtype without "torch."."""
    return str(dtype).removeprefix("torch.")


def lay_out(name: str, wanted: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]) -> Contents:
    """Returns the contents of a file that holds the given pieces.

    name: of the file.
    wanted: key, dtype and shape of each piece.
    """
    pieces: list[Piece] = []
    end = 0
    for key, dtype, shape in sorted(wanted, key=lambda piece: -piece[1].itemsize):
        start, end = end, end + math.prod(shape) * dtype.itemsize
        pieces.append(Piece(key, dtype, shape, start, end))
    table = {p.key: {"dtype": DTYPES[dtype_name(p.dtype)], "shape": p.shape, "data_offsets": (p.start, p.end)} for p in pieces}
    text = json.dumps({"__metadata__": {"format": "pt"}, **table}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return Contents(name, len(text).to_bytes(8, "little") + text, tuple(pieces))


def bytes_of(tensor: Tensor) -> Tensor:
    """Returns a tensor's elements as uint8 [bytes] in host memory; the same memory if that is possible."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def write(out: BinaryIO, header: bytes, parts: Iterable[Tensor], stop: threading.Event) -> Digests:
    """Write the header and the byte tensors; returns the digests of all of it. Other threads run nearly all the time.

    Raises InterruptedError soon after `stop` is set.
    """
    digests = DigestPair(header)
    out.write(header)
    for part in parts:
        memory = part.numpy().data
        for start in range(0, len(memory), _BLOCK):
            if stop.is_set():
                raise InterruptedError("stopped: another rank could not write")
            block = memory[start : start + _BLOCK]
            out.write(block)
            digests.update(block)
    return digests.hexdigests()


@dataclass
class PieceFile:
    """An open file and what its header says. Several threads may read from it."""

    path: Path
    handle: int
    data: int  # where the header ends
    pieces: dict[str, Piece]
    _map: mmap.mmap | None = None
    _mapping: threading.Lock = field(default_factory=threading.Lock)

    def fill(self, key: str, offset: Sequence[int], shape: Sequence[int], target: Tensor) -> None:
        """Copy a box of a piece into `target`, which has the same shape; the dtype is converted if it differs.

        key: name of the piece in the file.
        offset, shape: the box within the piece.
        """
        piece = self.pieces[key]
        whole_rows = tuple(shape[1:]) == piece.shape[1:]
        if whole_rows and target.is_cpu and target.dtype == piece.dtype and target.is_contiguous():
            row = math.prod(piece.shape[1:]) * piece.dtype.itemsize
            start = self.data + piece.start + (offset[0] * row if offset else 0)
            self._read(start, target.reshape(-1).view(torch.uint8).numpy().data)
            return
        if target.numel():
            box = tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))
            target.copy_(self._mapped(piece)[box])

    def _read(self, start: int, into: memoryview) -> None:
        done = 0
        while done < len(into):
            count = os.preadv(self.handle, [into[done : done + (1 << 30)]], start + done)
            if not count:
                raise CheckpointError(f"{self.path}: ends before byte {start + len(into)}")
            done += count

    def _mapped(self, piece: Piece) -> Tensor:
        """Returns the piece as mapped memory: for a box of columns only the pages that hold them are read."""
        with self._mapping:
            if self._map is None:  # copy-on-write, though nobody writes: torch warns about read-only memory
                self._map = mmap.mmap(self.handle, 0, access=mmap.ACCESS_COPY)
        count = math.prod(piece.shape)
        return torch.frombuffer(self._map, dtype=piece.dtype, count=count, offset=self.data + piece.start).view(piece.shape)


@contextmanager
def piece_file(path: Path) -> Iterator[PieceFile]:
    """Open a file of pieces. Raises CheckpointError if its header cannot be right."""
    with opened(path) as handle:
        size = os.fstat(handle).st_size
        length = int.from_bytes(os.pread(handle, 8, 0), "little")
        if size < 8 or not 2 <= length <= min(_LARGEST_HEADER, size - 8):
            raise CheckpointError(f"{path}: damaged: its header cannot be {length} of {size} bytes long")
        try:
            table = json.loads(os.pread(handle, length, 8))
            pieces = {key: _piece(key, entry, size - 8 - length) for key, entry in table.items() if key != "__metadata__"}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{path}: damaged: its header: {error}") from None
        yield PieceFile(path, handle, 8 + length, pieces)


_BY_CODE = {code: dtype_named(name) for name, code in DTYPES.items()}


def _piece(key: str, entry: dict[str, object], room: int) -> Piece:
    dtype, shape, span = _BY_CODE[str(entry["dtype"])], entry["shape"], entry["data_offsets"]
    if not (isinstance(shape, list) and isinstance(span, list) and all(type(n) is int and n >= 0 for n in shape + span)):
        raise ValueError(f"{key}: not counts: {shape}, {span}")
    start, end = span
    if not start <= end <= room or end - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{key}: bytes {start} to {end} of {room} are not {entry['dtype']} of shape {shape}")
    return Piece(key, dtype, tuple(shape), start, end)
