"""Samples as rows of T tokens with their labels, documents and positions: read from mapped shards, no more of a row than
this rank's part of it.

A label is the token that follows; it is IGNORED where nothing of the same document follows, where the token is a prompt's,
and where a row is padding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

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
    places: Iterable[Where | None], rows: int, context: int, document_mask: bool, columns: Columns | None = None,
    pieces: Sequence[int] | None = None,
) -> Batch:  # fmt: skip
    """The rows at these places, as many as `rows`; None is padding, of which nothing is predicted.

    With `document_mask`, the first token of a document is never predicted from the one before it, and attention and
    positions begin anew with it. `pieces`: for every row the length at which they also begin anew, T for none (a
    sequence-length warm-up); labels stay.
    """
    parts = columns or whole_row(context)
    width = sum(stop - start for start, stop in parts)
    tokens = np.empty((rows, width), dtype=np.int64)
    labels = np.empty((rows, width), dtype=np.int64)
    empty = np.ones(rows, dtype=np.bool_)  # rows that are not filled from end to end
    cuts: list[Ids] = []  # numbers of places in the whole batch at which a document begins
    ends: list[Ids] = []  # numbers of places that are the last before such a one, to be predicted by nobody
    for row, place in enumerate(places):
        if place is None:
            continue
        base = row * context
        if place.pieces is None:
            empty[row] = False
            _read_cut(place.shard, place.first, parts, tokens[row], labels[row])
            if document_mask:
                document_ends = place.shard.ends
                # Of the index's own type: otherwise the whole mapped index would be converted for every row.
                span = np.array((place.first, place.first + context), dtype=document_ends.dtype)
                begin, end = document_ends.searchsorted(span, "right")
                if begin < end:
                    inside = document_ends[begin:end].astype(np.int64) + (base - place.first)
                    ends.append(inside - 1)
                    cuts.append(inside if inside[-1] < base + context else inside[:-1])
        else:
            tokens[row], labels[row], empty[row] = 0, IGNORED, False
            heads = _read_fitted(place.shard, *place.pieces, parts, tokens[row], labels[row])
            if document_mask:
                cuts.append(heads[heads < context] + base)
    tokens[empty], labels[empty] = 0, IGNORED
    if ends:
        _ignore(labels, np.concatenate(ends), context, parts)
    if not document_mask:
        if columns is None:
            return Batch(tokens, labels, None, None)
        own = np.concatenate([np.arange(*part) for part in parts])
        return Batch(tokens, labels, None, np.repeat(own[None], rows, 0))
    docs, positions = _documents(cuts, rows, context, pieces)
    if columns is not None:
        positions = np.concatenate([positions[:, start:stop] for start, stop in parts], axis=1)
    return Batch(tokens, labels, docs, positions)


def _read_cut(shard: Shard, first: int, parts: Columns, tokens: Ids, labels: Ids) -> None:
    at = 0
    for start, stop in parts:
        to = at + stop - start
        window = shard.tokens[first + start : first + stop + 1]
        tokens[at:to], labels[at:to] = window[:-1], window[1:]
        if shard.learned is not None:
            labels[at:to][~_bits(shard.learned, first + start + 1, stop - start)] = IGNORED
        at = to


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
