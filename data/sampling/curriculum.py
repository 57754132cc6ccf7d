"""The mixture that a run's config requests, and its changes during the run: past samples stay as they were.

Positions are places in the order (sampler.py). The history is part of every checkpoint, so that any past batch can be made
again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from mikoshi.data.errors import DataError
from mikoshi.data.io.record_fields import LARGEST, RECORD_REMEDY, checked_int
from mikoshi.data.sampling.mixture import Mixture, MixtureStage, make_mixture, whole_weights

Ids = npt.NDArray[np.int64]
Skipped = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class MixtureRequest:
    """Weights and caps of the sources.

    stages: pairs of the position from which weights apply, and the weight of each source by name.
    caps: the most samples that each source gives (None: no limit).
    """

    stages: tuple[tuple[int, dict[str, float]], ...]
    caps: dict[str, int | None]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the sources."""
        return tuple(self.caps)


@dataclass(frozen=True)
class MixtureHistory:
    """The requests of a run, each with the position from which it applies, the first from 0. It gives the order of sources of
    the whole run.

    Within each part, every source's count is within one of its share of that part.
    """

    requests: tuple[tuple[int, MixtureRequest], ...]

    @cached_property
    def names(self) -> tuple[str, ...]:
        """All sources: those requested now, then those of the past only."""
        return tuple(dict.fromkeys(name for _, request in reversed(self.requests) for name in request.names))

    @cached_property
    def numbers(self) -> Ids:
        """For each of `names` its number in the run: the order of first mention, which later changes do not alter."""
        known = list(dict.fromkeys(name for _, request in self.requests for name in request.names))
        return np.array([known.index(name) for name in self.names], dtype=np.int64)

    @property
    def end(self) -> int:
        """The first position at which no source is left."""
        since, mixture, _ = self._parts[-1]
        return since + mixture.end

    def locate(self, positions: Ids) -> tuple[Ids, Ids]:
        """For the samples at these positions: the source (index in `names`), and how many were drawn from it before."""
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
        """The integer weight of each source at a position."""
        since, mixture, _ = [part for part in self._parts if part[0] <= position][-1]
        stage = [s for s in mixture.stages if s.start <= position - since][-1]
        return dict(zip(mixture.names, stage.weights, strict=True))

    def with_change(self, request: MixtureRequest, position: int) -> MixtureHistory:
        """The same history before `position`, and another request from there on."""
        return MixtureHistory((*((since, old) for since, old in self.requests if since < position), (position, request)))

    def record(self) -> list[Any]:
        """The history as plain values, which `read_history` reads."""
        return [[since, asdict(request)] for since, request in self.requests]

    @cached_property
    def _parts(self) -> list[tuple[int, Mixture, dict[str, int]]]:
        """For each part its first position, its mixture counted from there, and what was drawn before it."""
        parts: list[tuple[int, Mixture, dict[str, int]]] = []
        drawn: dict[str, int] = {}
        for number, (since, request) in enumerate(self.requests):
            passed = [stage for stage in request.stages if stage[0] <= since][-1:]
            stages = [(0, weights) for _, weights in passed]
            stages += [(start - since, weights) for start, weights in request.stages if start > since]
            whole = [(start, whole_weights(weights)) for start, weights in stages]
            caps = [None if cap is None else max(0, cap - drawn.get(name, 0)) for name, cap in request.caps.items()]
            mixture = make_mixture(
                request.names, [MixtureStage(start, tuple(w[n] for n in request.names)) for start, w in whole], caps
            )
            parts.append((since, mixture, dict(drawn)))
            if number + 1 < len(self.requests):
                counts = mixture.counts(self.requests[number + 1][0] - since).tolist()
                for name, count in zip(request.names, counts, strict=True):
                    drawn[name] = drawn.get(name, 0) + count
        return parts


def new_history(request: MixtureRequest) -> MixtureHistory:
    """The history of a run that begins with this request."""
    return MixtureHistory(((0, request),))


def read_history(record: Sequence[Any]) -> MixtureHistory:
    """The history in a record of MixtureHistory.record. Raises DataError if positions are out of order or caps are no
    numbers."""
    starts = _ascending([since for since, _ in record], "curriculum")
    return MixtureHistory(tuple((since, _read_request(request)) for since, (_, request) in zip(starts, record, strict=True)))


def _read_request(request: Mapping[str, Any]) -> MixtureRequest:
    starts = _ascending([start for start, _ in request["stages"]], "stages")
    stages = tuple((start, dict(weights)) for start, (_, weights) in zip(starts, request["stages"], strict=True))
    caps = {name: None if cap is None else checked_int(cap, f"caps.{name}") for name, cap in request["caps"].items()}
    return MixtureRequest(stages, caps)


def _ascending(positions: Sequence[object], name: str) -> list[int]:
    """Positions from 0 on, each beyond the one before it."""
    out: list[int] = []
    for number, position in enumerate(positions):
        out.append(checked_int(position, name, out[-1] + 1 if out else 0, LARGEST if number else 0))
    if not out:
        raise DataError(f"data: the record's {name} are empty: {RECORD_REMEDY}")
    return out


def check_skips(old: Sequence[Sequence[int]], new: Skipped, position: int) -> None:
    """Raises DataError if the positions left out before `position`, which are consumed, would change."""

    def past(spans: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
        return [(start, min(stop, position)) for start, stop in spans if start < position]

    if past(old) != past(new):
        raise DataError(
            f"data.skip = {[list(s) for s in new]}: positions before {position} are consumed already, with {past(old)} left "
            f"out: only what begins at {position} or later can be skipped from here"
        )
