"""What is said of a run that goes on with other settings than it was saved with: a line for each, and for its learning rate."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mikoshi.trainer.config.run import RunConfig
from mikoshi.trainer.engines.optim import learning_rate

_RATE = ("optim.lr", "optim.schedule.", "train.steps")
_LONGEST = 120


def changes_told(old: RunConfig, new: RunConfig, changes: Mapping[str, tuple[Any, Any]], step: int) -> list[str]:
    """`changes`: what `differences` finds between the config that saved the checkpoint of `step` and the run's. A line for
    each, and one more where they move the learning rate, with it before and after."""
    lines = [f"changed since step {step}: {key}: {_short(before)} -> {_short(now)}" for key, (before, now) in changes.items()]
    if any(key.startswith(_RATE) for key in changes) and step < new.train.steps:
        lines.append(_rate_told(old, new, step))
    return lines


def _rate_told(old: RunConfig, new: RunConfig, step: int) -> str:
    """Of the first step, counted from 1 as the metrics do, at which the two schedules differ."""
    for at in range(step, new.train.steps):
        before, now = rate(old, at), rate(new, at)
        if before != now:
            kept = f"unchanged up to step {at}; " if at > step else ""
            longer = not new.optim.schedule.steps and old.train.steps != new.train.steps
            way = f" (optim.schedule.steps={old.optim.schedule.steps or old.train.steps} keeps the schedule)" if longer else ""
            return f"learning rate: {kept}at step {at + 1} it was {before:.4g}, it is now {now:.4g}{way}"
    return "learning rate: unchanged"


def rate(config: RunConfig, step: int) -> float:
    return learning_rate(config.optim.lr, config.optim.schedule, step, config.train.steps)


def moments_begun_anew(state: Iterable[str], saved: Mapping[str, object]) -> list[str]:
    """Of the names of a `state` to load, the moments that a checkpoint of tensors `saved` lacks because another optimizer
    moved their parameters there: with Muon the stacked experts once had AdamW, and routers Muon."""
    moved = {name.removeprefix("optim.").rpartition(".")[0] for name in saved if name.startswith("optim.")}
    return [
        name
        for name in state
        if name.startswith("optim.") and name not in saved and name.removeprefix("optim.").rpartition(".")[0] in moved
    ]


def anew_told(moments: list[str]) -> str:
    parameters = sorted({name.removeprefix("optim.").rpartition(".")[0] for name in moments})
    return (
        f"optimizer state of {len(parameters)} parameters begins anew, for another optimizer moved them before: "
        f"{', '.join(parameters[:3])}{', ...' if len(parameters) > 3 else ''}"
    )


def _short(value: Any) -> str:
    text = "unset" if value is None else str(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
