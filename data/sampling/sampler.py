"""The order of all samples of a run: for any sample its source, shard and row.

Sample g is at position p of the order (g itself, unless positions are skipped). The mixture gives the source at p and how many
samples were drawn from it before, and the source's own order gives the row. Nothing depends on the ranks.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from mikoshi.data.dataset.split import Corpus
from mikoshi.data.errors import DataError
from mikoshi.data.sampling.curriculum import MixtureHistory
from mikoshi.data.sampling.shuffle import ShuffledOrder

Ids = npt.NDArray[np.int64]

_BLOCK = 1 << 13
"""Samples whose places are worked out together: alone, one costs as much as a hundred."""


@dataclass(frozen=True)
class Skips:
    """Positions of the order that are left out: [start, stop) each, ascending and disjoint. Made by `make_skips`."""

    spans: tuple[tuple[int, int], ...] = ()

    def positions(self, samples: Ids) -> Ids:
        """The position of each sample."""
        if not self.spans:
            return samples
        lengths = np.cumsum([0] + [stop - start for start, stop in self.spans])
        firsts = np.array([start for start, _ in self.spans]) - lengths[:-1]
        moved: Ids = samples + lengths[np.searchsorted(firsts, samples, side="right")]
        return moved


def make_skips(spans: Sequence[Sequence[int]]) -> Skips:
    """The positions to leave out; adjacent spans are joined. Raises DataError for an empty span."""
    out: list[tuple[int, int]] = []
    for start, stop in sorted((a, b) for a, b in spans):
        if not 0 <= start < stop:
            raise DataError(f"data.skip: [{start}, {stop}] holds no position: give [first, one past the last]")
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(stop, out[-1][1]))
        else:
            out.append((start, stop))
    return Skips(tuple(out))


@dataclass(frozen=True)
class Samples:
    """For every sample its position in the order, its source, how many of that source came before it, and the shard and row
    it is read from."""

    position: Ids
    source: Ids
    draw: Ids
    shard: Ids
    row: Ids

    def part(self, start: int, stop: int) -> Samples:
        """Samples `start` to `stop`, as views."""
        cut = slice(start, stop)
        return Samples(self.position[cut], self.source[cut], self.draw[cut], self.shard[cut], self.row[cut])

    def take(self, index: Ids) -> Samples:
        """The samples at these indices."""
        return Samples(self.position[index], self.source[index], self.draw[index], self.shard[index], self.row[index])

    def __len__(self) -> int:
        return len(self.position)

    def digest(self, before: str) -> str:
        """The digest of all samples up to these, from that of all samples before."""
        digest = hashlib.sha256(before.encode())
        for numbers in (self.position, self.source, self.draw, self.shard, self.row):
            digest.update(numbers.astype("<i8").tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Sampler:
    """All samples of a run, in order.

    warmup: pairs of a position and the length at which attention and positions restart inside of a row from there on,
        ascending; before the first, rows are whole.
    """

    corpora: tuple[Corpus, ...]
    orders: tuple[ShuffledOrder, ...]
    mixture: MixtureHistory
    skips: Skips = Skips()
    warmup: tuple[tuple[int, int], ...] = ()
    _blocks: OrderedDict[int, Samples] = field(default_factory=OrderedDict, compare=False, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, compare=False, repr=False)

    @property
    def context(self) -> int:
        """Tokens of a row."""
        return self.corpora[0].context

    def samples(self, start: int, stop: int) -> Samples:
        """Samples start..stop-1. Raises DataError if the sources are exhausted before."""
        parts = []
        for number in range(start // _BLOCK, -(-stop // _BLOCK)):
            block, first = self._block(number), number * _BLOCK
            low, high = max(start, first) - first, min(stop, first + _BLOCK) - first
            if high > len(block):
                raise DataError(
                    f"data.mixture: the sources give {first + len(block)} samples in all and sample {stop - 1} is asked for: "
                    "lower train.steps, or raise the sources' epochs"
                )
            parts.append(block.part(low, high))
        if len(parts) == 1:
            return parts[0]
        joined = [np.concatenate([getattr(p, f) for p in parts]) for f in ("position", "source", "draw", "shard", "row")]
        return Samples(*joined)

    def digest(self, samples: Samples, before: str) -> str:
        """The digest of all samples up to these, from that of all samples before. Later changes of the mixture do not alter
        it."""
        return replace(samples, source=self.mixture.numbers[samples.source]).digest(before)

    def pieces(self, positions: Ids) -> list[int] | None:
        """The warm-up's length for rows at these positions; None without a warm-up."""
        if not self.warmup:
            return None
        starts = [start for start, _ in self.warmup]
        at = np.searchsorted(starts, positions, side="right") - 1
        return [self.context if i < 0 else self.warmup[i][1] for i in at.tolist()]

    def _block(self, number: int) -> Samples:
        with self._lock:  # the prefetch thread and whoever looks at another step
            block = self._blocks.get(number)
            if block is None:
                block = self._make_block(number)
                self._blocks[number] = block
                while len(self._blocks) > 4:
                    self._blocks.popitem(last=False)
            return block

    def _make_block(self, number: int) -> Samples:
        positions = self.skips.positions(np.arange(number * _BLOCK, (number + 1) * _BLOCK, dtype=np.int64))
        positions = positions[positions < self.mixture.end]
        source, draw = self.mixture.locate(positions)
        shard, row = np.zeros_like(positions), np.zeros_like(positions)
        for k, order in enumerate(self.orders):
            here = np.flatnonzero(source == k)
            if here.size:
                shard[here], row[here] = order.at(draw[here])
        return Samples(positions, source, draw, shard, row)


def make_sampler(
    corpora: Sequence[Corpus], mixture: MixtureHistory, seed: int, window: int = 0, left_out: Skips = Skips(),
    warmup: Sequence[tuple[int, int]] = (),
) -> Sampler:  # fmt: skip
    """The sampler of a run.

    window: shards whose samples are shuffled together, 0 for all.
    left_out: positions to skip.
    """
    orders = tuple(ShuffledOrder(c.counts, window, f"{seed}:{c.name}" if c.name else str(seed)) for c in corpora)
    return Sampler(tuple(corpora), orders, mixture, left_out, tuple(warmup))
