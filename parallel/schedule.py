"""Pipeline schedules as data: what every rank of the pipeline does in which order, with its sends and receives.

The orders of computation are those of torch.distributed.pipelining; this file adds the transfers, in one order that all
ranks agree on, and the clock by which a timeline and its bubble are drawn. No process group is needed.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from mikoshi.parallel.errors import LayoutError

Schedule = Literal["gpipe", "1f1b", "interleaved", "interleaved-zb", "zbv", "dualpipev"]
Computation = Literal["forward", "backward", "backward-input", "backward-weight"]
Transfer = Literal["send-forward", "receive-forward", "send-backward", "receive-backward"]

_TORCH_NAMES: dict[Schedule, str] = {
    "gpipe": "GPipe",  # Huang et al. 2019, arXiv:1811.06965
    "interleaved": "Interleaved1F1B",  # Narayanan et al. 2021, arXiv:2104.04473
    "interleaved-zb": "InterleavedZeroBubble",  # Qi et al. 2023, arXiv:2401.10241
    "zbv": "ZBVZeroBubble",  # the same, V-shaped
    "dualpipev": "DualPipeV",  # DeepSeek-AI 2024, arXiv:2412.19437, in its V-shaped form
}
_COMPUTATIONS: dict[str, Computation] = {
    "FORWARD": "forward",
    "FULL_BACKWARD": "backward",
    "BACKWARD_INPUT": "backward-input",
    "BACKWARD_WEIGHT": "backward-weight",
}
_SINGLE = ("gpipe", "1f1b")
_V_SHAPED = ("zbv", "dualpipev")


@dataclass(frozen=True)
class Action:
    """One thing that a rank does for one micro-batch in one stage; a transfer names the stage that computes with it."""

    kind: Computation | Transfer
    stage: int
    micro: int


Orders = tuple[tuple[Action, ...], ...]
"""What each rank does, in order."""


def virtual_stages(kind: Schedule, requested: int | None) -> int:
    """Stages of one rank: 1 or 2 if the schedule requires it, else the requested number, at least 2. Raises LayoutError."""
    required = 1 if kind in _SINGLE else 2 if kind in _V_SHAPED else None
    if required is None:
        required = requested or 2
        if required < 2:
            raise LayoutError(f'parallel.virtual_stages {requested}: schedule "{kind}" needs at least 2; for 1 use "1f1b"')
    elif requested not in (None, required):
        raise LayoutError(f'parallel.virtual_stages {requested}: schedule "{kind}" has {required} stage(s) a rank')
    return required


def rank_of(stage: int, pp: int, kind: Schedule) -> int:
    """The pipeline rank that holds a stage: in a circle, or down and up again for the V-shaped schedules."""
    return 2 * pp - 1 - stage if kind in _V_SHAPED and stage >= pp else stage % pp


def splits_backward(kind: Schedule) -> bool:
    """Whether gradients of inputs and of weights are computed apart, to fill the bubble with the latter."""
    return kind in ("interleaved-zb", "zbv", "dualpipev")


@functools.lru_cache(maxsize=64)
def orders(kind: Schedule, pp: int, virtual: int, micro_batches: int) -> Orders:
    """The work of every rank, in order. Raises LayoutError where the schedule needs other micro-batches."""
    if pp == 1:
        steps = [Action(k, 0, m) for m in range(micro_batches) for k in get_args(Computation)[:2]]
        return (tuple(steps),)
    try:
        if kind == "1f1b":
            work = tuple(tuple(_one_forward_one_backward(rank, pp, micro_batches)) for rank in range(pp))
        else:
            from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops  # brings in Dynamo: over a second

            ranks = get_schedule_ops(_TORCH_NAMES[kind], pp, micro_batches, virtual)
            work = tuple(tuple(_flatten(rank)) for rank in ranks)
        _clock(work, pp)
    except (ValueError, AssertionError, _Deadlock) as error:
        raise LayoutError(f'schedule "{kind}" cannot run {micro_batches} micro-batch(es) over {pp} ranks: {error}') from None
    return work


def _one_forward_one_backward(rank: int, pp: int, micro_batches: int) -> list[Action]:
    """1F1B (Narayanan et al. 2019, arXiv:1806.03377): enough forward passes to fill the stages behind, then one backward
    for each forward. Our own: it needs no more micro-batches than there are, torch's wants as many as stages."""
    ahead = min(micro_batches, pp - rank - 1)
    forward = [Action("forward", rank, m) for m in range(micro_batches)]
    backward = [Action("backward", rank, m) for m in range(micro_batches)]
    steady = [a for pair in zip(forward[ahead:], backward, strict=False) for a in pair]
    return forward[:ahead] + steady + backward[micro_batches - ahead :]


def _flatten(actions: Sequence[Any]) -> list[Action]:
    flat: list[Action] = []
    for action in actions:
        if action is None:
            continue
        stage, computation, micro, *parts = action
        inner = parts[0] if parts else None
        if inner:
            flat += _flatten(inner)
        elif computation.name in _COMPUTATIONS:  # the reduction of gradients is not the schedule's matter here
            flat.append(Action(_COMPUTATIONS[computation.name], stage, micro))
    return flat


class _Deadlock(Exception):
    pass


@dataclass(frozen=True)
class Bar:
    """One action on the clock, in units of one stage's forward pass of one micro-batch."""

    rank: int
    start: float
    end: float
    action: Action


# A backward pass costs two forward passes; its halves one each.
_COST: dict[str, float] = {"forward": 1, "backward": 2, "backward-input": 1, "backward-weight": 1}


def _dependency(action: Action, last: int) -> Action | None:
    """The action of the neighbouring stage whose result this one takes; None: it takes none, or from its own rank's
    forward pass."""
    if action.kind == "forward":
        return Action("forward", action.stage - 1, action.micro) if action.stage else None
    if action.kind in ("backward", "backward-input") and action.stage < last:
        return Action(action.kind, action.stage + 1, action.micro)
    return None


def _finish_time(action: Action, finished: dict[Action, float]) -> float | None:
    if action.kind == "forward":
        return finished.get(action)
    for kind in ("backward", "backward-input"):  # a schedule may split the backward pass of some and not of others
        if (end := finished.get(Action(kind, action.stage, action.micro))) is not None:
            return end
    return None


def _clock(work: Orders, pp: int) -> list[Bar]:
    """Every action as early as its rank and its input allow. Raises _Stuck if the order can never end."""
    last = max(action.stage for rank in work for action in rank)
    finished: dict[Action, float] = {}
    at, free, bars = [0] * pp, [0.0] * pp, []
    while any(at[r] < len(work[r]) for r in range(pp)):
        moved = False
        for r in range(pp):
            while at[r] < len(work[r]):
                action = work[r][at[r]]
                need = _dependency(action, last)
                ready = 0.0 if need is None else _finish_time(need, finished)
                if ready is None:
                    break
                start = max(free[r], ready)
                free[r] = finished[action] = start + _COST[action.kind]
                bars.append(Bar(r, start, free[r], action))
                at[r] += 1
                moved = True
        if not moved:
            raise _Deadlock("the ranks would wait for each other")
    return bars


def timeline(kind: Schedule, pp: int, virtual: int, micro_batches: int) -> list[Bar]:
    """Every action on the clock, for drawing. One unit is the forward pass of one stage."""
    return sorted(_clock(orders(kind, pp, virtual, micro_batches), pp), key=lambda bar: (bar.rank, bar.start))


def bubble(kind: Schedule, pp: int, virtual: int, micro_batches: int) -> float:
    """Share of the ranks' time in which they wait, transfers costing nothing."""
    bars = timeline(kind, pp, virtual, micro_batches)
    return 1 - sum(bar.end - bar.start for bar in bars) / (pp * max(bar.end for bar in bars))


@functools.lru_cache(maxsize=64)
def programs(kind: Schedule, pp: int, virtual: int, micro_batches: int) -> Orders:
    """The work of every rank with its transfers."""
    return _with_transfers(orders(kind, pp, virtual, micro_batches), kind, pp)


@functools.lru_cache(maxsize=64)
def forward_programs(kind: Schedule, pp: int, virtual: int, micro_batches: int) -> Orders:
    """Forward passes only, for evaluation and generation: a rank's stages one after another, with their transfers."""
    stages_by_rank = [[s for s in range(pp * virtual) if rank_of(s, pp, kind) == rank] for rank in range(pp)]
    work = tuple(tuple(Action("forward", s, m) for s in stages for m in range(micro_batches)) for stages in stages_by_rank)
    return _with_transfers(work, kind, pp)


def _with_transfers(work: Orders, kind: Schedule, pp: int) -> Orders:
    """Between any two ranks, sends and receives stand in the same order on both sides, so that no order of a
    communication library's queue can lock them."""
    last = max(action.stage for rank in work for action in rank)
    out: list[list[Action]] = [[] for _ in work]
    for bar in sorted(_clock(work, pp), key=lambda bar: (bar.end, bar.rank)):
        action = bar.action
        out[bar.rank].append(action)
        if action.kind == "forward" and action.stage < last:
            _transfer(out, bar.rank, rank_of(action.stage + 1, pp, kind), "forward", action.stage + 1, action)
        if action.kind in ("backward", "backward-input") and action.stage:
            _transfer(out, bar.rank, rank_of(action.stage - 1, pp, kind), "backward", action.stage - 1, action)
    return tuple(tuple(rank) for rank in out)


def _transfer(out: list[list[Action]], source: int, target: int, direction: str, stage: int, done: Action) -> None:
    if source != target:
        out[source].append(Action(f"send-{direction}", done.stage, done.micro))  # type: ignore[arg-type]
        out[target].append(Action(f"receive-{direction}", stage, done.micro))  # type: ignore[arg-type]
