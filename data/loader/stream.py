"""Batches straight from raw sources, without preparation: the batch at step n is a function of (sources, seed, n), and any
number of ranks continues with the very next row.

Row j of every global batch belongs to lane j // (rows a lane), and a rank reads the lanes of its rows. The state is a small
table with the place of every lane.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from mikoshi.data.dataset.predicted import predicts_nothing
from mikoshi.data.dataset.rows import Batch, ColumnRanges, RowLocation, read_rows
from mikoshi.data.errors import DataError
from mikoshi.data.io.record_fields import RECORD_REMEDY, checked_int, checked_str
from mikoshi.data.loader.lanes import COUNTS, CURSOR, Lane, Stream, chain_digest
from mikoshi.data.loader.prefetch import prefetched
from mikoshi.data.sampling.curriculum import MixtureHistory
from mikoshi.data.sampling.sampler import Skips

Table = npt.NDArray[np.int64]
"""Of every lane: its digest, and of every source its cursor and its counts."""
_WIDTH = CURSOR + COUNTS
_DIGESTS, _COUNTED = (1 << 63) - 1, 1 << 48
"""The largest digest, and more than any number of pieces, documents or tokens."""

_ROWS = ("read", "nothing")
"""What is counted of rows: all, and those in which no token is predicted."""
_KEPT = 8
_REPLAYED = 2
"""Steps that are read again after a resume, to see that they are the same."""


def check_whole_batches(left_out: Skips, global_batch: int) -> None:
    """Raises DataError if a part of a batch is to be skipped, which a stream cannot do."""
    for start, stop in left_out.spans:
        if start % global_batch or stop % global_batch:
            raise DataError(
                f"data.skip: [{start}, {stop}]: a stream skips whole batches: give multiples of train.global_batch "
                f"{global_batch}"
            )


@dataclass
class StreamLoader:
    """The training rows of one rank of `world`, in order from the step at which it started or resumed."""

    streams: tuple[Stream, ...]
    mixture: MixtureHistory
    skips: Skips
    lanes: int
    context: int
    global_batch: int
    rank: int
    world: int
    document_mask: bool
    columns: ColumnRanges | None = None
    warmup: tuple[tuple[int, int], ...] = ()
    most_invalid: float | None = None
    _lanes: dict[int, list[Lane]] = field(default_factory=dict)
    _digests: dict[int, int] = field(default_factory=dict)
    _tables: dict[int, Table] = field(default_factory=dict)
    _read: dict[int, Table] = field(default_factory=dict)  # rows, and those that predict nothing, of this rank up to a step
    _earlier: Table = field(default_factory=lambda: np.zeros(2, np.int64), compare=False)  # of all ranks before these
    _kept: int = _KEPT
    _read_lock: threading.Lock = field(default_factory=threading.Lock, compare=False, repr=False)
    _batch: int = 0  # the batch of the order that is read next: a step's, but for what is skipped

    def __post_init__(self) -> None:
        check_whole_batches(self.skips, self.global_batch)
        self.restart(0, np.zeros((self.lanes, 1 + _WIDTH * len(self.streams)), np.int64))

    @property
    def rows(self) -> int:
        """Rows of a rank, padding included."""
        return -(-self.global_batch // self.world)

    @property
    def _share(self) -> int:
        """Rows of a global batch from each lane."""
        return self.global_batch // self.lanes

    def restart(self, step: int, table: Table) -> None:
        """Continue with `step` from these places of the lanes."""
        with self._read_lock:  # a read that was left behind has ended
            self._restart(step, table)

    def _restart(self, step: int, table: Table) -> None:
        first = min(self.rank * self.rows, self.global_batch)
        last = min(first + self.rows, self.global_batch)
        mine = range(first // self._share, -(-last // self._share)) if first < last else range(0)
        self._lanes, self._digests = {}, {}
        for number in mine:
            self._digests[number] = int(table[number, 0])
            self._lanes[number] = [Lane(stream, number, self.lanes) for stream in self.streams]
            for k, lane in enumerate(self._lanes[number]):
                cursor, counts = np.split(table[number, 1 + _WIDTH * k :][:_WIDTH], [CURSOR])
                piece, document, offset = cursor.tolist()
                lane.seek(piece, document, offset, counts)
        # The lanes stand after the last row that was consumed: what is skipped from there on is yet to be gone past.
        self._batch = self._batch_of(step - 1) + 1 if step else 0
        self._tables, self._read = {step: self._table()}, {step: np.zeros(2, np.int64)}

    def _align_sources(self, lanes: object, sources: Sequence[str], name: str) -> Table:
        """A recorded table of these sources as a table of the current streams; the lanes of a new stream are at its
        beginning. Raises DataError if it is no such table, or has numbers that no loader writes."""
        was = self._parse_table(lanes, 1 + _WIDTH * len(sources), name)
        out = np.zeros((self.lanes, 1 + _WIDTH * len(self.streams)), np.int64)
        out[:, 0] = was[:, 0]
        for k, stream in enumerate(self.streams):
            if stream.name in sources:
                at = sources.index(stream.name)
                out[:, 1 + _WIDTH * k :][:, :_WIDTH] = was[:, 1 + _WIDTH * at :][:, :_WIDTH]
        return out

    def _parse_table(self, lanes: object, width: int, name: str) -> Table:
        if not isinstance(lanes, list) or [len(r) if isinstance(r, list) else -1 for r in lanes] != [width] * self.lanes:
            raise DataError(f"data: the record's {name} are no table of {self.lanes} rows of {width} numbers: {RECORD_REMEDY}")
        most = [_DIGESTS, *[_COUNTED] * (width - 1)]
        return np.array([[checked_int(n, name, 0, m) for n, m in zip(row, most, strict=True)] for row in lanes], dtype=np.int64)

    def _batch_of(self, step: int) -> int:
        return int(self.skips.positions(np.array([step * self.global_batch]))[0]) // self.global_batch

    def _table(self) -> Table:
        """The places of the lanes whose first row is this rank's; zeros elsewhere."""
        out = np.zeros((self.lanes, 1 + _WIDTH * len(self.streams)), np.int64)
        for number, lanes in self._lanes.items():
            if self.rank * self.rows <= number * self._share < (self.rank + 1) * self.rows:
                out[number] = (self._digests[number], *(n for lane in lanes for n in (*lane.cursor(), *lane.left_out)))
        return out

    def stream(
        self, start: int, stop: int, ready: Callable[[Batch], Batch] = lambda batch: batch, ahead: int = 2
    ) -> Generator[Batch, None, None]:
        """Batches of steps start..stop-1, read ahead by one thread; `start` must be the loader's current step.

        ready: applied to each batch by that thread.
        ahead: the most batches that wait.
        """
        self._kept = _KEPT + ahead

        def make(step: int) -> Batch:
            with self._read_lock:
                batch = self.read(step)
            return ready(batch)

        return prefetched(make, start, stop, ahead)

    def read(self, step: int) -> Batch:
        """This rank's rows of `step`, which must be the next step; skipped batches before it are passed over."""
        if step not in self._tables:
            raise DataError(f"a stream goes on with step {max(self._tables)}, not {step}: it cannot go back")
        wanted = self._batch_of(step)
        while self._batch < wanted:
            self._rows(self._batch)
            self._batch += 1
        places = self._rows(wanted)
        self._batch += 1
        position = wanted * self.global_batch
        piece = [length for start, length in self.warmup if start <= position][-1:] or [self.context]
        pieces = piece * len(places) if self.warmup else None
        batch = read_rows(places, self.rows, self.context, self.document_mask, self.columns, pieces)
        self._tables[step + 1] = self._table()
        nothing = sum(predicts_nothing(place, self.context, self.document_mask) for place in places)
        self._read[step + 1] = self._read[step] + np.array([len(places), nothing])
        while len(self._tables) > self._kept:
            del self._read[min(self._tables)], self._tables[min(self._tables)]
        return batch

    def _rows(self, batch: int) -> list[RowLocation]:
        """This rank's rows of a batch. Its lanes advance past all of theirs."""
        positions = np.arange(batch * self.global_batch, (batch + 1) * self.global_batch, dtype=np.int64)
        source, _ = self.mixture.locate(positions)
        first = self.rank * self.rows
        places = []
        for number, lanes in self._lanes.items():
            for j in range(number * self._share, (number + 1) * self._share):
                row = lanes[int(source[j])].row(self.context)
                self._digests[number] = chain_digest(self._digests[number], row)
                if first <= j < first + self.rows:
                    places.append(row)
        return places

    def state(self, step: int, total: Callable[[Table], Table]) -> dict[str, Any]:
        """The places of all lanes after `step` steps and a few before. Collective: `total` sums over the ranks, each row of
        the batch counted once."""
        tables = dict(self._tables)  # another thread reads ahead
        earlier = max([s for s in tables if s <= step - _REPLAYED] or [min(tables)])
        now, before = (total(tables[s]) for s in (step, earlier))
        return {
            "sources": [stream.name for stream in self.streams],
            "lanes": now.tolist(),
            "earlier": {"step": earlier, "lanes": before.tolist()},
            "left_out": self._left_out(now),
            "rows": dict(zip(_ROWS, (self._earlier + total(self._read[step])).tolist(), strict=True)),
        }

    def _left_out(self, table: Table) -> dict[str, int]:
        """Documents of all lanes used, and left out by reason. Raises DataError if more are unreadable than allowed."""
        counts = table[:, 1:].reshape(self.lanes, len(self.streams), _WIDTH)[:, :, CURSOR:].sum((0, 1)).tolist()
        used, unreadable, most = counts[0], counts[1], self.most_invalid
        if most is not None and unreadable > (most if most >= 1 or most == 0 else most * (used + unreadable)):
            raise DataError(
                f"data.max_invalid = {most:g}: {unreadable} of {used + unreadable} documents cannot be read: "
                + ("; ".join(self.names[:3]) or "other ranks read them")
            )
        return dict(zip(("used", "unreadable", "empty", "dropped"), counts, strict=True))

    @property
    def names(self) -> list[str]:
        """The first documents that this rank could not read."""
        return [name for lanes in self._lanes.values() for lane in lanes for name in lane.names]

    def replay(self, state: Mapping[str, Any], step: int) -> None:
        """Read the last steps again, compare them with a state, and continue with `step`.

        Raises DataError if the rows are not those that were consumed. Nothing is read again if the run no longer has one of the
        sources.
        """
        earlier, sources = state["earlier"], [checked_str(name, "sources") for name in state["sources"]]
        rows = state.get("rows", dict.fromkeys(_ROWS, 0))  # other versions counted none
        self._earlier = np.array([checked_int(rows[key], f"rows.{key}", 0, _COUNTED) for key in _ROWS], dtype=np.int64)
        first = checked_int(earlier["step"], "earlier.step", max(0, step - _KEPT), step)
        table = self._align_sources(state["lanes"], sources, "lanes")
        if not {stream.name for stream in self.streams}.issuperset(sources):
            self.restart(step, table)
            return
        self.restart(first, self._align_sources(earlier["lanes"], sources, "earlier.lanes"))
        for replayed in range(first, step):
            self.read(replayed)
        for number, lanes in self._lanes.items():
            found = [self._digests[number], *(int(n) for lane in lanes for n in (*lane.cursor(), *lane.left_out))]
            if found != table[number].tolist():
                raise DataError(
                    f"data.source: the rows of steps {first} to {step} are not those that the run consumed (lane "
                    f"{number}): a source's files have changed; put them back, or give another run.name"
                )
        self.restart(step, table)
