"""The agent of one node: it runs ranks as the head tells it over a pipe, and leaves none behind when the head is gone.

The head (controller.head) starts `python -P -m mikoshi.launch.agent.node` on every node. Both exchange JSON objects, one a
line.
Messages to the agent: greet, open, start, signal, stacks, end, probe, beat, bye.
Messages from the agent: hello, opened, ended, state, probed, asked, failed.
The head counts as gone when it hangs up, or sends nothing for the time in its greeting.
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
from mikoshi.launch.agent.stop_requests import StopRequests
from mikoshi.trainer.signals import STOP_SIGNALS
from mikoshi.trainer.streams import open_streams

_HEARTBEAT_INTERVAL = 0.5
_WITNESS_TIMEOUT = 10.0
_SHUTDOWN_TIMEOUT = 20.0
"""Seconds for the ranks to end once the head is gone. Then this process exits in any case, and they with it."""


class Channel:
    """This process's standard input and output, reserved for messages. Other output goes to the log."""

    def __init__(self) -> None:
        self._in = os.fdopen(os.dup(0), "rb")
        self._out = os.dup(1)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(2, 1)  # output of libraries goes to the log
        self._lock = threading.Lock()

    def send(self, **message: Any) -> None:
        """Send a message, from any thread. If the head is gone, the message is dropped."""
        line = json.dumps(message).encode() + b"\n"
        with self._lock, contextlib.suppress(OSError):
            while line:
                line = line[os.write(self._out, line) :]

    def lines(self) -> Any:
        """Yield messages until the head hangs up."""
        for line in self._in:
            with contextlib.suppress(ValueError):
                message = json.loads(line)
                if isinstance(message, dict):
                    yield message


class NodeAgent:
    """The state of a node's agent. The main thread runs the ranks, and other threads exchange messages."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.tasks: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self.greeting: dict[str, Any] = {}
        self.requests = StopRequests(120.0)
        self.group: Any = None
        self.rendezvous: Any = None
        self.signals: list[int] = []
        self.number = self.cancelled = -1  # the current attempt, and the last one that was told to end
        self.head_gone = threading.Event()
        self.last_message = time.monotonic()

    def receive(self) -> None:
        """Process messages until the head hangs up. Long tasks go to the main thread, and each probe to its own."""
        for message in self.channel.lines():
            self.last_message = time.monotonic()
            if message.get("do") == "bye":
                break
            try:
                self._dispatch(message)
            except Exception as error:
                self.channel.send(failed=f"{type(error).__name__}: {error}", attempt=self.number)
        self._shut_down()

    def _dispatch(self, message: dict[str, Any]) -> None:
        kind, group = message.get("do"), self.group
        if kind == "signal":
            self.requests.add(int(message["number"]))
        elif kind == "end":
            self.cancelled = int(message["attempt"])
            if group is not None and self.number == self.cancelled:
                group.stop_event.set()
        elif kind == "stacks" and group is not None:
            with contextlib.suppress(OSError):
                group.keep_stacks(message["header"])
        elif kind == "probe":
            threading.Thread(target=self._probe, args=(message,), daemon=True).start()
        elif kind in ("greet", "open", "start"):
            if kind == "start":  # earlier requests concerned the attempt before
                self.requests = StopRequests(self.requests.grace)
            self.tasks.put(message)

    def _shut_down(self) -> None:
        """End the ranks and then this process, within _SHUTDOWN_TIMEOUT seconds in any case, since the head is gone."""
        self.head_gone.set()
        group = self.group
        if group is not None:
            group.stop_event.set()
        self.tasks.put(None)
        threading.Timer(_SHUTDOWN_TIMEOUT, os._exit, (1,)).start()

    def _probe(self, message: dict[str, Any]) -> None:
        from mikoshi.launch.host.probe import answer

        try:
            result = answer(message["question"])
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}"}
        self.channel.send(probed=result, id=message["id"])

    def send_heartbeats(self) -> None:
        """Report every half second that this node is alive and what its ranks do, and notice when the head is not."""
        forwarded = 0
        while not self.head_gone.wait(_HEARTBEAT_INTERVAL if forwarded == len(self.signals) else 0.01):
            if forwarded < len(self.signals):
                self.channel.send(asked=self.signals[forwarded])
                forwarded += 1
                continue
            self.channel.send(state=self._state(), attempt=self.number)
            if time.monotonic() - self.last_message > float(self.greeting.get("fence", 60.0)):
                print("the process that leads this run is silent: the ranks are ended", file=sys.stderr)
                self._shut_down()

    def _state(self) -> dict[str, Any]:
        """For every running rank: seconds since its last heartbeat, and its page without the time."""
        group = self.group
        if group is None:
            return {}
        now = time.monotonic()
        with contextlib.suppress(RuntimeError):  # a rank has just started or ended
            return {
                str(rank): [now - p.time, p.pid, p.step, p.count, p.limit, p.phase, stopped]
                for rank, (p, stopped) in group.pages().items()
            }
        return {}

    def on_signal(self, number: int, _frame: object) -> None:
        """Handle a signal of the scheduler: it concerns the whole run, so the head is told."""
        self.signals.append(number)

    def run(self) -> None:
        """Greet, then run one attempt after another in the main thread."""
        first = self.tasks.get()
        if first is None:
            return
        self._greet(first)
        from mikoshi.launch.agent.fork_server import running_fork_server
        from mikoshi.launch.host.private_folder import private_folder

        with running_fork_server(int(first["ranks"])), private_folder() as private:
            self._hello(first)
            while (task := self.tasks.get()) is not None:
                try:
                    if task["do"] == "open":
                        self._open(task)
                    else:
                        self._attempt(task, private)
                except Exception as error:
                    self.channel.send(failed=f"{type(error).__name__}: {error}", attempt=task.get("attempt", -1))

    def _greet(self, message: dict[str, Any]) -> None:
        self.greeting = message
        os.chdir(message["workdir"])
        _wait_for_witness(message["witness"])
        from mikoshi.launch.host.network import RESOLVER

        os.environ.update(message["env"])
        os.environ.setdefault(*RESOLVER)
        from mikoshi.trainer.config.data import RecoverySection

        self.requests.grace = RecoverySection.model_validate(message["policy"]).grace

    def _hello(self, message: dict[str, Any]) -> None:
        from importlib.metadata import version

        if message["opens"]:  # torch, which has the store, is slow to import; the fork server imports meanwhile
            importlib.import_module("torch")
        from mikoshi.launch.host.network import select_interface

        self.interface, self.address = select_interface(message["interface"])
        self.channel.send(
            hello={
                "host": socket.gethostname(), "pid": os.getpid(), "mikoshi": version("mikoshi"),
                "cores": cores(), "interface": self.interface, "address": self.address,
                "node": os.environ.get("MIKOSHI_NODE_NAME", ""),
            }
        )  # fmt: skip

    def _open(self, task: dict[str, Any]) -> None:
        from mikoshi.launch.agent.rendezvous import LOOPBACK, Rendezvous

        self.rendezvous = Rendezvous(LOOPBACK if task["alone"] else self.address)
        self.channel.send(opened=[self.rendezvous.host, self.rendezvous.port, self.rendezvous.run_id], attempt=task["attempt"])

    def _attempt(self, task: dict[str, Any], private: Path) -> None:
        from mikoshi.launch.agent.rendezvous import LOOPBACK, Placement, loopback_interface
        from mikoshi.launch.agent.tasks import resolve_task
        from mikoshi.launch.agent.worker_group import WorkerGroup, WorkerGroupSpec
        from mikoshi.trainer.config.data import RecoverySection
        from mikoshi.trainer.record.run_folder import RunFolder

        alone = task["place"]["host"] == LOOPBACK
        placement = Placement(**task["place"], interface=loopback_interface() if alone else self.interface)
        function, arguments = resolve_task(task["work"], task["arguments"])
        logs = Path(task["logs"]) if task["logs"] else None
        if logs is not None:  # nodes with disks of their own keep the logs of their ranks
            logs.mkdir(parents=True, exist_ok=True)
        spec = WorkerGroupSpec(
            task["attempt"], placement, function, arguments, RecoverySection.model_validate(self.greeting["policy"]),
            RunFolder(Path(task["folder"])) if task["folder"] else None, private, detect_hangs=False, env=task["env"],
            logs=(lambda rank: logs / f"rank-{rank}.log") if logs else None, bind=task["bind"],
        )  # fmt: skip
        group = WorkerGroup(spec, self.requests)
        self.number, self.group = task["attempt"], group
        if self.head_gone.is_set() or self.cancelled == self.number:  # the request came before the group existed
            group.stop_event.set()
        outcome = group.run()
        self.group = None
        self.channel.send(ended=outcome.model_dump(mode="json"), attempt=task["attempt"])


def _wait_for_witness(witness: str) -> None:
    """Exit if a file of the head is not visible here, since ranks would then save where nobody looks.

    A network file system may take a moment to show it.
    """
    until = time.monotonic() + _WITNESS_TIMEOUT
    while witness and not Path(witness).exists():
        if time.monotonic() > until:
            print(f"{witness} is not there: its folder is not shared with this node", file=sys.stderr, flush=True)
            os._exit(1)
        time.sleep(0.2)


def main() -> None:
    """Run the agent of this node until the head is gone."""
    open_streams(unread=True)
    agent = NodeAgent(Channel())
    for number in STOP_SIGNALS:
        signal.signal(number, agent.on_signal)
    for loop in (agent.receive, agent.send_heartbeats):
        threading.Thread(target=loop, daemon=True).start()
    agent.run()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
