"""The order of samples: a permutation of 0..n-1 that is a function of its key, in O(1) time and memory per index."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt

ROUNDS = 8

_U64 = npt.NDArray[np.uint64]


def _round_keys(key: str) -> list[np.uint64]:
    raw = hashlib.shake_256(key.encode()).digest(8 * ROUNDS)
    return [np.uint64(int.from_bytes(raw[i : i + 8], "little")) for i in range(0, len(raw), 8)]


def _scatter(x: _U64, key: np.uint64) -> _U64:
    x = (x ^ key) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
    return x ^ (x >> np.uint64(32))


def permute(index: npt.NDArray[Any], n: int, key: str) -> npt.NDArray[np.int64]:
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
