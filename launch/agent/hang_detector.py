"""Finds the rank that has stopped making progress, for whatever reason, and never blames a rank that still works."""

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

DUMP_SIGNAL = signal.SIGRTMIN + 1
"""On this signal a rank writes the stacks of its threads. The handler is C code and needs no interpreter lock."""

_CHECK_INTERVAL = 0.2
_SUSPENDED = 1.0
# Forward and backward alternate within a step, in an order that differs between ranks. Ranks in either wait for a compile.
_ORDER = {
    "start": 0, "load": 1, "data": 2, "compile": 2, "forward": 3, "backward": 3, "reduce": 4, "update": 5, "agree": 6, "end": 8,
}  # fmt: skip
_LATE = 7  # save, evaluate


@dataclass(frozen=True)
class Hang:
    """The rank that holds up the others.

    page: its last heartbeat
    seconds: how long it has been silent
    stopped: whether its process is stopped by a signal or a debugger
    """

    rank: int
    page: Page
    seconds: float
    stopped: bool


@dataclass
class HangDetector:
    """Reads the heartbeat pages of one attempt's ranks.

    silence, patience: limits in seconds, see `config.data.RecoverySection`
    pages: the last page of each rank
    """

    silence: float
    patience: float
    began: float = field(default_factory=time.monotonic)
    pages: dict[int, Page] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.last_check = self.counted_from = self.began

    def read(self, rank: int, path: Path) -> Page | None:
        """Read a rank's page; if that fails, return its last one."""
        page = read_page(path)
        if page is not None:
            self.pages[rank] = page
        return self.pages.get(rank)

    def check(self, ranks: Mapping[int, tuple[int, Path]]) -> Hang | None:
        """Return the hang among the running ranks, or None.

        ranks: process id and page file of each running rank
        """
        now = time.monotonic()
        if now - self.last_check < _CHECK_INTERVAL:
            return None
        if now - self.last_check > _SUSPENDED:  # this process was stopped itself, and perhaps its ranks with it
            self.counted_from = now
        self.last_check = now
        not_started = Page(0, 0, 0, self.began, self.patience, "start")
        pages = {rank: self.read(rank, path) or not_started for rank, (_, path) in ranks.items()}
        stopped = {rank for rank, page in pages.items() if now - page.time > self.silence and is_stopped(ranks[rank][0])}
        return find_hang(pages, stopped, now, self.counted_from, self.silence)


def find_hang(pages: Mapping[int, Page], stopped: set[int], now: float, since: float, silence: float) -> Hang | None:
    """Return the rank that has been silent for too long, or None.

    A stopped process comes first. Otherwise it is the least advanced rank, once it exceeds the limit of its own phase: the
    ranks ahead wait for it.

    stopped: ranks whose process is stopped
    since: time before which silence does not count
    """
    if not pages:
        return None
    quiet = {rank: now - max(page.time, since) for rank, page in pages.items()}
    for rank in sorted(stopped):
        if quiet[rank] > min(silence, pages[rank].limit):
            return Hang(rank, pages[rank], quiet[rank], True)
    last = min(pages, key=lambda rank: (*_progress_key(pages[rank]), pages[rank].time, rank))
    return Hang(last, pages[last], quiet[last], False) if quiet[last] > pages[last].limit else None


def _progress_key(page: Page) -> tuple[int, int, int]:
    return page.step, _ORDER.get(page.phase, _LATE), page.count


def is_stopped(pid: int) -> bool:
    """Whether a process is stopped by a signal or a debugger."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "tT"
    return False


def dump_stacks(pids: Mapping[int, int], files: Mapping[int, Path], wait: float = 2.0) -> None:
    """Have every rank write its stacks into its file, and wait up to `wait` seconds until it has. Stopped ranks are
    continued."""
    before = {rank: _size(path) for rank, path in files.items()}
    for pid in pids.values():
        with contextlib.suppress(ProcessLookupError):
            _interrupt_main_thread(pid)
            os.kill(pid, signal.SIGCONT)  # it may run for a moment, which does no harm
    deadline, sizes = time.monotonic() + wait, before
    while time.monotonic() < deadline:
        time.sleep(0.02)
        last, sizes = sizes, {rank: _size(path) for rank, path in files.items()}
        if sizes == last and all(sizes[rank] > before[rank] for rank in pids):
            return


def _interrupt_main_thread(pid: int) -> None:
    """Signal the main thread alone. Sent to the process, a library's thread might take it, while the main thread's stack
    changes."""
    to_thread = getattr(ctypes.CDLL(None), "tgkill", None)
    if to_thread is None:
        os.kill(pid, DUMP_SIGNAL)
    else:
        to_thread(pid, pid, int(DUMP_SIGNAL))


def keep_stacks(folder: RunFolder, files: Mapping[int, Path], attempt: int, header: str) -> Path:
    """Copy the stacks into the run folder, and return the folder they are in."""
    target = folder.stacks
    target.mkdir(parents=True, exist_ok=True)
    for rank, path in files.items():
        text = path.read_text(errors="replace") if path.exists() else ""
        with (target / f"attempt-{attempt}-rank-{rank}.txt").open("a", encoding="utf-8") as out:
            out.write(f"{header}\n{text or 'it wrote no stack within 2 s: its process is stuck in the kernel'}\n\n")
    return target


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
