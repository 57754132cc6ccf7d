"""Keeps one agent process connected on every node of a site. A node that is lost is never waited for.

A node counts as lost when its pipe closes, or when it sends no message for `cluster.patience.lost` seconds.
"""

from __future__ import annotations

import contextlib
import selectors
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mikoshi.launch.agent.stop_requests import StopRequests
from mikoshi.launch.backends.base import Site
from mikoshi.launch.config.cluster import Base
from mikoshi.launch.transport.link import Link
from mikoshi.trainer.config.data import RecoverySection
from mikoshi.trainer.errors import LaunchError, OutageError

POLL_INTERVAL = 0.05
CHECK_INTERVAL = 0.5
"""Seconds between polls for messages, and between checks for silent and for additional nodes."""

_HEARTBEAT_INTERVAL = 1.0
_FENCE_FACTOR = 3.0
"""Multiple of patience.lost after which an agent without messages ends its ranks: later than the head gives it up."""

_KILL_TIMEOUT = 40.0
_PROBATION, _MAX_PROBATION = 5.0, 600.0
"""Seconds that a node which was lost must be up before the run uses it again. Doubled with every loss, up to the second."""

_RETRY_DELAY, _MAX_RETRY_DELAY = 3.0, 60.0
"""Seconds before another try to reach a node that does not answer. Doubled with every try, up to the second."""


class AgentPool:
    """The nodes of a site and the connections to their agents.

    up: nodes that answer and are not avoided, in the site's order
    down: for every other node that was tried, what is wrong with it
    hello, last_hello: the greeting of each connected node, and the last greeting of every node
    losses: how often each node was lost
    avoided: nodes that the run does without
    tick: called during long waits
    """

    def __init__(
        self, site: Site, cluster: Base, policy: RecoverySection, requests: StopRequests, log: Callable[[str], Path],
        workdir: Path, env: dict[str, str], witness: Path | None = None,
    ) -> None:  # fmt: skip
        """Start the heartbeat thread. No agent is started yet.

        log: maps a node's name to the file for its agent's stderr
        env: environment variables for every agent
        witness: a file that every node must see, so that what ranks write beside it reaches the same disk
        """
        self.witness = str(witness) if witness else ""
        self.site, self.cluster, self.policy, self.requests = site, cluster, policy, requests
        self.log, self.workdir, self.env = log, workdir, env
        self.names = site.nodes()
        self.links: dict[str, Link] = {}
        self.last_hello: dict[str, dict[str, Any]] = {}
        self.losses: dict[str, int] = {}
        self.hello: dict[str, dict[str, Any]] = {}
        self.down: dict[str, str] = {}
        self.avoided: set[str] = set()
        self.tick: Callable[[], None] = lambda: None
        self._selector = selectors.DefaultSelector()
        self._last_check = 0.0
        self._up_since: dict[str, float] = {}
        self._next_try: dict[str, float] = {}
        self._delay: dict[str, float] = {}
        self._closed = threading.Event()
        self._probed: dict[tuple[str, int], dict[str, Any]] = {}
        self._heartbeats = threading.Thread(target=self._send_heartbeats, daemon=True)
        self._heartbeats.start()

    @property
    def up(self) -> list[str]:
        """Names of the nodes that answer and are not avoided, in the site's order."""
        return [name for name in self.names if name in self.hello and name not in self.avoided]

    @property
    def stable(self) -> list[str]:
        """The nodes of `up` that have stayed up for a probation time, which doubles with every loss of the node."""
        now = time.monotonic()
        return [
            name for name in self.up
            if not (lost := self.losses.get(name, 0))
            or now - self._up_since[name] > min(_PROBATION * 2 ** (lost - 1), _MAX_PROBATION)
        ]  # fmt: skip

    def gather(self, wanted: int, least: int, patience: float, rejoin: float, first: bool) -> list[str]:
        """Start agents until enough nodes are up, and return the nodes that are.

        Returns early, with the nodes that are up, when a signal asks to stop. Raises OutageError if fewer than `least`
        nodes are up after `patience` seconds, or LaunchError if none is.

        wanted: number of nodes to wait for
        least: number of nodes to accept once `rejoin` seconds have passed
        patience: seconds until it gives up
        rejoin: seconds to wait for nodes beyond `least`
        first: also wait, up to `patience`, for nodes that are still starting
        """
        began = time.monotonic()
        while True:
            if self.avoided and len(self.up) < least:  # a node that has failed is better than none
                self.avoided.clear()
            self.start_agents()
            self.poll(POLL_INTERVAL)
            self.tick()
            passed, up = time.monotonic() - began, self.up
            if len(up) >= wanted or self.requests.signals:
                return up
            coming = first and passed < patience and any(self._is_coming_up(name) for name in self.links)
            if len(up) >= least and passed >= rejoin and not coming:
                return up
            if passed > patience:
                lines = "; ".join(f"{name}: {why}" for name, why in self.down.items()) or "no node answers"
                message = f"{len(up)} of {wanted} nodes are up after {patience:g} s ({lines}); {least} are needed at least"
                raise (OutageError if up else LaunchError)(message)

    def _is_coming_up(self, name: str) -> bool:
        """Whether a node is worth waiting for: its first attempt still runs, or its agent has sent a message."""
        link = self.links[name]
        return name not in self.hello and (name not in self.down or link.last_message > link.started)

    def start_agents(self) -> None:
        """Start an agent on every node that has none, except on nodes that failed a moment ago."""
        now = time.monotonic()
        for name in self.names:
            if name in self.avoided or name in self.links or now < self._next_try.get(name, now):
                continue
            link = Link(name, self.site.command(name), self.log(name))
            link.send(
                {
                    "do": "greet", "workdir": str(self.workdir), "witness": self.witness, "env": self.env,
                    "ranks": self.cluster.ranks,
                    "policy": self.policy.model_dump(mode="json"), "interface": self.cluster.network.interface,
                    "fence": _FENCE_FACTOR * self.cluster.patience.lost, "opens": name == self.names[0],
                }
            )  # fmt: skip
            self.links[name] = link
            self._selector.register(link.process.stdout, selectors.EVENT_READ, name)  # type: ignore[arg-type]

    def mark_lost(self, name: str, why: str) -> None:
        """Drop a node and close its connection.

        The agent ends its ranks once it notices, at the latest when it has received no message for the fence time. The node
        is not used again before that time has passed.
        """
        link = self.links.pop(name, None)
        if link is None:
            return
        self.down[name] = why
        fence = 0.0
        if self.hello.pop(name, None) is not None:
            self.losses[name] = self.losses.get(name, 0) + 1
            fence = 0.0 if link.closed else _FENCE_FACTOR * self.cluster.patience.lost
        pause = self._delay.get(name, _RETRY_DELAY)
        self._next_try[name], self._delay[name] = time.monotonic() + max(pause, fence), min(2 * pause, _MAX_RETRY_DELAY)
        self._selector.unregister(link.process.stdout)  # type: ignore[arg-type]
        link.close()

    def poll(self, seconds: float, on: Callable[[str, dict[str, Any]], None] = lambda *_: None) -> list[str]:
        """Process the messages of all nodes for up to `seconds`, and return the nodes that were lost meanwhile.

        on: called with every node's name and message
        """
        lost: list[str] = []
        for key, _ in self._selector.select(seconds):
            name = key.data
            link = self.links.get(name)
            for message in link.receive() if link is not None else ():
                self._handle(name, message)
                on(name, message)
            if link is not None and link.closed and self.links.get(name) is link:
                last_line = link.last_error_line()
                self.mark_lost(name, f"its agent ended: {last_line}" if last_line else "its agent ended")
                lost.append(name)
        if time.monotonic() - self._last_check < CHECK_INTERVAL:
            return lost
        self._last_check = time.monotonic()
        for name, link in list(self.links.items()):
            # A node that is starting imports for a while, and is lost only if its pipe closes or patience.start is over.
            patience = self.cluster.patience.lost if name in self.hello else self.cluster.patience.start
            if link.silent_seconds > patience:
                self.mark_lost(name, f"no word for {link.silent_seconds:.1f} s")
                lost.append(name)
            else:
                link.flush()
        return lost

    def _handle(self, name: str, message: dict[str, Any]) -> None:
        if "hello" in message:
            self.hello[name] = self.last_hello[name] = message["hello"]
            self._up_since[name] = time.monotonic()
            self.down.pop(name, None)
            self._delay.pop(name, None)
        elif "asked" in message:
            if not self.requests.signals:  # count it once: a scheduler signals every node
                self.requests.add(int(message["asked"]))
        elif "probed" in message:
            self._probed[name, int(message["id"])] = message["probed"]

    def _send_heartbeats(self) -> None:
        """Send a heartbeat to every agent once a second, however busy the main thread is."""
        while not self._closed.wait(_HEARTBEAT_INTERVAL):
            for link in list(self.links.values()):
                with contextlib.suppress(OSError):
                    link.send({"do": "beat"})

    def probe(self, question: dict[str, Any], patience: float) -> dict[str, dict[str, Any]]:
        """Send a question to `host.probe` on all nodes at once, and return the answer of each.

        The answer of a node that sent none within `patience` seconds is {"error": reason}.
        """
        names, number = self.up, time.monotonic_ns()
        for name in names:
            self.links[name].send({"do": "probe", "question": question, "id": number})
        until = time.monotonic() + patience
        while time.monotonic() < until and any((name, number) not in self._probed and name in self.links for name in names):
            self.poll(POLL_INTERVAL)
            if self.requests.signals:
                break
        silence = {"error": f"no answer within {patience:g} s"}
        return {name: self._probed.pop((name, number), silence) for name in names}

    def close(self) -> None:
        """Close all connections, and wait until no node has a rank left."""
        for link in self.links.values():
            link.send({"do": "bye"})
        threads = [threading.Thread(target=link.close, args=(_KILL_TIMEOUT,)) for link in self.links.values()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self._closed.set()
        self._selector.close()
        self.links.clear()
