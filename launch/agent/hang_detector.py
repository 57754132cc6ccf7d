"""Every rank that has stopped making progress is named, however it came to stand still, and none that goes on."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mikoshi.parallel.process.heartbeat import Page, read_page
from mikoshi.trainer.record.run_folder import RunFolder

DUMP = signal.SIGRTMIN + 1
"""On this a rank writes the stack of each of its threads; its handler is C code, which needs no lock of Python."""

_EVERY = 0.2
_GAP = 1.0
# Within a step forward and backward alternate, on another rank in another order. One that compiles is waited for in both.
_ORDER = {
    "start": 0, "load": 1, "data": 2, "compile": 2, "forward": 3, "backward": 3, "reduce": 4, "update": 5, "agree": 6, "end": 8,
}  # fmt: skip
_LATE = 7  # save, evaluate


@dataclass(frozen=True)
class Hang:
    """The rank that holds up the others, what it said last, and for how many seconds it has been silent."""

    rank: int
    page: Page
    seconds: float
    stopped: bool


@dataclass
class Watch:
    """The pages of one attempt's ranks. `pages` holds what each of them said last."""

    silence: float
    patience: float
    began: float = field(default_factory=time.monotonic)
    pages: dict[int, Page] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.looked = self.since = self.began

    def read(self, rank: int, path: Path) -> Page | None:
        """This rank's page as it is now, or as it was last."""
        page = read_page(path)
        if page is not None:
            self.pages[rank] = page
        return self.pages.get(rank)

    def look(self, ranks: Mapping[int, tuple[int, Path]]) -> Hang | None:
        """Who hangs among the ranks that run, given each one's process id and page."""
        now = time.monotonic()
        if now - self.looked < _EVERY:
            return None
        if now - self.looked > _GAP:  # this process itself was stopped, and its ranks perhaps with it
            self.since = now
        self.looked = now
        unborn = Page(0, 0, 0, self.began, self.patience, "start")
        pages = {rank: self.read(rank, path) or unborn for rank, (_, path) in ranks.items()}
        stopped = {rank for rank, page in pages.items() if now - page.time > self.silence and is_stopped(ranks[rank][0])}
        return who_hangs(pages, stopped, now, self.since, self.silence)


def who_hangs(pages: Mapping[int, Page], stopped: set[int], now: float, since: float, silence: float) -> Hang | None:
    """The rank that has been silent for too long, counted from `since` at the earliest.

    A stopped process first. Else the least advanced, once it is past its own limit: those ahead wait for it, and it may
    be in a phase that takes its time.
    """
    if not pages:
        return None
    quiet = {rank: now - max(page.time, since) for rank, page in pages.items()}
    for rank in sorted(stopped):
        if quiet[rank] > min(silence, pages[rank].limit):
            return Hang(rank, pages[rank], quiet[rank], True)
    last = min(pages, key=lambda rank: (*_advance(pages[rank]), pages[rank].time, rank))
    return Hang(last, pages[last], quiet[last], False) if quiet[last] > pages[last].limit else None


def _advance(page: Page) -> tuple[int, int, int]:
    return page.step, _ORDER.get(page.phase, _LATE), page.beats


def is_stopped(pid: int) -> bool:
    """Whether a process stands still by a signal or under a debugger."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "tT"
    return False


def dump_stacks(pids: Mapping[int, int], files: Mapping[int, Path], wait: float = 2.0) -> None:
    """Have every rank write its stacks into its file, the stopped ones too, and wait until they have, or for `wait` s."""
    before = {rank: _size(path) for rank, path in files.items()}
    for pid in pids.values():
        with contextlib.suppress(ProcessLookupError):
            _interrupt_main_thread(pid)
            os.kill(pid, signal.SIGCONT)  # it may go on for a moment: what it does then is as good as ever
    deadline, sizes = time.monotonic() + wait, before
    while time.monotonic() < deadline:
        time.sleep(0.02)
        last, sizes = sizes, {rank: _size(path) for rank, path in files.items()}
        if sizes == last and all(sizes[rank] > before[rank] for rank in pids):
            return


def _interrupt_main_thread(pid: int) -> None:
    """To the process as a whole, the signal might go to a thread of a library, and the stack be written while it changes."""
    to_thread = getattr(ctypes.CDLL(None), "tgkill", None)
    if to_thread is None:
        os.kill(pid, DUMP)
    else:
        to_thread(pid, pid, int(DUMP))


def keep_stacks(folder: RunFolder, files: Mapping[int, Path], attempt: int, header: str) -> Path:
    """Put the stacks where the run's other files are; the folder."""
    target = folder.stacks
    target.mkdir(parents=True, exist_ok=True)
    for rank, path in files.items():
        text = path.read_text(errors="replace") if path.exists() else ""
        with (target / f"attempt-{attempt}-rank-{rank}.txt").open("a", encoding="utf-8") as out:
            out.write(f"{header}\n{text or 'it wrote no stack within 2 s: its process is stuck in the kernel'}\n\n")
    return target


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
