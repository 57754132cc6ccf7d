"""Every setting that differs from the checkpoint a run resumes from is reported, with its effect on the learning rate."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mikoshi.trainer.config.run import RunConfig
from mikoshi.trainer.engines.optim import learning_rate

_RATE = ("optim.lr", "optim.schedule.", "train.steps")
_LONGEST = 120


def describe_changes(old: RunConfig, new: RunConfig, changes: Mapping[str, tuple[Any, Any]], step: int) -> list[str]:
    """One line for each changed setting, and one more where the learning rate changes.

    changes: `differences` between the config that saved the checkpoint of `step` and the run's config.
    """
    lines = [f"changed since step {step}: {key}: {_short(before)} -> {_short(now)}" for key, (before, now) in changes.items()]
    if any(key.startswith(_RATE) for key in changes) and step < new.train.steps:
        lines.append(_describe_rate_change(old, new, step))
    return lines


def _describe_rate_change(old: RunConfig, new: RunConfig, step: int) -> str:
    """Of the first step, counted from 1 as the metrics do, at which the two schedules differ."""
    for at in range(step, new.train.steps):
        before, now = learning_rate_at(old, at), learning_rate_at(new, at)
        if before != now:
            kept = f"unchanged up to step {at}; " if at > step else ""
            longer = not new.optim.schedule.steps and old.train.steps != new.train.steps
            way = f" (optim.schedule.steps={old.optim.schedule.steps or old.train.steps} keeps the schedule)" if longer else ""
            return f"learning rate: {kept}at step {at + 1} it was {before:.4g}, it is now {now:.4g}{way}"
    return "learning rate: unchanged"


def learning_rate_at(config: RunConfig, step: int) -> float:
    """Learning rate of a step, counted from 0."""
    return learning_rate(config.optim.lr, config.optim.schedule, step, config.train.steps)


def reset_moments(state: Iterable[str], saved: Mapping[str, object]) -> list[str]:
    """Optimizer moments that start at zero, because another optimizer updated their parameters before.

    state: names to be loaded. saved: tensors of the checkpoint. With Muon, earlier versions used AdamW for stacked experts and
    Muon for routers.
    """
    moved = {name.removeprefix("optim.").rpartition(".")[0] for name in saved if name.startswith("optim.")}
    return [
        name
        for name in state
        if name.startswith("optim.") and name not in saved and name.removeprefix("optim.").rpartition(".")[0] in moved
    ]


def describe_reset_moments(moments: list[str]) -> str:
    """One line that names the parameters whose optimizer state is reset."""
    parameters = sorted({name.removeprefix("optim.").rpartition(".")[0] for name in moments})
    return (
        f"optimizer state of {len(parameters)} parameters begins anew, for another optimizer moved them before: "
        f"{', '.join(parameters[:3])}{', ...' if len(parameters) > 3 else ''}"
    )


def _short(value: Any) -> str:
    text = "unset" if value is None else str(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
