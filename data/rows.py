"""Samples as rows of T tokens with their labels, documents and positions: read from mapped shards, no more of a row than
this rank's part of it.

A label is the token that follows; it is IGNORED where nothing of the same document follows, where the token is a prompt's,
and where a row is padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from data.shards import Shard

IGNORED = -100
"""Label of a position that is not predicted. The same value as in torch's cross-entropy."""

Ids = npt.NDArray[np.int64]
Columns = tuple[tuple[int, int], ...]
"""The parts [start, stop) of a row that a context-parallel rank holds, in its order."""


@dataclass(frozen=True)
class Batch:
    """Some rows, int64 [rows, T] each. `docs` numbers the documents in a row and `positions` counts inside each;
    both None when rows are read as one document.

    On a context-parallel rank `tokens`, `labels` and `positions` are of its own columns only, while `docs` is of the
    whole row, since a query must know what its keys elsewhere belong to.
    """

    tokens: Ids
    labels: Ids
    docs: Ids | None
    positions: Ids | None

    def rows(self, start: int, stop: int) -> Batch:
        docs = None if self.docs is None else self.docs[start:stop]
        positions = None if self.positions is None else self.positions[start:stop]
        return Batch(self.tokens[start:stop], self.labels[start:stop], docs, positions)

    def columns(self, columns: Columns) -> Batch:
        """The part of every whole row that a context-parallel rank holds."""
        index = np.concatenate([np.arange(*part) for part in columns])
        positions = np.broadcast_to(np.arange(self.tokens.shape[1]), self.tokens.shape)
        positions = positions if self.positions is None else self.positions
        return Batch(self.tokens[:, index], self.labels[:, index], self.docs, np.ascontiguousarray(positions[:, index]))


class Where(NamedTuple):
    """A sample's place: an open shard and, by how rows are made, the row's first token or the pieces it is made of."""

    shard: Shard
    first: int
    pieces: tuple[list[int], list[int]] | None = None


def whole_row(context: int) -> Columns:
    return ((0, context),)


def ranges(index: Ids) -> Columns:
    """Ascending stretches of an index of columns, in its order."""
    breaks = np.flatnonzero(np.diff(index) != 1) + 1
    return tuple((int(part[0]), int(part[-1]) + 1) for part in np.split(index, breaks))


def read_rows(
    places: Sequence[Where], rows: int, context: int, document_mask: bool, columns: Columns | None = None,
    pieces: Sequence[int] | None = None,
) -> Batch:  # fmt: skip
    """The rows at these places, and padding up to `rows`, of which nothing is predicted.

    With `document_mask`, the first token of a document is never predicted from the one before it, and attention and
    positions begin anew with it. `pieces`: for every row the length at which they also begin anew, T for none (a
    sequence-length warm-up); labels stay.
    """
    parts = columns or whole_row(context)
    read = _cut_rows if not places or places[0].pieces is None else _fitted_rows
    tokens, labels, cuts, ends = read(places, context, parts, document_mask)
    if ends:
        _ignore(labels, np.concatenate(ends), context, parts)
    if rows > len(places):
        missing = (rows - len(places), tokens.shape[1])
        tokens = np.concatenate((tokens, np.zeros(missing, np.int64)))
        labels = np.concatenate((labels, np.full(missing, IGNORED, np.int64)))
    if not document_mask:
        if columns is None:
            return Batch(tokens, labels, None, None)
        own = np.concatenate([np.arange(*part) for part in parts])
        return Batch(tokens, labels, None, np.repeat(own[None], rows, 0))
    docs, positions = _documents(cuts, rows, context, pieces)
    if columns is not None:
        positions = np.concatenate([positions[:, start:stop] for start, stop in parts], axis=1)
    return Batch(tokens, labels, docs, positions)


_Read = tuple[Ids, Ids, list[Ids], list[Ids]]
"""Tokens and labels, and in numbers of places of the whole batch, row after row: where documents begin, and what comes last
before such a place and is to be predicted by nobody."""


def _cut_rows(places: Sequence[Where], context: int, parts: Columns, document_mask: bool) -> _Read:
    """Rows that are stretches of shards. Those of one shard are read together: numpy takes as long for one as for ten."""
    groups: dict[int, tuple[Shard, list[int], list[int]]] = {}
    for row, place in enumerate(places):
        _, at, firsts = groups.setdefault(id(place.shard), (place.shard, [], []))
        at.append(row)
        firsts.append(place.first)
    blocks: list[list[npt.NDArray[Any]]] = [[] for _ in parts]
    cuts, ends, order = list[Ids](), list[Ids](), list[int]()
    for shard, at, firsts in groups.values():
        first, order = np.array(firsts, dtype=np.int64), order + at
        for block, (start, stop) in zip(blocks, parts, strict=True):
            block.append(_windows(shard.tokens, start, stop - start + 1)[first])
        if document_mask:
            inside, after = _ends_within(shard.ends, first, context, np.array(at, dtype=np.int64) * context)
            ends.append(inside - 1)
            cuts.append(inside[inside < after])
    back = np.argsort(np.array(order, dtype=np.int64))
    whole = [
        np.concatenate(block)[back].astype(np.int64) if block else np.zeros((0, stop - start + 1), np.int64)
        for block, (start, stop) in zip(blocks, parts, strict=True)
    ]
    tokens = whole[0][:, :-1] if len(whole) == 1 else np.concatenate([block[:, :-1] for block in whole], axis=1)
    labels = whole[0][:, 1:].copy() if len(whole) == 1 else np.concatenate([block[:, 1:] for block in whole], axis=1)
    for shard, at, firsts in groups.values():
        if shard.learned is not None:
            for row, from_token in zip(at, firsts, strict=True):
                flags = [_bits(shard.learned, from_token + start + 1, stop - start) for start, stop in parts]
                labels[row, ~np.concatenate(flags)] = IGNORED
    return tokens, labels, cuts, ends


def _windows(tokens: npt.NDArray[Any], start: int, length: int) -> npt.NDArray[Any]:
    """Row i: the `length` tokens from i + start on, a view."""
    width = tokens.itemsize
    shape = (len(tokens) - start - length + 1, length)
    return np.ndarray(shape, tokens.dtype, tokens, start * width, (width, width))


def _ends_within(ends: npt.NDArray[Any], first: Ids, context: int, base: Ids) -> tuple[Ids, Ids]:
    """Where documents end in the rows that begin at tokens `first`, as places of a batch in which those rows begin at
    `base`; and for each the place after its row."""
    # Of the index's own type: otherwise the whole mapped index would be converted.
    low = ends.searchsorted(first.astype(ends.dtype), "right")
    counts = ends.searchsorted((first + context).astype(ends.dtype), "right") - low
    offsets = np.cumsum(counts) - counts
    index = np.repeat(low - offsets, counts) + np.arange(counts.sum())
    inside = ends[index].astype(np.int64) + np.repeat(base - first, counts)
    return inside, np.repeat(base + context, counts)


def _fitted_rows(places: Sequence[Where], context: int, parts: Columns, document_mask: bool) -> _Read:
    """Rows that are whole documents put together."""
    width = sum(stop - start for start, stop in parts)
    tokens = np.zeros((len(places), width), dtype=np.int64)
    labels = np.full((len(places), width), IGNORED, dtype=np.int64)
    cuts: list[Ids] = []
    for row, place in enumerate(places):
        assert place.pieces is not None
        heads = _read_fitted(place.shard, *place.pieces, parts, tokens[row], labels[row])
        cuts.append(heads[heads < context] + row * context)
    return tokens, labels, cuts, []


def _read_fitted(shard: Shard, firsts: list[int], lengths: list[int], parts: Columns, tokens: Ids, labels: Ids) -> Ids:
    """Fill a row with pieces, one after another; returns where each begins, and last where the padding does."""
    begin, heads = 0, [0]
    for first, length in zip(firsts, lengths, strict=True):
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


def _ignore(labels: Ids, places: Ids, context: int, parts: Columns) -> None:
    if parts == whole_row(context):
        labels.ravel()[places] = IGNORED
        return
    mask = np.zeros((len(labels), context), dtype=np.bool_)
    mask.ravel()[places] = True
    labels[np.concatenate([mask[:, start:stop] for start, stop in parts], axis=1)] = IGNORED


def _documents(cuts: list[Ids], rows: int, context: int, pieces: Sequence[int] | None) -> tuple[Ids, Ids]:
    """Number of the document at every place of every row, from 0, and the position in it. `cuts`: the places of the
    whole batch, one row after another, at which one begins within a row."""
    places = np.arange(rows * context)
    more = [places[row * context : (row + 1) * context : piece] for row, piece in enumerate(pieces or ())]
    begins = np.unique(np.concatenate([places[::context], *cuts, *more]))
    lengths = np.diff(begins, append=rows * context)
    owner = begins // context
    number = np.arange(len(begins)) - np.searchsorted(owner, np.arange(rows))[owner]
    docs = np.repeat(number, lengths).reshape(rows, context)
    return docs, (places - np.repeat(begins, lengths)).reshape(rows, context)
