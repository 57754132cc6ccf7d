"""What a run's config asks of its mixture, and what becomes of it when that changes on the way: the past stays as it was.

Positions are places in the order (sampler.py). A history goes into every checkpoint, so that a batch of the past can
always be made again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from mikoshi.data.errors import DataError
from mikoshi.data.io.numbers import MOST, WAY, whole
from mikoshi.data.sampling.mixture import Mixture, Stage, mix, whole_weights

Ids = npt.NDArray[np.int64]
Skipped = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Asked:
    """Weights from sample positions on (one table of source name to weight for each), and the samples that each source
    gives at most (None: no end)."""

    stages: tuple[tuple[int, dict[str, float]], ...]
    caps: dict[str, int | None]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.caps)


@dataclass(frozen=True)
class History:
    """What was asked from which position on, the first from 0: the order of sources of a whole run.

    Within each part, every source's count is within one of its share of that part.
    """

    asked: tuple[tuple[int, Asked], ...]

    @cached_property
    def names(self) -> tuple[str, ...]:
        """All sources: those that are asked for now, then those of the past alone."""
        return tuple(dict.fromkeys(name for _, asked in reversed(self.asked) for name in asked.names))

    @cached_property
    def numbers(self) -> Ids:
        """For each of `names` its number in the run: that of its first mention, which no later change alters."""
        known = list(dict.fromkeys(name for _, asked in self.asked for name in asked.names))
        return np.array([known.index(name) for name in self.names], dtype=np.int64)

    @property
    def end(self) -> int:
        """The first position for which no source is left."""
        since, mixture, _ = self._parts[-1]
        return since + mixture.end

    def locate(self, positions: Ids) -> tuple[Ids, Ids]:
        """Source (its place in `names`), and how many were drawn from it before, of the samples at these positions."""
        if len(self._parts) == 1:
            return self._parts[0][1].locate(positions)
        source, draw = np.empty_like(positions), np.empty_like(positions)
        which = np.searchsorted([since for since, _, _ in self._parts], positions, side="right") - 1
        for number in np.unique(which):
            since, mixture, before = self._parts[number]
            here = which == number
            local, drawn = mixture.locate(positions[here] - since)
            source[here] = np.array([self.names.index(name) for name in mixture.names])[local]
            draw[here] = drawn + np.array([before.get(name, 0) for name in mixture.names])[local]
        return source, draw

    def counts(self, position: int) -> dict[str, int]:
        """Samples drawn from each source before a position."""
        since, mixture, before = [part for part in self._parts if part[0] <= position][-1]
        drawn = dict(zip(mixture.names, mixture.counts(position - since).tolist(), strict=True))
        return {name: before.get(name, 0) + drawn.get(name, 0) for name in self.names}

    def weights(self, position: int) -> dict[str, int]:
        """What each source counts for at a position, in whole numbers."""
        since, mixture, _ = [part for part in self._parts if part[0] <= position][-1]
        stage = [s for s in mixture.stages if s.start <= position - since][-1]
        return dict(zip(mixture.names, stage.weights, strict=True))

    def changed(self, asked: Asked, position: int) -> History:
        """The same before `position`, and something else asked from there on."""
        return History((*((since, old) for since, old in self.asked if since < position), (position, asked)))

    def record(self) -> list[Any]:
        return [[since, asdict(asked)] for since, asked in self.asked]

    @cached_property
    def _parts(self) -> list[tuple[int, Mixture, dict[str, int]]]:
        """Of each part its first position, its mixture counted from there, and what was drawn before it."""
        parts: list[tuple[int, Mixture, dict[str, int]]] = []
        drawn: dict[str, int] = {}
        for number, (since, asked) in enumerate(self.asked):
            passed = [stage for stage in asked.stages if stage[0] <= since][-1:]
            stages = [(0, weights) for _, weights in passed]
            stages += [(start - since, weights) for start, weights in asked.stages if start > since]
            whole = [(start, whole_weights(weights)) for start, weights in stages]
            caps = [None if cap is None else max(0, cap - drawn.get(name, 0)) for name, cap in asked.caps.items()]
            mixture = mix(asked.names, [Stage(start, tuple(w[n] for n in asked.names)) for start, w in whole], caps)
            parts.append((since, mixture, dict(drawn)))
            if number + 1 < len(self.asked):
                counts = mixture.counts(self.asked[number + 1][0] - since).tolist()
                for name, count in zip(asked.names, counts, strict=True):
                    drawn[name] = drawn.get(name, 0) + count
        return parts


def begin(asked: Asked) -> History:
    return History(((0, asked),))


def read_history(record: Sequence[Any]) -> History:
    """What History.record wrote. Raises DataError for positions that are not in order, and for caps that are no numbers."""
    starts = _ascending([since for since, _ in record], "curriculum")
    return History(tuple((since, _read_asked(asked)) for since, (_, asked) in zip(starts, record, strict=True)))


def _read_asked(asked: Mapping[str, Any]) -> Asked:
    starts = _ascending([start for start, _ in asked["stages"]], "stages")
    stages = tuple((start, dict(weights)) for start, (_, weights) in zip(starts, asked["stages"], strict=True))
    caps = {name: None if cap is None else whole(cap, f"caps.{name}") for name, cap in asked["caps"].items()}
    return Asked(stages, caps)


def _ascending(positions: Sequence[object], name: str) -> list[int]:
    """Positions from 0 on, each beyond the one before it."""
    out: list[int] = []
    for number, position in enumerate(positions):
        out.append(whole(position, name, out[-1] + 1 if out else 0, MOST if number else 0))
    if not out:
        raise DataError(f"data: the record's {name} are empty: {WAY}")
    return out


def check_skips(old: Sequence[Sequence[int]], new: Skipped, position: int) -> None:
    """Raises DataError if positions before `position`, which are consumed, would come to be left out or to be back."""

    def past(spans: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
        return [(start, min(stop, position)) for start, stop in spans if start < position]

    if past(old) != past(new):
        raise DataError(
            f"data.skip = {[list(s) for s in new]}: positions before {position} are consumed already, with {past(old)} left "
            f"out: only what begins at {position} or later can be skipped from here"
        )
