"""The order of samples: a permutation determined by its key, in O(1) time and memory per index.

`permute` is the permutation. `ShuffledOrder` applies it to the shards of a corpus, epoch after epoch, over all of them at once
or window by window, so that a remote corpus needs only a few shards at a time.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

ROUNDS = 8

_U64 = npt.NDArray[np.uint64]
Ids = npt.NDArray[np.int64]


def _round_keys(key: str) -> list[np.uint64]:
    raw = hashlib.shake_256(key.encode()).digest(8 * ROUNDS)
    return [np.uint64(int.from_bytes(raw[i : i + 8], "little")) for i in range(0, len(raw), 8)]


def _scatter(x: _U64, key: np.uint64) -> _U64:
    x = (x ^ key) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
    return x ^ (x >> np.uint64(32))


def permute(index: npt.NDArray[Any], n: int, key: str) -> Ids:
    """Where each index goes in the permutation of n that `key` determines. Vectorised and stateless.

    index: each in 0..n-1.

    A Feistel network on the smallest power of two that holds n, applied until the result is under n (Black and Rogaway 2002,
    "Ciphers with arbitrary finite domains"): a bijection whatever the round function, with two rounds on average.
    """
    if n <= 1:
        return np.zeros(len(index), dtype=np.int64)
    bits = max(2, (n - 1).bit_length())
    keys = _round_keys(key)

    def network(x: _U64) -> _U64:
        right_bits = bits // 2
        for round_key in keys:
            left_bits = bits - right_bits
            left, right = x >> np.uint64(right_bits), x & np.uint64((1 << right_bits) - 1)
            left ^= _scatter(right, round_key) & np.uint64((1 << left_bits) - 1)
            x = (right << np.uint64(left_bits)) | left
            right_bits = left_bits
        return x

    with np.errstate(over="ignore"):
        out = network(np.asarray(index).astype(np.uint64))
        outside = np.flatnonzero(out >= n)
        while outside.size:
            out[outside] = network(out[outside])
            outside = outside[out[outside] >= n]
    return out.astype(np.int64)


@dataclass(frozen=True)
class _Epoch:
    """The layout of an epoch.

    shards: in this epoch's order.
    before: number of samples before each shard, and the total at the end.
    bounds: number of samples before each window, and the total at the end.
    """

    shards: Ids
    before: Ids
    bounds: Ids


@dataclass(frozen=True)
class ShuffledOrder:
    """Where the d-th sample drawn from a corpus is, for any d. Every epoch has every sample once.

    counts: samples in each shard.
    window: shards whose samples are mixed with each other, 0 for all. The shards of an epoch come in shuffled order, a window
        at a time.
    key: determines the order.
    """

    counts: Ids
    window: int
    key: str
    _epochs: OrderedDict[int, _Epoch] = field(default_factory=OrderedDict, compare=False, repr=False)

    @property
    def samples(self) -> int:
        """Samples of an epoch."""
        return int(self.counts.sum())

    def at(self, draws: Ids) -> tuple[Ids, Ids]:
        """The shard of each draw, and the sample in it."""
        shards, inside = np.empty_like(draws), np.empty_like(draws)
        epochs, places = np.divmod(draws, self.samples)
        for epoch in np.unique(epochs):
            here = np.flatnonzero(epochs == epoch)
            shards[here], inside[here] = self._of_epoch(int(epoch), places[here])
        return shards, inside

    def _of_epoch(self, epoch: int, places: Ids) -> tuple[Ids, Ids]:
        layout = self._epoch_layout(epoch)
        windows = np.searchsorted(layout.bounds, places, side="right") - 1
        ordered = np.empty_like(places)
        for window in np.unique(windows):
            here = np.flatnonzero(windows == window)
            first, stop = (int(b) for b in layout.bounds[window : window + 2])
            key = f"{self.key}:epoch:{epoch}" + (f":window:{window}" if self._windowed else "")
            ordered[here] = first + permute(places[here] - first, stop - first, key)
        at = np.searchsorted(layout.before, ordered, side="right") - 1
        return layout.shards[at], ordered - layout.before[at]

    @property
    def _windowed(self) -> bool:
        return 0 < self.window < len(self.counts)

    def _epoch_layout(self, epoch: int) -> _Epoch:
        number = epoch if self._windowed else 0  # without windows every epoch has the shards in their own order
        if number not in self._epochs:
            shards = np.arange(len(self.counts), dtype=np.int64)
            if self._windowed:
                shards = permute(shards, len(shards), f"{self.key}:epoch:{epoch}:shards")
            before = np.concatenate(([0], np.cumsum(self.counts[shards], dtype=np.int64)))
            bounds = np.unique(np.append(before[:: self.window or len(shards)], before[-1]))
            self._epochs[number] = _Epoch(shards, before, bounds)
            while len(self._epochs) > 2:
                self._epochs.popitem(last=False)
        return self._epochs[number]
