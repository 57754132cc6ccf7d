"""The batch at step n, as a function of (data, seed, n): the position in the data is one integer, the samples consumed.

Each rank reads its own rows, and its own columns of them, ahead of the step in one thread; whatever the number of ranks,
their rows together are the same global batch.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mikoshi.data.dataset.rows import Batch, Columns, Ids, Take, Where, read_rows
from mikoshi.data.dataset.split import Corpus
from mikoshi.data.errors import DataError, StorageError
from mikoshi.data.io.numbers import text, whole
from mikoshi.data.loader.buffers import Buffers
from mikoshi.data.loader.prefetch import prefetched
from mikoshi.data.sampling.sampler import Course, Samples, Skips

_TOGETHER = 1 << 17
"""Tokens that are read together where a batch has fewer: rows cost less in company."""
_LOOKED_AT = 64
_KEPT = 64
"""Steps whose digests are kept, so that a resumed run can follow them again."""
_FOLLOWED = 1 << 10
"""Steps that are followed at most: other versions kept as many more as they read ahead."""


def read_samples(
    course: Course, samples: Samples, rows: int, document_mask: bool, columns: Columns | None = None, take: Take = np.empty
) -> Batch:
    """These samples as rows, padded to as many as `rows`. Raises DataError for those of a source that the run no longer has,
    and for ids beyond the data's vocabulary."""
    if len(samples) and samples.source.max() >= len(course.corpora):
        gone = course.mixture.names[int(samples.source.max())]
        raise DataError(f"data.mixture: these samples came from {gone!r}, which is not in the mixture any more: name it again")
    places = [
        course.corpora[source].where(shard, row)
        for source, shard, row in zip(samples.source.tolist(), samples.shard.tolist(), samples.row.tolist(), strict=True)
    ]
    batch = read_rows(places, rows, course.context, document_mask, columns, course.pieces(samples.position), take)
    return _within(course.corpora[0].info.vocab, batch, places)


def _within(vocab: int, batch: Batch, places: Sequence[Where]) -> Batch:
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
    """Training batches: `batch(step)` for any step, past or future, of which rank r of `world` reads its own rows, and of
    those the `columns` that it holds (None: all). Where `world` does not divide `global_batch`, the last ranks have rows
    that are padding."""

    course: Course
    global_batch: int
    rank: int
    world: int
    document_mask: bool
    columns: Columns | None = None
    _digests: dict[int, str] = field(default_factory=dict, compare=False, repr=False)
    _buffers: Buffers = field(default_factory=Buffers, compare=False, repr=False)
    _turn: threading.Lock = field(default_factory=threading.Lock, compare=False, repr=False)

    @property
    def skips(self) -> Skips:
        return self.course.skips

    @property
    def rows(self) -> int:
        return -(-self.global_batch // self.world)

    def samples(self, step: int) -> Samples:
        """The whole global batch's samples."""
        return self.course.samples(step * self.global_batch, (step + 1) * self.global_batch)

    def batch(self, step: int) -> Batch:
        """This rank's part of the global batch at `step`, [rows, T]."""
        samples = self.samples(step)
        mine = samples.part(min(self.rank * self.rows, len(samples)), min((self.rank + 1) * self.rows, len(samples)))
        return read_samples(self.course, mine, self.rows, self.document_mask, self.columns)

    def stream(
        self, start: int, stop: int, ready: Callable[[Batch], Batch] = lambda batch: batch, ahead: int = 2
    ) -> Generator[Batch, None, None]:
        """Batches of steps start..stop-1 as `ready` makes them, each read by one thread while those before it are in use:
        `ahead` at most wait. Every step's samples go into the digest."""

        together = max(1, _TOGETHER // (self.rows * self.course.context))
        read: dict[int, Batch] = {}
        alone = start  # the first, so that it comes at once; later on, those among which one cannot be read

        def taken(step: int) -> Batch:
            nonlocal alone
            self._fetch_soon(step, stop)
            self._digests[step + 1] = self.course.digest(self.samples(step), self._digests.get(step, ""))
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
            with self._turn:
                batch = taken(step)
            return ready(batch)

        return prefetched(make, start, stop, ahead)

    def _batches(self, step: int, count: int) -> dict[int, Batch]:
        """This rank's part of several global batches, read together."""
        size = self.global_batch
        mine = [np.arange(s * size, (s + 1) * size)[self.rank * self.rows :][: self.rows] for s in range(count)]
        whole = self.course.samples(step * size, (step + count) * size)
        if any(len(own) < self.rows for own in mine):  # rows of padding
            return {step: self.batch(step)}
        samples, rows, take = whole.take(np.concatenate(mine)), count * self.rows, self._buffers.take
        batch = read_samples(self.course, samples, rows, self.document_mask, self.columns, take)
        return {step + s: batch.rows(s * self.rows, (s + 1) * self.rows) for s in range(count)}

    def go_on(self, step: int, digest: str) -> None:
        """The next step is `step`, and what was consumed before it has this digest."""
        with self._turn:  # a read that was left behind has ended
            self._digests.clear()
            self._digests[step] = digest

    def state(self, step: int, _total: object = None) -> dict[str, Any]:
        """What a resumed run checks: the digest of all samples before `step`, that of those before an earlier step, and on
        rank 0 one of the very tokens of the last batch."""
        digests = dict(self._digests)
        earlier = min(s for s in digests if step - _KEPT <= s <= step)
        content = self.content(step - 1) if step and self.rank == 0 else ""
        return {"digest": digests[step], "earlier": {"step": earlier, "digest": digests[earlier]}, "content": content}

    def follow(self, state: Mapping[str, Any], step: int) -> None:
        """Find the last steps' samples and, on rank 0, read the last batch again; then go on with `step`. Raises DataError
        if they are not those that were consumed. Where some came from a source that the run no longer has, there is
        nothing to compare."""
        earlier, was = state["earlier"], text(state["digest"], "digest")
        first = whole(earlier["step"], "earlier.step", max(0, step - _FOLLOWED), step)
        digest = text(earlier["digest"], "earlier.digest")
        if first < step and self._gone(first, step):
            self.go_on(step, was)
            return
        for before in range(first, step):
            digest = self.course.digest(self.samples(before), digest)
        if digest != was:
            raise DataError(
                f"data: the samples of steps {first} to {step} are not those that the run consumed (digest "
                f"{digest[:12]}, was {was[:12]}): the order has changed; use the version that began the run"
            )
        if step and self.rank == 0 and self.content(step - 1) != state["content"]:
            raise DataError(
                f"data.path: the tokens of step {step} are not those that the run consumed: a shard was altered; "
                "`mikoshi data verify` names it"
            )
        self.go_on(step, digest)

    def _gone(self, start: int, stop: int) -> bool:
        """Whether samples of these steps came from a source that the run no longer has."""
        samples = self.course.samples(start * self.global_batch, stop * self.global_batch)
        return int(samples.source.max()) >= len(self.course.corpora)

    def content(self, step: int) -> str:
        """Digest of the very tokens and labels of the global batch at a step: of up to 64 of its rows."""
        samples = self.samples(step).take(np.unique(np.linspace(0, self.global_batch - 1, _LOOKED_AT).astype(np.int64)))
        batch = read_samples(self.course, samples, len(samples), self.document_mask)
        return hashlib.sha256(batch.tokens.tobytes() + batch.labels.tobytes()).hexdigest()

    def _fetch_soon(self, step: int, stop: int) -> None:
        """Tell corpora that are kept elsewhere which shards this rank's coming rows are in, those before step `stop`."""
        for k, corpus in enumerate(self.course.corpora):
            if corpus.dataset.ahead is None:
                continue
            wanted: dict[int, None] = {}
            for later in range(step, min(step + 8, stop)):
                samples = self.samples(later).part(self.rank * self.rows, (self.rank + 1) * self.rows)
                wanted |= dict.fromkeys(samples.shard[samples.source == k].tolist())
            corpus.ahead(list(wanted))


def evaluation_batches(
    corpus: Corpus, rows: int, batches: int, rank: int, world: int, document_mask: bool, columns: Columns | None = None
) -> Iterator[Batch]:
    """The first `batches` global batches of `rows` rows, in the order of the text, the same at every evaluation.

    Where the split ends early, padding rows keep the ranks in step.
    """
    share = -(-rows // world)
    before = np.concatenate(([0], np.cumsum(corpus.counts)))
    for number in range(min(batches, -(-corpus.samples // rows))):
        first = min(number * rows + rank * share, (number + 1) * rows)
        samples: Ids = np.arange(first, min(first + share, (number + 1) * rows, corpus.samples), dtype=np.int64)
        shards = np.searchsorted(before, samples, side="right") - 1
        places = [corpus.where(int(s), int(i)) for s, i in zip(shards, samples - before[shards], strict=True)]
        yield _within(corpus.info.vocab, read_rows(places, share, corpus.context, document_mask, columns), places)
