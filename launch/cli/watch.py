"""The verbs that watch runs: their states and logs, from their folders and one query to the scheduler."""

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
    from mikoshi.launch.operate.board import Board, RunRow
    from mikoshi.launch.runs.logs import LogSource
    from mikoshi.launch.runs.record import SubmittedRun


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
    """Show the state of a run: nodes, progress, speed, checkpoint, its last events, and what to do next.

    It reads the run folder and queries the scheduler once; if that does not answer, the folder alone.
    """
    if run is None:
        runs(Path("runs"), as_json)
        return
    from mikoshi.launch.config.paths import printable
    from mikoshi.launch.operate.board import folder_of, survey_run
    from mikoshi.launch.operate.board_text import as_json as to_json
    from mikoshi.launch.operate.board_text import run_page
    from mikoshi.launch.runs.tails import last_records

    now = time.time()
    path = folder_of(run)
    row, notes = survey_run(path, now)
    events = last_records(path / "events.jsonl", 5)
    if as_json:
        typer.echo(dumps(to_json(row, notes, events), indent=2))
        return
    print_notes(notes)
    for name, text in [("run", printable(path)), *run_page(row, events, now)]:
        state = _colour(row.state, row.state)
        typer.echo(f"{name:<18} {text.replace(row.state, state, 1) if name == 'state' else text}")


def runs(
    folder: Annotated[Path, typer.Option(help="folder that runs are kept in")] = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Show all runs of a folder, newest first: state, nodes, step, loss, speed, last sign of life."""
    from mikoshi.launch.config.paths import printable
    from mikoshi.launch.operate.board import all_runs, survey_runs
    from mikoshi.launch.operate.board_text import as_json as to_json

    now = time.time()
    board = survey_runs(all_runs(folder), now)
    if as_json:
        typer.echo(dumps({"runs": [to_json(row, ()) for row in board.rows], "notes": list(board.notes)}, indent=2))
        return
    print_notes(board.notes)
    if not board.rows:
        typer.echo(f"{printable(folder)}: there is no run yet")
        return
    _print_board(board, now)


def _print_board(board: Board, now: float) -> None:
    from mikoshi.launch.operate.board_text import aligned, runs_table

    head, *lines = aligned(runs_table(board.rows, now))
    if sys.stdout.isatty():
        lines = [_coloured(line, row) for line, row in zip(lines, board.rows, strict=True)]
    typer.echo("\n".join([head, *lines]))


def _coloured(line: str, row: RunRow) -> str:
    name, state, rest = line.partition(f"  {row.state} ") if f"  {row.state} " in line else (line, "", "")
    return f"{name}{_colour(state, row.state)}{rest}" if state else line


def _colour(text: str, state: str) -> str:
    from mikoshi.launch.operate.board_text import COLOURS

    if not sys.stdout.isatty() or "NO_COLOR" in os.environ:
        return text
    *bold, colour = COLOURS[state].split()
    return typer.style(text, fg=colour, bold=bool(bold))


def print_notes(notes: Iterable[str]) -> None:
    """Print notes on stderr."""
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def logs(
    run: NamedRun,
    follow: Annotated[
        bool, typer.Option("-f", "--follow", help="go on until the run has ended, over all its attempts")
    ] = False,
    rank: Annotated[int, typer.Option(min=0, help="the rank whose log to show")] = 0,
    attempt: Annotated[
        int | None, typer.Option(min=1, help="which attempt (default: the newest with a log)", show_default=False)
    ] = None,
    node: Annotated[str, typer.Option(help="show the log of this node's agent instead", show_default=False)] = "",
    head: Annotated[bool, typer.Option("--head", help="show the log of the head process instead")] = False,
    lines: Annotated[
        int | None, typer.Option("-n", "--lines", min=0, help="only the last (default: all; with -f 20)", show_default=False)
    ] = None,
) -> None:
    """Show the log of a rank, also while the run continues and over all its attempts."""
    from mikoshi.launch.config.names import host_name
    from mikoshi.launch.config.paths import printable
    from mikoshi.launch.operate.board import folder_of
    from mikoshi.launch.runs.logs import LogSource
    from mikoshi.trainer.errors import LaunchError

    path = folder_of(run)
    if not (path / "spec.json").is_file():
        raise LaunchError(
            f"{printable(path)}: `mikoshi train` started this run: what it said is where it was started; "
            f"its records are {printable(path / 'events.jsonl')} and {printable(path / 'metrics.jsonl')}"
        )
    if head + bool(node) > 1 or (follow and attempt is not None):
        raise LaunchError(
            "--head, --node: give one" if head and node else "-f goes on to the newest attempt: leave out --attempt"
        )
    try:
        source = LogSource(rank, host_name(node) if node else "", head)
    except ValueError as error:
        raise LaunchError(f"--node: {error}") from None
    exit_on_interrupt(lambda: _logs(path, source, attempt, follow, lines))


def _logs(path: Path, source: LogSource, number: int | None, following: bool, lines: int | None) -> None:
    from mikoshi.launch.operate.control import run_status
    from mikoshi.launch.operate.status import FINAL
    from mikoshi.launch.runs.logs import choose_attempt, read_log
    from mikoshi.launch.runs.record import open_submitted

    submitted = open_submitted(path)
    if following:
        follow_run(path, source, 20 if lines is None else lines)
    elif _is_remote(submitted):
        _pod_logs(submitted, source, number, False, lines)
    else:
        found = choose_attempt(submitted, source, number, lambda: run_status(path).state in FINAL)
        newest = submitted.attempts[-1].number
        if number is None and found.number != newest:
            _print_note(f"attempt {newest} has said nothing yet; attempt {found.number}:")
        for piece in read_log(source.existing_file(found), lines):
            sys.stdout.buffer.write(piece)


def _is_remote(run: SubmittedRun) -> bool:
    """Whether the run folder with the logs is on a disk of the cluster."""
    from mikoshi.launch.backends.kubernetes.manifests import is_apart

    return run.spec.cluster.kind == "kubernetes" and is_apart(run)


def _pod_logs(run: SubmittedRun, source: LogSource, number: int | None, following: bool, lines: int | None) -> None:
    """Show the output of pods, since the ranks' logs are out of reach."""
    from mikoshi.launch.backends.kubernetes.kubernetes import log_lines
    from mikoshi.launch.config.cluster import KubernetesCluster
    from mikoshi.launch.runs.logs import not_submitted
    from mikoshi.trainer.errors import LaunchError

    cluster, attempts = run.spec.cluster, run.attempts
    assert isinstance(cluster, KubernetesCluster)
    attempt = next((one for one in reversed(attempts) if number in (None, one.number)), None)
    if attempts and attempt is None:
        raise LaunchError(f"--attempt {number}: the attempts are {', '.join(str(one.number) for one in attempts)}")
    if attempt is None or not (job := attempt.job):
        raise not_submitted(run.folder.path)
    if source.node and not source.node.isdigit():
        raise LaunchError(f"--node {source.node}: pods have numbers: 0 is the one that leads")
    if source.rank:
        raise LaunchError(f"--rank {source.rank}: logs of ranks are files of the run folder, which is on the cluster's disk; "
                          "without --rank what the leading pod prints is shown")  # fmt: skip
    for line in log_lines(cluster, job, int(source.node or 0), following, lines):
        typer.echo(line.rstrip("\n"))


def _follow_pod(run: SubmittedRun, source: LogSource, lines: int | None, ended: Callable[[], bool]) -> None:
    """Follow a pod's output, and wait for the pod if it has not started."""
    from mikoshi.launch.backends.kubernetes.kubernetes import NoPodError
    from mikoshi.launch.operate.control import SCHEDULER_INTERVAL

    waiting = False
    while True:
        try:
            return _pod_logs(run, source, None, True, lines)
        except NoPodError:
            if ended():
                return None
        if not waiting:
            _print_note(f"waiting for the pod of node {source.node or 0} to start")
        waiting = True
        time.sleep(SCHEDULER_INTERVAL)


def follow_run(path: Path, source: LogSource | None = None, lines: int | None = None) -> None:
    """Show a log of a run until the run has ended, then its state.

    source: whose log; default: rank 0
    lines: start with the last so many lines; default: all
    """
    from mikoshi.launch.config.paths import printable
    from mikoshi.launch.operate.control import SCHEDULER_INTERVAL, run_status
    from mikoshi.launch.operate.status import FINAL
    from mikoshi.launch.runs.logs import LogSource, follow_log
    from mikoshi.launch.runs.record import open_submitted

    last_query, over = 0.0, False

    def ended() -> bool:
        nonlocal last_query, over
        if not over and time.monotonic() - last_query >= SCHEDULER_INTERVAL:
            last_query = time.monotonic()
            over = run_status(path).state in FINAL
        return over

    run = open_submitted(path)
    if _is_remote(run):
        _follow_pod(run, source or LogSource(), lines, ended)
    else:
        for piece in follow_log(run, source or LogSource(), lines, ended, _print_note):
            sys.stdout.buffer.write(piece)
            sys.stdout.buffer.flush()
    seen = run_status(path)
    _print_note(f"{printable(path)}: {seen.state}{f': {seen.why}' if seen.why else ''}")


def _print_note(text: str) -> None:
    sys.stdout.flush()
    print(f"-- {text}", file=sys.stderr, flush=True)


def exit_on_interrupt(work: Callable[[], None]) -> None:
    """Call `work`; Ctrl-C exits with code 130 and no error."""
    try:
        work()
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
