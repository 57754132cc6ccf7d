"""Stopping a run and going on with it: never two attempts at once, and never a request that nobody was told of."""

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
from mikoshi.launch.config.paths import named, typed
from mikoshi.launch.operate.board import look_at
from mikoshi.launch.operate.status import FINAL, State
from mikoshi.launch.operate.submit import hand_over, layouts, least, look_ahead
from mikoshi.launch.runs.record import Attempt, Request, Stop, Submitted, open_submitted
from mikoshi.trainer.errors import LaunchError, TooFewError

LOOKS = 0.3
ASKS = 3.0
"""Seconds between looks at the folder, and between questions to the scheduler."""

_SIGNS = 6.0
"""Seconds in which whoever leads a run gives a sign of life, three times over."""


@dataclass(frozen=True)
class Standing:
    """A run as it stands. unsure: what kept the scheduler from being asked."""

    run: Submitted
    state: State
    why: str
    unsure: str = ""


def standing(folder: Path) -> Standing:
    """Raises LaunchError where there is no submitted run."""
    run = open_submitted(folder)
    row, notes = look_at(folder, time.time())
    return Standing(run, row.state, row.why, notes[0] if notes else "")


def ask_to_stop(run: Submitted, backend: Backend, now: bool) -> Attempt:
    """Record that the newest attempt is to stop, then tell it. Where it cannot be told, the record is as it was before.
    Raises LaunchError."""
    attempt = run.attempts[-1]
    if run.spec.cluster.kind not in ("local", "ssh"):  # there the head's own record serves as well
        attempt.read_job()
    file = attempt.path / "stop.json"
    before = file.read_bytes() if file.exists() else None
    attempt.write(Stop(time=time.time(), by=_who(), now=now))
    try:
        backend.cancel(attempt, now)
    except BaseException:
        if before is not None:
            write_file(file, before)
        else:
            file.unlink(missing_ok=True)
        raise
    return attempt


def wait_for_end(run: Submitted, backend: Backend, now: bool, show: Callable[[State, str], None]) -> Standing:
    """Until a run that was asked to stop has ended. One that its scheduler started once more meanwhile is asked again."""
    told = run.attempts[-1].number
    asked = 0.0
    while True:
        newest = run.attempts[-1]
        if newest.number > told and newest.stop is None:
            told = ask_to_stop(run, backend, now).number
        result = newest.result
        if time.monotonic() - asked >= ASKS or (result is not None and not result.next):
            asked = time.monotonic()
            seen = standing(run.folder.path)
            show(seen.state, seen.why)
            if seen.state in FINAL:
                return seen
        time.sleep(LOOKS)


def resume(
    seen: Standing, backend: Backend, nodes: int | None, min_nodes: int | None, exclude: Sequence[str], include: Sequence[str]
) -> tuple[Attempt, str]:  # fmt: skip
    """Another attempt at a run that has ended; and its layout in words. After an error there is none. Raises LaunchError."""
    run, path = seen.run, seen.run.folder.path
    if seen.unsure:
        raise LaunchError(f"{named(path)}: whether it still runs cannot be told: {seen.unsure}")
    if seen.state not in FINAL:
        how = f"`mikoshi cancel {typed(path)}{' --now' * (seen.state == 'stopping')}` ends it first"
        raise LaunchError(f"{named(path)}: it is {seen.state}: {how}")
    before = run.attempts
    request = next_request(run, nodes, min_nodes, exclude, include)
    told, _ = layouts(run.spec.config, run.spec.cluster, request)
    look_ahead(run.spec, request.nodes)
    _only_one(run)
    request = _checked(run, backend, request)
    with contextlib.ExitStack() as undo:
        attempt = run.add(request)
        undo.callback(shutil.rmtree, attempt.path, ignore_errors=True)
        if attempt.number != (before[-1].number if before else 0) + 1:
            raise LaunchError(f"{named(path)}: someone else has just resumed it: `mikoshi status {typed(path)}`")
        hand_over(run, attempt, backend, undo)
        undo.pop_all()
    return attempt, told


def _checked(run: Submitted, backend: Backend, request: Request) -> Request:
    """The request, without nodes that were found bad; with them where there are too few others: one may have been lost for a
    moment alone. Raises LaunchError."""
    try:
        backend.check(run, request)
    except TooFewError:
        if not request.bad:
            raise
        request = request.model_copy(update={"bad": []})
        backend.check(run, request)
    return request


def _only_one(run: Submitted) -> None:
    """Raises LaunchError where the newest attempt is led from another machine, whose word nobody can ask for, and gives a sign
    of life: its clock may differ from this one's, so what counts is whether there is another sign."""
    newest = run.attempts[-1] if run.attempts else None
    if newest is None or newest.result is not None or run.spec.cluster.kind not in ("local", "ssh"):
        return
    head = newest.started
    if head is None or head.host == socket.gethostname():
        return
    before, until = newest.status, time.monotonic() + _SIGNS
    while time.monotonic() < until:
        time.sleep(LOOKS)
        if newest.status != before:
            path = typed(run.folder.path)
            raise LaunchError(f"{named(run.folder.path)}: it runs, led from {head.host}: `mikoshi cancel {path}` there first")


def next_request(
    run: Submitted, nodes: int | None, min_nodes: int | None, exclude: Sequence[str], include: Sequence[str]
) -> Request:  # fmt: skip
    """What the next attempt asks for: as the one before, without the nodes that were found bad. Raises LaunchError."""
    last = run.attempts[-1] if run.attempts else None
    was = last.request if last is not None else None
    try:
        named = [*map(host_name, exclude)]
        back = {*map(host_name, include)}
    except ValueError as error:
        raise LaunchError(f"--exclude-node, --include-node: {error}") from None
    if both := sorted(back & set(named)):
        raise LaunchError(f"--exclude-node {both[0]} and --include-node {both[0]}: leave one out")
    never = dict.fromkeys([*(was.exclude if was else []), *named])
    bad = [name for name in (last.found_bad if last is not None else []) if name not in (*never, *back)]
    count = nodes or (was.nodes if was else run.spec.cluster.nodes)
    fewest = min_nodes or (was.min_nodes if was is not None and was.min_nodes < was.nodes else None)
    smallest = least(run.spec.config, count, min(fewest, count) if fewest and not min_nodes else fewest)
    return Request(
        nodes=count, min_nodes=smallest, exclude=[name for name in never if name not in back], bad=bad,
        cause="resume" if was else "submit", time=time.time(),
    )  # fmt: skip


def _who() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user without a name, as in a container
        return "someone"
