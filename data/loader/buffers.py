"""Memory for batches that is reused once no view of it is left, since fresh pages cost more than filling them."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import numpy.typing as npt

_KEPT = 64


def _references(buffers: list[npt.NDArray[np.uint8]], at: int) -> int:
    return sys.getrefcount(buffers[at])


_ALONE = _references([np.empty(1, dtype=np.uint8)], 0)
"""References to a buffer that only the list holds, as this interpreter counts them."""


class Buffers:
    """Arrays to fill. One is reused only when it and every array and tensor that shares its memory are gone. For one thread."""

    def __init__(self) -> None:
        self._buffers: list[npt.NDArray[np.uint8]] = []

    def take(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """An array of this shape, with arbitrary values."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        for at in range(len(self._buffers)):
            if size <= self._buffers[at].nbytes <= 2 * size and _references(self._buffers, at) == _ALONE:
                return self._buffers[at][:size].view(dtype).reshape(shape)
        made = np.empty(size, dtype=np.uint8)
        if len(self._buffers) == _KEPT:
            self._buffers.pop(0)
        self._buffers.append(made)
        return made.view(dtype).reshape(shape)
