"""Finds ranks that are slower than their peers, by the time that each spends on its own work without waiting for others.

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
class SlowRank:
    """A rank whose work takes `ratio` times as long as the median of its peers."""

    rank: int
    ratio: float


class Stragglers:
    """Compares this rank's step times with its peers' every `window` steps.

    A rank is reported after three slow windows in a row: with windows of 5 steps, within 20 steps of its first slow one.
    """

    def __init__(self, device: torch.device, peers: Sequence[int], window: int = 5) -> None:
        """`peers`: for every rank the number of its group. The ranks of a group have equal work to do."""
        self.peers, self.window = tuple(peers), window
        self.known: deque[float] = deque(maxlen=window)
        self.last = 0.0
        self.ratios: list[list[float]] = [[] for _ in self.peers]
        self.probe = _Probe(device) if device.type == "cuda" else None
        self.begun: float | None = None

    def begin(self) -> None:
        """Mark the start of this rank's own work in a step."""
        if self.probe is None:
            self.begun = time.thread_time()

    def end(self) -> None:
        """Mark its end. On CUDA the caller has read the step's results, so that the stream is idle."""
        if self.probe is not None:
            self.known.extend(self.probe.times())
        elif self.begun is not None:
            self.known.append(time.thread_time() - self.begun)
            self.begun = None

    def due(self, step: int) -> bool:
        """Whether the ranks compare their times after this step."""
        return len(self.peers) > 1 and step % self.window == 0

    def slow_ranks(self) -> list[SlowRank]:
        """The ranks that were slow in the last three windows, the same list on every rank. Collective.

        A rank that stays slow is reported again after three more windows. A window without a measurement of a rank (common on
        CUDA) does not count for that rank.
        """
        fresh = bool(self.known)
        self.last = median(self.known) if fresh else self.last
        self.known.clear()
        times_and_fresh = torch.zeros(2, len(self.peers), dtype=torch.float64)
        times_and_fresh[:, dist.get_rank()] = torch.tensor([self.last, float(fresh)])
        dist.all_reduce(times_and_fresh)
        now = find_slow(times_and_fresh[0].tolist(), self.peers if self.probe is None else [0] * len(self.peers))
        return self.persistent(now, [rank for rank, taken in enumerate(times_and_fresh[1].tolist()) if taken])

    def persistent(self, now: Sequence[SlowRank], taken: Sequence[int]) -> list[SlowRank]:
        """Ranks that have now been slow in enough windows in a row.

        now: ranks that were slow in this window. taken: ranks that were measured in it.
        """
        ratios, found = {one.rank: one.ratio for one in now}, []
        for rank in taken:
            self.ratios[rank] = [*self.ratios[rank], ratios[rank]] if rank in ratios else []
            if len(self.ratios[rank]) == _IN_A_ROW:
                found.append(SlowRank(rank, median(self.ratios[rank])))
                self.ratios[rank] = []
        return found


def find_slow(times: Sequence[float], peers: Sequence[int]) -> list[SlowRank]:
    """The ranks whose time is at least 1.5 times the median of their peers.

    times: seconds of each rank, 0 where unknown. peers: group number of each rank. A rank without peers is not judged. Each
    group is sorted once, because every rank of thousands calls this every few steps.
    """
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
            found.append(SlowRank(rank, mine / usual))
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
