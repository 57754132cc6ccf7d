"""The agent of one node: it does what its leader says over a pipe, and when the leader is gone it leaves no rank behind.

`python -P -m mikoshi.launch.agent.node`, started on every node by the process that leads a run (controller.head), talks JSON,
a line an object.
To it: greet, open, start, signal, stacks, end, probe, beat, bye. From it: hello, opened, ended, state, probed, asked, failed.
A leader that says nothing for as long as the greeting tells is gone, as is one that has hung up.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import queue
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from mikoshi.data.io.cores import cores
from mikoshi.launch.agent.requests import Requests
from mikoshi.trainer.signals import ASKING
from mikoshi.trainer.streams import open_streams

_BEAT = 0.5
_SHOWN = 10.0
_LAST = 20.0
"""Seconds for the ranks' end once the leader is gone; then this process ends all the same, and they with it."""


class Channel:
    """This process's standard input and output, which nothing else may use from here on."""

    def __init__(self) -> None:
        self._in = os.fdopen(os.dup(0), "rb")
        self._out = os.dup(1)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(2, 1)  # what libraries print goes to the log
        self._lock = threading.Lock()

    def send(self, **message: Any) -> None:
        """From any thread. A leader that is gone hears nothing."""
        line = json.dumps(message).encode() + b"\n"
        with self._lock, contextlib.suppress(OSError):
            while line:
                line = line[os.write(self._out, line) :]

    def lines(self) -> Any:
        """Messages, one after another, until the leader hangs up."""
        for line in self._in:
            with contextlib.suppress(ValueError):
                message = json.loads(line)
                if isinstance(message, dict):
                    yield message


class Agent:
    """What a leader has told this node, and what is being done about it: main thread the ranks, others the talk."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.todo: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self.greeting: dict[str, Any] = {}
        self.requests = Requests(120.0)
        self.ranks: Any = None
        self.meeting: Any = None
        self.asked: list[int] = []
        self.number = self.cut = -1  # of the attempt under way, and of the last one that was to end
        self.gone = threading.Event()
        self.heard = time.monotonic()

    def listen(self) -> None:
        """Until the leader hangs up. What takes long goes to the main thread, a probe to one of its own."""
        for message in self.channel.lines():
            self.heard = time.monotonic()
            if message.get("do") == "bye":
                break
            try:
                self._heed(message)
            except Exception as error:
                self.channel.send(failed=f"{type(error).__name__}: {error}", attempt=self.number)
        self._leave()

    def _heed(self, message: dict[str, Any]) -> None:
        kind, ranks = message.get("do"), self.ranks
        if kind == "signal":
            self.requests.ask(int(message["number"]))
        elif kind == "end":
            self.cut = int(message["attempt"])
            if ranks is not None and self.number == self.cut:
                ranks.end.set()
        elif kind == "stacks" and ranks is not None:
            with contextlib.suppress(OSError):
                ranks.keep_stacks(message["header"])
        elif kind == "probe":
            threading.Thread(target=self._probe, args=(message,), daemon=True).start()
        elif kind in ("greet", "open", "start"):
            if kind == "start":  # what was asked of the attempt before is done
                self.requests = Requests(self.requests.grace)
            self.todo.put(message)

    def _leave(self) -> None:
        """The leader is gone: the ranks go, then this process, within _LAST seconds whatever happens."""
        self.gone.set()
        ranks = self.ranks
        if ranks is not None:
            ranks.end.set()
        self.todo.put(None)
        threading.Timer(_LAST, os._exit, (1,)).start()

    def _probe(self, message: dict[str, Any]) -> None:
        from mikoshi.launch.host.probe import answer

        try:
            told = answer(message["question"])
        except Exception as error:
            told = {"error": f"{type(error).__name__}: {error}"}
        self.channel.send(probed=told, id=message["id"])

    def beat(self) -> None:
        """Say every half second that this node lives, and what its ranks do; notice that the leader does not."""
        told = 0
        while not self.gone.wait(_BEAT if told == len(self.asked) else 0.01):
            if told < len(self.asked):
                self.channel.send(asked=self.asked[told])
                told += 1
                continue
            self.channel.send(state=self._state(), attempt=self.number)
            if time.monotonic() - self.heard > float(self.greeting.get("fence", 60.0)):
                print("the process that leads this run is silent: the ranks are ended", file=sys.stderr)
                self._leave()

    def _state(self) -> dict[str, Any]:
        """Of every rank that runs: seconds since its last beat, and its page without the time."""
        ranks = self.ranks
        if ranks is None:
            return {}
        now = time.monotonic()
        with contextlib.suppress(RuntimeError):  # one has just begun or ended
            return {
                str(rank): [now - p.time, p.pid, p.step, p.beats, p.limit, p.phase, stopped]
                for rank, (p, stopped) in ranks.pages().items()
            }
        return {}

    def ask(self, number: int, _frame: object) -> None:
        """A scheduler's signal to this node is a matter of the whole run: the leader hears of it."""
        self.asked.append(number)

    def work(self) -> None:
        """Greet, then one attempt after another, in the main thread."""
        first = self.todo.get()
        if first is None:
            return
        self._greet(first)
        from mikoshi.launch.agent.fork_server import warm
        from mikoshi.launch.host.private_folder import private_folder

        with warm(int(first["ranks"])), private_folder() as private:
            self._hello(first)
            while (task := self.todo.get()) is not None:
                try:
                    self._open(task) if task["do"] == "open" else self._attempt(task, private)
                except Exception as error:
                    self.channel.send(failed=f"{type(error).__name__}: {error}", attempt=task.get("attempt", -1))

    def _greet(self, message: dict[str, Any]) -> None:
        self.greeting = message
        os.chdir(message["workdir"])
        _see(message["witness"])
        from mikoshi.launch.host.network import RESOLVER

        os.environ.update(message["env"])
        os.environ.setdefault(*RESOLVER)
        from mikoshi.trainer.config.data import RecoverySection

        self.requests.grace = RecoverySection.model_validate(message["policy"]).grace

    def _hello(self, message: dict[str, Any]) -> None:
        from importlib.metadata import version

        if message["opens"]:  # the store is torch's, which is slow to import: as is the ranks' process, meanwhile
            importlib.import_module("torch")
        from mikoshi.launch.host.network import interface_of

        self.interface, self.address = interface_of(message["interface"])
        self.channel.send(
            hello={
                "host": socket.gethostname(), "pid": os.getpid(), "mikoshi": version("mikoshi"),
                "cores": cores(), "interface": self.interface, "address": self.address,
                "node": os.environ.get("MIKOSHI_NODE_NAME", ""),
            }
        )  # fmt: skip

    def _open(self, task: dict[str, Any]) -> None:
        from mikoshi.launch.agent.rendezvous import LOOPBACK, Meeting

        self.meeting = Meeting(LOOPBACK if task["alone"] else self.address)
        self.channel.send(opened=[self.meeting.host, self.meeting.port, self.meeting.run_id], attempt=task["attempt"])

    def _attempt(self, task: dict[str, Any], private: Path) -> None:
        from mikoshi.launch.agent.rendezvous import LOOPBACK, Place, loopback_interface
        from mikoshi.launch.agent.tasks import work_of
        from mikoshi.launch.agent.worker_group import Attempt, Ranks
        from mikoshi.trainer.config.data import RecoverySection
        from mikoshi.trainer.record.run_folder import RunFolder

        alone = task["place"]["host"] == LOOPBACK
        place = Place(**task["place"], interface=loopback_interface() if alone else self.interface)
        work, arguments = work_of(task["work"], task["arguments"])
        logs = Path(task["logs"]) if task["logs"] else None
        if logs is not None:  # where nodes have disks of their own, each keeps the logs of its ranks
            logs.mkdir(parents=True, exist_ok=True)
        attempt = Attempt(
            task["attempt"], place, work, arguments, RecoverySection.model_validate(self.greeting["policy"]),
            RunFolder(Path(task["folder"])) if task["folder"] else None, private, watched=False, env=task["env"],
            logs=(lambda rank: logs / f"rank-{rank}.log") if logs else None, bind=task["bind"],
        )  # fmt: skip
        ranks = Ranks(attempt, self.requests)
        self.number, self.ranks = task["attempt"], ranks
        if self.gone.is_set() or self.cut == self.number:  # said before there was anything to end
            ranks.end.set()
        ended = ranks.run()
        self.ranks = None
        self.channel.send(ended=ended.model_dump(mode="json"), attempt=task["attempt"])


def _see(witness: str) -> None:
    """End where a file of the leader's is not on this node: ranks here would save where nobody looks. A network's file system
    may take a moment."""
    until = time.monotonic() + _SHOWN
    while witness and not Path(witness).exists():
        if time.monotonic() > until:
            print(f"{witness} is not there: its folder is not shared with this node", file=sys.stderr, flush=True)
            os._exit(1)
        time.sleep(0.2)


def main() -> None:
    """Entry point."""
    open_streams(unread=True)
    agent = Agent(Channel())
    for number in ASKING:
        signal.signal(number, agent.ask)
    for talk in (agent.listen, agent.beat):
        threading.Thread(target=talk, daemon=True).start()
    agent.work()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
