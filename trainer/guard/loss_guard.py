"""The loss guard detects steps whose loss or gradient norm cannot be trusted, by the same rule on every rank and every run.

It knows only the figures of steps, which are equal on all ranks, and its state goes into every checkpoint: a run that is
killed and goes on decides as one that was not. Going back is decided in a file of its own, before anything is undone.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mikoshi.data.io.atomic import write_file
from mikoshi.trainer.config.data import GuardSection
from mikoshi.trainer.engines.base import StepLimits
from mikoshi.trainer.errors import CheckpointError, RunError

_NORMAL = 1.4826  # makes the median absolute deviation that of a normal distribution's standard deviation
_FEWEST = 16
_LOSS_FLOOR = 0.01
_NORM_FLOOR = 0.2
"""Least deviation of the loss, as a part of its median, and of the logarithm of the norm: what is as good as flat."""
_TINY, _LARGEST = 1e-30, 1e300
_LARGEST_FILE = 1 << 20


@dataclass(frozen=True)
class Verdict:
    """What the guard makes of a step. kind: "" (normal), "non-finite" or "spike"; why: which figure, and how far it is off."""

    kind: str = ""
    why: str = ""


@dataclass(frozen=True)
class _Level:
    """Where a figure is, how much it varies, and from where on it is too far off."""

    middle: float
    deviation: float
    bound: float


class LossGuard:
    """Median and deviation of the last applied steps, sliding as training goes on.

    A figure spikes at `threshold` deviations above the median; the deviation is 1.4826 x the median absolute deviation
    (Hampel 1974, "The influence curve and its role in robust estimation"; Leys et al. 2013, "Detecting outliers"), which a
    few spikes among the steps do not move. The gradient norm, which varies by factors, is judged by its logarithm.
    """

    def __init__(self, section: GuardSection, state: Mapping[str, Any] | None = None) -> None:
        """`state`: what `state` of another guard returned. Raises CheckpointError if it is nothing of the kind."""
        self.section = section
        known = {key: [] if state is None else _figures(state, key) for key in ("losses", "norms")}
        if len(known["losses"]) != len(known["norms"]):
            raise CheckpointError("record.guard: the checkpoint's loss guard knows more losses than norms: it is damaged")
        size = min(section.window, 1 << 20)
        self.losses, self.norms = deque(known["losses"], maxlen=size), deque(known["norms"], maxlen=size)
        self.left = 0 if state is None else _count(state)
        """Steps in a row, up to the last one, that nobody applied; one that predicts nothing is none of them and ends none."""
        self._levels: tuple[_Level, _Level] | None = None

    def limits(self) -> StepLimits:
        """What the next step's figures must stay below to be applied. Where spikes are only recorded, anything finite is."""
        levels = None if self.section.spike == "record" else self._level()
        return StepLimits() if levels is None else StepLimits(levels[0].bound, levels[1].bound)

    def judge(self, loss: float, norm: float) -> Verdict:
        """What a step's loss and gradient norm are, compared with those of the applied steps before it."""
        for name, value in (("loss", loss), ("gradient norm", norm)):
            if not math.isfinite(value):
                return Verdict("non-finite", f"the {name} is {value}")
        levels = self._level()
        if levels is None:
            return Verdict()
        of_loss, of_norm = levels
        why = []
        if not loss < of_loss.bound:
            why.append(_describe("loss", loss, of_loss.middle, (loss - of_loss.middle) / of_loss.deviation))
        if not norm < of_norm.bound:
            off = (_log(norm) - of_norm.middle) / of_norm.deviation
            why.append(_describe("gradient norm", norm, math.exp(of_norm.middle), off))
        return Verdict("spike", " and ".join(why)) if why else Verdict()

    def accept(self, loss: float, norm: float) -> None:
        """Record that a step with this loss and gradient norm was applied."""
        self.left = 0
        self.losses.append(loss)
        self.norms.append(norm)
        self._levels = None

    def leave(self) -> None:
        """Record that a step was not applied."""
        self.left += 1

    def state(self) -> dict[str, Any]:
        """For the checkpoint: JSON, from which an equal guard is made."""
        return {"losses": list(self.losses), "norms": list(self.norms), "left": self.left}

    def _level(self) -> tuple[_Level, _Level] | None:
        """Of loss and norm; None while too few steps are known."""
        fewest = min(max(_FEWEST, self.section.window // 4), self.losses.maxlen or _FEWEST)
        if len(self.losses) < fewest:
            return None
        if self._levels is None:
            far = self.section.threshold
            middle, deviation = _spread(self.losses)
            deviation = max(deviation, _LOSS_FLOOR * abs(middle), _TINY)
            of_loss = _Level(middle, deviation, middle + far * deviation)
            middle, deviation = _spread([_log(norm) for norm in self.norms])
            deviation = max(deviation, _NORM_FLOOR)
            of_norm = _Level(middle, deviation, math.exp(min(700.0, middle + far * deviation)))
            self._levels = of_loss, of_norm
        return self._levels


def _log(norm: float) -> float:
    return math.log(max(norm, _TINY))


def _spread(values: Sequence[float] | deque[float]) -> tuple[float, float]:
    """Median and robust standard deviation."""
    middle = _median(sorted(values))
    return middle, _NORMAL * _median(sorted(abs(value - middle) for value in values))


def _median(ordered: list[float]) -> float:
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def _describe(name: str, value: float, middle: float, deviations: float) -> str:
    return f"the {name} is {value:.4g}, {deviations:.1f} deviations above the median of {middle:.4g}"


def _figures(state: Mapping[str, Any], key: str) -> list[float]:
    values = state.get(key) if isinstance(state, Mapping) else None
    if not isinstance(values, list) or not all(type(v) in (int, float) and abs(v) <= _LARGEST for v in values):
        raise CheckpointError(f"record.guard: the loss guard has no list of finite numbers as {key}: it is damaged")
    return [float(v) for v in values]


def _count(state: Mapping[str, Any]) -> int:
    left = state.get("left")
    if type(left) is not int or not 0 <= left < 1 << 48:
        raise CheckpointError("record.guard: the loss guard has no number of steps as left: it is damaged")
    return left


@dataclass(frozen=True)
class Rewind:
    """The run has gone back once. at: the step that spiked; to: the step of the checkpoint that it went on from; span:
    positions in the order of the data that it leaves out from there on, [first, one past the last]."""

    at: int
    to: int
    span: tuple[int, int]


def read_rewinds(path: Path) -> list[Rewind]:
    """The times that a run has gone back, oldest first; none where there is no file. Raises RunError if it is damaged."""
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST_FILE + 1)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        if len(content) > _LARGEST_FILE:
            raise ValueError(f"more than {_LARGEST_FILE} bytes")
        told = json.loads(content)
        if not isinstance(told, dict) or told.keys() != {"rewinds"} or not isinstance(told["rewinds"], list):
            raise ValueError('not {"rewinds": [...]}')
        return [_rewind(entry) for entry in told["rewinds"]]
    except (ValueError, RecursionError) as error:
        raise RunError(
            f"{path}: damaged: {error}: it says which batches the run left out when it went back; restore it, or give another "
            "run.name"
        ) from None


def _rewind(entry: Any) -> Rewind:
    if not isinstance(entry, dict) or entry.keys() != {"at", "to", "span"}:
        raise ValueError(f"{str(entry)[:80]} is not at, to and span")
    span = entry["span"]
    numbers = [entry["at"], entry["to"], *(span if isinstance(span, list) and len(span) == 2 else [None, None])]
    if not all(type(n) is int and 0 <= n < 1 << 63 for n in numbers):
        raise ValueError(f"{str(entry)[:80]} holds something else than numbers from 0 on")
    at, to, first, stop = numbers
    if not (to < at and first < stop):
        raise ValueError(f"{str(entry)[:80]} does not go back, or leaves nothing out")
    return Rewind(at, to, (first, stop))


def add_rewind(path: Path, rewind: Rewind) -> None:
    """Decide to go back: durable once this returns, all of it or nothing."""
    entries = [asdict(known) for known in (*read_rewinds(path), rewind)]
    write_file(path, json.dumps({"rewinds": entries}).encode())


def abandoned(rewinds: Sequence[Rewind], step: int, skipped: Sequence[Sequence[int]]) -> bool:
    """Whether a checkpoint belongs to a history that the run has gone back before: it is later than one it went back to,
    and the positions it leaves out, `skipped` (joined where they touch), lack what is left out since."""

    def covered(first: int, stop: int) -> bool:
        return any(low <= first and stop <= high for low, high in skipped)

    return any(step > rewind.to and not covered(*rewind.span) for rewind in rewinds)
