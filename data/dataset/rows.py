"""Samples as rows of T tokens with labels, documents and positions, read from mapped shards; of each row only this rank's part.

A label is the next token. It is IGNORED at the end of a document, in a prompt, and in padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mikoshi.data.dataset.shards import Shard
from mikoshi.data.errors import DataError

IGNORED = -100
"""Label of a position that is not predicted. The same value as in torch's cross-entropy."""

_VERIFY = "`mikoshi data verify` names what is damaged"

Ids = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.int32]
Flags = npt.NDArray[np.bool_]
Allocate = Callable[[tuple[int, ...], npt.DTypeLike], npt.NDArray[Any]]
"""Gives an array of a shape and type to fill, as numpy.empty does."""
ColumnRanges = tuple[tuple[int, int], ...]
"""The parts [start, stop) of a row that a context-parallel rank holds, in its order."""


@dataclass(frozen=True)
class Batch:
    """Some rows, [rows, T] each: tokens and labels int64, docs and positions int32.

    docs: number of the document in the row; None if rows are read as one document.
    positions: position in the document; None if rows are read as one document.
    padding: bool, places without a token of the data; None if there are none.

    On a context-parallel rank `tokens`, `labels`, `positions` and `padding` cover its own columns only, while `docs` covers the
    whole row, since a query must know which document its keys on other ranks belong to.
    """

    tokens: Ids
    labels: Ids
    docs: Numbers | None
    positions: Numbers | None
    padding: Flags | None = None

    def slice_rows(self, start: int, stop: int) -> Batch:
        """Rows `start` to `stop`, as views."""
        docs = None if self.docs is None else self.docs[start:stop]
        positions = None if self.positions is None else self.positions[start:stop]
        padding = None if self.padding is None else self.padding[start:stop]
        return Batch(self.tokens[start:stop], self.labels[start:stop], docs, positions, padding)

    def select_columns(self, columns: ColumnRanges) -> Batch:
        """The part of every whole row that a context-parallel rank holds."""
        index = np.concatenate([np.arange(*part) for part in columns])
        counted = np.broadcast_to(np.arange(self.tokens.shape[1], dtype=np.int32), self.tokens.shape)
        positions = counted if self.positions is None else self.positions
        padding = None if self.padding is None else np.ascontiguousarray(self.padding[:, index])
        own = np.ascontiguousarray(positions[:, index])
        return Batch(self.tokens[:, index], self.labels[:, index], self.docs, own, padding)


class RowLocation(NamedTuple):
    """Where a row is read from: an open shard, and either the row's first token or the pieces it consists of."""

    shard: Shard
    first: int
    pieces: tuple[list[int], list[int]] | None = None


def full_row(context: int) -> ColumnRanges:
    """The columns of a rank that holds whole rows."""
    return ((0, context),)


def column_ranges(index: Ids) -> ColumnRanges:
    """The ascending ranges in an index of columns, in its order."""
    breaks = np.flatnonzero(np.diff(index) != 1) + 1
    return tuple((int(part[0]), int(part[-1]) + 1) for part in np.split(index, breaks))


def read_rows(
    locations: Sequence[RowLocation], rows: int, context: int, document_mask: bool, columns: ColumnRanges | None = None,
    pieces: Sequence[int] | None = None, allocate: Allocate = np.empty,
) -> Batch:  # fmt: skip
    """The rows at these locations, and padding up to `rows`, of which nothing is predicted.

    document_mask: the first token of a document is not predicted, and attention and positions restart with it.
    columns: the ranges of columns to read (None: all).
    pieces: for every row the length at which attention and positions also restart (sequence-length warm-up), T for none; labels
        are unaffected.
    allocate: makes the arrays that are filled.
    """
    parts = columns or full_row(context)
    read = _cut_rows if not locations or locations[0].pieces is None else _fitted_rows
    width = sum(stop - start for start, stop in parts)
    tokens, labels = allocate((rows, width), np.int64), allocate((rows, width), np.int64)
    tokens[len(locations) :], labels[len(locations) :] = 0, IGNORED
    cuts, ends = read(locations, context, parts, document_mask, tokens, labels)
    if ends:
        _ignore(labels, np.concatenate(ends), context, parts)
    padding = _padding(locations, rows, context, parts)
    if not document_mask:
        if columns is None:
            return Batch(tokens, labels, None, None, padding)
        own = np.concatenate([np.arange(*part, dtype=np.int32) for part in parts])
        return Batch(tokens, labels, None, np.repeat(own[None], rows, 0), padding)
    docs, positions = _documents(cuts, rows, context, pieces, allocate)
    if columns is not None:
        positions = np.concatenate([positions[:, start:stop] for start, stop in parts], axis=1)
    return Batch(tokens, labels, docs, positions, padding)


def _padding(locations: Sequence[RowLocation], rows: int, context: int, parts: ColumnRanges) -> Flags | None:
    """Which places hold no token: the end of fitted rows, and rows beyond the last location."""
    fitted = bool(locations) and locations[0].pieces is not None
    if not fitted and len(locations) == rows:
        return None
    filled = np.zeros(rows, dtype=np.int64)
    filled[: len(locations)] = [context if place.pieces is None else sum(place.pieces[1]) for place in locations]
    found: Flags = np.concatenate([np.arange(*part) for part in parts]) >= filled[:, None]
    return found


_Boundaries = tuple[list[Ids], list[Ids]]
"""In numbers of places of the whole batch, row after row: where documents begin, and what comes last before such a place
and is to be predicted by nobody."""


def _cut_rows(
    locations: Sequence[RowLocation], context: int, parts: ColumnRanges, document_mask: bool, tokens: Ids, labels: Ids
) -> _Boundaries:
    """Read rows that are stretches of shards. Rows of one shard are read together, which takes numpy as long for ten as for
    one."""
    groups: dict[int, tuple[Shard, list[int], list[int]]] = {}
    for row, place in enumerate(locations):
        _, at, firsts = groups.setdefault(id(place.shard), (place.shard, [], []))
        at.append(row)
        firsts.append(place.first)
    cuts, ends = list[Ids](), list[Ids]()
    for shard, at, firsts in groups.values():
        rows, first, column = np.array(at, dtype=np.int64), np.array(firsts, dtype=np.int64), 0
        for start, stop in parts:
            into = slice(column, column := column + stop - start)
            read = _windows(shard.tokens, start, stop - start + 1)[first]
            tokens[rows, into], labels[rows, into] = read[:, :-1], read[:, 1:]
            if shard.learned is not None:
                for row, from_token in zip(at, firsts, strict=True):
                    flags = _bits(shard.learned, from_token + start + 1, stop - start)
                    labels[row, into][~flags] = IGNORED
        if document_mask:
            inside, after = _ends_within(shard.ends, first, context, rows * context)
            ends.append(inside - 1)
            cuts.append(inside[inside < after])
    return cuts, ends


def _windows(tokens: npt.NDArray[Any], start: int, length: int) -> npt.NDArray[Any]:
    """Row i: the `length` tokens from i + start on, a view."""
    width = tokens.itemsize
    shape = (len(tokens) - start - length + 1, length)
    return np.ndarray(shape, tokens.dtype, tokens, start * width, (width, width))


def _ends_within(ends: npt.NDArray[Any], first: Ids, context: int, base: Ids) -> tuple[Ids, Ids]:
    """The ends of documents in the rows that begin at tokens `first`, as places of a batch in which those rows begin at
    `base`; and for each the place after its row."""
    # Of the index's own type: otherwise the whole mapped index would be converted.
    low = ends.searchsorted(first.astype(ends.dtype), "right")
    counts = ends.searchsorted((first + context).astype(ends.dtype), "right") - low
    offsets = np.cumsum(counts) - counts
    index = np.repeat(low - offsets, counts) + np.arange(counts.sum())
    inside = ends[index].astype(np.int64) + np.repeat(base - first, counts)
    return inside, np.repeat(base + context, counts)


def _fitted_rows(
    locations: Sequence[RowLocation], context: int, parts: ColumnRanges, _document_mask: bool, tokens: Ids, labels: Ids
) -> _Boundaries:
    """Read rows that are whole documents put together."""
    cuts: list[Ids] = []
    tokens[:], labels[:] = 0, IGNORED
    for row, place in enumerate(locations):
        assert place.pieces is not None
        if sum(place.pieces[1]) > context:
            raise DataError(
                f"{place.shard.path}: the plan of rows has one that is too long: `mikoshi data verify` names what is damaged"
            )
        heads = _read_fitted(place.shard, *place.pieces, parts, tokens[row], labels[row])
        cuts.append(heads[heads < context] + row * context)
    return cuts, []


def _read_fitted(shard: Shard, firsts: list[int], lengths: list[int], parts: ColumnRanges, tokens: Ids, labels: Ids) -> Ids:
    """Fill a row with pieces. Returns where each begins, and at the end where the padding does."""
    begin, heads = 0, [0]
    for first, length in zip(firsts, lengths, strict=True):
        if first + length >= len(shard.tokens):
            raise DataError(
                f"{shard.path}: the plan of rows reaches beyond the shard: `mikoshi data verify` names what is damaged"
            )
        at = 0
        for start, stop in parts:
            low, high = max(start, begin), min(stop, begin + length)
            if low < high:
                source, into = first + low - begin, slice(at + low - start, at + high - start)
                count = high - low
                tokens[into] = shard.tokens[source : source + count]
                labels[into] = shard.tokens[source + 1 : source + count + 1]
                if shard.learned is not None:
                    labels[into][~_bits(shard.learned, source + 1, count)] = IGNORED
            at += stop - start
        begin += length
        heads.append(begin)
    return np.array(heads, dtype=np.int64)


def _bits(learned: npt.NDArray[np.uint8], first: int, count: int) -> npt.NDArray[np.bool_]:
    low = first // 8
    bits = np.unpackbits(learned[low : (first + count + 7) // 8], bitorder="little")
    return bits[first - 8 * low : first - 8 * low + count].view(np.bool_)


def _ignore(labels: Ids, places: Ids, context: int, parts: ColumnRanges) -> None:
    if parts == full_row(context):
        labels.ravel()[places] = IGNORED
        return
    mask = np.zeros((len(labels), context), dtype=np.bool_)
    mask.ravel()[places] = True
    labels[np.concatenate([mask[:, start:stop] for start, stop in parts], axis=1)] = IGNORED


def _documents(
    cuts: list[Ids], rows: int, context: int, pieces: Sequence[int] | None, allocate: Allocate
) -> tuple[Numbers, Numbers]:
    """For every place its document's number in the row, from 0, and its position in that document.

    cuts: places of the whole batch, row after row, at which a document begins within a row.
    """
    firsts = np.arange(0, rows * context, context)
    more = [np.arange(row * context, (row + 1) * context, piece) for row, piece in enumerate(pieces or ())]
    begins = np.unique(np.concatenate([firsts, *cuts, *more]))
    owner = begins // context
    number = np.arange(len(begins)) - np.searchsorted(owner, np.arange(rows))[owner]
    # Written as what changes from a place to the next, then added up.
    docs, positions = allocate((rows * context,), np.int32), allocate((rows * context,), np.int32)
    docs[:], positions[:] = 0, 1
    docs[begins] = np.diff(number, prepend=0)
    positions[begins] = 1 - np.diff(begins, prepend=-1)
    positions[:1] = 0
    np.cumsum(docs, out=docs)
    np.cumsum(positions, out=positions)
    return docs.reshape(rows, context), positions.reshape(rows, context)
