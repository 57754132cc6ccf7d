"""Where the ranks of one machine meet: a store that listens on the loopback interface alone, fresh for every attempt."""

from __future__ import annotations

import socket
import uuid
from datetime import timedelta

import psutil
from torch._C._distributed_c10d import TCPStore
from torch.distributed.elastic.rendezvous.api import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo

_HOST = "127.0.0.1"


class Loopback(RendezvousHandler):
    """A rendezvous of one node. Nothing in its store is ever unpickled, and no address of an earlier attempt is in it."""

    def __init__(self) -> None:
        self.run_id = uuid.uuid4().hex
        # torch binds its own socket to every interface, whatever the host name it is given.
        listener = socket.create_server((_HOST, 0), backlog=2048)
        port = listener.getsockname()[1]
        self.store = TCPStore(
            _HOST, port, None, is_master=True, timeout=timedelta(minutes=1), wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )  # fmt: skip
        self.address = (_HOST, port)
        self.info = RendezvousInfo(self.store, 0, 1, RendezvousStoreInfo(_HOST, port))

    def get_backend(self) -> str:
        return "loopback"

    @property
    def use_agent_store(self) -> bool:
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        return self.info

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        pass

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self.run_id

    def shutdown(self) -> bool:
        return True


def loopback_interface() -> str:
    """The name of the interface that 127.0.0.1 is on."""
    return next(name for name, at in psutil.net_if_addrs().items() if any(one.address == _HOST for one in at))
