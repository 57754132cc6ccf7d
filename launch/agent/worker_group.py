"""One attempt of a run's ranks on this node: all of them start, and none is left when it is over.

Not torchrun's LocalElasticAgent, which waits for a function's return value that a rank which is killed or ends by os._exit
never gives, tells one of several failed ranks, whichever, gives the others 30 s, and reads a pickled file for an error.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, Literal

from mikoshi.launch.agent.fork_server import Files, message, start
from mikoshi.launch.agent.hang_detector import Hang, Watch, dump_stacks, is_stopped, keep_stacks
from mikoshi.launch.agent.outcome import MILD, Ended, Silent
from mikoshi.launch.agent.rendezvous import Place
from mikoshi.launch.agent.requests import Requests
from mikoshi.launch.host.network import RESOLVER
from mikoshi.parallel.process.heartbeat import Page
from mikoshi.trainer.config.data import RecoverySection
from mikoshi.trainer.exit_codes import LOST_PEER, PREEMPTED, USER_ERROR
from mikoshi.trainer.record.run_folder import RunFolder
from mikoshi.trainer.signals import ASKING

_ENDED = tuple(-number for number in ASKING)
NURSERY_GONE = 255
"""Of a rank whose exit code its forkserver cannot tell any more."""

_LOOK = 0.05
_SETTLE = 2.0
_UNKILLABLE = 30.0


@dataclass(frozen=True)
class Attempt:
    """What an attempt's ranks are to do. folder: of the run; without one, silence is no fault. watched: whether it is judged
    here who hangs. env: on top of this process's own. logs: of a global rank, the file for what it prints; None: as here.
    bind: keep each to cores of its own, which are those beside its GPU.
    """

    number: int
    place: Place
    work: Callable[..., int]
    arguments: tuple[Any, ...]
    policy: RecoverySection
    folder: RunFolder | None
    private: Path
    watched: bool = True
    env: Mapping[str, str] = field(default_factory=dict)
    logs: Callable[[int], Path] | None = None
    bind: Literal["", "cores", "gpus"] = ""

    def files(self, rank: int) -> Files:
        return Files.of(self.private, self.number, rank)


class Ranks:
    """The ranks of an attempt, by global rank."""

    def __init__(self, attempt: Attempt, requests: Requests) -> None:
        self.attempt, self.requests = attempt, requests
        self.processes: dict[int, ForkServerProcess] = {}
        self.watch = Watch(attempt.policy.silence, attempt.policy.patience)
        self.codes: dict[int, int] = {}
        self.end = threading.Event()
        self.stacks = ""
        self._hang: Hang | None = None
        self._overdue: list[int] = []
        self._sent: dict[int, int] = {}
        self._first_lost: float | None = None
        self._abandons = False

    def run(self) -> Ended:
        """Start them, see them through and tell how they ended. `end`, once set, ends them before that."""
        try:
            if not self.end.is_set():
                self._start()
            running = self._running()
            while running and not self._over(running):
                self._pass_on(running)
                time.sleep(_LOOK)
                running = self._running()
        finally:
            self._shutdown()
        return self._ended()

    def _start(self) -> None:
        self.watch.began = time.monotonic()
        place = self.attempt.place
        for local in range(place.ranks):
            rank = place.first + local
            env = {**os.environ, **self.attempt.env, **self._told(rank, local)}
            env.setdefault("GLOO_SOCKET_IFNAME", place.interface)
            env.setdefault("NCCL_SOCKET_IFNAME", place.interface)
            env.setdefault(*RESOLVER)
            log = self.attempt.logs(rank) if self.attempt.logs else None
            bound = place.ranks if self.attempt.bind else 0
            try:
                self.processes[rank] = start(
                    rank,
                    env,
                    self.attempt.files(rank),
                    self.attempt.work,
                    self.attempt.arguments,
                    log,
                    bound,
                    self.attempt.bind == "gpus",
                )
            except (OSError, EOFError):  # what it was to be forked from has just died
                self.codes[rank] = NURSERY_GONE

    def _told(self, rank: int, local: int) -> dict[str, str]:
        """What torchrun tells a rank, and who its supervisor is."""
        place, files = self.attempt.place, self.attempt.files(rank)
        return {
            "RANK": str(rank), "LOCAL_RANK": str(local), "WORLD_SIZE": str(place.world), "LOCAL_WORLD_SIZE": str(place.ranks),
            "GROUP_RANK": str(place.node), "GROUP_WORLD_SIZE": str(place.nodes), "MASTER_ADDR": place.host,
            "MASTER_PORT": str(place.port), "TORCHELASTIC_RUN_ID": place.run_id, "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": str(self.attempt.number), "TORCHELASTIC_ERROR_FILE": str(files.error),
            "MIKOSHI_SUPERVISOR": str(os.getpid()), "MIKOSHI_ANSWER": str(files.answer),
        }  # fmt: skip

    def _running(self) -> dict[int, ForkServerProcess]:
        """The ranks that have not ended; notes how the others did."""
        for rank, process in self.processes.items():
            if rank not in self.codes and process.exitcode is not None:
                self.codes[rank] = process.exitcode
        return {rank: process for rank, process in self.processes.items() if rank not in self.codes}

    def _over(self, running: dict[int, ForkServerProcess]) -> bool:
        """Whether those that still run are to be ended now."""
        now = time.monotonic()
        if self.requests.at_once or now > self.requests.deadline:
            self._overdue = sorted(running)
            return True
        if self.end.is_set():
            return True
        self._abandons = any(self._leaves_others(rank, code) for rank, code in self.codes.items())
        if self._abandons and self._first_lost is None:
            self._first_lost = now
        if any(code not in MILD for code in self.codes.values()):
            return True
        if self._first_lost is not None and now - self._first_lost > _SETTLE:
            return True
        if self.attempt.watched and self.attempt.folder is not None:
            self._hang = self.watch.look({rank: (self._pid(rank), self.attempt.files(rank).page) for rank in running})
        if self._hang is not None:
            self.keep_stacks(f"rank {self._hang.rank} held up the others")
        return self._hang is not None

    def keep_stacks(self, header: str) -> None:
        """Have every rank write its stacks into the run's folder."""
        assert self.attempt.folder is not None
        files = {rank: self.attempt.files(rank).stacks for rank in self.processes if rank not in self.codes}
        dump_stacks({rank: self._pid(rank) for rank in files}, files)
        kept = keep_stacks(self.attempt.folder, files, self.attempt.number, f"{time.strftime('%F %T')}: {header}")
        self.stacks = str(kept)

    def pages(self) -> dict[int, tuple[Page, bool]]:
        """What every rank that runs said last, and whether its process is stopped."""
        found = {rank: self.watch.read(rank, self.attempt.files(rank).page) for rank in self._alive()}
        now = time.monotonic()
        unborn = Page(0, 0, 0, self.watch.began, self.attempt.policy.patience, "start")
        told = {rank: page or unborn for rank, page in found.items()}
        return {rank: (page, now - page.time > 1.0 and is_stopped(self._pid(rank))) for rank, page in told.items()}

    def _alive(self) -> list[int]:
        return [rank for rank in list(self.processes) if rank not in self.codes]

    def _leaves_others(self, rank: int, code: int) -> bool:
        """Whether its peers will wait for a rank in vain, though what is wrong is told by one of them, or by no one."""
        if code == PREEMPTED or code in _ENDED:  # past its steps it has done its part, and the others may still save
            page = self.watch.read(rank, self.attempt.files(rank).page)
            early = page is None or page.phase in ("start", "load")
            return early or (code in _ENDED and not self.requests.asked)
        return code in (USER_ERROR, LOST_PEER)

    def _pass_on(self, running: dict[int, ForkServerProcess]) -> None:
        """Every signal goes to every rank, also to those that started later."""
        for rank in running:
            for number in self.requests.asked[self._sent.get(rank, 0) :]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._pid(rank), number)
            self._sent[rank] = len(self.requests.asked)

    def _pid(self, rank: int) -> int:
        pid = self.processes[rank].pid
        assert pid is not None
        return pid

    def _shutdown(self) -> None:
        """Kill those that still run: all that they have saved is on disk, and what they wait for will not come."""
        for process in self.processes.values():
            if process.exitcode is None:
                process.kill()
        deadline = time.monotonic() + _UNKILLABLE
        for rank, process in self.processes.items():
            process.join(max(0.0, deadline - time.monotonic()))
            if process.exitcode is None:
                raise RuntimeError(f"rank {rank} (process {process.pid}) cannot be killed: it is stuck in the kernel")

    def _ended(self) -> Ended:
        ranks = range(self.attempt.place.first, self.attempt.place.first + self.attempt.place.ranks)
        files = {rank: self.attempt.files(rank) for rank in ranks}
        pages = {rank: self.watch.read(rank, files[rank].page) for rank in ranks}
        hang = self._hang
        if hang is not None:
            pages[hang.rank] = hang.page
        abandons = any(code not in MILD or self._leaves_others(rank, code) for rank, code in self.codes.items())
        return Ended(
            ranks=len(ranks), codes=dict(self.codes), overdue=self._overdue, stacks=self.stacks,
            abandons=abandons or self._abandons or len(self.codes) < len(ranks),
            said={rank: text for rank in ranks if (text := message(files[rank]))},
            said_at={rank: file.error.stat().st_mtime for rank, file in files.items() if file.error.exists()},
            at={rank: (page.step, page.phase) for rank, page in pages.items() if page},
            silent=Silent(rank=hang.rank, seconds=hang.seconds, stopped=hang.stopped) if hang else None,
            answers={rank: file.answer.read_text() for rank, file in files.items() if file.answer.exists()},
        )  # fmt: skip
