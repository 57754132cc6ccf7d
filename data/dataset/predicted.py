"""Rows in which no token is predicted, found without reading tokens. A step of such rows alone would learn nothing.

A conversation's prompt is not learned, so that a row inside a prompt predicts nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from mikoshi.data.dataset.dataset import is_remote
from mikoshi.data.dataset.rows import RowLocation
from mikoshi.data.dataset.shards import Shard
from mikoshi.data.dataset.split import Corpus
from mikoshi.data.errors import DataError

Rows = npt.NDArray[np.bool_]


def count_unpredicted_rows(corpus: Corpus, document_mask: bool) -> int:
    """The number of rows of a corpus in which no token is predicted. Reads all documents' ends and loss bits."""
    return sum(int(rows.sum()) for rows in _by_shard(corpus, document_mask))


def unpredicted_share(corpus: Corpus, document_mask: bool) -> float | None:
    """The share of a corpus's rows in which no token is predicted; None for a remote corpus, which would have to be fetched."""
    return None if is_remote(corpus.dataset.place) else count_unpredicted_rows(corpus, document_mask) / max(1, corpus.samples)


def check_predicts(corpus: Corpus, document_mask: bool) -> None:
    """Raises DataError if no row of a local training split predicts a token."""
    if is_remote(corpus.dataset.place) or not all(rows.all() for rows in _by_shard(corpus, document_mask)):
        return
    name = f"data.mixture.{corpus.name}" if corpus.name else "data.path"
    raise DataError(
        f"{name}: no token of the {corpus.samples:,} training rows of {corpus.context} tokens in {corpus.dataset.place} is "
        "predicted, so that nothing can be learned: its answers are empty, too far apart or behind prompts that are longer "
        'than a row: raise train.context, set data.packing = "fit", or look at the roles of its messages'
    )


def predicts_nothing(place: RowLocation, context: int, document_mask: bool) -> bool:
    """Whether a row of a shard predicts no token."""
    return bool(_cut(place.shard, place.first + 1, 1, context, document_mask)[0])


def _by_shard(corpus: Corpus, document_mask: bool) -> Iterator[Rows]:
    """For each shard whether its rows predict nothing."""
    for number, (info, count) in enumerate(zip(corpus.shards, corpus.counts.tolist(), strict=True)):
        if not count:
            continue
        shard = corpus.dataset.shard(info)
        if corpus.plan is None:
            yield _cut(shard, 1, count, corpus.context, document_mask)
        elif shard.learned is None:  # every piece has a label
            yield np.zeros(count, np.bool_)
        else:
            first = int(corpus.plan.before[number])
            starts = corpus.plan.starts[first : first + count + 1].astype(np.int64)
            pieces = corpus.plan.pieces[starts[0] : starts[-1]]
            yield ~np.logical_or.reduceat(_any_learned(shard, pieces), starts[:-1] - starts[0])


def _cut(shard: Shard, first: int, rows: int, context: int, document_mask: bool) -> Rows:
    """Of `rows` rows whose labels are the tokens from `first` on."""
    stop = first + rows * context
    heads = shard.ends.astype(np.int64) if document_mask else np.zeros(0, np.int64)  # the first tokens of documents
    heads = heads[(heads >= first) & (heads < stop)] - first
    if shard.learned is None:
        all_heads: Rows = np.equal(np.bincount(heads // context, minlength=rows), context)
        return all_heads
    predicted = _bits(shard, first, stop)
    predicted[heads] = False
    found: Rows = np.logical_not(predicted.reshape(rows, context).any(axis=1))
    return found


def _any_learned(shard: Shard, pieces: npt.NDArray[np.void]) -> Rows:
    """For each piece of documents whether one of its labels is learned."""
    bits = np.append(_bits(shard, 0, len(shard.tokens)), False)
    first = pieces["first"].astype(np.int64) + 1
    edges = np.stack((first, first + pieces["length"].astype(np.int64)), axis=1).ravel()
    found: Rows = np.logical_or.reduceat(bits, edges)[::2]
    return found


def _bits(shard: Shard, first: int, stop: int) -> Rows:
    assert shard.learned is not None
    low = first // 8
    bits = np.unpackbits(shard.learned[low : -(-stop // 8)], bitorder="little")
    return bits[first - 8 * low : stop - 8 * low].view(np.bool_)
