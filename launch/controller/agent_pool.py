"""The nodes that can carry a run: one agent each, and no node that is gone is waited for.

Every node counts until it has said nothing for cluster.patience.lost seconds, or its pipe has closed.
"""

from __future__ import annotations

import contextlib
import selectors
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mikoshi.launch.agent.requests import Requests
from mikoshi.launch.backends.base import Site
from mikoshi.launch.config.cluster import Base
from mikoshi.launch.transport.link import Link
from mikoshi.trainer.config.data import RecoverySection
from mikoshi.trainer.errors import LaunchError, OutageError

LOOK = 0.05
OFTEN = 0.5
"""Seconds between looks at what nodes say, and at who is silent and whether more nodes could be had."""

_BEAT = 1.0
_FENCE = 3.0
"""Times patience.lost after which an agent that hears nothing ends its ranks: later than the leader gives it up."""

_KILL = 40.0
_STEADY, _LONG = 5.0, 600.0
"""Seconds that a node which was lost must be up before a run stops to take it in: doubled from one loss to the next."""

_AGAIN, _RARELY = 3.0, 60.0
"""Seconds before another try to reach a node that does not answer: doubled from one to the next."""


class Crew:
    """The nodes of a site, as far as they answer. up: those that do and are not avoided, in the site's order; why: of the
    others, what is wrong; known: what each said when it came up last; losses: times that each was lost."""

    def __init__(
        self, site: Site, cluster: Base, policy: RecoverySection, requests: Requests, log: Callable[[str], Path],
        workdir: Path, env: dict[str, str], witness: Path | None = None,
    ) -> None:  # fmt: skip
        """witness: a file that every node must see, for what is written beside it to be the same on all."""
        self.witness = str(witness) if witness else ""
        self.site, self.cluster, self.policy, self.requests = site, cluster, policy, requests
        self.log, self.workdir, self.env = log, workdir, env
        self.names = site.nodes()
        self.links: dict[str, Link] = {}
        self.known: dict[str, dict[str, Any]] = {}
        self.losses: dict[str, int] = {}
        self.hello: dict[str, dict[str, Any]] = {}
        self.why: dict[str, str] = {}
        self.avoided: set[str] = set()
        self.tick: Callable[[], None] = lambda: None
        self._selector = selectors.DefaultSelector()
        self._looked = 0.0
        self._since: dict[str, float] = {}
        self._next: dict[str, float] = {}
        self._pause: dict[str, float] = {}
        self._done = threading.Event()
        self._probed: dict[tuple[str, int], dict[str, Any]] = {}
        self._beats = threading.Thread(target=self._beat, daemon=True)
        self._beats.start()

    @property
    def up(self) -> list[str]:
        return [name for name in self.names if name in self.hello and name not in self.avoided]

    @property
    def steady(self) -> list[str]:
        """Those of `up` that have stayed so for a while, the longer the more often they were lost."""
        now = time.monotonic()
        return [
            name for name in self.up
            if not (lost := self.losses.get(name, 0)) or now - self._since[name] > min(_STEADY * 2 ** (lost - 1), _LONG)
        ]  # fmt: skip

    def gather(self, wanted: int, least: int, patience: float, rejoin: float, first: bool) -> list[str]:
        """Reach for nodes until `wanted` are up, or `rejoin` seconds are over and `least` of them are; those that are up, or as
        many as there are when a signal asks to stop. first: those that are still coming up are waited for. When there are fewer
        than `least` after `patience` seconds, raises OutageError where some are up, else LaunchError: no node can do what the
        cluster file says."""
        began = time.monotonic()
        while True:
            if self.avoided and len(self.up) < least:  # better one that has failed than none
                self.avoided.clear()
            self.reach()
            self.listen(LOOK)
            self.tick()
            passed, up = time.monotonic() - began, self.up
            if len(up) >= wanted or self.requests.asked:
                return up
            coming = first and passed < patience and any(self._comes_up(name) for name in self.links)
            if len(up) >= least and passed >= rejoin and not coming:
                return up
            if passed > patience:
                lines = "; ".join(f"{name}: {why}" for name, why in self.why.items()) or "no node answers"
                told = f"{len(up)} of {wanted} nodes are up after {patience:g} s ({lines}); {least} are needed at least"
                raise (OutageError if up else LaunchError)(told)

    def _comes_up(self, name: str) -> bool:
        """Whether a node that is reached for is worth waiting for: tried for the first time, or one whose agent has spoken."""
        link = self.links[name]
        return name not in self.hello and (name not in self.why or link.heard > link.began)

    def reach(self) -> None:
        """Start the agents of nodes that have none, unless they have just failed."""
        now = time.monotonic()
        for name in self.names:
            if name in self.avoided or name in self.links or now < self._next.get(name, now):
                continue
            link = Link(name, self.site.command(name), self.log(name))
            link.send(
                {
                    "do": "greet", "workdir": str(self.workdir), "witness": self.witness, "env": self.env,
                    "ranks": self.cluster.ranks,
                    "policy": self.policy.model_dump(mode="json"), "interface": self.cluster.network.interface,
                    "fence": _FENCE * self.cluster.patience.lost, "opens": name == self.names[0],
                }
            )  # fmt: skip
            self.links[name] = link
            self._selector.register(link.process.stdout, selectors.EVENT_READ, name)  # type: ignore[arg-type]

    def lose(self, name: str, why: str) -> None:
        """Give a node up: its agent ends its ranks when it notices, at the latest when it has heard nothing for a while. Until
        it must have done so it is not used again."""
        link = self.links.pop(name, None)
        if link is None:
            return
        self.why[name] = why
        fence = 0.0
        if self.hello.pop(name, None) is not None:
            self.losses[name] = self.losses.get(name, 0) + 1
            fence = 0.0 if link.closed else _FENCE * self.cluster.patience.lost
        pause = self._pause.get(name, _AGAIN)
        self._next[name], self._pause[name] = time.monotonic() + max(pause, fence), min(2 * pause, _RARELY)
        self._selector.unregister(link.process.stdout)  # type: ignore[arg-type]
        link.close()

    def listen(self, seconds: float, on: Callable[[str, dict[str, Any]], None] = lambda *_: None) -> list[str]:
        """Hear what nodes say within `seconds`; those that were lost on the way."""
        lost: list[str] = []
        for key, _ in self._selector.select(seconds):
            name = key.data
            link = self.links.get(name)
            for message in link.receive() if link is not None else ():
                self._hear(name, message)
                on(name, message)
            if link is not None and link.closed and self.links.get(name) is link:
                words = link.last_words()
                self.lose(name, f"its agent ended: {words}" if words else "its agent ended")
                lost.append(name)
        if time.monotonic() - self._looked < OFTEN:
            return lost
        self._looked = time.monotonic()
        for name, link in list(self.links.items()):
            # One that is coming up imports for a while: what it says meanwhile is that it lives, or its pipe closes.
            patience = self.cluster.patience.lost if name in self.hello else self.cluster.patience.start
            if link.silent > patience:
                self.lose(name, f"no word for {link.silent:.1f} s")
                lost.append(name)
            else:
                link.flush()
        return lost

    def _hear(self, name: str, message: dict[str, Any]) -> None:
        if "hello" in message:
            self.hello[name] = self.known[name] = message["hello"]
            self._since[name] = time.monotonic()
            self.why.pop(name, None)
            self._pause.pop(name, None)
        elif "asked" in message:
            if not self.requests.asked:  # once for all nodes: a scheduler sends its signal to each of them
                self.requests.ask(int(message["asked"]))
        elif "probed" in message:
            self._probed[name, int(message["id"])] = message["probed"]

    def _beat(self) -> None:
        """Agents hear from this process every second, whatever it is busy with."""
        while not self._done.wait(_BEAT):
            for link in list(self.links.values()):
                with contextlib.suppress(OSError):
                    link.send({"do": "beat"})

    def probe(self, question: dict[str, Any], patience: float) -> dict[str, dict[str, Any]]:
        """Ask host.probe on all nodes that are up at once; their answers, {"error": why} for a node without one."""
        names, number = self.up, time.monotonic_ns()
        for name in names:
            self.links[name].send({"do": "probe", "question": question, "id": number})
        until = time.monotonic() + patience
        while time.monotonic() < until and any((name, number) not in self._probed and name in self.links for name in names):
            self.listen(LOOK)
            if self.requests.asked:
                break
        silence = {"error": f"no answer within {patience:g} s"}
        return {name: self._probed.pop((name, number), silence) for name in names}

    def close(self) -> None:
        """Hang up on all nodes, and wait until none has a rank left."""
        for link in self.links.values():
            link.send({"do": "bye"})
        threads = [threading.Thread(target=link.close, args=(_KILL,)) for link in self.links.values()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self._done.set()
        self._selector.close()
        self.links.clear()
