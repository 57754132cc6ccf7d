"""How runs stand: each told from its folder, with one question to each scheduler however many there are; nothing is changed."""

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
from mikoshi.launch.config.paths import named
from mikoshi.launch.operate.status import State, held, records_of, state_of, state_of_plain
from mikoshi.launch.runs.logs import last_words
from mikoshi.launch.runs.record import FORMAT, Attempt, Result, content, is_there, newer
from mikoshi.launch.runs.tails import last_records
from mikoshi.trainer.errors import LaunchError
from mikoshi.trainer.record.run_folder import RunFolder, predicting

PACE = 50
"""Steps that speed and time left are the mean of."""


@dataclass(frozen=True)
class Row:
    """A run. cluster: its kind, "" where `mikoshi train` started it. job: as its scheduler calls it. nodes: those that carry
    it now; asked: how many it asked for. seconds_left: until its last step. checkpoint: the newest step that is saved.
    seen: time of its last sign of life. swept: what a sweep gave it."""

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
    """Newest first. notes: what could not be asked or read, a line each."""

    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Known:
    """What is read of a run before any scheduler is asked. spec: None where `mikoshi train` started it. result: of one that
    has ended for good, which nothing changes. note: why its scheduler cannot be asked, of a run that may be going on."""

    path: Path
    spec: Mapping[str, Any] | None = None
    attempt: Attempt | None = None
    job: Mapping[str, str] = field(default_factory=dict)
    open: bool = False
    result: Result | None = None
    note: str = ""


def folder_of(given: Path) -> Path:
    """A run's folder: as given, or by its name alone in runs/. Raises LaunchError where there is no run."""
    for path in (given, Path("runs") / given):
        if (path / "spec.json").is_file() or (path / "config.toml").is_file():
            return path
    raise LaunchError(f"{named(given)}: not a run folder: `mikoshi runs` shows those that there are")


def all_runs(folder: Path) -> list[Path]:
    """The folders of all runs below a folder. Raises LaunchError where that cannot be read."""
    try:
        found = [path for path in folder.iterdir() if not path.name.startswith(".")]
    except OSError as error:
        raise LaunchError(
            f"--folder {named(folder)}: cannot be read: {error.strerror}; give the folder that runs are kept in"
        ) from None
    return [path for path in found if _may_be_run(path)]


def _may_be_run(path: Path) -> bool:
    """Also where somebody else's rights keep this from being known: look() then says so."""
    try:
        return is_there(f"{path}/spec.json") or is_there(f"{path}/config.toml")
    except OSError:
        return True


def look(paths: Sequence[Path], now: float) -> Board:
    """How these runs stand. A scheduler that does not answer, or a run whose records are damaged, is a note."""
    notes: list[str] = []
    known: list[_Known] = []
    for path in paths:
        try:
            known.append(_known(path))
        except LaunchError as error:
            notes.append(str(error))
        except OSError as error:  # somebody else's, or removed meanwhile
            notes.append(f"{named(path)}: cannot be read: {error.strerror}")
    notes += [one.note for one in known if one.note]
    jobs = _ask([one for one in known if one.open], notes)
    rows = []
    for one in known:
        try:
            rows.append(_plain_row(one, now) if one.spec is None else _row(one, one.spec, jobs.get(one.path), now))
        except LaunchError as error:
            notes.append(str(error))
        except OSError as error:  # somebody else's, or removed meanwhile
            notes.append(f"{named(one.path)}: cannot be read: {error.strerror}")
    return Board(tuple(sorted(rows, key=lambda row: (-row.created, row.name))), tuple(dict.fromkeys(notes)))


def look_at(path: Path, now: float) -> tuple[Row, tuple[str, ...]]:
    """One run, and what could not be asked. Raises LaunchError where its records cannot be read."""
    board = look([path], now)
    if not board.rows:
        raise LaunchError(board.notes[0])
    return board.rows[0], board.notes


def _known(path: Path) -> _Known:
    file = f"{path}/spec.json"
    try:
        text = content(file)
    except FileNotFoundError:
        return _Known(path)
    except OSError as error:
        raise LaunchError(f"{named(file)}: cannot be read: {error.strerror}") from None
    try:
        spec = json.loads(text)
    except ValueError as error:
        raise LaunchError(f"{named(file)}: damaged: {error}") from None
    if not isinstance(spec, dict) or not isinstance(spec.get("format"), int) or not isinstance(spec.get("cluster"), dict):
        raise LaunchError(f"{named(file)}: damaged: it is no record of a run")
    if spec["format"] > FORMAT:
        raise newer(Path(file), spec["format"], spec.get("mikoshi", "?"))
    attempt = newest_attempt(path)
    if attempt is None:
        return _Known(path, spec)
    result = attempt.result
    may_run = result is None or result.next == "requeued"
    try:
        job = _job(attempt, str(spec["cluster"].get("kind"))) if may_run else attempt.job
    except LaunchError as error:
        return _Known(path, spec, attempt, note=str(error))
    return _Known(path, spec, attempt, job, bool(job) and may_run, None if may_run else result)


def _job(attempt: Attempt, kind: str) -> dict[str, str]:
    """Raises LaunchError where it is damaged and nothing else tells."""
    if kind not in ("local", "ssh"):
        return attempt.read_job()
    from mikoshi.launch.backends.local.local import job_of

    return job_of(attempt)


def newest_attempt(path: Path) -> Attempt | None:
    """Of a run's folder."""
    try:
        numbers = [int(name) for name in os.listdir(f"{path}/attempts") if name.isdigit()]  # noqa: PTH208
    except OSError:
        return None
    newest = (Attempt(Path(f"{path}/attempts/{number}")) for number in sorted(numbers, reverse=True))
    return next((attempt for attempt in newest if attempt.asked_for), None)


def _ask(known: Sequence[_Known], notes: list[str]) -> dict[Path, JobState]:
    """What the schedulers say: one question to each."""
    groups: dict[str, list[_Known]] = {}
    for one in known:
        groups.setdefault(_scheduler(one), []).append(one)
    found: dict[Path, JobState] = {}
    for group in groups.values():
        spec = group[0].spec
        assert spec is not None
        try:
            cluster = ADAPTER.validate_json(json.dumps(spec["cluster"]), strict=True)
            states = open_backend(cluster).look([dict(one.job) for one in group])
        except ValueError as error:
            told = str(error) if isinstance(error, LaunchError) else "its cluster is not one of this version's"
            notes.append(f"{told}; shown is what the run {'folder knows' if len(group) == 1 else 'folders know'}")
            continue
        found.update({one.path: state for one, state in zip(group, states, strict=True)})
    return found


def _scheduler(one: _Known) -> str:
    """What is the same for runs that one question answers for."""
    cluster = one.spec["cluster"] if one.spec is not None else {}
    kind = cluster.get("kind")
    if kind == "kubernetes":
        return f"{kind} {cluster.get('context')} {cluster.get('namespace')}"
    return "this machine" if kind in ("local", "ssh") else str(kind)


def _row(one: _Known, spec: Mapping[str, Any], job: JobState | None, now: float) -> Row:
    """Of a run that was submitted. Raises LaunchError where a record is damaged."""
    records = None if one.attempt is None else records_of(one.attempt, None if one.result is None else (one.job, one.result))
    state, why = state_of(records, job, now)
    if state == "lost" and one.attempt is not None and one.attempt.started is None and (said := last_words(one.attempt)):
        why = f"{why}; its last words: {said}"
    config = spec.get("config") or {}
    pace = _pace(one.path, int(config.get("train", {}).get("steps") or 0), state)
    status, started = (records.status, records.started) if records is not None else (None, None)
    nodes = status.nodes if status is not None else started.nodes if started is not None else list(job.nodes if job else ())
    seen = max(pace.pop("seen"), status.time if status is not None else 0.0, started.time if started is not None else 0.0)
    return Row(
        name=str(config.get("run", {}).get("name") or one.path.name), path=str(one.path), state=state, why=why,
        cluster=str(spec["cluster"].get("kind")), job=job_name(one.job), attempt=records.number if records is not None else 0,
        nodes=tuple(nodes), lost=tuple(status.lost) if status is not None else (),
        asked=records.request.nodes if records is not None else 0, restarts=status.restarts if status is not None else 0,
        created=float(spec.get("created") or 0.0), seen=seen or None, swept=_swept(one.path), **pace,
    )  # fmt: skip


def _plain_row(one: _Known, now: float) -> Row:
    folder = RunFolder(one.path)
    events = last_records(folder.events, 64)
    state, why = state_of_plain(held(one.path), events, now)
    text = folder.config.read_text(encoding="utf-8", errors="replace")
    steps = re.search(r"^\[train\]$(?:\n(?!\[).*)*?\nsteps = (\d+)$", text, re.MULTILINE)
    pace = _pace(one.path, int(steps.group(1)) if steps else 0, state)
    restarts = sum(event.get("event") == "restart" for event in events)
    return Row(
        name=one.path.name, path=str(one.path), state=state, why=why, restarts=restarts, seen=pace.pop("seen") or None,
        created=folder.config.stat().st_mtime, **pace,
    )  # fmt: skip


def _pace(path: Path, steps: int, state: State) -> dict[str, Any]:
    """How far a run has come and how fast it is, from the last records of its logs."""
    folder = RunFolder(path)
    going = state in ("running", "stopping")
    metrics, events = last_records(folder.metrics, PACE + 2 if going else 2), last_records(folder.events, 4)
    taken = [record for record in metrics if "loss" in record and "step_seconds" in record][-PACE:]
    ends = [event["step"] for event in events[-2:] if event.get("event") == "end" and "step" in event]
    step = int(taken[-1]["step"]) if taken else max(ends, default=0)
    saved = _saved(events)  # nearly always among the last few
    found: dict[str, Any] = {"step": step, "steps": steps, "checkpoint": newest_save(folder) if saved is None else saved}
    times = [record["time"] for record in (*metrics[-1:], *events[-1:]) if isinstance(record.get("time"), int | float)]
    found["seen"] = max(times, default=0.0)
    if taken:
        predicted = predicting(taken) or predicting(last_records(folder.metrics, PACE + 2))
        if predicted:
            loss = predicted[-1]["loss"]
            found["loss"] = math.nan if loss is None else loss  # a step whose loss is not finite
        seconds = sum(record["step_seconds"] for record in taken)
        if seconds > 0 and going:
            found["tokens_per_second"] = sum(r.get("computed_tokens", r.get("tokens", 0)) for r in taken) / seconds
            found["seconds_left"] = (steps - step) * seconds / len(taken)
    return found


def _swept(path: Path) -> dict[str, str]:
    """The values that a sweep gave this run."""
    try:
        found = json.loads(content(f"{path}/sweep.json"))
    except (OSError, ValueError):
        return {}
    return {str(key): str(value) for key, value in found.items()} if isinstance(found, dict) else {}


def job_name(job: Mapping[str, str]) -> str:
    """What a job is called where people look for it."""
    if job.get("id"):
        return f"job {job['id']}"
    if job.get("jobset"):
        return f"JobSet {job.get('namespace', '')}/{job['jobset']}"
    return f"process {job['pid']} on {job.get('host', 'this machine')}" if job.get("pid") else ""


def newest_save(folder: RunFolder) -> int | None:
    """The newest step that is saved, as the run's events tell."""
    return _saved(last_records(folder.events, 1 << 20))


def _saved(events: Sequence[Mapping[str, Any]]) -> int | None:
    """The newest step that is saved by these events."""
    for event in reversed(events):
        if event.get("event") in ("save", "resume", "import") and isinstance(event.get("step"), int):
            return int(event["step"])
    return None
