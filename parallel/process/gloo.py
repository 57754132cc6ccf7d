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


def use_one_worker() -> None:
    """Give every gloo group that Python makes in this process from now on one worker thread: those of `new_group`, of meshes
    and of other libraries.

    Collectives of one group then run one after another, in the order of their calls. One that waits for another of its group,
    as a communication hook could, would wait forever. Otherwise the groups are torch's own, on the interfaces of
    GLOO_SOCKET_IFNAME. Existing groups are not changed. May be called again.
    """
    if dist.is_gloo_available():
        # `init_process_group` passes no options on to gloo.
        dist.ProcessGroupGloo.__init__ = _with_one_worker  # type: ignore[method-assign, assignment]


_torchs_own: Any = dist.ProcessGroupGloo.__init__ if dist.is_gloo_available() else None


def _with_one_worker(
    self: Any, store: Store, rank: int, size: int, how: Any = None, *, timeout: timedelta | None = None, options: Any = None
) -> None:
    """What torch's own takes: options or a timeout, in fourth place or by name."""
    if isinstance(how, timedelta):
        timeout = how
    elif how is not None:
        options = how
    if options is None:
        gloo: Any = dist.ProcessGroupGloo
        options = gloo._Options()
        named = [name for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name]
        options._devices = [gloo.create_device(interface=name) for name in named] or [gloo.create_default_device()]
        if timeout is not None:
            options._timeout = timeout
    options._threads = 1
    _torchs_own(self, store, rank, size, options)
