"""Stops runs and resumes them. There are never two attempts at once, and no recorded request that was not sent."""

from __future__ import annotations

import contextlib
import getpass
import shutil
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mikoshi.data.io.atomic import write_file
from mikoshi.launch.backends.base import Backend
from mikoshi.launch.config.names import host_name
from mikoshi.launch.config.paths import printable, shell_quoted
from mikoshi.launch.operate.board import survey_run
from mikoshi.launch.operate.status import FINAL, State
from mikoshi.launch.operate.submit import check_data, check_layouts, fewest_nodes, submit_attempt
from mikoshi.launch.runs.record import Attempt, Request, Stop, SubmittedRun, open_submitted
from mikoshi.trainer.errors import LaunchError, TooFewError

POLL_INTERVAL = 0.3
SCHEDULER_INTERVAL = 3.0
"""Seconds between checks of the folder, and between queries to the scheduler."""

_LIVENESS_TIME = 6.0
"""Seconds in which a live head updates its status three times."""


@dataclass(frozen=True)
class RunStatus:
    """The state of a run. unsure: why the scheduler could not be asked, or ""."""

    run: SubmittedRun
    state: State
    why: str
    unsure: str = ""


def run_status(folder: Path) -> RunStatus:
    """Return the state of a submitted run. Raises LaunchError if there is none."""
    run = open_submitted(folder)
    row, notes = survey_run(folder, time.time())
    return RunStatus(run, row.state, row.why, notes[0] if notes else "")


def request_stop(run: SubmittedRun, backend: Backend, now: bool) -> Attempt:
    """Record that the newest attempt is to stop, and tell it. If it cannot be told, the record is undone. Raises
    LaunchError.

    now: stop at once, without a checkpoint
    """
    attempt = run.attempts[-1]
    if run.spec.cluster.kind not in ("local", "ssh"):  # there the head's own record identifies it too
        attempt.read_job()
    file = attempt.path / "stop.json"
    before = file.read_bytes() if file.exists() else None
    attempt.write(Stop(time=time.time(), by=_user_name(), now=now))
    try:
        backend.cancel(attempt, now)
    except BaseException:
        if before is not None:
            write_file(file, before)
        else:
            file.unlink(missing_ok=True)
        raise
    return attempt


def wait_for_end(run: SubmittedRun, backend: Backend, now: bool, show: Callable[[State, str], None]) -> RunStatus:
    """Wait until a run that was asked to stop has ended. If the scheduler restarts it meanwhile, it is asked again.

    show: called with the state and the reason
    """
    stopped = run.attempts[-1].number
    last_query = 0.0
    while True:
        newest = run.attempts[-1]
        if newest.number > stopped and newest.stop is None:
            stopped = request_stop(run, backend, now).number
        result = newest.result
        if time.monotonic() - last_query >= SCHEDULER_INTERVAL or (result is not None and not result.next):
            last_query = time.monotonic()
            seen = run_status(run.folder.path)
            show(seen.state, seen.why)
            if seen.state in FINAL:
                return seen
        time.sleep(POLL_INTERVAL)


def resume(
    seen: RunStatus, backend: Backend, nodes: int | None, min_nodes: int | None, exclude: Sequence[str], include: Sequence[str]
) -> tuple[Attempt, str]:  # fmt: skip
    """Start another attempt at a run that has ended, and return it with its layout as text.

    After an error there is no new attempt. Raises LaunchError.

    exclude, include: nodes to avoid from now on, and avoided nodes to use again
    """
    run, path = seen.run, seen.run.folder.path
    if seen.unsure:
        raise LaunchError(f"{printable(path)}: whether it still runs cannot be told: {seen.unsure}")
    if seen.state not in FINAL:
        how = f"`mikoshi cancel {shell_quoted(path)}{' --now' * (seen.state == 'stopping')}` ends it first"
        raise LaunchError(f"{printable(path)}: it is {seen.state}: {how}")
    before = run.attempts
    request = next_request(run, nodes, min_nodes, exclude, include)
    layout, _ = check_layouts(run.spec.config, run.spec.cluster, request)
    check_data(run.spec, request.nodes)
    _check_not_running(run)
    request = _feasible_request(run, backend, request)
    with contextlib.ExitStack() as undo:
        attempt = run.add(request)
        undo.callback(shutil.rmtree, attempt.path, ignore_errors=True)
        if attempt.number != (before[-1].number if before else 0) + 1:
            raise LaunchError(f"{printable(path)}: someone else has just resumed it: `mikoshi status {shell_quoted(path)}`")
        submit_attempt(run, attempt, backend, undo)
        undo.pop_all()
    return attempt, layout


def _feasible_request(run: SubmittedRun, backend: Backend, request: Request) -> Request:
    """The request without bad nodes; or with them if too few others are left. Raises LaunchError."""
    try:
        backend.check(run, request)
    except TooFewError:
        if not request.bad:
            raise
        request = request.model_copy(update={"bad": []})
        backend.check(run, request)
    return request


def _check_not_running(run: SubmittedRun) -> None:
    """Raise LaunchError if another machine leads the newest attempt and still updates its status.

    Clocks may differ, so what counts is whether the status changes.
    """
    newest = run.attempts[-1] if run.attempts else None
    if newest is None or newest.result is not None or run.spec.cluster.kind not in ("local", "ssh"):
        return
    head = newest.started
    if head is None or head.host == socket.gethostname():
        return
    before, until = newest.status, time.monotonic() + _LIVENESS_TIME
    while time.monotonic() < until:
        time.sleep(POLL_INTERVAL)
        if newest.status != before:
            path = shell_quoted(run.folder.path)
            raise LaunchError(
                f"{printable(run.folder.path)}: it runs, led from {head.host}: `mikoshi cancel {path}` there first"
            )


def next_request(
    run: SubmittedRun, nodes: int | None, min_nodes: int | None, exclude: Sequence[str], include: Sequence[str]
) -> Request:  # fmt: skip
    """Build the next attempt's request: like the last one, without the nodes that were found bad. Raises LaunchError."""
    last = run.attempts[-1] if run.attempts else None
    was = last.request if last is not None else None
    try:
        excluded = [*map(host_name, exclude)]
        back = {*map(host_name, include)}
    except ValueError as error:
        raise LaunchError(f"--exclude-node, --include-node: {error}") from None
    if both := sorted(back & set(excluded)):
        raise LaunchError(f"--exclude-node {both[0]} and --include-node {both[0]}: leave one out")
    never = dict.fromkeys([*(was.exclude if was else []), *excluded])
    bad = [name for name in (last.nodes_to_avoid if last is not None else []) if name not in (*never, *back)]
    count = nodes or (was.nodes if was else run.spec.cluster.nodes)
    fewest = min_nodes or (was.min_nodes if was is not None and was.min_nodes < was.nodes else None)
    smallest = fewest_nodes(run.spec.config, count, min(fewest, count) if fewest and not min_nodes else fewest)
    return Request(
        nodes=count, min_nodes=smallest, exclude=[name for name in never if name not in back], bad=bad,
        cause="resume" if was else "submit", time=time.time(),
    )  # fmt: skip


def _user_name() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user without a name, as in a container
        return "someone"
