"""Which source each sample is from: after any number of samples every source has its share to within one sample, whatever the
weights and however they change. Any position is found in O(1).

A source's share grows with its weight. Its i-th sample may be drawn once its share exceeds i, and must be drawn by the time its
share is i + 1; of the sources that may, the one with the earliest deadline is drawn. That order meets every deadline (earliest
deadline first is optimal for unit jobs; the windows are those of Baruah, Cohen, Plaxton and Varvel 1996, "Proportionate
progress"), so that no count is a whole sample away from its share. With integer weights the order repeats, and one cycle of it,
kept as a table, serves a whole stage.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property

import numpy as np
import numpy.typing as npt

from mikoshi.data.errors import DataError

FINEST = 1 << 14
"""Weights are whole numbers that add up to this at most."""

FOREVER = 1 << 62

Ids = npt.NDArray[np.int64]


def whole_weights(weights: dict[str, float]) -> dict[str, int]:
    """The same proportions as integers: exact if integers up to FINEST can express them, else to the nearest 1/FINEST.

    Raises DataError if a weight is negative or too small to be distinguished from 0, or if all are 0.
    """
    for name, weight in weights.items():
        if not 0 <= weight < math.inf:
            raise DataError(f"data.mixture.{name}.weight = {weight}: give a number that is not negative")
    total = sum(Fraction(str(w)) for w in weights.values())
    if not total:
        raise DataError(f"data.mixture: every weight is 0 ({', '.join(weights)}): give one source a weight above 0")
    exact = {name: Fraction(str(w)) / total for name, w in weights.items()}
    parts = math.lcm(*(share.denominator for share in exact.values()))
    if parts <= FINEST:
        return {name: int(share * parts) for name, share in exact.items()}
    out = {name: round(share * FINEST) for name, share in exact.items()}
    for name, weight in weights.items():
        if weight and not out[name]:
            raise DataError(f"data.mixture.{name}.weight = {weight}: under 1/{2 * FINEST} of all: raise it, or set it to 0")
    return out


@dataclass(frozen=True)
class MixtureStage:
    """From sample `start` on, sources are drawn by these integer weights, one a source."""

    start: int
    weights: tuple[int, ...]


@dataclass(frozen=True)
class _Cycle:
    """A stretch of the order.

    source: the source of each sample.
    rank: how many samples of that source come before it in the stretch.
    counts: samples of each source in the stretch.
    """

    source: npt.NDArray[np.int16]
    rank: npt.NDArray[np.int32]
    counts: Ids

    @staticmethod
    def of(source: list[int], sources: int) -> _Cycle:
        """The stretch with these sources."""
        array = np.array(source, dtype=np.int16)
        rank = np.zeros(len(array), dtype=np.int32)
        for k in range(sources):
            here = array == k
            rank[here] = np.arange(here.sum())
        return _Cycle(array, rank, np.bincount(array, minlength=sources).astype(np.int64))


@dataclass(frozen=True)
class _StageOrder:
    """The order of one stage: an opening, a cycle repeated `repeats` times, and a close if another stage follows (what is
    urgent then depends on that stage).

    before: samples drawn from every source before the stage.
    """

    start: int
    before: Ids
    opening: _Cycle
    cycle: _Cycle
    repeats: int
    close: _Cycle

    def locate(self, at: Ids) -> tuple[Ids, Ids]:
        """Source and draw of the samples at these places of the stage."""
        source, draw = np.empty_like(at), np.empty_like(at)
        first, period = len(self.opening.source), max(1, len(self.cycle.source))
        last = first + period * self.repeats
        parts = (
            (self.opening, at < first, 0, np.zeros_like(at), at),
            (self.cycle, (at >= first) & (at < last), 1, (at - first) // period, (at - first) % period),
            (self.close, at >= last, 1, np.full_like(at, self.repeats), at - last),
        )
        for part, here, opened, cycles, inside in parts:
            if here.any():
                source[here] = part.source[inside[here]]
                base = self.before + opened * self.opening.counts
                draw[here] = base[source[here]] + cycles[here] * self.cycle.counts[source[here]] + part.rank[inside[here]]
        return source, draw


@dataclass(frozen=True)
class Mixture:
    """The order of sources in consecutive stages, from sample 0 to `end`. Made by `make_mixture`.

    names: of the sources.
    stages: the first starts at 0; no stage has only zero weights.
    """

    names: tuple[str, ...]
    stages: tuple[MixtureStage, ...]
    end: int = FOREVER
    _orders: list[_StageOrder] = field(default_factory=list, compare=False, repr=False)

    @cached_property
    def _starts(self) -> Ids:
        return np.array([stage.start for stage in self.stages], dtype=np.int64)

    def locate(self, positions: Ids) -> tuple[Ids, Ids]:
        """For the samples at these positions (each under `end`): the source, and how many were drawn from it before."""
        if len(self.names) == 1:
            return np.zeros_like(positions), positions
        source, draw = np.empty_like(positions), np.empty_like(positions)
        which = np.searchsorted(self._starts, positions, side="right") - 1
        for number in np.unique(which):
            here = which == number
            order = self._stage_order(int(number))
            source[here], draw[here] = order.locate(positions[here] - order.start)
        return source, draw

    def counts(self, position: int) -> Ids:
        """Samples drawn from each source before `position`."""
        if len(self.names) == 1 or not position:
            return np.array([position] + [0] * (len(self.names) - 1), dtype=np.int64)
        order = self._stage_order(int(np.searchsorted(self._starts, position - 1, side="right")) - 1)
        first, period = len(order.opening.source), max(1, len(order.cycle.source))
        at = position - order.start
        cycles, inside = divmod(min(max(0, at - first), period * order.repeats), period)
        drawn = order.before + cycles * order.cycle.counts
        rest = at - first - period * order.repeats
        for part, length in ((order.opening, min(at, first)), (order.cycle, inside), (order.close, max(0, rest))):
            drawn = drawn + np.bincount(part.source[:length], minlength=len(self.names))
        return drawn

    def shares(self, position: int) -> tuple[Fraction, ...]:
        """The exact share of each source in the samples before `position`; the shares add up to it."""
        due = [Fraction(0)] * len(self.names)
        for stage, stop in zip(self.stages, [*(s.start for s in self.stages), self.end][1:], strict=True):
            length = min(position, stop) - stage.start
            if length > 0:
                total = sum(stage.weights)
                due = [d + Fraction(w * length, total) for d, w in zip(due, stage.weights, strict=True)]
        return tuple(due)

    def _stage_order(self, number: int) -> _StageOrder:
        while len(self._orders) <= number:
            self._orders.append(_order_stage(self, len(self._orders)))
        return self._orders[number]


def make_mixture(names: Sequence[str], stages: Sequence[MixtureStage], caps: Sequence[int | None]) -> Mixture:
    """The mixture in which source k gives at most `caps[k]` samples (None: no limit).

    Once its share reaches the cap, a source's weight is 0 and the others' weights apply. The mixture ends when no source is
    left.
    """
    due, out = [Fraction(0)] * len(names), list[MixtureStage]()
    spent = [cap == 0 for cap in caps]
    for stage, stop in zip(stages, [*(s.start for s in stages), FOREVER][1:], strict=True):
        at = stage.start
        while at < stop:
            weights = tuple(0 if gone else w for gone, w in zip(spent, stage.weights, strict=True))
            total = sum(weights)
            if not total:
                return Mixture(tuple(names), tuple(out), at)
            ends = {
                k: at + math.floor((cap - due[k]) * total / weights[k])
                for k, cap in enumerate(caps) if cap is not None and weights[k]
            }  # fmt: skip
            until = min([stop, *ends.values()])
            due = [d + Fraction(w * (until - at), total) for d, w in zip(due, weights, strict=True)]
            spent = [gone or ends.get(k, FOREVER) <= until for k, gone in enumerate(spent)]
            if until > at:
                out.append(MixtureStage(at, weights))
            at = until
    return Mixture(tuple(names), tuple(out), FOREVER)


def _order_stage(mixture: Mixture, number: int) -> _StageOrder:
    stage, sources = mixture.stages[number], len(mixture.names)
    following = mixture.stages[number + 1].start if number + 1 < len(mixture.stages) else None
    length = None if following is None else following - stage.start
    counts = mixture.counts(stage.start)
    lag = [due - int(c) for due, c in zip(mixture.shares(stage.start), counts, strict=True)]
    drawer = _DeadlineScheduler(lag, stage.weights)
    period = sum(stage.weights)
    # A draw looks no further ahead than the rarest source's next: only so near the end does what follows matter.
    horizon = math.ceil(period / min(w for w in stage.weights if w)) + 2
    free = None if length is None else max(0, length - horizon)
    opening: list[int] = []
    seen: dict[tuple[int, ...], int] = {}
    while drawer.state() not in seen and (free is None or len(opening) + period <= free):
        seen[drawer.state()] = len(opening)
        opening += drawer.draw(period)
    cycle_start = seen.get(drawer.state())
    cycle = [] if cycle_start is None else opening[cycle_start:]
    opening = opening if cycle_start is None else opening[:cycle_start]
    repeats = ((FOREVER if free is None else free) - len(opening)) // len(cycle) if cycle else 0
    close: list[int] = []
    if length is not None:
        done = len(opening) + repeats * len(cycle)
        drawn = np.bincount(opening, minlength=sources) + repeats * np.bincount(np.array(cycle, int), minlength=sources)
        close = _closing_draws(mixture, number, done, [int(c) for c in counts + drawn], length - done)
    before = np.asarray(counts, dtype=np.int64)
    return _StageOrder(
        stage.start, before, _Cycle.of(opening, sources), _Cycle.of(cycle, sources), repeats, _Cycle.of(close, sources)
    )


class _DeadlineScheduler:
    """Draws samples under constant weights by earliest deadline first, from sources that are `lag` samples behind their
    shares."""

    def __init__(self, lag: Sequence[Fraction], weights: Sequence[int]) -> None:
        self.lag, self.weights, self.total = lag, weights, sum(weights)
        self.at, self.drawn = 0, [0] * len(weights)
        self.waiting: list[tuple[int, int]] = []
        self.ready: list[tuple[float, int]] = []
        for k in range(len(weights)):
            self._push_next(k)

    def _push_next(self, k: int) -> None:
        ahead, weight = self.drawn[k] - self.lag[k], self.weights[k]
        if weight:
            heapq.heappush(self.waiting, (math.floor(ahead * self.total / weight), k))
        elif ahead < 0:  # no longer drawn by weight, but still owed a part of a sample: it may, and need not, come
            heapq.heappush(self.waiting, (0, k))

    def _due(self, k: int) -> float:
        weight = self.weights[k]
        return math.ceil((self.drawn[k] + 1 - self.lag[k]) * self.total / weight) if weight else math.inf

    def state(self) -> tuple[int, ...]:
        """What future draws depend on at the end of a cycle: how far each source is ahead of its weight."""
        cycles = self.at // self.total
        return tuple(d - cycles * w for d, w in zip(self.drawn, self.weights, strict=True))

    def draw(self, samples: int) -> list[int]:
        """The sources of the next samples."""
        out = []
        for _ in range(samples):
            while self.waiting and self.waiting[0][0] <= self.at:
                _, k = heapq.heappop(self.waiting)
                heapq.heappush(self.ready, (self._due(k), k))
            _, k = heapq.heappop(self.ready)
            out.append(k)
            self.at += 1
            self.drawn[k] += 1
            self._push_next(k)
        return out


def _closing_draws(mixture: Mixture, number: int, done: int, drawn: list[int], length: int) -> list[int]:
    """The last `length` samples of a stage, whose deadlines depend on the stages that follow."""
    stage = mixture.stages[number]
    ahead = [*mixture.stages[number:]]
    stops = [*(s.start for s in ahead), mixture.end][1:]
    origin = stage.start + done
    due = mixture.shares(origin)
    out: list[int] = []

    def last_chance(k: int) -> float:
        """The position by which the next sample of source k must have been drawn."""
        missing, at = drawn[k] + 1 - due[k], origin
        for later, stop in zip(ahead, stops, strict=True):
            rate = Fraction(later.weights[k], sum(later.weights))
            span = stop - max(at, later.start)
            if rate and missing <= rate * span:
                return max(at, later.start) + math.ceil(missing / rate)
            missing, at = missing - rate * span, stop
        return math.inf

    total = sum(stage.weights)
    limits = [last_chance(k) for k in range(len(drawn))]
    for step in range(1, length + 1):
        may = [k for k, w in enumerate(stage.weights) if due[k] + Fraction(w * step, total) > drawn[k]]
        k = min(may, key=lambda k: (limits[k], k))
        out.append(k)
        drawn[k] += 1
        limits[k] = last_chance(k)
    return out
