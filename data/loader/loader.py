"""The batch at step n as a function of (data, seed, n). The position in the data is one integer, the number of samples
consumed.

Each rank reads its own rows, and its own columns of them, ahead of the step in one thread. Whatever the number of ranks, their
rows together are the same global batch.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mikoshi.data.dataset.rows import Allocate, Batch, ColumnRanges, Ids, RowLocation, read_rows
from mikoshi.data.dataset.split import Corpus
from mikoshi.data.errors import DataError, StorageError
from mikoshi.data.io.record_fields import checked_int, checked_str
from mikoshi.data.loader.buffers import Buffers
from mikoshi.data.loader.prefetch import prefetched
from mikoshi.data.sampling.sampler import Sampler, Samples, Skips

_TOGETHER = 1 << 17
"""Tokens that are read together where a batch has fewer: rows cost less in company."""
_LOOKED_AT = 64
_KEPT = 64
"""Steps whose digests are kept, so that a resumed run can follow them again."""
_REPLAYED = 1 << 10
"""Steps that are followed at most: other versions kept as many more as they read ahead."""


def read_samples(
    sampler: Sampler,
    samples: Samples,
    rows: int,
    document_mask: bool,
    columns: ColumnRanges | None = None,
    allocate: Allocate = np.empty,
) -> Batch:
    """These samples as rows, padded to `rows`.

    Raises DataError for samples of a source that the run no longer has, and for ids beyond the vocabulary.
    """
    if len(samples) and samples.source.max() >= len(sampler.corpora):
        gone = sampler.mixture.names[int(samples.source.max())]
        raise DataError(f"data.mixture: these samples came from {gone!r}, which is not in the mixture any more: name it again")
    places = [
        sampler.corpora[source].locate(shard, row)
        for source, shard, row in zip(samples.source.tolist(), samples.shard.tolist(), samples.row.tolist(), strict=True)
    ]
    batch = read_rows(places, rows, sampler.context, document_mask, columns, sampler.pieces(samples.position), allocate)
    return _check_vocabulary(sampler.corpora[0].info.vocab, batch, places)


def _check_vocabulary(vocab: int, batch: Batch, places: Sequence[RowLocation]) -> Batch:
    """The batch. Raises DataError for ids beyond the vocabulary."""
    if batch.tokens.max(initial=0) >= vocab or batch.labels[:, -1].max(initial=0) >= vocab:  # labels are the next tokens
        at = int(np.flatnonzero(np.maximum(batch.tokens, batch.labels).max(1) >= vocab)[0])
        raise DataError(
            f"{places[at].shard.path}: token id {max(batch.tokens[at].max(), batch.labels[at].max())} is beyond the "
            f"vocabulary of {vocab}: the data was not made by its tokenizer, or is damaged; prepare it again"
        )
    return batch


@dataclass(frozen=True)
class Loader:
    """Training batches for any step, past or future.

    rank, world: this rank reads its share of the rows. If `world` does not divide `global_batch`, the last ranks have padding
        rows.
    columns: the columns that it reads (None: all).
    """

    sampler: Sampler
    global_batch: int
    rank: int
    world: int
    document_mask: bool
    columns: ColumnRanges | None = None
    _digests: dict[int, str] = field(default_factory=dict, compare=False, repr=False)
    _buffers: Buffers = field(default_factory=Buffers, compare=False, repr=False)
    _read_lock: threading.Lock = field(default_factory=threading.Lock, compare=False, repr=False)

    @property
    def skips(self) -> Skips:
        """The positions that are left out."""
        return self.sampler.skips

    @property
    def rows(self) -> int:
        """Rows of a rank, padding included."""
        return -(-self.global_batch // self.world)

    def samples(self, step: int) -> Samples:
        """The samples of the whole global batch at a step."""
        return self.sampler.samples(step * self.global_batch, (step + 1) * self.global_batch)

    def batch(self, step: int) -> Batch:
        """This rank's part of the global batch at `step`, [rows, T]."""
        samples = self.samples(step)
        mine = samples.part(min(self.rank * self.rows, len(samples)), min((self.rank + 1) * self.rows, len(samples)))
        return read_samples(self.sampler, mine, self.rows, self.document_mask, self.columns)

    def stream(
        self, start: int, stop: int, ready: Callable[[Batch], Batch] = lambda batch: batch, ahead: int = 2
    ) -> Generator[Batch, None, None]:
        """Batches of steps start..stop-1, read ahead by one thread. Every step's samples go into the digest.

        ready: applied to each batch by that thread.
        ahead: the most batches that wait.
        """

        together = max(1, _TOGETHER // (self.rows * self.sampler.context))
        read: dict[int, Batch] = {}
        alone = start  # the first, so that it comes at once; later on, those among which one cannot be read

        def taken(step: int) -> Batch:
            nonlocal alone
            self._prefetch_shards(step, stop)
            self._digests[step + 1] = self.sampler.digest(self.samples(step), self._digests.get(step, ""))
            self._digests.pop(step - _KEPT - ahead, None)
            count = min(together, stop - step) if step > alone else 1
            if step not in read:
                try:
                    read.update(self._batches(step, count))
                except (DataError, StorageError):
                    if count == 1:
                        raise
                    alone = step + count - 1
            return read.pop(step) if step in read else self.batch(step)

        def make(step: int) -> Batch:
            with self._read_lock:
                batch = taken(step)
            return ready(batch)

        return prefetched(make, start, stop, ahead)

    def _batches(self, step: int, count: int) -> dict[int, Batch]:
        """This rank's part of several global batches, read together."""
        size = self.global_batch
        mine = [np.arange(s * size, (s + 1) * size)[self.rank * self.rows :][: self.rows] for s in range(count)]
        whole = self.sampler.samples(step * size, (step + count) * size)
        if any(len(own) < self.rows for own in mine):  # rows of padding
            return {step: self.batch(step)}
        samples, rows, take = whole.take(np.concatenate(mine)), count * self.rows, self._buffers.take
        batch = read_samples(self.sampler, samples, rows, self.document_mask, self.columns, take)
        return {step + s: batch.slice_rows(s * self.rows, (s + 1) * self.rows) for s in range(count)}

    def resume_at(self, step: int, digest: str) -> None:
        """Continue with `step`, given the digest of all samples before it."""
        with self._read_lock:  # a read that was left behind has ended
            self._digests.clear()
            self._digests[step] = digest

    def state(self, step: int, _total: object = None) -> dict[str, Any]:
        """What a resumed run checks: the digest of all samples before `step`, that before an earlier step, and on rank 0 one
        of the tokens of the last batch."""
        digests = dict(self._digests)
        earlier = min(s for s in digests if step - _KEPT <= s <= step)
        content = self.content_digest(step - 1) if step and self.rank == 0 else ""
        return {"digest": digests[step], "earlier": {"step": earlier, "digest": digests[earlier]}, "content": content}

    def replay(self, state: Mapping[str, Any], step: int) -> None:
        """Compare the last steps with a state, then continue with `step`.

        The samples of the steps since the state's earlier one are determined again, and on rank 0 the last batch is read again.
        Raises DataError if they are not those that were consumed. Nothing is compared if some are from a source that the run no
        longer has.
        """
        earlier, was = state["earlier"], checked_str(state["digest"], "digest")
        first = checked_int(earlier["step"], "earlier.step", max(0, step - _REPLAYED), step)
        digest = checked_str(earlier["digest"], "earlier.digest")
        if first < step and self._from_removed_source(first, step):
            self.resume_at(step, was)
            return
        for before in range(first, step):
            digest = self.sampler.digest(self.samples(before), digest)
        if digest != was:
            raise DataError(
                f"data: the samples of steps {first} to {step} are not those that the run consumed (digest "
                f"{digest[:12]}, was {was[:12]}): the order has changed; use the version that began the run"
            )
        if step and self.rank == 0 and self.content_digest(step - 1) != state["content"]:
            raise DataError(
                f"data.path: the tokens of step {step} are not those that the run consumed: a shard was altered; "
                "`mikoshi data verify` names it"
            )
        self.resume_at(step, digest)

    def _from_removed_source(self, start: int, stop: int) -> bool:
        """Whether samples of these steps are from a source that the run no longer has."""
        samples = self.sampler.samples(start * self.global_batch, stop * self.global_batch)
        return int(samples.source.max()) >= len(self.sampler.corpora)

    def content_digest(self, step: int) -> str:
        """Digest of the tokens and labels of the global batch at a step, from up to 64 of its rows."""
        samples = self.samples(step).take(np.unique(np.linspace(0, self.global_batch - 1, _LOOKED_AT).astype(np.int64)))
        batch = read_samples(self.sampler, samples, len(samples), self.document_mask)
        return hashlib.sha256(batch.tokens.tobytes() + batch.labels.tobytes()).hexdigest()

    def _prefetch_shards(self, step: int, stop: int) -> None:
        """Announce the shards of this rank's coming rows, before step `stop`, to remote corpora."""
        for k, corpus in enumerate(self.sampler.corpora):
            if corpus.dataset.prefetch is None:
                continue
            wanted: dict[int, None] = {}
            for later in range(step, min(step + 8, stop)):
                samples = self.samples(later).part(self.rank * self.rows, (self.rank + 1) * self.rows)
                wanted |= dict.fromkeys(samples.shard[samples.source == k].tolist())
            corpus.prefetch(list(wanted))


def evaluation_batches(
    corpus: Corpus, rows: int, batches: int, rank: int, world: int, document_mask: bool, columns: ColumnRanges | None = None
) -> Iterator[Batch]:
    """The first `batches` global batches of `rows` rows, in the order of the text, the same at every evaluation.

    If the split ends early, padding rows keep the ranks in step.
    """
    share = -(-rows // world)
    before = np.concatenate(([0], np.cumsum(corpus.counts)))
    for number in range(min(batches, -(-corpus.samples // rows))):
        first = min(number * rows + rank * share, (number + 1) * rows)
        samples: Ids = np.arange(first, min(first + share, (number + 1) * rows, corpus.samples), dtype=np.int64)
        shards = np.searchsorted(before, samples, side="right") - 1
        places = [corpus.locate(int(s), int(i)) for s, i in zip(shards, samples - before[shards], strict=True)]
        yield _check_vocabulary(corpus.info.vocab, read_rows(places, share, corpus.context, document_mask, columns), places)
