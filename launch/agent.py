"""One attempt of a run's ranks on this node: all of them start, and none is left when it is over.

This is torchrun's elastic agent (its base for agents of other process managers) over ranks that are forked. Its own
LocalElasticAgent waits for a function's return value, which a rank that is killed or ends by os._exit never gives; it tells one
of several failed ranks, whichever; it gives the others 30 s; and it reads a pickled file for a rank's error.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, SimpleElasticAgent, WorkerGroup, WorkerSpec, WorkerState

from launch.forked import Files, message, start
from launch.rendezvous import Loopback, loopback_interface
from launch.watch import Hang, Watch, dump_stacks
from trainer.exit_codes import DONE, LOST_PEER, PREEMPTED, USER_ERROR
from trainer.sections import RecoverySection
from trainer.stop import ASKING

_ENDED = tuple(-number for number in ASKING)
NURSERY_GONE = 255
"""Of a rank whose exit code its forkserver cannot tell any more."""

_SETTLE = 2.0
_UNKILLABLE = 30.0


@dataclass
class Requests:
    """The signals that this process was asked to stop with, since when, and by when the ranks must have done so."""

    grace: float
    asked: list[int] = field(default_factory=list)
    deadline: float = float("inf")

    def ask(self, number: int, _frame: object) -> None:
        if not self.asked:
            self.deadline = time.monotonic() + self.grace
        self.asked.append(number)

    @property
    def at_once(self) -> bool:
        """Whether Ctrl-C came twice."""
        return self.asked.count(signal.SIGINT) > 1


@dataclass(frozen=True)
class Attempt:
    """What an attempt's ranks are to do. watched: a rank that falls silent is a fault."""

    number: int
    ranks: int
    work: Callable[..., int]
    arguments: tuple[Any, ...]
    policy: RecoverySection
    watched: bool
    private: Path

    def files(self, rank: int) -> Files:
        return Files.of(self.private, self.number, rank)


class Ranks(SimpleElasticAgent):
    """The ranks of an attempt. After run(): `codes` are the exit codes of those that ended by themselves, `hang` is the rank
    that fell silent, `overdue` are those that had to be killed after a stop was asked for."""

    def __init__(self, attempt: Attempt, requests: Requests) -> None:
        self.rendezvous = Loopback()
        spec = WorkerSpec(
            role="mikoshi", local_world_size=attempt.ranks, rdzv_handler=self.rendezvous, entrypoint=attempt.work,
            max_restarts=0, monitor_interval=0.05, local_addr="127.0.0.1",
        )  # fmt: skip
        super().__init__(spec)
        self.attempt, self.requests = attempt, requests
        self.processes: dict[int, ForkServerProcess] = {}
        self.watch = Watch(attempt.policy.silence, attempt.policy.patience)
        self.codes: dict[int, int] = {}
        self.hang: Hang | None = None
        self.overdue: list[int] = []
        self._sent: dict[int, int] = {}
        self._first_lost: float | None = None

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        self.watch.began = time.monotonic()
        for worker in worker_group.workers:
            rank = worker.local_rank
            env = {**os.environ, **self._place(rank)}
            env.setdefault("GLOO_SOCKET_IFNAME", loopback_interface())
            env.setdefault("NCCL_SOCKET_IFNAME", loopback_interface())
            files = self.attempt.files(rank)
            try:
                self.processes[rank] = start(rank, env, files, self.attempt.work, self.attempt.arguments)
            except (OSError, EOFError):  # what it was to be forked from has just died
                self.codes[rank] = NURSERY_GONE
        return {rank: process.pid for rank, process in self.processes.items()}

    def _place(self, rank: int) -> dict[str, str]:
        """What torchrun tells a rank, and who its supervisor is."""
        (host, port), size = self.rendezvous.address, str(self.attempt.ranks)
        return {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size,
            "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1", "MASTER_ADDR": host, "MASTER_PORT": str(port),
            "TORCHELASTIC_RUN_ID": self.rendezvous.run_id, "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": str(self.attempt.number),
            "TORCHELASTIC_ERROR_FILE": str(self.attempt.files(rank).error), "MIKOSHI_SUPERVISOR": str(os.getpid()),
        }  # fmt: skip

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        running = self._running()
        if not running or self._over(running):
            done = len(self.codes) == self.attempt.ranks and not any(self.codes.values())
            state = WorkerState.SUCCEEDED if done else WorkerState.FAILED
            return RunResult(state, return_values=dict(self.codes) if done else {})
        self._pass_on(running)
        return RunResult(WorkerState.HEALTHY)

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
            self.overdue = sorted(running)
            return True
        unclear = [rank for rank, code in self.codes.items() if self._leaves_others(rank, code)]
        if unclear and self._first_lost is None:
            self._first_lost = now
        if any(code not in (DONE, PREEMPTED, USER_ERROR, LOST_PEER, *_ENDED) for code in self.codes.values()):
            return True
        if self._first_lost is not None and now - self._first_lost > _SETTLE:
            return True
        if self.attempt.watched:
            self.hang = self.watch.look({rank: (self._pid(rank), self.attempt.files(rank).page) for rank in running})
        if self.hang is not None:
            pids, stacks = {r: self._pid(r) for r in running}, {r: self.attempt.files(r).stacks for r in running}
            dump_stacks(pids, stacks)
        return self.hang is not None

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

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        self._shutdown()

    def _shutdown(self, death_sig: signal.Signals = signal.SIGKILL, timeout: int = 30) -> None:
        """Kill those that still run: all that they have saved is on disk, and what they wait for will not come."""
        for process in self.processes.values():
            if process.exitcode is None:
                process.kill()
        deadline = time.monotonic() + _UNKILLABLE
        for rank, process in self.processes.items():
            process.join(max(0.0, deadline - time.monotonic()))
            if process.exitcode is None:
                raise RuntimeError(f"rank {rank} (process {process.pid}) cannot be killed: it is stuck in the kernel")

    def said(self, rank: int) -> str:
        """What this rank said of its end."""
        return message(self.attempt.files(rank))

    def said_at(self, rank: int) -> float:
        """When it did so: the first of several is the one that the others follow from."""
        error = self.attempt.files(rank).error
        return error.stat().st_mtime if error.exists() else float("inf")
