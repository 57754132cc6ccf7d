"""Runs the ranks of one attempt on this node: all of them start, and none is left at the end.

torchrun's LocalElasticAgent does not serve here. It waits for a return value that a rank which is killed, or ends by
os._exit, never sends. It reports any one of several failed ranks, gives the others 30 s, and unpickles a file to read an
error.
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

from mikoshi.launch.agent.fork_server import RankFiles, error_message, start_rank
from mikoshi.launch.agent.hang_detector import Hang, HangDetector, dump_stacks, is_stopped, keep_stacks
from mikoshi.launch.agent.outcome import BENIGN_CODES, HungRank, RanksOutcome
from mikoshi.launch.agent.rendezvous import Placement
from mikoshi.launch.agent.stop_requests import StopRequests
from mikoshi.launch.host.network import RESOLVER
from mikoshi.parallel.process.heartbeat import Page
from mikoshi.trainer.config.data import RecoverySection
from mikoshi.trainer.exit_codes import LOST_PEER, PREEMPTED, USER_ERROR
from mikoshi.trainer.record.run_folder import RunFolder
from mikoshi.trainer.signals import STOP_SIGNALS

_ENDED_BY_SIGNAL = tuple(-number for number in STOP_SIGNALS)
FORK_SERVER_GONE = 255
"""Exit code of a rank whose fork server died, so that its own is unknown."""

_POLL_INTERVAL = 0.05
_SETTLE_TIME = 2.0
_KILL_TIMEOUT = 30.0


@dataclass(frozen=True)
class WorkerGroupSpec:
    """What an attempt's ranks run.

    folder: the run folder; without one, hangs are not detected
    private: folder for the ranks' own files
    detect_hangs: whether hangs are detected here, not by the head
    env: environment variables on top of this process's own
    logs: maps a global rank to its log file; None: the output of this process
    bind: pin each rank to cores of its own; "gpus": those beside its GPU
    """

    number: int
    placement: Placement
    function: Callable[..., int]
    arguments: tuple[Any, ...]
    policy: RecoverySection
    folder: RunFolder | None
    private: Path
    detect_hangs: bool = True
    env: Mapping[str, str] = field(default_factory=dict)
    logs: Callable[[int], Path] | None = None
    bind: Literal["", "cores", "gpus"] = ""

    def files(self, rank: int) -> RankFiles:
        """The files through which a rank reports."""
        return RankFiles.of(self.private, self.number, rank)


class WorkerGroup:
    """The ranks of one attempt on this node, by global rank.

    stop_event: once set, the ranks are ended
    """

    def __init__(self, spec: WorkerGroupSpec, requests: StopRequests) -> None:
        self.spec, self.requests = spec, requests
        self.processes: dict[int, ForkServerProcess] = {}
        self.detector = HangDetector(spec.policy.silence, spec.policy.patience)
        self.codes: dict[int, int] = {}
        self.stop_event = threading.Event()
        self.stacks = ""
        self._hang: Hang | None = None
        self._overdue: list[int] = []
        self._forwarded: dict[int, int] = {}
        self._stranded_since: float | None = None
        self._abandons = False

    def run(self) -> RanksOutcome:
        """Start the ranks, wait for them and return how they ended."""
        try:
            if not self.stop_event.is_set():
                self._start()
            running = self._running()
            while running and not self._must_end(running):
                self._forward_signals(running)
                time.sleep(_POLL_INTERVAL)
                running = self._running()
        finally:
            self._shutdown()
        return self._outcome()

    def _start(self) -> None:
        self.detector.began = time.monotonic()
        placement = self.spec.placement
        for local in range(placement.ranks):
            rank = placement.first_rank + local
            env = {**os.environ, **self.spec.env, **self._environment(rank, local)}
            env.setdefault("GLOO_SOCKET_IFNAME", placement.interface)
            env.setdefault("NCCL_SOCKET_IFNAME", placement.interface)
            env.setdefault(*RESOLVER)
            log = self.spec.logs(rank) if self.spec.logs else None
            bound = placement.ranks if self.spec.bind else 0
            try:
                self.processes[rank] = start_rank(
                    rank,
                    env,
                    self.spec.files(rank),
                    self.spec.function,
                    self.spec.arguments,
                    log,
                    bound,
                    self.spec.bind == "gpus",
                )
            except (OSError, EOFError):  # the fork server has just died
                self.codes[rank] = FORK_SERVER_GONE

    def _environment(self, rank: int, local: int) -> dict[str, str]:
        """The environment variables that torchrun sets for a rank, and its supervisor's process id."""
        placement, files = self.spec.placement, self.spec.files(rank)
        return {
            "RANK": str(rank), "LOCAL_RANK": str(local), "WORLD_SIZE": str(placement.world_size),
            "LOCAL_WORLD_SIZE": str(placement.ranks),
            "GROUP_RANK": str(placement.node), "GROUP_WORLD_SIZE": str(placement.nodes), "MASTER_ADDR": placement.host,
            "MASTER_PORT": str(placement.port), "TORCHELASTIC_RUN_ID": placement.run_id, "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": str(self.spec.number), "TORCHELASTIC_ERROR_FILE": str(files.error),
            "MIKOSHI_SUPERVISOR": str(os.getpid()), "MIKOSHI_ANSWER": str(files.answer),
        }  # fmt: skip

    def _running(self) -> dict[int, ForkServerProcess]:
        """The ranks that have not ended. Records the exit codes of the others."""
        for rank, process in self.processes.items():
            if rank not in self.codes and process.exitcode is not None:
                self.codes[rank] = process.exitcode
        return {rank: process for rank, process in self.processes.items() if rank not in self.codes}

    def _must_end(self, running: dict[int, ForkServerProcess]) -> bool:
        """Whether the ranks that still run must be ended now."""
        now = time.monotonic()
        if self.requests.immediate or now > self.requests.deadline:
            self._overdue = sorted(running)
            return True
        if self.stop_event.is_set():
            return True
        self._abandons = any(self._strands_others(rank, code) for rank, code in self.codes.items())
        if self._abandons and self._stranded_since is None:
            self._stranded_since = now
        if any(code not in BENIGN_CODES for code in self.codes.values()):
            return True
        if self._stranded_since is not None and now - self._stranded_since > _SETTLE_TIME:
            return True
        if self.spec.detect_hangs and self.spec.folder is not None:
            self._hang = self.detector.check({rank: (self._pid(rank), self.spec.files(rank).page) for rank in running})
        if self._hang is not None:
            self.keep_stacks(f"rank {self._hang.rank} held up the others")
        return self._hang is not None

    def keep_stacks(self, header: str) -> None:
        """Have every rank write its stacks, and copy them into the run folder."""
        assert self.spec.folder is not None
        files = {rank: self.spec.files(rank).stacks for rank in self.processes if rank not in self.codes}
        dump_stacks({rank: self._pid(rank) for rank in files}, files)
        kept = keep_stacks(self.spec.folder, files, self.spec.number, f"{time.strftime('%F %T')}: {header}")
        self.stacks = str(kept)

    def pages(self) -> dict[int, tuple[Page, bool]]:
        """The last heartbeat of every running rank, and whether its process is stopped."""
        found = {rank: self.detector.read(rank, self.spec.files(rank).page) for rank in self._alive()}
        now = time.monotonic()
        not_started = Page(0, 0, 0, self.detector.began, self.spec.policy.patience, "start")
        latest = {rank: page or not_started for rank, page in found.items()}
        return {rank: (page, now - page.time > 1.0 and is_stopped(self._pid(rank))) for rank, page in latest.items()}

    def _alive(self) -> list[int]:
        return [rank for rank in list(self.processes) if rank not in self.codes]

    def _strands_others(self, rank: int, code: int) -> bool:
        """Whether the peers of a rank that ended so will wait for it in vain."""
        if (
            code == PREEMPTED or code in _ENDED_BY_SIGNAL
        ):  # a rank past its steps is not needed any more, and the others may still save
            page = self.detector.read(rank, self.spec.files(rank).page)
            early = page is None or page.phase in ("start", "load")
            return early or (code in _ENDED_BY_SIGNAL and not self.requests.signals)
        return code in (USER_ERROR, LOST_PEER)

    def _forward_signals(self, running: dict[int, ForkServerProcess]) -> None:
        """Send every signal to every rank, also to ranks that started after it."""
        for rank in running:
            for number in self.requests.signals[self._forwarded.get(rank, 0) :]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._pid(rank), number)
            self._forwarded[rank] = len(self.requests.signals)

    def _pid(self, rank: int) -> int:
        pid = self.processes[rank].pid
        assert pid is not None
        return pid

    def _shutdown(self) -> None:
        """Kill the ranks that still run. What they have saved is on disk."""
        for process in self.processes.values():
            if process.exitcode is None:
                process.kill()
        deadline = time.monotonic() + _KILL_TIMEOUT
        for rank, process in self.processes.items():
            process.join(max(0.0, deadline - time.monotonic()))
            if process.exitcode is None:
                raise RuntimeError(f"rank {rank} (process {process.pid}) cannot be killed: it is stuck in the kernel")

    def _outcome(self) -> RanksOutcome:
        ranks = range(self.spec.placement.first_rank, self.spec.placement.first_rank + self.spec.placement.ranks)
        files = {rank: self.spec.files(rank) for rank in ranks}
        pages = {rank: self.detector.read(rank, files[rank].page) for rank in ranks}
        hang = self._hang
        if hang is not None:
            pages[hang.rank] = hang.page
        abandons = any(code not in BENIGN_CODES or self._strands_others(rank, code) for rank, code in self.codes.items())
        return RanksOutcome(
            ranks=len(ranks), codes=dict(self.codes), overdue=self._overdue, stacks=self.stacks,
            abandons=abandons or self._abandons or len(self.codes) < len(ranks),
            said={rank: text for rank in ranks if (text := error_message(files[rank]))},
            said_at={rank: file.error.stat().st_mtime for rank, file in files.items() if file.error.exists()},
            at={rank: (page.step, page.phase) for rank, page in pages.items() if page},
            silent=HungRank(rank=hang.rank, seconds=hang.seconds, stopped=hang.stopped) if hang else None,
            answers={rank: file.answer.read_text() for rank, file in files.items() if file.answer.exists()},
        )  # fmt: skip
