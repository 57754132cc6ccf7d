"""Reads the logs of a run, and follows them from one attempt to the next. Every byte is shown once."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mikoshi.launch.runs.record import Attempt, SubmittedRun
from mikoshi.launch.runs.tails import start_of_last
from mikoshi.launch.config.paths import printable, shell_quoted
from mikoshi.trainer.errors import LaunchError

POLL_INTERVAL = 0.2
"""Seconds between checks of a log that is followed."""

_CHUNK = 1 << 16
_MAX_LINE = 300  # characters of a last line that are shown


@dataclass(frozen=True)
class LogSource:
    """Whose log to read: a rank's, a node's, or the head's."""

    rank: int = 0
    node: str = ""
    head: bool = False

    def file(self, attempt: Attempt) -> Path:
        """Its log file in an attempt."""
        if self.head:
            return attempt.head_log
        return attempt.node_log(self.node) if self.node else attempt.rank_log(self.rank)

    def existing_file(self, attempt: Attempt) -> Path:
        """The same; for a head that wrote no log, the output of its job."""
        file = self.file(attempt)
        return (job_log(attempt) or file) if self.head and not file.is_file() else file

    @property
    def label(self) -> str:
        """Its name in messages."""
        return "the head" if self.head else f"node {self.node}" if self.node else f"rank {self.rank}"


def job_log(attempt: Attempt) -> Path | None:
    """The output file of an attempt's Slurm job, or None.

    It is found by the job's id, in the run folder or in that of its sweep; else it is the newest one.
    """
    folder, ident = attempt.path.parent.parent, attempt.job.get("id", "")
    places = (folder, *folder.parent.glob(".sweep-*")) if re.fullmatch(r"[0-9_]+", ident) else ()
    for place in places:
        with contextlib.suppress(OSError):  # another user's sweep
            if (found := place / f"slurm-{ident}.out").is_file():
                return found
    files = [path for path in folder.glob("slurm-*.out") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_mtime, default=None)


def last_line(attempt: Attempt) -> str:
    """The last line in the log of an attempt's head, or of its job; "" if there is none."""
    try:
        lines = b"".join(read_log(LogSource(head=True).existing_file(attempt), 4)).decode(errors="replace").split("\n")
    except LaunchError:
        return ""
    return next((line.strip()[:_MAX_LINE] for line in reversed(lines) if line.strip()), "")


def choose_attempt(run: SubmittedRun, source: LogSource, number: int | None, over: Callable[[], bool] = lambda: False) -> Attempt:
    """Return the attempt whose log to show: that `number`, or the newest with a log from this source.

    Raises LaunchError, with the logs that exist.

    over: whether the run has ended
    """
    attempts = run.attempts
    if not attempts:
        raise not_submitted(run.folder.path)
    if number is not None:
        found = next((attempt for attempt in attempts if attempt.number == number), None)
        if found is None:
            raise LaunchError(f"--attempt {number}: the attempts are {', '.join(str(one.number) for one in attempts)}")
        if not source.existing_file(found).is_file():
            raise LaunchError(f"{source.label} has said nothing in attempt {number}; {available_logs(found)}")
        return found
    for attempt in reversed(attempts):
        if source.existing_file(attempt).is_file():
            return attempt
    newest = attempts[-1]
    if newest.started is None and newest.result is None and not over():
        path = shell_quoted(run.folder.path)
        raise LaunchError(
            f"{printable(run.folder.path)}: it has not started yet: `mikoshi status {path}` says why, "
            f"`mikoshi logs {path} -f` waits"
        )
    raise LaunchError(f"{source.label} has said nothing; {available_logs(newest)}")


def not_submitted(path: Path) -> LaunchError:
    """The error for a run without an attempt."""
    return LaunchError(f"{printable(path)}: it was never handed to the cluster: `mikoshi resume {shell_quoted(path)}`")


def available_logs(attempt: Attempt) -> str:
    """Describe which logs an attempt has, and the options that show them."""
    names = [path.name for path in attempt.path.glob("*.log")]
    ranks = sorted(int(found.group(1)) for name in names if (found := re.fullmatch(r"rank-(\d+)\.log", name)))
    nodes = sorted(found.group(1) for name in names if (found := re.fullmatch(r"node-(.+)\.log", name)))
    parts = [f"--rank {', '.join(map(str, ranks[:8]))}{f' ... {ranks[-1]}' if len(ranks) > 8 else ''}"] if ranks else []
    parts += [f"--node {', '.join(nodes[:8])}{' ...' if len(nodes) > 8 else ''}"] if nodes else []
    parts += ["--head"] if "head.log" in names or job_log(attempt) else []
    return f"attempt {attempt.number} has {'; '.join(parts)}" if parts else f"attempt {attempt.number} has no log at all"


def read_log(path: Path, lines: int | None) -> Iterator[bytes]:
    """Yield a log, or its last `lines` lines. Raises LaunchError if it cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(0 if lines is None else start_of_last(path, lines))
            while piece := file.read(_CHUNK):
                yield piece
    except OSError as error:
        raise LaunchError(f"{printable(path)}: cannot be read: {error.strerror}") from None


def follow_log(
    run: SubmittedRun, source: LogSource, lines: int | None, ended: Callable[[], bool], tell: Callable[[str], None]
) -> Iterator[bytes]:  # fmt: skip
    """Yield a log from its last `lines` lines on, over all later attempts, until the run has ended.

    Yields whole lines. If a process died within a line, the rest of it comes last.

    ended: whether the run has ended
    tell: called with messages that are not part of the log
    """
    attempt = next((one for one in reversed(run.attempts) if source.file(one).is_file()), None)
    tail: _Tail | None = None
    waiting = False
    while True:
        over = ended()  # checked before the file, so that nothing written until then is missed
        newest = run.attempts[-1] if run.attempts else None
        if tail is None and attempt is not None and source.file(attempt).is_file():
            tail = _Tail(source.file(attempt), lines)
            lines = None
        if tail is not None:
            yield from tail.more(tell)
        if newest is not None and (attempt is None or newest.number > attempt.number) and source.file(newest).is_file():
            if tail is not None:
                yield from tail.rest(tell)
            if attempt is not None:
                tell(f"attempt {newest.number}:")
            attempt, tail = newest, None
            continue
        if over:
            if tail is not None:
                yield from tail.rest(tell)
            elif newest is not None and source.existing_file(newest).is_file():
                yield from read_log(source.existing_file(newest), lines)
            return
        if tail is None and not waiting:
            waiting = True
            tell(f"waiting for {source.label} to start")
        time.sleep(POLL_INTERVAL)


class _Tail:
    """A growing file, and how far it has been read."""

    def __init__(self, path: Path, lines: int | None) -> None:
        self.path = path
        self.at = 0 if lines is None else start_of_last(path, lines)
        self.same = self._identity()
        self.begun = b""

    def more(self, tell: Callable[[str], None]) -> Iterator[bytes]:
        """Yield the whole lines that were added."""
        for piece in self._pieces(tell):
            whole, end, begun = (self.begun + piece).rpartition(b"\n")
            self.begun = begun
            if end:
                yield whole + end

    def rest(self, tell: Callable[[str], None]) -> Iterator[bytes]:
        """Yield everything that is left, as the last line will not be completed."""
        yield from self.more(tell)
        if self.begun:
            yield self.begun + b"\n"
            self.begun = b""

    def _pieces(self, tell: Callable[[str], None]) -> Iterator[bytes]:
        identity = self._identity()
        if identity is None:
            return  # moved away, perhaps only for a moment
        size, *same = identity
        if self.same is not None and same != list(self.same[1:]):
            tell(f"{self.path.name} was replaced: from its beginning")
            self.at, self.begun = 0, b""
        elif size < self.at:
            tell(f"{self.path.name} was cut: from its beginning")
            self.at, self.begun = 0, b""
        self.same = identity
        with self.path.open("rb") as file:
            file.seek(self.at)
            while piece := file.read(_CHUNK):
                self.at += len(piece)
                yield piece

    def _identity(self) -> tuple[int, int, int] | None:
        try:
            found = self.path.stat()
        except OSError:
            return None
        return found.st_size, found.st_dev, found.st_ino
