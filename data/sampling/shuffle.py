"""The order of samples: a permutation that is a function of its key, in O(1) time and memory per index.

`permute` is the permutation itself; `Order` lays it over the shards of a corpus, epoch after epoch, over all of them at
once or window by window, so that a corpus read from afar needs only a few shards at hand.
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
    """Where each index (0 <= index < n) goes in the permutation of n that `key` names. Vectorised; keeps no state.

    A Feistel network on the smallest power of two that holds n, walked until it lands under n (Black and Rogaway
    2002, "Ciphers with arbitrary finite domains"): a bijection whatever the round function, two walks on average.
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
    """`shards` in this epoch's order and the number of samples before each, with the total at the end; `bounds`: the
    numbers of samples before each window, with the total."""

    shards: Ids
    before: Ids
    bounds: Ids


@dataclass(frozen=True)
class Order:
    """Where the d-th sample drawn from a corpus stands, for any d. Every epoch has every sample once.

    `counts`: samples in each shard. `window`: shards whose samples are mixed with each other, 0 for all: the shards of
    an epoch come in a shuffled order, as many at a time as a window holds. `key`: what the order is a function of.
    """

    counts: Ids
    window: int
    key: str
    _epochs: OrderedDict[int, _Epoch] = field(default_factory=OrderedDict, compare=False, repr=False)

    @property
    def samples(self) -> int:
        return int(self.counts.sum())

    def at(self, draws: Ids) -> tuple[Ids, Ids]:
        """Shard and sample inside it of each draw."""
        shards, inside = np.empty_like(draws), np.empty_like(draws)
        epochs, places = np.divmod(draws, self.samples)
        for epoch in np.unique(epochs):
            here = np.flatnonzero(epochs == epoch)
            shards[here], inside[here] = self._of_epoch(int(epoch), places[here])
        return shards, inside

    def _of_epoch(self, epoch: int, places: Ids) -> tuple[Ids, Ids]:
        laid = self._laid(epoch)
        windows = np.searchsorted(laid.bounds, places, side="right") - 1
        ordered = np.empty_like(places)
        for window in np.unique(windows):
            here = np.flatnonzero(windows == window)
            first, stop = (int(b) for b in laid.bounds[window : window + 2])
            key = f"{self.key}:epoch:{epoch}" + (f":window:{window}" if self._windowed else "")
            ordered[here] = first + permute(places[here] - first, stop - first, key)
        at = np.searchsorted(laid.before, ordered, side="right") - 1
        return laid.shards[at], ordered - laid.before[at]

    @property
    def _windowed(self) -> bool:
        return 0 < self.window < len(self.counts)

    def _laid(self, epoch: int) -> _Epoch:
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
