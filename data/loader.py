"""The batch at step n, as a function of (data fingerprint, seed, n): the position in the data is one integer.

Shapes: rows of T tokens. A row is T + 1 consecutive tokens of one shard, cut into inputs and labels.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data.errors import DataError
from data.order import permute
from data.shards import DatasetInfo, Shard, open_shard, read_index

IGNORED = -100
"""Label of a position that is not predicted. The same value as in torch's cross-entropy."""

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """Some rows, int64 [rows, T] each. `docs` numbers the documents in a row and `positions` counts inside each;
    both None when rows are read as one document."""

    tokens: Ids
    labels: Ids
    docs: Ids | None
    positions: Ids | None

    def rows(self, start: int, stop: int) -> Batch:
        docs = None if self.docs is None else self.docs[start:stop]
        positions = None if self.positions is None else self.positions[start:stop]
        return Batch(self.tokens[start:stop], self.labels[start:stop], docs, positions)

    def part(self, index: Ids) -> Batch:
        """Some positions of every row; `docs` then numbers documents of those positions only."""
        docs = None if self.docs is None else self.docs[:, index]
        shape = self.tokens.shape
        positions = np.broadcast_to(np.arange(shape[1]), shape) if self.positions is None else self.positions
        return Batch(self.tokens[:, index], self.labels[:, index], docs, np.ascontiguousarray(positions[:, index]))


@dataclass(frozen=True)
class Split:
    """An open split of a dataset, seen as samples of T tokens that never cross a shard.

    `starts` is the number of samples before each shard, and at the end the number of all.
    """

    shards: tuple[Shard, ...]
    starts: Ids
    context: int

    @property
    def samples(self) -> int:
        return int(self.starts[-1])


def open_split(folder: Path, split: str, context: int) -> tuple[Split, DatasetInfo]:
    """Open a prepared dataset's split for rows of `context` tokens. Raises DataError if there is not one whole row."""
    info = read_index(folder)
    if split not in info.splits:
        raise DataError(f"data.path: {folder} has no split {split!r}; it has {', '.join(info.splits)}")
    shards = tuple(open_shard(folder / s.file, s) for s in info.splits[split])
    starts = np.cumsum([0] + [max(0, (len(s.tokens) - 1) // context) for s in shards], dtype=np.int64)
    if starts[-1] == 0:
        tokens = info.tokens(split)
        raise DataError(f"data.path: the {split} split of {folder} has {tokens} tokens, less than one row of {context} + 1")
    return Split(shards, starts, context), info


def read_rows(split: Split, samples: Ids, document_mask: bool) -> Batch:
    """The rows of the given samples. A sample of -1 is padding: no position of it is predicted.

    With `document_mask`, the first token of a document is never predicted from the one before it.
    """
    shape = (len(samples), split.context)
    tokens, labels = np.zeros(shape, dtype=np.int64), np.full(shape, IGNORED, dtype=np.int64)
    docs, positions = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    positions[:] = np.arange(split.context)
    where = np.searchsorted(split.starts, samples, side="right") - 1
    for row, (sample, at) in enumerate(zip(samples, where, strict=True)):
        if sample < 0:
            continue
        shard = split.shards[at]
        first = int(sample - split.starts[at]) * split.context
        window = shard.tokens[first : first + split.context + 1]
        tokens[row], labels[row] = window[:-1], window[1:]
        if document_mask:
            # Of the index's own type: otherwise the whole mapped index would be converted for every row.
            span = np.array((first, first + split.context), dtype=shard.ends.dtype)
            begin, end = np.searchsorted(shard.ends, span, side="right")
            cuts = shard.ends[begin:end].astype(np.int64) - first
            labels[row, cuts - 1] = IGNORED
            cuts = cuts[cuts < split.context]
            docs[row, cuts] = 1
            np.cumsum(docs[row], out=docs[row])
            starts = np.concatenate(([0], cuts))
            positions[row] -= starts[docs[row]]
    return Batch(tokens, labels, docs if document_mask else None, positions if document_mask else None)


@dataclass(frozen=True)
class Loader:
    """Training batches: `batch(step)` for any step, past or future. Rank r of `world` reads its own rows only."""

    split: Split
    seed: int
    global_batch: int
    rank: int
    world: int
    document_mask: bool

    def samples(self, step: int) -> Ids:
        """Samples of the whole global batch at a step: each epoch is a permutation of all samples under its own key."""
        g = np.arange(step * self.global_batch, (step + 1) * self.global_batch, dtype=np.int64)
        epochs, index = np.divmod(g, self.split.samples)
        out = np.empty_like(g)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            out[here] = permute(index[here], self.split.samples, f"{self.seed}:epoch:{epoch}")
        return out

    def batch(self, step: int) -> Batch:
        """This rank's rows of the global batch at `step`, [global_batch / world, T]."""
        share = self.global_batch // self.world
        mine = self.samples(step)[self.rank * share : (self.rank + 1) * share]
        return read_rows(self.split, mine, self.document_mask)

    def stream(self, start: int, stop: int) -> Iterator[Batch]:
        """Batches of steps start..stop-1, each read by one thread while the one before it is in use."""
        if start >= stop:
            return
        with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as reader:
            coming = reader.submit(self.batch, start)
            for step in range(start, stop):
                batch = coming.result()
                if step + 1 < stop:
                    coming = reader.submit(self.batch, step + 1)
                yield batch


def evaluation_batches(split: Split, rows: int, batches: int, rank: int, world: int, document_mask: bool) -> Iterator[Batch]:
    """The first `batches` global batches of `rows` rows, in the order of the text, the same at every evaluation.

    Where the split ends early, padding rows keep the ranks in step.
    """
    share = rows // world
    for number in range(min(batches, -(-split.samples // rows))):
        first = number * rows + rank * share
        samples = np.arange(first, first + share, dtype=np.int64)
        yield read_rows(split, np.where(samples < split.samples, samples, -1), document_mask)
