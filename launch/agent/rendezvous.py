"""Where the ranks of an attempt meet: a store that listens on one interface alone, fresh for every attempt."""

from __future__ import annotations

import socket
import uuid
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Place:
    """Where one node's ranks stand among all: node `node` of `nodes`, `ranks` each, node-major, so that neighbours share a
    node; where they meet, the id that tells this attempt from others, and the interface that they reach each other by."""

    node: int
    nodes: int
    ranks: int
    host: str
    port: int
    run_id: str
    interface: str

    @property
    def first(self) -> int:
        """Global rank of this node's first."""
        return self.node * self.ranks

    @property
    def world(self) -> int:
        return self.nodes * self.ranks


class Meeting:
    """An open store. Nothing in it is ever unpickled, and no address of an earlier attempt is in it."""

    def __init__(self, host: str = LOOPBACK) -> None:
        from torch._C._distributed_c10d import TCPStore

        self.run_id = uuid.uuid4().hex
        # torch binds its own socket to every interface, whatever the host name it is given.
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, 0), family=family, backlog=2048)
        self.host, self.port = host, int(listener.getsockname()[1])
        self.store: TCPStore = TCPStore(
            host, self.port, None, is_master=True, timeout=timedelta(minutes=1), wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )  # fmt: skip

    def alone(self, ranks: int) -> Place:
        """The place of the only node."""
        return Place(0, 1, ranks, self.host, self.port, self.run_id, loopback_interface())


def loopback_interface() -> str:
    """The name of the interface that 127.0.0.1 is on."""
    return next(name for name, at in psutil.net_if_addrs().items() if any(one.address == LOOPBACK for one in at))
