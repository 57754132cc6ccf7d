"""One attempt of a run's ranks on several nodes, from the first node's open store to the last one's report.

A rank that hangs is found here, among the ranks of all nodes, as agent.hang_detector has it for one.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mikoshi.launch.agent.hang_detector import Hang, who_hangs
from mikoshi.launch.agent.outcome import MILD, Ended, Silent, merged
from mikoshi.launch.controller.agent_pool import LOOK, OFTEN, Crew
from mikoshi.parallel.process.heartbeat import WITHIN_STEPS, Page
from mikoshi.trainer.exit_codes import PREEMPTED

_SETTLE = 2.0
"""Seconds in which what ended one node's ranks is heard from the others, before these are ended."""

_KILL = 40.0
_HEARD_ALL = 1.5
"""Seconds in which every node has told of its ranks again."""

_REGROUP = signal.SIGUSR2


@dataclass(frozen=True)
class Errand:
    """What ranks are to do. work, arguments: see agent.tasks. folder: the run's, whose events and stacks they keep; logs: the
    folder of their logs. envs: variables of the ranks of each node, by its name. ranks: of a node, 0: as the cluster has it.
    patience: seconds after which they are ended."""

    work: str
    arguments: dict[str, Any]
    folder: Path | None = None
    logs: Path | None = None
    envs: dict[str, dict[str, str]] = field(default_factory=dict)
    bind: Literal["", "cores", "gpus"] = ""
    ranks: int = 0
    patience: float = float("inf")


class Course:
    """An errand of the ranks of these nodes, which are numbered in this order. more: whether to stop for a larger set of nodes
    that is there now."""

    def __init__(
        self, crew: Crew, number: int, names: list[str], errand: Errand, more: Callable[[], bool] = lambda: False
    ) -> None:
        self.crew, self.number, self.names, self.errand, self.more = crew, number, names, errand, more
        self.ranks = errand.ranks or crew.cluster.ranks
        self.until = time.monotonic() + errand.patience
        self.parts: dict[str, Ended] = {}
        self.lost: dict[str, str] = {}
        self.pages: dict[int, tuple[Page, bool]] = {}
        self.opened: list[Any] | None = None
        self.hang: Hang | None = None
        self.suspected: float | None = None
        self.began = time.monotonic()
        self.heard: set[str] = set()  # nodes whose ranks have all begun
        self.asked_more = 0.0
        self.ending: float | None = None  # since when the rest is being ended
        self.told = 0
        self.regroup = False

    def run(self) -> Ended:
        """See it through; how the ranks ended."""
        self._send(self.names[0], {"do": "open", "attempt": self.number, "alone": len(self.names) == 1})
        while self.opened is None and not self._over():
            self._look()
            if self.crew.requests.asked:  # no rank has begun: nothing is lost
                return Ended(ranks=0, codes={0: PREEMPTED})
            if time.monotonic() - self.began > self.crew.cluster.patience.start:
                self._lose(self.names[0], "it did not open the ranks' meeting point")
        if self.opened is None or self._over():
            return self._ended()
        self._start()
        while self._waits_for():
            self._look()
            self._pass_on()
            if self.ending is None and self._over():
                self._end_others()
            self._lose_the_stuck()
        return self._ended()

    def _waits_for(self) -> list[str]:
        """Nodes that have neither told how their ranks ended nor been lost."""
        return [name for name in self.names if name not in self.parts and name not in self.lost]

    def _lose_the_stuck(self) -> None:
        """Nodes that beat, and do not do what they were told: start their ranks, or end them."""
        now, start = time.monotonic(), self.crew.cluster.patience.start
        if self.ending is not None and now - self.ending > _KILL:
            for name in self._waits_for():
                self._lose(name, f"its ranks did not end within {_KILL:g} s")
        elif now - self.began > start:
            for name in self._waits_for():
                if name not in self.heard:
                    self._lose(name, f"its ranks did not start within {start:g} s")

    def _start(self) -> None:
        assert self.opened is not None
        host, port, run_id = self.opened
        errand = self.errand
        for node, name in enumerate(self.names):
            place = {
                "node": node, "nodes": len(self.names), "ranks": self.ranks, "host": host, "port": port,
                "run_id": run_id,
            }  # fmt: skip
            self._send(
                name,
                {
                    "do": "start", "attempt": self.number, "place": place, "work": errand.work, "arguments": errand.arguments,
                    "folder": str(errand.folder) if errand.folder else None, "logs": str(errand.logs) if errand.logs else None,
                    "env": errand.envs.get(name, {}), "bind": errand.bind,
                },
            )  # fmt: skip
        self.began = time.monotonic()

    def _send(self, name: str, message: dict[str, Any]) -> None:
        if name in self.crew.links:
            self.crew.links[name].send(message)

    def _look(self) -> None:
        lost = self.crew.listen(LOOK, self._hear)
        for name in lost:
            if name in self.names and name not in self.parts:
                self.lost[name] = self.crew.why[name]
        self.crew.tick()
        if self.ending is None and self.errand.folder is not None:
            self._watch()

    def _hear(self, name: str, message: dict[str, Any]) -> None:
        if name not in self.names:
            return
        if message.get("attempt") == self.number and "opened" in message:
            self.opened = message["opened"]
        elif message.get("attempt") == self.number and "ended" in message:
            self.parts[name] = Ended.model_validate_json(json.dumps(message["ended"]), strict=True)
        elif message.get("attempt") == self.number and "state" in message:
            if len(message["state"]) == self.ranks:
                self.heard.add(name)
            for rank, (age, pid, step, beats, limit, phase, stopped) in message["state"].items():
                # As its own node saw it: what takes long on the way is nobody's silence.
                self.pages[int(rank)] = (Page(pid, step, beats, -age, limit, phase), stopped)
        elif message.get("attempt") == self.number and "failed" in message:
            self._lose(name, f"its agent failed: {message['failed']}")

    def _lose(self, name: str, why: str) -> None:
        self.crew.lose(name, why)
        self.lost[name] = why

    def _over(self) -> bool:
        """Whether what goes on elsewhere is in vain."""
        late = time.monotonic() > min(self.until, self.crew.requests.deadline + _SETTLE)
        if self.lost or self.hang is not None or self.crew.requests.at_once or late:
            return True
        return any(part.abandons for part in self.parts.values())

    def _end_others(self) -> None:
        """After a moment in which those that are ending anyway say what ended them."""
        clear = any(code not in MILD for part in self.parts.values() for code in part.codes.values())
        until = time.monotonic() + (0.0 if clear or self.lost or self.hang or self.crew.requests.at_once else _SETTLE)
        while time.monotonic() < until and self._waits_for():
            self._look()
        self.ending = time.monotonic()
        if self.hang is not None:
            header = f"rank {self.hang.rank} held up the others"
            for name in self.names:
                self._send(name, {"do": "stacks", "header": header})
        for name in self.names:
            self._send(name, {"do": "end", "attempt": self.number})

    def _pass_on(self) -> None:
        for number in self.crew.requests.asked[self.told :]:
            for name in self.names:
                self._send(name, {"do": "signal", "number": number})
        self.told = len(self.crew.requests.asked)
        if self.regroup or self.told or self.ending is not None or time.monotonic() - self.asked_more < OFTEN:
            return
        self.asked_more = time.monotonic()
        # Only a run that makes steps can stop without losing what it has just begun.
        steps = all(page.step > 0 and page.phase in WITHIN_STEPS for page, _ in self.pages.values())
        if steps and len(self.heard) == len(self.names) and self.more():
            self.regroup = True
            for name in self.names:
                self._send(name, {"do": "signal", "number": int(_REGROUP)})

    def _watch(self) -> None:
        """Who hangs, of all ranks that run: those whose node has told of its end do not."""
        ranks = self.ranks
        ended = {
            rank for name in self.parts for rank in range(self.names.index(name) * ranks, (self.names.index(name) + 1) * ranks)
        }
        pages = {rank: page for rank, (page, _) in self.pages.items() if rank not in ended}
        if len(pages) + len(ended) < len(self.names) * ranks:
            return  # not all have been heard of
        stopped = {rank for rank in pages if self.pages[rank][1]}
        found = who_hangs(pages, stopped, 0.0, float("-inf"), self.crew.policy.silence)
        if found is None:
            self.suspected = None
            return
        # Nodes tell of themselves in turn: the rank that the others wait for may be in a report that is still to come.
        self.suspected = self.suspected or time.monotonic()
        if time.monotonic() - self.suspected > _HEARD_ALL:
            self.hang = found

    def _ended(self) -> Ended:
        ranks = self.ranks
        whole = merged(list(self.parts.values()))
        nodes = {node * ranks + local: name for node, name in enumerate(self.names) for local in range(ranks)}
        silent = whole.silent
        if self.hang is not None and not self.lost:
            silent = Silent(rank=self.hang.rank, seconds=self.hang.seconds, stopped=self.hang.stopped)
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
