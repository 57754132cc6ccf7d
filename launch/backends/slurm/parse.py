"""Parses the output of Slurm's commands, in versions 22.05 to 25."""

from __future__ import annotations

import re

from mikoshi.launch.backends.base import JobState
from mikoshi.parallel.process.nodelist import expand_nodelist
from mikoshi.trainer.errors import LaunchError

QUEUED = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD")
ALIVE = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING")
HELD = ("JobHeldUser", "job requeued in held state", "launch failed requeued held")
SQUEUE_FORMAT = "%i|%T|%N|%r"
"""Output format of squeue for job_states()."""

_PREFIX = re.compile(r"^(?:\w+: )?(?:error|fatal|info): ")
_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")


def parse_time(limit: str) -> float:
    """Parse a time limit: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]].

    Infinite for UNLIMITED and for zero, by which Slurm means the same. Raises LaunchError.
    """
    if limit.upper() in ("UNLIMITED", "INFINITE"):
        return float("inf")
    found = _TIME.fullmatch(limit)
    if found is None:
        raise LaunchError(f"time = {limit!r}: no time as Slurm has it, such as 90 (minutes), 12:00:00 or 2-00:00:00")
    days, *rest = (None if group is None else int(group) for group in found.groups())
    parts = [part for part in rest if part is not None]
    if days is not None:
        hours, minutes, rest_seconds = (*parts, 0, 0)[:3]
    elif len(parts) == 3:
        hours, minutes, rest_seconds = parts
    else:
        hours, (minutes, rest_seconds) = 0, (*parts, 0)[:2]
    return ((days or 0) * 24 + hours) * 3600.0 + minutes * 60 + rest_seconds or float("inf")


def parse_fields(text: str) -> dict[str, str]:
    """Parse one record of `scontrol -o show`. A value with spaces is cut at the first."""
    found: dict[str, str] = {}
    for part in text.split():
        name, equals, value = part.partition("=")
        if equals:
            found.setdefault(name, value)
    return found


def job_states(listing: str) -> dict[str, JobState]:
    """Parse the output of `squeue -h -r -o SQUEUE_FORMAT`, by job id."""
    states: dict[str, JobState] = {}
    for line in listing.splitlines():
        parts = line.split("|", 3)
        if len(parts) == 4:
            ident, state, nodes, reason = (part.strip() for part in parts)
            states[ident] = _state(ident, state, reason, tuple(expand_nodelist(nodes)))
    return states


def _state(ident: str, state: str, reason: str, nodes: tuple[str, ...]) -> JobState:
    why = "" if reason in ("None", "(null)") else reason
    if state in QUEUED:
        # Slurm does not start it before someone releases it.
        held = state in ("REQUEUE_HOLD", "SPECIAL_EXIT") or why.replace("_", " ") in HELD
        return JobState("queued", f"{why or state}: held; let it go by `scontrol release {ident}`" if held else why or state)
    if state in ALIVE:
        return JobState("running", "" if state == "RUNNING" else state, nodes)
    return JobState("ended", "" if state == "COMPLETED" else state, nodes)


def error_line(text: str) -> str:
    """A command's error output as one line, without the command's name."""
    lines = [_PREFIX.sub("", line.strip()) for line in text.splitlines()]
    return "; ".join(dict.fromkeys(line for line in lines if line)) or "it said nothing"


def file_pattern(path: str) -> str:
    """Escape a path for sbatch --output, which expands %."""
    return path.replace("%", "%%")


def safe_name(name: str) -> str:
    """A job name of letters, digits and ._- alone, safe for mail subjects and tables."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-")[:100] or "mikoshi"
