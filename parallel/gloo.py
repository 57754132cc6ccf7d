"""Groups of CPU tensors that do not write to freed memory: gloo's, each with one worker thread.

torch gives a gloo group two workers. Each of them, after every collective, writes the collective's name into one string
that they share without a lock (ProcessGroupGloo::runLoop). Most names are short enough to lie in the string itself; that
of a functional all-gather, ALLGATHER_COALESCED, lies on the heap, and two workers that end a gather and another collective
at the same moment free it twice, or write where it was. glibc then ends the rank, some time later and somewhere else
("malloc(): unaligned tcache chunk detected"). A gather and a sum in turn do so within milliseconds when both are queued
at once (torch 2.13), and within days when each is waited for.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import Store
from torch.distributed import distributed_c10d


def one_worker() -> None:
    """From now on every gloo group that torch makes in this process has one worker: `new_group`'s, a mesh's and other
    libraries', too. Collectives of one group then run one after the other, in the order in which they were asked for.

    Otherwise the groups are torch's own, on the interfaces of GLOO_SOCKET_IFNAME. Groups that are there already stay as
    they are. May be called again.
    """
    if dist.is_gloo_available() and distributed_c10d.ProcessGroupGloo is not _OneWorker:
        # torch takes options for NCCL's groups alone.
        distributed_c10d.ProcessGroupGloo = _OneWorker  # type: ignore[misc]


_Gloo: Any = distributed_c10d.ProcessGroupGloo if dist.is_gloo_available() else object  # its stub lacks what options take


class _OneWorker(_Gloo):  # type: ignore[misc]
    def __init__(self, store: Store, rank: int, size: int, timeout: timedelta) -> None:
        options = _Gloo._Options()
        options._threads = 1
        options._timeout = timeout
        named = [name for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name]
        options._devices = [_Gloo.create_device(interface=name) for name in named] or [_Gloo.create_default_device()]
        super().__init__(store, rank, size, options)
