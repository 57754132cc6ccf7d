"""A rank that is slow for its peers is named: each tells how long its own work of a step takes, waiting for others left out.

On CPU that is the time that the main thread was running: a wait in a collective sleeps. (The time that it waited for a core
is left out. Where ranks share cores it is most of a step, and differs among equal ranks by as much as what is looked for.)
On CUDA the streams wait inside of kernels, so the device is asked instead how long a product of fixed size takes it, between
two steps when it has nothing else to do.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist

_SLOW = 1.5
"""Times as long as the median of its peers: what is twice as slow stands out, what is a third slower by chance does not."""
_IN_A_ROW = 3
"""Windows: equal ranks of a busy machine differ for one of them now and then, a slow one does in each."""
_SHARE = 0.002  # of the time of training that the product may take
_SIDE = 4096


@dataclass(frozen=True)
class Slow:
    """A rank whose work takes `ratio` times as long as that of the median of its peers."""

    rank: int
    ratio: float


class Stragglers:
    """Watches the steps of this rank, compares it with its peers every `window` steps, and names who is slow in three windows
    in a row: of 5 steps each, within 20 steps of its first slow one."""

    def __init__(self, device: torch.device, peers: Sequence[int], window: int = 5) -> None:
        """`peers`: for every rank the number of its group. The ranks of a group have equal work to do."""
        self.peers, self.window = tuple(peers), window
        self.known: deque[float] = deque(maxlen=window)
        self.last = 0.0
        self.ratios: list[list[float]] = [[] for _ in self.peers]
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
        """The ranks that were slow in the last three windows, the same list on each; who stays slow is named again after as
        many. A window in which a rank's time was not taken (on CUDA that is seldom done) is none of its own. Collective."""
        fresh = bool(self.known)
        self.last = median(self.known) if fresh else self.last
        self.known.clear()
        told = torch.zeros(2, len(self.peers), dtype=torch.float64)
        told[:, dist.get_rank()] = torch.tensor([self.last, float(fresh)])
        dist.all_reduce(told)
        now = slow(told[0].tolist(), self.peers if self.probe is None else [0] * len(self.peers))
        return self.lasting(now, [rank for rank, taken in enumerate(told[1].tolist()) if taken])

    def lasting(self, now: Sequence[Slow], taken: Sequence[int]) -> list[Slow]:
        """Of those slow in this window, in which the time of the ranks `taken` was: who has been in as many as it takes."""
        ratios, found = {one.rank: one.ratio for one in now}, []
        for rank in taken:
            self.ratios[rank] = [*self.ratios[rank], ratios[rank]] if rank in ratios else []
            if len(self.ratios[rank]) == _IN_A_ROW:
                found.append(Slow(rank, median(self.ratios[rank])))
                self.ratios[rank] = []
        return found


def slow(times: Sequence[float], peers: Sequence[int]) -> list[Slow]:
    """Of each rank's time, 0 where it knows none, and each one's group: who is slow. A rank without peers is not judged. Each
    group is sorted once: every rank of thousands does this every few steps."""
    groups: dict[int, list[float]] = {}
    for time_taken, peer in zip(times, peers, strict=True):
        if time_taken > 0:
            groups.setdefault(peer, []).append(time_taken)
    for group in groups.values():
        group.sort()
    found = []
    for rank, (mine, peer) in enumerate(zip(times, peers, strict=True)):
        usual = _median_without(groups.get(peer, []), mine) if mine > 0 else 0.0
        if usual and mine >= _SLOW * usual:
            found.append(Slow(rank, mine / usual))
    return found


def _median_without(ordered: Sequence[float], one: float) -> float:
    """The median of the others of a group, given in order; 0 where there are none."""
    count, at = len(ordered) - 1, bisect_left(ordered, one)
    if count < 1:
        return 0.0
    low, high = ((count - 1) // 2, count // 2)
    return (ordered[low + (low >= at)] + ordered[high + (high >= at)]) / 2


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
