"""Rows read straight from raw sources: a fixed number of lanes, each an independent stream, the same whatever number of ranks
read them.

With n lanes, lane l reads every n-th piece of a source, in an order shuffled anew each epoch; within a piece, documents come in
blocks, each shuffled. The place of a lane in a source is three numbers: the piece (counted through all epochs), the document at
which the current block begins, and the token in the block at which the next row begins.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mikoshi.data.dataset.rows import RowLocation
from mikoshi.data.dataset.shards import Shard
from mikoshi.data.errors import DataError
from mikoshi.data.prepare.piece import Selection, Tally, encode_documents, is_held_out, text_digest, usable_documents
from mikoshi.data.sampling.shuffle import permute
from mikoshi.data.sources.sources import Document, Piece
from mikoshi.data.tokenizer.tokenizer import Tokenizer

Ids = npt.NDArray[np.int64]

_BLOCK_DOCUMENTS, _BLOCK_CHARACTERS = 512, 2 << 20
PIECE_BYTES = 8 << 20
"""A piece is read from its beginning to go on within it, so it is small."""

CURSOR = 3
COUNTS = 4
_NAMES = 20


@dataclass(frozen=True)
class Stream:
    """A raw source in use.

    shares: if there are fewer pieces than lanes, so many lanes read each piece, each its share of the documents.
    held_out: share of the documents kept for evaluation, which are not read here.
    """

    name: str
    selection: Selection
    pieces: tuple[Piece, ...]
    shares: int
    tokenizer: Tokenizer
    held_out: float
    seed: int

    @property
    def units(self) -> int:
        """The number of shares of pieces, which are distributed over lanes."""
        return len(self.pieces) * self.shares

    def unit(self, ordinal: int) -> tuple[Piece, int]:
        """The piece, and the share of it, that is `ordinal`-th over all epochs."""
        epoch, place = divmod(ordinal, self.units)
        at = permute(np.array([place]), self.units, f"{self.seed}:{self.name}:epoch:{epoch}:pieces")
        piece, share = divmod(int(at[0]), self.shares)
        return self.pieces[piece], share


@dataclass
class Lane:
    """One lane of one source, at a place in it.

    left_out: documents used, unreadable, empty and dropped before it.
    names: the first unreadable ones.
    """

    stream: Stream
    number: int
    lanes: int
    left_out: Ids = field(default_factory=lambda: np.zeros(COUNTS, np.int64))
    names: list[str] = field(default_factory=list)
    piece: int = 0  # pieces of this lane before the one being read
    document: int = 0  # usable documents of the piece before the block at the front
    offset: int = 0  # tokens of that block before the next row
    _tokens: Ids = field(default_factory=lambda: np.zeros(0, np.int64))
    _ends: Ids = field(default_factory=lambda: np.zeros(0, np.int64))
    _learned: npt.NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))
    _blocks: list[tuple[int, int, int, Ids]] = field(default_factory=list)  # piece, document, tokens and counts of each
    _reading: Iterator[tuple[list[Document], Ids]] | None = None
    _next: tuple[int, int] = (0, 0)  # piece and document at which the block after those read begins

    def cursor(self) -> tuple[int, int, int]:
        """Piece, document and token offset of the next row."""
        return self.piece, self.document, self.offset

    def seek(self, piece: int, document: int, offset: int, left_out: Ids) -> None:
        """Continue from a cursor with its counts. Raises DataError for a cursor that no lane can have."""
        self.left_out = left_out.copy()
        self.piece, self.document, self.offset = piece, document, offset
        self._tokens, self._ends, self._learned = np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.bool_)
        self._blocks, self._reading, self._next = [], None, (piece, document)
        if not offset:
            return
        self._read_block()
        if offset >= len(self._tokens):
            raise DataError(
                f"data.source: the run stands at token {offset} of a block of {len(self._tokens)} of "
                f"{self.stream.name or 'the source'}: its files have changed, or the checkpoint was altered; put them back, or "
                "give another run.name"
            )

    def row(self, context: int) -> RowLocation:
        """The next row of `context` tokens, and the label after its last. Raises DataError if the source has no usable
        document, or an unreadable one where that is an error."""
        while len(self._tokens) - self.offset < context + 1:
            self._read_block()
        first, stop = self.offset, self.offset + context + 1
        low, high = np.searchsorted(self._ends, (first, stop), side="right")
        learned = self._learned[first:stop]
        shard = Shard(
            Path(self.stream.name), self._tokens[first:stop].astype(np.uint32), self._ends[low:high] - first,
            None if learned.all() else np.packbits(learned, bitorder="little"),
        )  # fmt: skip
        self._move(context)
        return RowLocation(shard, 0)

    def _move(self, tokens: int) -> None:
        """Advance by so many tokens, and past the blocks that end among them."""
        self.offset += tokens
        while self._blocks and self.offset >= self._blocks[0][2]:
            _, _, size, counts = self._blocks.pop(0)
            self.left_out += counts
            self.offset -= size
            self._tokens, self._learned = self._tokens[size:], self._learned[size:]
            self._ends = self._ends[self._ends > size] - size
            self.piece, self.document = self._blocks[0][:2] if self._blocks else self._next

    def _read_block(self) -> None:
        empty = 0
        while True:
            piece, document = self._next
            if self._reading is None:
                self._reading = _blocks(self.stream, self._ordinal(piece), document, self.names)
            block, counts = next(self._reading)
            if block:
                break
            # What came after a piece's last document counts with it: it is read again when that is.
            if self._blocks:
                self._blocks[-1][3][:] += counts
            else:
                self.left_out += counts
            self._reading, self._next = None, (piece + 1, 0)
            empty = empty + 1 if document == 0 else 0
            if empty > self.stream.units:
                raise DataError(
                    f"data.source: no document of {self.stream.name or 'the source'} can be used: every piece is empty"
                )
        order = permute(
            np.arange(len(block)), len(block), f"{self.stream.seed}:{self.stream.name}:{self._ordinal(piece)}:{document}"
        )
        used = [d for d in (block[i] for i in order) if not is_held_out(text_digest(d.split_key), self.stream.held_out)]
        found = list(encode_documents(self.stream.tokenizer, used))
        if not self._blocks:
            self.piece, self.document = piece, document
        tokens = [ids.astype(np.int64) for ids, _ in found]
        flags = [np.ones(len(ids), np.bool_) if learned is None else learned for ids, learned in found]
        sizes = np.cumsum([len(ids) for ids in tokens], dtype=np.int64)
        self._ends = np.concatenate((self._ends, sizes + len(self._tokens)))
        self._tokens, self._learned = np.concatenate((self._tokens, *tokens)), np.concatenate((self._learned, *flags))
        counts[0] = len(used)
        self._blocks.append((piece, document, int(sizes[-1]) if len(sizes) else 0, counts))
        self._next = (piece, document + len(block))

    def _ordinal(self, piece: int) -> int:
        return self.number + piece * self.lanes


def _blocks(stream: Stream, ordinal: int, first: int, names: list[str]) -> Iterator[tuple[list[Document], Ids]]:
    """The usable documents of a unit from the `first` on, in blocks, and at its end an empty block. The end of a block depends
    only on its beginning.

    With each block comes the count of what was left out on the way (counted by the first share of a piece).
    """
    tally, (piece, share) = Tally(), stream.unit(ordinal)
    documents = islice(usable_documents(stream.selection, piece, tally), share, None, stream.shares)

    def left_out() -> Ids:
        return np.array([0, tally.invalid, tally.empty, sum(tally.dropped.values())], dtype=np.int64) * (share == 0)

    for _ in islice(documents, first):
        pass
    before = left_out()
    while True:
        block: list[Document] = []
        size = 0
        for document in documents:
            block.append(document)
            size += len(document.text or "")
            if len(block) >= _BLOCK_DOCUMENTS or size >= _BLOCK_CHARACTERS:
                break
        after = left_out()
        names += [name for name in tally.names if share == 0 and name not in names][: _NAMES - len(names)]
        yield block, after - before
        before = after
        if not block:
            return


def chain_digest(before: int, row: RowLocation) -> int:
    """The digest of a lane's rows up to this one, from that of the rows before, as a number of 63 bits."""
    found = hashlib.sha256(before.to_bytes(8, "little") + np.ascontiguousarray(row.shard.tokens).tobytes())
    return int.from_bytes(found.digest()[:8], "little") >> 1
