"""Prints the states of runs: a table of many, a page of one, and what can be done next."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from mikoshi.launch.config.paths import shell_quoted
from mikoshi.launch.operate.board import RunRow
from mikoshi.launch.operate.status import FINAL
from mikoshi.trainer.record.durations import clock

COLOURS = {
    "running": "green", "done": "bold green", "starting": "cyan", "queued": "cyan", "requeued": "cyan",
    "stopping": "yellow", "stopped": "yellow", "cancelled": "yellow", "failed": "red", "lost": "red",
}  # fmt: skip
_BAR = 24


def runs_table(rows: Sequence[RunRow], now: float) -> list[list[str]]:
    """The cells of a table, header first. Empty columns are left out."""
    head = ["name", "state", "cluster", "nodes", "step", "loss", "tokens/s", "time left", "last sign", "swept"]
    lines = [head, *(_cells(row, now) for row in rows)]
    kept = [n for n, name in enumerate(head) if name not in ("swept", "cluster") or any(line[n] for line in lines[1:])]
    return [[line[n] for n in kept] for line in lines]


def _cells(row: RunRow, now: float) -> list[str]:
    return [
        one_line(row.name), row.state, row.cluster, _nodes(row), f"{row.step}/{row.steps}", _loss(row),
        "" if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}",
        "" if row.seconds_left is None else clock(row.seconds_left),
        elapsed(row.seen, now), " ".join(f"{key}={one_line(value)}" for key, value in row.swept.items()),
    ]  # fmt: skip


def aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    """Format cells as lines with aligned columns, numbers to the right."""
    if not cells:
        return []
    right = {n for n, name in enumerate(cells[0]) if name in ("nodes", "step", "loss", "tokens/s", "time left", "last sign")}
    widths = [max(len(line[n]) for line in cells) for n in range(len(cells[0]))]
    return [
        "  ".join(
            cell.rjust(width) if n in right else cell.ljust(width)
            for n, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    ]


def run_page(row: RunRow, events: Sequence[Mapping[str, Any]], now: float) -> list[tuple[str, str]]:
    """Everything about one run, as pairs of heading and text."""
    where = f" on {row.cluster}" if row.cluster else ""
    attempt = f", attempt {row.attempt}" if row.attempt else ""
    job = f" ({row.job})" if row.job else ""
    entries: list[tuple[str, str]] = [
        ("state", f"{row.state}{attempt}{where}{job}{f': {one_line(row.why)}' if row.why else ''}")
    ]
    if row.swept:
        entries.append(("swept", " ".join(f"{key}={one_line(value)}" for key, value in row.swept.items())))
    if row.nodes or row.asked:
        lost = f"; lost: {' '.join(row.lost)}" if row.lost else ""
        entries.append(("nodes", f"{len(row.nodes)} of {row.asked}: {' '.join(row.nodes) or 'none yet'}{lost}"))
    left = "" if row.seconds_left is None else f", {clock(row.seconds_left)} left"
    share = row.step / row.steps if row.steps else 0.0
    entries.append(("step", f"{row.step}/{row.steps} {bar(share)} {share:.0%}{left}"))
    if row.loss is not None:
        speed = "" if row.tokens_per_second is None else f", {row.tokens_per_second:,.0f} tokens/s"
        entries.append(("loss", f"{_loss(row)}{speed}"))
    entries.append(("checkpoint", "none yet" if row.checkpoint is None else f"step {row.checkpoint}"))
    if row.restarts:
        entries.append(("restarts", str(row.restarts)))
    entries.append(("last sign of life", f"{elapsed(row.seen, now)} ago" if row.seen else "none yet"))
    entries += [("events" if not n else "", f"{_clock_time(event)}  {describe_event(event)}") for n, event in enumerate(events)]
    entries += [("next" if not n else "", line) for n, line in enumerate(advice(row))]
    return entries


def bar(share: float) -> str:
    """A progress bar as text. share: from 0 to 1."""
    full = round(_BAR * min(1.0, max(0.0, share)))
    return f"[{'#' * full}{'-' * (_BAR - full)}]"


def elapsed(when: float | None, now: float) -> str:
    """Time since `when` in one fitting unit; "" if it is None."""
    if not when:
        return ""
    seconds = max(0.0, now - when)
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def advice(row: RunRow) -> list[str]:
    """Commands that can be run next for this run."""
    path = shell_quoted(row.path)
    if row.state == "done":
        return [f"mikoshi report {path}", f'mikoshi generate {path} --prompt "..."']
    if not row.cluster:
        again = f"mikoshi train {path}"
        goes_on = "" if row.checkpoint is None else f"   # goes on from step {row.checkpoint}, with the --ranks you like"
        return [again + goes_on] if row.state in FINAL else []
    resume = f"mikoshi resume {path}"
    if row.state == "failed":
        return [f"mikoshi logs {path}", f"mikoshi logs {path} --head", resume]
    if row.state == "lost":
        return [resume, f"mikoshi logs {path} --head"] if row.attempt else [resume]
    if row.state in FINAL:
        return [resume, f"mikoshi resume {path} --nodes {max(1, row.asked // 2)}"] if row.asked > 1 else [resume]
    if row.state in ("queued", "requeued"):
        return [f"mikoshi cancel {path}"]
    return [f"mikoshi logs {path} -f", f"mikoshi cancel {path}"]


def describe_event(event: Mapping[str, Any]) -> str:
    """Describe an event in words. An event of an unknown kind is shown with all its fields."""
    kind = str(event.get("event"))
    known = _EVENT_FORMATS.get("eval-none" if kind == "eval" and event.get("loss", 0) is None else kind)
    try:
        if known is not None:
            return one_line(known.format_map({key: _shorten(value) for key, value in event.items()}))
    except (LookupError, ValueError, AttributeError, TypeError):
        pass  # the event lacks the fields of its kind
    more = " ".join(f"{key}={value}" for key, value in event.items() if key not in ("event", "time"))
    return one_line(f"{event.get('event')} {more}".strip())[:200]


_EVENT_FORMATS = {
    "attempt": "attempt {number} ({cause})",
    "nodes": "nodes: {nodes}; lost: {lost}",
    "avoid": "{node} is avoided: {how}",
    "start": "started on {ranks} rank(s), after step {step}",
    "resume": "went on from the checkpoint of step {step}",
    "save": "saved step {step}",
    "save-plan": "{told}",
    "save-failed": "could not save step {step}: {why}",
    "eval": "held-out loss {loss:.4f} at step {step}",
    "eval-none": "no held-out loss at step {step}: nothing is predicted, or it is not finite",
    "skip": "step {step} changed nothing: {why}",
    "empty": "step {step} changed nothing: no token is predicted",
    "spike": "step {step}: {why}",
    "non-finite": "step {step}: not finite: {values}",
    "retry": "step {step} was computed again: {why}",
    "rewind": "went back from step {step} to {to}",
    "straggler": "rank {rank} takes {ratio} times as long as the others",
    "diverged": "step {step}: {what}",
    "fault": "rank {rank} {how} at step {step}",
    "restart": "restart {number}",
    "stop": "asked to stop after step {step}",
    "end": "ended after step {step}",
}


def as_json(row: RunRow, notes: Sequence[str], events: Sequence[Mapping[str, Any]] | None = None) -> dict[str, Any]:
    """A run as a JSON object. A number that is not finite is null."""
    found = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in asdict(row).items()
    }
    found |= {"next": advice(row)}
    return found if events is None else found | {"events": list(events), "notes": list(notes)}


def one_line(text: str) -> str:
    """Replace control characters, which would move the cursor or break a table."""
    return "".join(sign if sign.isprintable() else " " for sign in text)


def _shorten(value: Any) -> Any:
    """Show the first elements of lists and tables, and their number."""
    if not isinstance(value, list | dict):
        return value
    return f"{' '.join(map(str, [*value][:8]))}{f' ... {len(value)} in all' if len(value) > 8 else ''}" or "none"


def _nodes(row: RunRow) -> str:
    if not row.cluster:
        return ""
    return f"{len(row.nodes)}/{row.asked}" if row.nodes else str(row.asked or "")


def _loss(row: RunRow) -> str:
    return "" if row.loss is None else f"{row.loss:.4f}"


def _clock_time(event: Mapping[str, Any]) -> str:
    when = event.get("time")
    return time.strftime("%m-%d %H:%M:%S", time.localtime(when)) if isinstance(when, int | float) else "?"
