"""Runs the ranks of one attempt on several nodes as a gang: they start together, and they end together.

It detects hangs among the ranks of all nodes, as `agent.hang_detector` does for those of one.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mikoshi.launch.agent.hang_detector import Hang, find_hang
from mikoshi.launch.agent.outcome import BENIGN_CODES, HungRank, RanksOutcome, merge
from mikoshi.launch.controller.agent_pool import CHECK_INTERVAL, POLL_INTERVAL, AgentPool
from mikoshi.parallel.process.heartbeat import WITHIN_STEPS, Page
from mikoshi.trainer.exit_codes import PREEMPTED

_SETTLE_TIME = 2.0
"""Seconds for the other nodes to report the same cause, before their ranks are ended."""

_KILL_TIMEOUT = 40.0
_CONFIRM_TIME = 1.5
"""Seconds in which every node has reported its ranks once more."""

_REGROUP_SIGNAL = signal.SIGUSR2


@dataclass(frozen=True)
class RankTask:
    """What the ranks of a gang run.

    name, arguments: the task and its arguments, see `agent.tasks`
    folder: the run folder, for events and stacks; without one, hangs are not detected
    logs: the folder for the ranks' logs
    envs: environment variables of the ranks, by node
    bind: whether each rank is pinned to cores of its own
    ranks: ranks per node; 0 takes the cluster's number
    patience: seconds after which the ranks are ended
    """

    name: str
    arguments: dict[str, Any]
    folder: Path | None = None
    logs: Path | None = None
    envs: dict[str, dict[str, str]] = field(default_factory=dict)
    bind: Literal["", "cores", "gpus"] = ""
    ranks: int = 0
    patience: float = float("inf")


class Gang:
    """One attempt at a task on the given nodes. Their order gives the node numbers.

    can_grow: called while the ranks run; True stops them, so that the next attempt can use more nodes
    """

    def __init__(
        self, pool: AgentPool, number: int, names: list[str], task: RankTask, can_grow: Callable[[], bool] = lambda: False
    ) -> None:
        self.pool, self.number, self.names, self.task, self.can_grow = pool, number, names, task, can_grow
        self.ranks = task.ranks or pool.cluster.ranks
        self.deadline = time.monotonic() + task.patience
        self.results: dict[str, RanksOutcome] = {}
        self.lost: dict[str, str] = {}
        self.pages: dict[int, tuple[Page, bool]] = {}
        self.rendezvous: list[Any] | None = None
        self.hang: Hang | None = None
        self.suspected_since: float | None = None
        self.started_at = time.monotonic()
        self.started_nodes: set[str] = set()  # nodes whose ranks have all started
        self.last_growth_check = 0.0
        self.ending_since: float | None = None  # monotonic time since which the remaining ranks are being ended
        self.forwarded = 0
        self.regroup = False

    def run(self) -> RanksOutcome:
        """Run the task until the last node has reported or was lost, and return how the ranks ended."""
        self._send(self.names[0], {"do": "open", "attempt": self.number, "alone": len(self.names) == 1})
        while self.rendezvous is None and not self._must_end():
            self._poll()
            if self.pool.requests.signals:  # no rank has started, so nothing is lost
                return RanksOutcome(ranks=0, codes={0: PREEMPTED})
            if time.monotonic() - self.started_at > self.pool.cluster.patience.start:
                self._mark_lost(self.names[0], "it did not open the ranks' meeting point")
        if self.rendezvous is None or self._must_end():
            return self._outcome()
        self._start()
        while self._pending():
            self._poll()
            self._forward_signals()
            if self.ending_since is None and self._must_end():
                self._end_remaining()
            self._drop_stuck_nodes()
        return self._outcome()

    def _pending(self) -> list[str]:
        """Nodes that have not reported how their ranks ended, and are not lost."""
        return [name for name in self.names if name not in self.results and name not in self.lost]

    def _drop_stuck_nodes(self) -> None:
        """Mark nodes as lost that send heartbeats but do not start or end their ranks."""
        now, start = time.monotonic(), self.pool.cluster.patience.start
        if self.ending_since is not None and now - self.ending_since > _KILL_TIMEOUT:
            for name in self._pending():
                self._mark_lost(name, f"its ranks did not end within {_KILL_TIMEOUT:g} s")
        elif now - self.started_at > start:
            for name in self._pending():
                if name not in self.started_nodes:
                    self._mark_lost(name, f"its ranks did not start within {start:g} s")

    def _start(self) -> None:
        assert self.rendezvous is not None
        host, port, run_id = self.rendezvous
        task = self.task
        for node, name in enumerate(self.names):
            place = {
                "node": node, "nodes": len(self.names), "ranks": self.ranks, "host": host, "port": port,
                "run_id": run_id,
            }  # fmt: skip
            self._send(
                name,
                {
                    "do": "start", "attempt": self.number, "place": place, "work": task.name, "arguments": task.arguments,
                    "folder": str(task.folder) if task.folder else None, "logs": str(task.logs) if task.logs else None,
                    "env": task.envs.get(name, {}), "bind": task.bind,
                },
            )  # fmt: skip
        self.started_at = time.monotonic()

    def _send(self, name: str, message: dict[str, Any]) -> None:
        if name in self.pool.links:
            self.pool.links[name].send(message)

    def _poll(self) -> None:
        lost = self.pool.poll(POLL_INTERVAL, self._handle)
        for name in lost:
            if name in self.names and name not in self.results:
                self.lost[name] = self.pool.down[name]
        self.pool.tick()
        if self.ending_since is None and self.task.folder is not None:
            self._detect_hang()

    def _handle(self, name: str, message: dict[str, Any]) -> None:
        if name not in self.names:
            return
        if message.get("attempt") == self.number and "opened" in message:
            self.rendezvous = message["opened"]
        elif message.get("attempt") == self.number and "ended" in message:
            self.results[name] = RanksOutcome.model_validate_json(json.dumps(message["ended"]), strict=True)
        elif message.get("attempt") == self.number and "state" in message:
            if len(message["state"]) == self.ranks:
                self.started_nodes.add(name)
            for rank, (age, pid, step, count, limit, phase, stopped) in message["state"].items():
                # The age is measured on the rank's node, so that network delay does not count as silence.
                self.pages[int(rank)] = (Page(pid, step, count, -age, limit, phase), stopped)
        elif message.get("attempt") == self.number and "failed" in message:
            self._mark_lost(name, f"its agent failed: {message['failed']}")

    def _mark_lost(self, name: str, why: str) -> None:
        self.pool.mark_lost(name, why)
        self.lost[name] = why

    def _must_end(self) -> bool:
        """Whether the remaining ranks must be ended, since their work cannot succeed any more."""
        late = time.monotonic() > min(self.deadline, self.pool.requests.deadline + _SETTLE_TIME)
        if self.lost or self.hang is not None or self.pool.requests.immediate or late:
            return True
        return any(part.abandons for part in self.results.values())

    def _end_remaining(self) -> None:
        """End the remaining ranks. Those that are ending anyway get a moment to report why."""
        clear = any(code not in BENIGN_CODES for part in self.results.values() for code in part.codes.values())
        deadline = time.monotonic() + (0.0 if clear or self.lost or self.hang or self.pool.requests.immediate else _SETTLE_TIME)
        while time.monotonic() < deadline and self._pending():
            self._poll()
        self.ending_since = time.monotonic()
        if self.hang is not None:
            header = f"rank {self.hang.rank} held up the others"
            for name in self.names:
                self._send(name, {"do": "stacks", "header": header})
        for name in self.names:
            self._send(name, {"do": "end", "attempt": self.number})

    def _forward_signals(self) -> None:
        for number in self.pool.requests.signals[self.forwarded :]:
            for name in self.names:
                self._send(name, {"do": "signal", "number": number})
        self.forwarded = len(self.pool.requests.signals)
        if (
            self.regroup
            or self.forwarded
            or self.ending_since is not None
            or time.monotonic() - self.last_growth_check < CHECK_INTERVAL
        ):
            return
        self.last_growth_check = time.monotonic()
        # Before its first step, stopping a run would only lose its start.
        steps = all(page.step > 0 and page.phase in WITHIN_STEPS for page, _ in self.pages.values())
        if steps and len(self.started_nodes) == len(self.names) and self.can_grow():
            self.regroup = True
            for name in self.names:
                self._send(name, {"do": "signal", "number": int(_REGROUP_SIGNAL)})

    def _detect_hang(self) -> None:
        """Look for a hang among all running ranks. Ranks whose node has reported their end do not count."""
        ranks = self.ranks
        ended = {
            rank
            for name in self.results
            for rank in range(self.names.index(name) * ranks, (self.names.index(name) + 1) * ranks)
        }
        pages = {rank: page for rank, (page, _) in self.pages.items() if rank not in ended}
        if len(pages) + len(ended) < len(self.names) * ranks:
            return  # some ranks have not reported yet
        stopped = {rank for rank in pages if self.pages[rank][1]}
        found = find_hang(pages, stopped, 0.0, float("-inf"), self.pool.policy.silence)
        if found is None:
            self.suspected_since = None
            return
        # Nodes report in turn: the rank that the others wait for may be in a report still to come.
        self.suspected_since = self.suspected_since or time.monotonic()
        if time.monotonic() - self.suspected_since > _CONFIRM_TIME:
            self.hang = found

    def _outcome(self) -> RanksOutcome:
        ranks = self.ranks
        whole = merge(list(self.results.values()))
        nodes = {node * ranks + local: name for node, name in enumerate(self.names) for local in range(ranks)}
        silent = whole.silent
        if self.hang is not None and not self.lost:
            silent = HungRank(rank=self.hang.rank, seconds=self.hang.seconds, stopped=self.hang.stopped)
        at = dict(whole.at)
        for rank, (page, _) in self.pages.items():
            at.setdefault(rank, (page.step, page.phase))
        several = len(self.names) > 1
        return whole.model_copy(
            update={
                "ranks": len(nodes), "nodes": nodes if several or self.lost else {}, "lost": self.lost, "silent": silent,
                "at": at, "regroup": self.regroup,
            }
        )  # fmt: skip
