"""Batches straight from raw sources, with no preparation: the batch at step n is a function of (sources, seed, n), and
any number of ranks goes on with the very next row.

Row j of every global batch belongs to lane j // (rows a lane): a rank reads the lanes that its rows are of. The state is
where every lane stands, one small table.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from mikoshi.data.dataset.predicted import is_nothing
from mikoshi.data.dataset.rows import Batch, Columns, Where, read_rows
from mikoshi.data.errors import DataError
from mikoshi.data.io.numbers import WAY, text, whole
from mikoshi.data.loader.lanes import COUNTS, CURSOR, Lane, Stream, chained
from mikoshi.data.loader.prefetch import prefetched
from mikoshi.data.sampling.curriculum import History
from mikoshi.data.sampling.sampler import Skips

Table = npt.NDArray[np.int64]
"""Of every lane: its digest, and of every source its cursor and its counts."""
_WIDTH = CURSOR + COUNTS
_DIGESTS, _COUNTED = (1 << 63) - 1, 1 << 48
"""The largest digest, and more than any number of pieces, documents or tokens."""

_ROWS = ("read", "nothing")
"""What is counted of rows: all, and those in which no token is predicted."""
_KEPT = 8
_AGAIN = 2
"""Steps that are read again after a resume, to see that they are the same."""


def check_whole_batches(left_out: Skips, global_batch: int) -> None:
    """Raises DataError for what a stream cannot skip: a part of a batch."""
    for start, stop in left_out.spans:
        if start % global_batch or stop % global_batch:
            raise DataError(
                f"data.skip: [{start}, {stop}]: a stream skips whole batches: give multiples of train.global_batch "
                f"{global_batch}"
            )


@dataclass
class StreamLoader:
    """The training rows of rank r of `world`, in order from the step that it went on from."""

    streams: tuple[Stream, ...]
    mixture: History
    skips: Skips
    lanes: int
    context: int
    global_batch: int
    rank: int
    world: int
    document_mask: bool
    columns: Columns | None = None
    warmup: tuple[tuple[int, int], ...] = ()
    most_invalid: float | None = None
    _lanes: dict[int, list[Lane]] = field(default_factory=dict)
    _digests: dict[int, int] = field(default_factory=dict)
    _tables: dict[int, Table] = field(default_factory=dict)
    _read: dict[int, Table] = field(default_factory=dict)  # rows, and those that predict nothing, of this rank up to a step
    _earlier: Table = field(default_factory=lambda: np.zeros(2, np.int64), compare=False)  # of all ranks before these
    _kept: int = _KEPT
    _turn: threading.Lock = field(default_factory=threading.Lock, compare=False, repr=False)
    _batch: int = 0  # the batch of the order that is read next: a step's, but for what is skipped

    def __post_init__(self) -> None:
        check_whole_batches(self.skips, self.global_batch)
        self.restart(0, np.zeros((self.lanes, 1 + _WIDTH * len(self.streams)), np.int64))

    @property
    def rows(self) -> int:
        return -(-self.global_batch // self.world)

    @property
    def _share(self) -> int:
        """Rows of a global batch that a lane gives."""
        return self.global_batch // self.lanes

    def restart(self, step: int, table: Table) -> None:
        """Go on with `step` from where the lanes stand."""
        with self._turn:  # a read that was left behind has ended
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
                lane.go_to(piece, document, offset, counts)
        # The lanes stand after the last row that was consumed: what is skipped from there on is yet to be gone past.
        self._batch = self._batch_of(step - 1) + 1 if step else 0
        self._tables, self._read = {step: self._table()}, {step: np.zeros(2, np.int64)}

    def _of_streams(self, lanes: object, sources: Sequence[str], name: str) -> Table:
        """A record's table of these sources as one of the streams there are now; a new one's lanes stand at its beginning.
        Raises DataError if it is no such table, or holds numbers that no loader writes."""
        was = self._told_table(lanes, 1 + _WIDTH * len(sources), name)
        out = np.zeros((self.lanes, 1 + _WIDTH * len(self.streams)), np.int64)
        out[:, 0] = was[:, 0]
        for k, stream in enumerate(self.streams):
            if stream.name in sources:
                at = sources.index(stream.name)
                out[:, 1 + _WIDTH * k :][:, :_WIDTH] = was[:, 1 + _WIDTH * at :][:, :_WIDTH]
        return out

    def _told_table(self, lanes: object, width: int, name: str) -> Table:
        if not isinstance(lanes, list) or [len(r) if isinstance(r, list) else -1 for r in lanes] != [width] * self.lanes:
            raise DataError(f"data: the record's {name} are no table of {self.lanes} rows of {width} numbers: {WAY}")
        most = [_DIGESTS, *[_COUNTED] * (width - 1)]
        return np.array([[whole(n, name, 0, m) for n, m in zip(row, most, strict=True)] for row in lanes], dtype=np.int64)

    def _batch_of(self, step: int) -> int:
        return int(self.skips.positions(np.array([step * self.global_batch]))[0]) // self.global_batch

    def _table(self) -> Table:
        """Where the lanes stand whose first row is this rank's; zeros elsewhere."""
        out = np.zeros((self.lanes, 1 + _WIDTH * len(self.streams)), np.int64)
        for number, lanes in self._lanes.items():
            if self.rank * self.rows <= number * self._share < (self.rank + 1) * self.rows:
                out[number] = (self._digests[number], *(n for lane in lanes for n in (*lane.cursor(), *lane.left_out)))
        return out

    def stream(
        self, start: int, stop: int, ready: Callable[[Batch], Batch] = lambda batch: batch, ahead: int = 2
    ) -> Generator[Batch, None, None]:
        """Batches of steps start..stop-1 as `ready` makes them, read ahead by one thread; `start` is the step that the
        loader stands at."""
        self._kept = _KEPT + ahead

        def make(step: int) -> Batch:
            with self._turn:
                batch = self.read(step)
            return ready(batch)

        return prefetched(make, start, stop, ahead)

    def read(self, step: int) -> Batch:
        """This rank's rows of the next step, which must be `step`; those of skipped batches before it are gone past."""
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
        nothing = sum(is_nothing(place, self.context, self.document_mask) for place in places)
        self._read[step + 1] = self._read[step] + np.array([len(places), nothing])
        while len(self._tables) > self._kept:
            del self._read[min(self._tables)], self._tables[min(self._tables)]
        return batch

    def _rows(self, batch: int) -> list[Where]:
        """This rank's rows of a batch, with its lanes gone past all of theirs."""
        positions = np.arange(batch * self.global_batch, (batch + 1) * self.global_batch, dtype=np.int64)
        source, _ = self.mixture.locate(positions)
        first = self.rank * self.rows
        places = []
        for number, lanes in self._lanes.items():
            for j in range(number * self._share, (number + 1) * self._share):
                row = lanes[int(source[j])].row(self.context)
                self._digests[number] = chained(self._digests[number], row)
                if first <= j < first + self.rows:
                    places.append(row)
        return places

    def state(self, step: int, total: Callable[[Table], Table]) -> dict[str, Any]:
        """Where every lane stands after `step` steps and a few before. Collective: `total` adds up over the ranks, each row
        of the batch counted once."""
        tables = dict(self._tables)  # another thread reads ahead
        earlier = max([s for s in tables if s <= step - _AGAIN] or [min(tables)])
        now, before = (total(tables[s]) for s in (step, earlier))
        return {
            "sources": [stream.name for stream in self.streams],
            "lanes": now.tolist(),
            "earlier": {"step": earlier, "lanes": before.tolist()},
            "left_out": self._left_out(now),
            "rows": dict(zip(_ROWS, (self._earlier + total(self._read[step])).tolist(), strict=True)),
        }

    def _left_out(self, table: Table) -> dict[str, int]:
        """Documents of all lanes used, and left out by reason. Raises DataError for more unreadable ones than may be."""
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

    def follow(self, state: Mapping[str, Any], step: int) -> None:
        """Read the last steps again, compare, and go on with `step`. Raises DataError if the rows are not those that were
        consumed. Where the run has a source no more, there is nothing to read again."""
        earlier, sources = state["earlier"], [text(name, "sources") for name in state["sources"]]
        rows = state.get("rows", dict.fromkeys(_ROWS, 0))  # other versions counted none
        self._earlier = np.array([whole(rows[key], f"rows.{key}", 0, _COUNTED) for key in _ROWS], dtype=np.int64)
        first = whole(earlier["step"], "earlier.step", max(0, step - _KEPT), step)
        table = self._of_streams(state["lanes"], sources, "lanes")
        if not {stream.name for stream in self.streams}.issuperset(sources):
            self.restart(step, table)
            return
        self.restart(first, self._of_streams(earlier["lanes"], sources, "earlier.lanes"))
        for again in range(first, step):
            self.read(again)
        for number, lanes in self._lanes.items():
            told = [self._digests[number], *(int(n) for lane in lanes for n in (*lane.cursor(), *lane.left_out))]
            if told != table[number].tolist():
                raise DataError(
                    f"data.source: the rows of steps {first} to {step} are not those that the run consumed (lane "
                    f"{number}): a source's files have changed; put them back, or give another run.name"
                )
        self.restart(step, table)
