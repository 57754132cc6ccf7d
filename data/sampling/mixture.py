"""Which source the sample at a position comes from: after any number of samples, every source has had its share to
within one sample, whatever the weights and however they change. O(1) to enter at any position.

A source's share grows with its weight. Its i-th sample may be drawn once its share exceeds i and must have been by the
time its share is i + 1; among those that may, the one that must soonest is drawn. That order meets every deadline
(earliest deadline first is optimal for unit jobs; the windows are those of Baruah, Cohen, Plaxton and Varvel 1996,
"Proportionate progress"), so no count is ever a whole sample away from its share. With weights that are whole numbers
the order repeats, so one turn of it, kept as a table, serves for all of a stage.
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
    """The same proportions in whole numbers: exact where numbers up to FINEST can say it, else to the nearest 1/FINEST.

    Raises DataError for a weight that is negative or too small to be told from none, or if all are zero.
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
class Stage:
    """From sample `start` on, sources are drawn by these weights (whole numbers, one a source)."""

    start: int
    weights: tuple[int, ...]


@dataclass(frozen=True)
class _Turn:
    """A stretch of the order: the source of each sample, and how many of that source came before it in the stretch."""

    source: npt.NDArray[np.int16]
    rank: npt.NDArray[np.int32]
    counts: Ids

    @staticmethod
    def of(source: list[int], sources: int) -> _Turn:
        array = np.array(source, dtype=np.int16)
        rank = np.zeros(len(array), dtype=np.int32)
        for k in range(sources):
            here = array == k
            rank[here] = np.arange(here.sum())
        return _Turn(array, rank, np.bincount(array, minlength=sources).astype(np.int64))


@dataclass(frozen=True)
class _Laid:
    """A stage worked out: an opening, then one turn over and over, then a close of its own where another stage follows
    (what must soon be drawn depends on what comes next). `before`: draws of every source before the stage."""

    start: int
    before: Ids
    opening: _Turn
    turn: _Turn
    turns: int
    close: _Turn

    def locate(self, at: Ids) -> tuple[Ids, Ids]:
        source, draw = np.empty_like(at), np.empty_like(at)
        first, period = len(self.opening.source), max(1, len(self.turn.source))
        last = first + period * self.turns
        parts = (
            (self.opening, at < first, 0, np.zeros_like(at), at),
            (self.turn, (at >= first) & (at < last), 1, (at - first) // period, (at - first) % period),
            (self.close, at >= last, 1, np.full_like(at, self.turns), at - last),
        )
        for part, here, opened, turns, inside in parts:
            if here.any():
                source[here] = part.source[inside[here]]
                base = self.before + opened * self.opening.counts
                draw[here] = base[source[here]] + turns[here] * self.turn.counts[source[here]] + part.rank[inside[here]]
        return source, draw


@dataclass(frozen=True)
class Mixture:
    """The order of sources: stages one after another, from sample 0 to `end`.

    Build with `mix`. `names` are the sources; `stages` start at 0 and have weights that are not all zero.
    """

    names: tuple[str, ...]
    stages: tuple[Stage, ...]
    end: int = FOREVER
    _laid: list[_Laid] = field(default_factory=list, compare=False, repr=False)

    @cached_property
    def _starts(self) -> Ids:
        return np.array([stage.start for stage in self.stages], dtype=np.int64)

    def locate(self, positions: Ids) -> tuple[Ids, Ids]:
        """Source, and how many were drawn from it before, of the samples at these positions (each under `end`)."""
        if len(self.names) == 1:
            return np.zeros_like(positions), positions
        source, draw = np.empty_like(positions), np.empty_like(positions)
        which = np.searchsorted(self._starts, positions, side="right") - 1
        for number in np.unique(which):
            here = which == number
            laid = self._lay(int(number))
            source[here], draw[here] = laid.locate(positions[here] - laid.start)
        return source, draw

    def counts(self, position: int) -> Ids:
        """Samples drawn from each source before `position`."""
        if len(self.names) == 1 or not position:
            return np.array([position] + [0] * (len(self.names) - 1), dtype=np.int64)
        laid = self._lay(int(np.searchsorted(self._starts, position - 1, side="right")) - 1)
        first, period = len(laid.opening.source), max(1, len(laid.turn.source))
        at = position - laid.start
        turns, inside = divmod(min(max(0, at - first), period * laid.turns), period)
        told = laid.before + turns * laid.turn.counts
        rest = at - first - period * laid.turns
        for part, length in ((laid.opening, min(at, first)), (laid.turn, inside), (laid.close, max(0, rest))):
            told = told + np.bincount(part.source[:length], minlength=len(self.names))
        return told

    def shares(self, position: int) -> tuple[Fraction, ...]:
        """What each source is due of the samples before `position`; all add up to it."""
        due = [Fraction(0)] * len(self.names)
        for stage, stop in zip(self.stages, [*(s.start for s in self.stages), self.end][1:], strict=True):
            length = min(position, stop) - stage.start
            if length > 0:
                total = sum(stage.weights)
                due = [d + Fraction(w * length, total) for d, w in zip(due, stage.weights, strict=True)]
        return tuple(due)

    def _lay(self, number: int) -> _Laid:
        while len(self._laid) <= number:
            self._laid.append(_lay(self, len(self._laid)))
        return self._laid[number]


def mix(names: Sequence[str], stages: Sequence[Stage], caps: Sequence[int | None]) -> Mixture:
    """The mixture in which source k gives `caps[k]` samples at most (None: no end): where its share reaches that, its
    weight is 0 from there on and the others' count alone. It ends where no source is left."""
    due, out = [Fraction(0)] * len(names), list[Stage]()
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
                out.append(Stage(at, weights))
            at = until
    return Mixture(tuple(names), tuple(out), FOREVER)


def _lay(mixture: Mixture, number: int) -> _Laid:
    stage, sources = mixture.stages[number], len(mixture.names)
    following = mixture.stages[number + 1].start if number + 1 < len(mixture.stages) else None
    length = None if following is None else following - stage.start
    counts = mixture.counts(stage.start)
    lag = [due - int(c) for due, c in zip(mixture.shares(stage.start), counts, strict=True)]
    drawer = _Drawer(lag, stage.weights)
    period = sum(stage.weights)
    # A draw looks no further ahead than the rarest source's next: only so near the end does what follows matter.
    sight = math.ceil(period / min(w for w in stage.weights if w)) + 2
    free = None if length is None else max(0, length - sight)
    opening: list[int] = []
    seen: dict[tuple[int, ...], int] = {}
    while drawer.state() not in seen and (free is None or len(opening) + period <= free):
        seen[drawer.state()] = len(opening)
        opening += drawer.draw(period)
    since = seen.get(drawer.state())
    turn = [] if since is None else opening[since:]
    opening = opening if since is None else opening[:since]
    turns = ((FOREVER if free is None else free) - len(opening)) // len(turn) if turn else 0
    close: list[int] = []
    if length is not None:
        done = len(opening) + turns * len(turn)
        drawn = np.bincount(opening, minlength=sources) + turns * np.bincount(np.array(turn, int), minlength=sources)
        close = _closing(mixture, number, done, [int(c) for c in counts + drawn], length - done)
    before = np.asarray(counts, dtype=np.int64)
    return _Laid(stage.start, before, _Turn.of(opening, sources), _Turn.of(turn, sources), turns, _Turn.of(close, sources))


class _Drawer:
    """Draws sample after sample under weights that stay, from sources that are `lag` behind their shares."""

    def __init__(self, lag: Sequence[Fraction], weights: Sequence[int]) -> None:
        self.lag, self.weights, self.total = lag, weights, sum(weights)
        self.at, self.drawn = 0, [0] * len(weights)
        self.waiting: list[tuple[int, int]] = []
        self.ready: list[tuple[float, int]] = []
        for k in range(len(weights)):
            self._next(k)

    def _next(self, k: int) -> None:
        ahead, weight = self.drawn[k] - self.lag[k], self.weights[k]
        if weight:
            heapq.heappush(self.waiting, (math.floor(ahead * self.total / weight), k))
        elif ahead < 0:  # no longer drawn by weight, but still owed a part of a sample: it may, and need not, come
            heapq.heappush(self.waiting, (0, k))

    def _due(self, k: int) -> float:
        weight = self.weights[k]
        return math.ceil((self.drawn[k] + 1 - self.lag[k]) * self.total / weight) if weight else math.inf

    def state(self) -> tuple[int, ...]:
        """What the draws to come depend on, at the end of a turn: how far ahead each source is of its weight."""
        turns = self.at // self.total
        return tuple(d - turns * w for d, w in zip(self.drawn, self.weights, strict=True))

    def draw(self, samples: int) -> list[int]:
        out = []
        for _ in range(samples):
            while self.waiting and self.waiting[0][0] <= self.at:
                _, k = heapq.heappop(self.waiting)
                heapq.heappush(self.ready, (self._due(k), k))
            _, k = heapq.heappop(self.ready)
            out.append(k)
            self.at += 1
            self.drawn[k] += 1
            self._next(k)
        return out


def _closing(mixture: Mixture, number: int, done: int, drawn: list[int], length: int) -> list[int]:
    """The last `length` samples of a stage, drawn with the stages after it in sight."""
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
