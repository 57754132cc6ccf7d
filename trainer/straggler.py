"""A rank that is slow for its peers is named: each tells how long its own work of a step takes, waiting for others left out.

On CPU that is the time that the main thread was running: a wait in a collective sleeps. (The time that it waited for a core
is left out. Where ranks share cores it is most of a step, and differs among equal ranks by as much as what is looked for.)
On CUDA the streams wait inside of kernels, so the device is asked instead how long a product of fixed size takes it, between
two steps when it has nothing else to do.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist

_SLOW = 1.5
"""Times as long as the median of its peers: what is twice as slow stands out, what is a third slower by chance does not."""
_SHARE = 0.002  # of the time of training that the product may take
_SIDE = 4096


@dataclass(frozen=True)
class Slow:
    """A rank whose work takes `ratio` times as long as that of the median of its peers."""

    rank: int
    ratio: float


class Stragglers:
    """Watches the steps of this rank, and compares it with its peers every `window` steps."""

    def __init__(self, device: torch.device, peers: Sequence[int], window: int = 10) -> None:
        """`peers`: for every rank the number of its group. The ranks of a group have equal work to do."""
        self.peers, self.window = tuple(peers), window
        self.known: deque[float] = deque(maxlen=window)
        self.probe = _Probe(device) if device.type == "cuda" else None
        self.begun: float | None = None

    def begin(self) -> None:
        """This rank's own work of a step begins."""
        if self.probe is None:
            self.begun = time.thread_time()

    def end(self) -> None:
        """Its work is done; on CUDA the step's figures have been read, so that its stream is idle."""
        if self.probe is not None:
            self.known.extend(self.probe.times())
        elif self.begun is not None:
            self.known.append(time.thread_time() - self.begun)
            self.begun = None

    def due(self, step: int) -> bool:
        return len(self.peers) > 1 and step % self.window == 0

    def named(self) -> list[Slow]:
        """The ranks that were slow over the last `window` steps, the same list on each. Collective."""
        told = torch.zeros(len(self.peers), dtype=torch.float64)
        told[dist.get_rank()] = median(self.known) if self.known else 0.0
        dist.all_reduce(told)
        self.known.clear()
        return slow(told.tolist(), self.peers if self.probe is None else [0] * len(self.peers))


def slow(times: Sequence[float], peers: Sequence[int]) -> list[Slow]:
    """Of each rank's time, 0 where it knows none, and each one's group: who is slow. A rank without peers is not judged."""
    found = []
    for rank, mine in enumerate(times):
        others = [t for other, t in enumerate(times) if other != rank and peers[other] == peers[rank] and t > 0]
        if others and mine >= _SLOW * median(others):
            found.append(Slow(rank, mine / median(others)))
    return found


class _Probe:
    """A product of two matrices, timed on the device now and then, so seldom that training is not slowed by it."""

    def __init__(self, device: torch.device) -> None:
        self.matrix = torch.ones((_SIDE, _SIDE), dtype=torch.bfloat16, device=device)
        self.out = torch.empty_like(self.matrix)
        self.began, self.ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.pending = False
        self.next = 0.0

    def times(self) -> list[float]:
        """What the last product took, once it is known; and the next one is begun when it is time for one."""
        found = []
        if self.pending and self.ended.query():
            seconds = self.began.elapsed_time(self.ended) / 1e3
            found, self.pending = [seconds], False
            self.next = time.monotonic() + 2 * seconds / _SHARE
        if not self.pending and time.monotonic() >= self.next:
            torch.mm(self.matrix, self.matrix, out=self.out)  # while it runs the rest is queued: no launch is timed
            self.began.record()
            torch.mm(self.matrix, self.matrix, out=self.out)
            self.ended.record()
            self.pending = True
        return found
