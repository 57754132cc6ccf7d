"""The states of runs, read from their folders with one query to each scheduler. Nothing is changed."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mikoshi.launch.backends.base import JobState
from mikoshi.launch.backends.open import open_backend
from mikoshi.launch.config.cluster import ADAPTER
from mikoshi.launch.config.paths import printable
from mikoshi.launch.operate.status import State, is_locked, records_of, state_of, state_of_plain
from mikoshi.launch.runs.logs import last_line
from mikoshi.launch.runs.record import FORMAT, Attempt, Result, exists, read_bytes, unsupported_format
from mikoshi.launch.runs.tails import last_records
from mikoshi.trainer.errors import LaunchError
from mikoshi.trainer.record.run_folder import RunFolder, predicting_steps

WINDOW = 50
"""Number of steps over which speed is averaged."""


@dataclass(frozen=True)
class RunRow:
    """A run.

    cluster: its kind; "" if `mikoshi train` started it
    job: the scheduler's name for it
    nodes: nodes whose ranks run now
    asked: number of requested nodes
    seconds_left: until its last step
    checkpoint: the newest saved step
    seen: Unix time of its last sign of life
    swept: the values that a sweep gave it
    """

    name: str
    path: str
    state: State
    why: str
    cluster: str = ""
    job: str = ""
    attempt: int = 0
    nodes: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()
    asked: int = 0
    step: int = 0
    steps: int = 0
    loss: float | None = None
    tokens_per_second: float | None = None
    seconds_left: float | None = None
    checkpoint: int | None = None
    restarts: int = 0
    seen: float | None = None
    created: float = 0.0
    swept: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Board:
    """Runs, newest first. notes: what could not be queried or read, a line each."""

    rows: tuple[RunRow, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _RunRecords:
    """What is known of a run before a scheduler is queried.

    spec: None if `mikoshi train` started it
    open: whether the scheduler must be queried
    result: of a run that has ended for good
    note: why the scheduler cannot be queried
    """

    path: Path
    spec: Mapping[str, Any] | None = None
    attempt: Attempt | None = None
    job: Mapping[str, str] = field(default_factory=dict)
    open: bool = False
    result: Result | None = None
    note: str = ""


def folder_of(given: Path) -> Path:
    """Return a run's folder, given as a path or as a name in runs/. Raises LaunchError if there is no run."""
    for path in (given, Path("runs") / given):
        if (path / "spec.json").is_file() or (path / "config.toml").is_file():
            return path
    raise LaunchError(f"{printable(given)}: not a run folder: `mikoshi runs` shows those that there are")


def all_runs(folder: Path) -> list[Path]:
    """Return the folders of all runs in a folder. Raises LaunchError if it cannot be read."""
    try:
        found = [path for path in folder.iterdir() if not path.name.startswith(".")]
    except OSError as error:
        raise LaunchError(
            f"--folder {printable(folder)}: cannot be read: {error.strerror}; give the folder that runs are kept in"
        ) from None
    return [path for path in found if _may_be_run(path)]


def _may_be_run(path: Path) -> bool:
    """Whether a folder is a run, or permissions hide it; survey_runs() then reports that."""
    try:
        return exists(f"{path}/spec.json") or exists(f"{path}/config.toml")
    except OSError:
        return True


def survey_runs(paths: Sequence[Path], now: float) -> Board:
    """Return the states of these runs. A scheduler that does not answer, or a damaged record, becomes a note.

    now: Unix time
    """
    notes: list[str] = []
    known: list[_RunRecords] = []
    for path in paths:
        try:
            known.append(_read_records(path))
        except LaunchError as error:
            notes.append(str(error))
        except OSError as error:  # another user's, or removed meanwhile
            notes.append(f"{printable(path)}: cannot be read: {error.strerror}")
    notes += [one.note for one in known if one.note]
    jobs = _query_schedulers([one for one in known if one.open], notes)
    rows = []
    for one in known:
        try:
            rows.append(_local_row(one, now) if one.spec is None else _row(one, one.spec, jobs.get(one.path), now))
        except LaunchError as error:
            notes.append(str(error))
        except OSError as error:  # another user's, or removed meanwhile
            notes.append(f"{printable(one.path)}: cannot be read: {error.strerror}")
    return Board(tuple(sorted(rows, key=lambda row: (-row.created, row.name))), tuple(dict.fromkeys(notes)))


def survey_run(path: Path, now: float) -> tuple[RunRow, tuple[str, ...]]:
    """Return the state of one run, and the notes. Raises LaunchError if its records cannot be read."""
    board = survey_runs([path], now)
    if not board.rows:
        raise LaunchError(board.notes[0])
    return board.rows[0], board.notes


def _read_records(path: Path) -> _RunRecords:
    file = f"{path}/spec.json"
    try:
        text = read_bytes(file)
    except FileNotFoundError:
        return _RunRecords(path)
    except OSError as error:
        raise LaunchError(f"{printable(file)}: cannot be read: {error.strerror}") from None
    try:
        spec = json.loads(text)
    except ValueError as error:
        raise LaunchError(f"{printable(file)}: damaged: {error}") from None
    if not isinstance(spec, dict) or not isinstance(spec.get("format"), int) or not isinstance(spec.get("cluster"), dict):
        raise LaunchError(f"{printable(file)}: damaged: it is no record of a run")
    if spec["format"] > FORMAT:
        raise unsupported_format(Path(file), spec["format"], spec.get("mikoshi", "?"))
    attempt = newest_attempt(path)
    if attempt is None:
        return _RunRecords(path, spec)
    result = attempt.result
    may_run = result is None or result.next == "requeued"
    try:
        job = _job(attempt, str(spec["cluster"].get("kind"))) if may_run else attempt.job
    except LaunchError as error:
        return _RunRecords(path, spec, attempt, note=str(error))
    return _RunRecords(path, spec, attempt, job, bool(job) and may_run, None if may_run else result)


def _job(attempt: Attempt, kind: str) -> dict[str, str]:
    """What identifies the job. Raises LaunchError if its record is damaged and there is no other."""
    if kind not in ("local", "ssh"):
        return attempt.read_job()
    from mikoshi.launch.backends.local.local import job_of

    return job_of(attempt)


def newest_attempt(path: Path) -> Attempt | None:
    """The newest attempt in a run folder, or None."""
    try:
        numbers = [int(name) for name in os.listdir(f"{path}/attempts") if name.isdigit()]  # noqa: PTH208
    except OSError:
        return None
    newest = (Attempt(Path(f"{path}/attempts/{number}")) for number in sorted(numbers, reverse=True))
    return next((attempt for attempt in newest if attempt.is_requested), None)


def _query_schedulers(known: Sequence[_RunRecords], notes: list[str]) -> dict[Path, JobState]:
    """Query every scheduler once, and return the state of each run's job."""
    groups: dict[str, list[_RunRecords]] = {}
    for one in known:
        groups.setdefault(_scheduler(one), []).append(one)
    found: dict[Path, JobState] = {}
    for group in groups.values():
        spec = group[0].spec
        assert spec is not None
        try:
            cluster = ADAPTER.validate_json(json.dumps(spec["cluster"]), strict=True)
            states = open_backend(cluster).query([dict(one.job) for one in group])
        except ValueError as error:
            reason = str(error) if isinstance(error, LaunchError) else "its cluster is not one of this version's"
            notes.append(f"{reason}; shown is what the run {'folder knows' if len(group) == 1 else 'folders know'}")
            continue
        found.update({one.path: state for one, state in zip(group, states, strict=True)})
    return found


def _scheduler(one: _RunRecords) -> str:
    """A key that is equal for runs which one query covers."""
    cluster = one.spec["cluster"] if one.spec is not None else {}
    kind = cluster.get("kind")
    if kind == "kubernetes":
        return f"{kind} {cluster.get('context')} {cluster.get('namespace')}"
    return "this machine" if kind in ("local", "ssh") else str(kind)


def _row(one: _RunRecords, spec: Mapping[str, Any], job: JobState | None, now: float) -> RunRow:
    """The row of a submitted run. Raises LaunchError where a record is damaged."""
    records = None if one.attempt is None else records_of(one.attempt, None if one.result is None else (one.job, one.result))
    state, why = state_of(records, job, now)
    if state == "lost" and one.attempt is not None and one.attempt.started is None and (line := last_line(one.attempt)):
        why = f"{why}; its last words: {line}"
    config = spec.get("config") or {}
    pace = _progress(one.path, int(config.get("train", {}).get("steps") or 0), state)
    status, started = (records.status, records.started) if records is not None else (None, None)
    nodes = status.nodes if status is not None else started.nodes if started is not None else list(job.nodes if job else ())
    seen = max(pace.pop("seen"), status.time if status is not None else 0.0, started.time if started is not None else 0.0)
    return RunRow(
        name=str(config.get("run", {}).get("name") or one.path.name), path=str(one.path), state=state, why=why,
        cluster=str(spec["cluster"].get("kind")), job=job_name(one.job), attempt=records.number if records is not None else 0,
        nodes=tuple(nodes), lost=tuple(status.lost) if status is not None else (),
        asked=records.request.nodes if records is not None else 0, restarts=status.restarts if status is not None else 0,
        created=float(spec.get("created") or 0.0), seen=seen or None, swept=_sweep_values(one.path), **pace,
    )  # fmt: skip


def _local_row(one: _RunRecords, now: float) -> RunRow:
    folder = RunFolder(one.path)
    events = last_records(folder.events, 64)
    state, why = state_of_plain(is_locked(one.path), events, now)
    text = folder.config.read_text(encoding="utf-8", errors="replace")
    steps = re.search(r"^\[train\]$(?:\n(?!\[).*)*?\nsteps = (\d+)$", text, re.MULTILINE)
    pace = _progress(one.path, int(steps.group(1)) if steps else 0, state)
    restarts = sum(event.get("event") == "restart" for event in events)
    return RunRow(
        name=one.path.name, path=str(one.path), state=state, why=why, restarts=restarts, seen=pace.pop("seen") or None,
        created=folder.config.stat().st_mtime, **pace,
    )  # fmt: skip


def _progress(path: Path, steps: int, state: State) -> dict[str, Any]:
    """The progress and speed of a run, from the last records of its logs."""
    folder = RunFolder(path)
    active = state in ("running", "stopping")
    metrics, events = last_records(folder.metrics, WINDOW + 2 if active else 2), last_records(folder.events, 4)
    taken = [record for record in metrics if "loss" in record and "step_seconds" in record][-WINDOW:]
    ends = [event["step"] for event in events[-2:] if event.get("event") == "end" and "step" in event]
    step = int(taken[-1]["step"]) if taken else max(ends, default=0)
    saved = _newest_saved(events)  # it is nearly always among the last events
    found: dict[str, Any] = {"step": step, "steps": steps, "checkpoint": newest_save(folder) if saved is None else saved}
    times = [record["time"] for record in (*metrics[-1:], *events[-1:]) if isinstance(record.get("time"), int | float)]
    found["seen"] = max(times, default=0.0)
    if taken:
        predicted = predicting_steps(taken) or predicting_steps(last_records(folder.metrics, WINDOW + 2))
        if predicted:
            loss = predicted[-1]["loss"]
            found["loss"] = math.nan if loss is None else loss  # null stands for a loss that is not finite
        seconds = sum(record["step_seconds"] for record in taken)
        if seconds > 0 and active:
            found["tokens_per_second"] = sum(r.get("computed_tokens", r.get("tokens", 0)) for r in taken) / seconds
            found["seconds_left"] = (steps - step) * seconds / len(taken)
    return found


def _sweep_values(path: Path) -> dict[str, str]:
    """The values that a sweep gave this run."""
    try:
        found = json.loads(read_bytes(f"{path}/sweep.json"))
    except (OSError, ValueError):
        return {}
    return {str(key): str(value) for key, value in found.items()} if isinstance(found, dict) else {}


def job_name(job: Mapping[str, str]) -> str:
    """Where users find a job: its Slurm id, JobSet or process."""
    if job.get("id"):
        return f"job {job['id']}"
    if job.get("jobset"):
        return f"JobSet {job.get('namespace', '')}/{job['jobset']}"
    return f"process {job['pid']} on {job.get('host', 'this machine')}" if job.get("pid") else ""


def newest_save(folder: RunFolder) -> int | None:
    """The newest saved step by the run's events, or None."""
    return _newest_saved(last_records(folder.events, 1 << 20))


def _newest_saved(events: Sequence[Mapping[str, Any]]) -> int | None:
    """The newest step that is saved by these events."""
    for event in reversed(events):
        if event.get("event") in ("save", "resume", "import") and isinstance(event.get("step"), int):
            return int(event["step"])
    return None
