"""What a run's processes have said, read where it lies and followed from one attempt to the next, every byte of it once."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mikoshi.launch.runs.record import Attempt, Submitted
from mikoshi.launch.runs.tails import start_of_last
from mikoshi.launch.config.paths import named, typed
from mikoshi.trainer.errors import LaunchError

LOOKS = 0.2
"""Seconds between looks at a file that is followed."""

_PIECE = 1 << 16
_LINE = 300  # signs of a last line that are shown


@dataclass(frozen=True)
class Voice:
    """Whose log. node, head: instead of a rank's; head: of the process that leads the attempt."""

    rank: int = 0
    node: str = ""
    head: bool = False

    def file(self, attempt: Attempt) -> Path:
        if self.head:
            return attempt.head_log
        return attempt.node_log(self.node) if self.node else attempt.rank_log(self.rank)

    def said(self, attempt: Attempt) -> Path:
        """The same; for a head that never came to speak, what its job said instead."""
        file = self.file(attempt)
        return (job_log(attempt) or file) if self.head and not file.is_file() else file

    @property
    def told(self) -> str:
        return "the head" if self.head else f"node {self.node}" if self.node else f"rank {self.rank}"


def job_log(attempt: Attempt) -> Path | None:
    """The output file of an attempt's Slurm job: by its number, in the run's folder or in that of its sweep; or the newest.
    None where there is none."""
    folder, ident = attempt.path.parent.parent, attempt.job.get("id", "")
    places = (folder, *folder.parent.glob(".sweep-*")) if re.fullmatch(r"[0-9_]+", ident) else ()
    for place in places:
        with contextlib.suppress(OSError):  # another user's sweep
            if (found := place / f"slurm-{ident}.out").is_file():
                return found
    files = [path for path in folder.glob("slurm-*.out") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_mtime, default=None)


def last_words(attempt: Attempt) -> str:
    """The last line of what an attempt's head has said, or else its job; "" where there is none."""
    try:
        lines = b"".join(read(Voice(head=True).said(attempt), 4)).decode(errors="replace").split("\n")
    except LaunchError:
        return ""
    return next((line.strip()[:_LINE] for line in reversed(lines) if line.strip()), "")


def chosen(run: Submitted, voice: Voice, number: int | None, over: Callable[[], bool] = lambda: False) -> Attempt:
    """The attempt whose log is asked for: that `number`, or the newest in which this voice has spoken. over: whether the run
    has ended. Raises LaunchError, naming the logs that there are."""
    attempts = run.attempts
    if not attempts:
        raise never_handed(run.folder.path)
    if number is not None:
        found = next((attempt for attempt in attempts if attempt.number == number), None)
        if found is None:
            raise LaunchError(f"--attempt {number}: the attempts are {', '.join(str(one.number) for one in attempts)}")
        if not voice.said(found).is_file():
            raise LaunchError(f"{voice.told} has said nothing in attempt {number}; {there_is(found)}")
        return found
    for attempt in reversed(attempts):
        if voice.said(attempt).is_file():
            return attempt
    newest = attempts[-1]
    if newest.started is None and newest.result is None and not over():
        path = typed(run.folder.path)
        raise LaunchError(
            f"{named(run.folder.path)}: it has not started yet: `mikoshi status {path}` says why, "
            f"`mikoshi logs {path} -f` waits"
        )
    raise LaunchError(f"{voice.told} has said nothing; {there_is(newest)}")


def never_handed(path: Path) -> LaunchError:
    """What to say of a run without an attempt."""
    return LaunchError(f"{named(path)}: it was never handed to the cluster: `mikoshi resume {typed(path)}`")


def there_is(attempt: Attempt) -> str:
    """Which logs an attempt has, and how to ask for them."""
    names = [path.name for path in attempt.path.glob("*.log")]
    ranks = sorted(int(found.group(1)) for name in names if (found := re.fullmatch(r"rank-(\d+)\.log", name)))
    nodes = sorted(found.group(1) for name in names if (found := re.fullmatch(r"node-(.+)\.log", name)))
    parts = [f"--rank {', '.join(map(str, ranks[:8]))}{f' ... {ranks[-1]}' if len(ranks) > 8 else ''}"] if ranks else []
    parts += [f"--node {', '.join(nodes[:8])}{' ...' if len(nodes) > 8 else ''}"] if nodes else []
    parts += ["--head"] if "head.log" in names or job_log(attempt) else []
    return f"attempt {attempt.number} has {'; '.join(parts)}" if parts else f"attempt {attempt.number} has no log at all"


def read(path: Path, lines: int | None) -> Iterator[bytes]:
    """A log, or its last lines. Raises LaunchError where it cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(0 if lines is None else start_of_last(path, lines))
            while piece := file.read(_PIECE):
                yield piece
    except OSError as error:
        raise LaunchError(f"{named(path)}: cannot be read: {error.strerror}") from None


def follow(
    run: Submitted, voice: Voice, lines: int | None, ended: Callable[[], bool], tell: Callable[[str], None]
) -> Iterator[bytes]:  # fmt: skip
    """What a voice says from its last `lines` lines on, over all attempts that are still to come, until the run has ended.
    Whole lines, but for what a process that died has left without its end. tell: is given what is no part of the log."""
    attempt = next((one for one in reversed(run.attempts) if voice.file(one).is_file()), None)
    tail: _Tail | None = None
    waiting = False
    while True:
        over = ended()  # before the file is looked at: what is said until then is still read
        newest = run.attempts[-1] if run.attempts else None
        if tail is None and attempt is not None and voice.file(attempt).is_file():
            tail = _Tail(voice.file(attempt), lines)
            lines = None
        if tail is not None:
            yield from tail.more(tell)
        if newest is not None and (attempt is None or newest.number > attempt.number) and voice.file(newest).is_file():
            if tail is not None:
                yield from tail.rest(tell)
            if attempt is not None:
                tell(f"attempt {newest.number}:")
            attempt, tail = newest, None
            continue
        if over:
            if tail is not None:
                yield from tail.rest(tell)
            elif newest is not None and voice.said(newest).is_file():
                yield from read(voice.said(newest), lines)
            return
        if tail is None and not waiting:
            waiting = True
            tell(f"waiting for {voice.told} to start")
        time.sleep(LOOKS)


class _Tail:
    """A file that others write, as far as it has been read."""

    def __init__(self, path: Path, lines: int | None) -> None:
        self.path = path
        self.at = 0 if lines is None else start_of_last(path, lines)
        self.same = self._identity()
        self.begun = b""

    def more(self, tell: Callable[[str], None]) -> Iterator[bytes]:
        """The whole lines that have come since."""
        for piece in self._pieces(tell):
            whole, end, begun = (self.begun + piece).rpartition(b"\n")
            self.begun = begun
            if end:
                yield whole + end

    def rest(self, tell: Callable[[str], None]) -> Iterator[bytes]:
        """All that is left, as nobody will end the last line."""
        yield from self.more(tell)
        if self.begun:
            yield self.begun + b"\n"
            self.begun = b""

    def _pieces(self, tell: Callable[[str], None]) -> Iterator[bytes]:
        identity = self._identity()
        if identity is None:
            return  # moved away for a moment, or for good: then there is no more
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
            while piece := file.read(_PIECE):
                self.at += len(piece)
                yield piece

    def _identity(self) -> tuple[int, int, int] | None:
        try:
            found = self.path.stat()
        except OSError:
            return None
        return found.st_size, found.st_dev, found.st_ino
