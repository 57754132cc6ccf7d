"""The verbs that watch runs: how they stand and what they say, from their folders and a question to the scheduler."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mikoshi.data.io.json import dumps
from mikoshi.launch.cli.arguments import AsJson, NamedRun

if TYPE_CHECKING:
    from mikoshi.launch.operate.board import Board, Row
    from mikoshi.launch.runs.logs import Voice
    from mikoshi.launch.runs.record import Submitted


STATUS_EXAMPLES = "Examples: `mikoshi status runs/quickstart`, `mikoshi status quickstart --json`, `mikoshi status`"
RUNS_EXAMPLES = "Examples: `mikoshi runs`, `mikoshi runs --folder /shared/runs --json`"
LOGS_EXAMPLES = (
    "Examples: `mikoshi logs runs/quickstart -f`, `mikoshi logs quickstart --rank 7 -n 50`, "
    "`mikoshi logs quickstart --attempt 1 --head`, `mikoshi logs quickstart --node n2`"
)


def status(
    run: Annotated[
        Path | None, typer.Argument(help="a run folder or a run's name (default: all of runs/)", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Tell how a run stands: state, nodes, progress, speed, checkpoint, its last events, and what to do next.

    From its folder and one question to the scheduler; where that does not answer, from the folder alone.
    """
    if run is None:
        runs(Path("runs"), as_json)
        return
    from mikoshi.launch.config.paths import named
    from mikoshi.launch.operate.board import folder_of, look_at
    from mikoshi.launch.operate.board_text import as_json as to_json
    from mikoshi.launch.operate.board_text import page
    from mikoshi.launch.runs.tails import last_records

    now = time.time()
    path = folder_of(run)
    row, notes = look_at(path, now)
    events = last_records(path / "events.jsonl", 5)
    if as_json:
        typer.echo(dumps(to_json(row, notes, events), indent=2))
        return
    tell_notes(notes)
    for name, text in [("run", named(path)), *page(row, events, now)]:
        state = _colour(row.state, row.state)
        typer.echo(f"{name:<18} {text.replace(row.state, state, 1) if name == 'state' else text}")


def runs(
    folder: Annotated[Path, typer.Option(help="folder that runs are kept in")] = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Show all runs of a folder, newest first: state, nodes, step, loss, speed, last sign of life."""
    from mikoshi.launch.config.paths import named
    from mikoshi.launch.operate.board import all_runs, look
    from mikoshi.launch.operate.board_text import as_json as to_json

    now = time.time()
    board = look(all_runs(folder), now)
    if as_json:
        typer.echo(dumps({"runs": [to_json(row, ()) for row in board.rows], "notes": list(board.notes)}, indent=2))
        return
    tell_notes(board.notes)
    if not board.rows:
        typer.echo(f"{named(folder)}: there is no run yet")
        return
    _print_board(board, now)


def _print_board(board: Board, now: float) -> None:
    from mikoshi.launch.operate.board_text import aligned, table

    head, *lines = aligned(table(board.rows, now))
    if sys.stdout.isatty():
        lines = [_painted(line, row) for line, row in zip(lines, board.rows, strict=True)]
    typer.echo("\n".join([head, *lines]))


def _painted(line: str, row: Row) -> str:
    name, state, rest = line.partition(f"  {row.state} ") if f"  {row.state} " in line else (line, "", "")
    return f"{name}{_colour(state, row.state)}{rest}" if state else line


def _colour(text: str, state: str) -> str:
    from mikoshi.launch.operate.board_text import COLOURS

    if not sys.stdout.isatty() or "NO_COLOR" in os.environ:
        return text
    *bold, colour = COLOURS[state].split()
    return typer.style(text, fg=colour, bold=bool(bold))


def tell_notes(notes: Iterable[str]) -> None:
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def logs(
    run: NamedRun,
    follow: Annotated[
        bool, typer.Option("-f", "--follow", help="go on until the run has ended, over all its attempts")
    ] = False,
    rank: Annotated[int, typer.Option(min=0, help="whose words")] = 0,
    attempt: Annotated[
        int | None, typer.Option(min=1, help="which attempt (default: the newest that has said something)", show_default=False)
    ] = None,
    node: Annotated[str, typer.Option(help="what starting this node said, instead", show_default=False)] = "",
    head: Annotated[bool, typer.Option("--head", help="what the process that leads the run said, instead")] = False,
    lines: Annotated[
        int | None, typer.Option("-n", "--lines", min=0, help="only the last (default: all; with -f 20)", show_default=False)
    ] = None,
) -> None:
    """Show what a rank of a run says, also while it runs and over its attempts."""
    from mikoshi.launch.config.names import host_name
    from mikoshi.launch.config.paths import named
    from mikoshi.launch.operate.board import folder_of
    from mikoshi.launch.runs.logs import Voice
    from mikoshi.trainer.errors import LaunchError

    path = folder_of(run)
    if not (path / "spec.json").is_file():
        raise LaunchError(f"{named(path)}: `mikoshi train` started this run: what it said is where it was started; its records "
                          f"are {named(path / 'events.jsonl')} and {named(path / 'metrics.jsonl')}")  # fmt: skip
    if head + bool(node) > 1 or (follow and attempt is not None):
        raise LaunchError(
            "--head, --node: give one" if head and node else "-f goes on to the newest attempt: leave out --attempt"
        )
    try:
        voice = Voice(rank, host_name(node) if node else "", head)
    except ValueError as error:
        raise LaunchError(f"--node: {error}") from None
    quietly(lambda: _logs(path, voice, attempt, follow, lines))


def _logs(path: Path, voice: Voice, number: int | None, following: bool, lines: int | None) -> None:
    from mikoshi.launch.operate.control import standing
    from mikoshi.launch.operate.status import FINAL
    from mikoshi.launch.runs.logs import chosen, read
    from mikoshi.launch.runs.record import open_submitted

    submitted = open_submitted(path)
    if following:
        follow_run(path, voice, 20 if lines is None else lines)
    elif _apart(submitted):
        _pod_logs(submitted, voice, number, False, lines)
    else:
        found = chosen(submitted, voice, number, lambda: standing(path).state in FINAL)
        newest = submitted.attempts[-1].number
        if number is None and found.number != newest:
            _tell(f"attempt {newest} has said nothing yet; attempt {found.number}:")
        for piece in read(voice.said(found), lines):
            sys.stdout.buffer.write(piece)


def _apart(run: Submitted) -> bool:
    """Whether the run folder with the logs is on a disk of the cluster's."""
    from mikoshi.launch.backends.kubernetes.manifests import is_apart

    return run.spec.cluster.kind == "kubernetes" and is_apart(run)


def _pod_logs(run: Submitted, voice: Voice, number: int | None, following: bool, lines: int | None) -> None:
    """The pods are asked: what they print is theirs, not a rank's."""
    from mikoshi.launch.backends.kubernetes.kubernetes import log_lines
    from mikoshi.launch.config.cluster import KubernetesCluster
    from mikoshi.launch.runs.logs import never_handed
    from mikoshi.trainer.errors import LaunchError

    cluster, attempts = run.spec.cluster, run.attempts
    assert isinstance(cluster, KubernetesCluster)
    attempt = next((one for one in reversed(attempts) if number in (None, one.number)), None)
    if attempts and attempt is None:
        raise LaunchError(f"--attempt {number}: the attempts are {', '.join(str(one.number) for one in attempts)}")
    if attempt is None or not (job := attempt.job):
        raise never_handed(run.folder.path)
    if voice.node and not voice.node.isdigit():
        raise LaunchError(f"--node {voice.node}: pods have numbers: 0 is the one that leads")
    if voice.rank:
        raise LaunchError(f"--rank {voice.rank}: logs of ranks are files of the run folder, which is on the cluster's disk; "
                          "without --rank what the leading pod prints is shown")  # fmt: skip
    for line in log_lines(cluster, job, int(voice.node or 0), following, lines):
        typer.echo(line.rstrip("\n"))


def _follow_pod(run: Submitted, voice: Voice, lines: int | None, ended: Callable[[], bool]) -> None:
    """A pod that has not come up yet is waited for."""
    from mikoshi.launch.backends.kubernetes.kubernetes import NoPodError
    from mikoshi.launch.operate.control import ASKS

    waiting = False
    while True:
        try:
            return _pod_logs(run, voice, None, True, lines)
        except NoPodError:
            if ended():
                return None
        if not waiting:
            _tell(f"waiting for the pod of node {voice.node or 0} to start")
        waiting = True
        time.sleep(ASKS)


def follow_run(path: Path, voice: Voice | None = None, lines: int | None = None) -> None:
    from mikoshi.launch.config.paths import named
    from mikoshi.launch.operate.control import ASKS, standing
    from mikoshi.launch.operate.status import FINAL
    from mikoshi.launch.runs.logs import Voice, follow
    from mikoshi.launch.runs.record import open_submitted

    asked, over = 0.0, False

    def ended() -> bool:
        nonlocal asked, over
        if not over and time.monotonic() - asked >= ASKS:
            asked = time.monotonic()
            over = standing(path).state in FINAL
        return over

    run = open_submitted(path)
    if _apart(run):
        _follow_pod(run, voice or Voice(), lines, ended)
    else:
        for piece in follow(run, voice or Voice(), lines, ended, _tell):
            sys.stdout.buffer.write(piece)
            sys.stdout.buffer.flush()
    seen = standing(path)
    _tell(f"{named(path)}: {seen.state}{f': {seen.why}' if seen.why else ''}")


def _tell(text: str) -> None:
    sys.stdout.flush()
    print(f"-- {text}", file=sys.stderr, flush=True)


def quietly(work: Callable[[], None]) -> None:
    """Ctrl-C while following is no error."""
    try:
        work()
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
