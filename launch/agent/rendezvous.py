"""The store through which the ranks of one attempt meet: new for every attempt, and open on one interface alone."""

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
class Placement:
    """Where one node's ranks are among all ranks. Ranks are numbered node by node, so that neighbours share a node.

    node, nodes: this node's number, and the number of nodes
    ranks: ranks per node
    host, port: the address of the store
    run_id: tells this attempt from others
    interface: the network interface that the ranks use
    """

    node: int
    nodes: int
    ranks: int
    host: str
    port: int
    run_id: str
    interface: str

    @property
    def first_rank(self) -> int:
        """Global rank of this node's first rank."""
        return self.node * self.ranks

    @property
    def world_size(self) -> int:
        """Number of ranks on all nodes."""
        return self.nodes * self.ranks


class Rendezvous:
    """An open TCPStore. Nothing in it is ever unpickled, and it holds no address of an earlier attempt."""

    def __init__(self, host: str = LOOPBACK) -> None:
        from torch._C._distributed_c10d import TCPStore

        self.run_id = uuid.uuid4().hex
        # torch would bind its socket to every interface, whatever host name it is given.
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, 0), family=family, backlog=2048)
        self.host, self.port = host, int(listener.getsockname()[1])
        self.store: TCPStore = TCPStore(
            host, self.port, None, is_master=True, timeout=timedelta(minutes=1), wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )  # fmt: skip

    def single_node(self, ranks: int) -> Placement:
        """The placement of a run's only node."""
        return Placement(0, 1, ranks, self.host, self.port, self.run_id, loopback_interface())


def loopback_interface() -> str:
    """Name of the interface with the address 127.0.0.1."""
    return next(name for name, at in psutil.net_if_addrs().items() if any(one.address == LOOPBACK for one in at))
