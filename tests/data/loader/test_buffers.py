"""A buffer is used again when nobody looks into it any more, and never before."""

import numpy as np
import torch

from mikoshi.data.loader.buffers import Buffers


def test_used_again_only_when_every_view_is_gone():
    buffers = Buffers()
    first = buffers.take((4, 8), np.int64)
    place = first.ctypes.data
    for look in (lambda a: a[1:2, ::3], lambda a: a.T, lambda a: torch.from_numpy(a)[2:], lambda a: memoryview(a)):
        held = look(first)
        del first
        assert buffers.take((4, 8), np.int64).ctypes.data != place
        del held
        first = buffers.take((4, 8), np.int64)
        assert first.ctypes.data == place


def test_other_sizes_and_types_and_many_held_at_once():
    buffers = Buffers()
    held = [buffers.take((n, 3), np.int32) for n in range(1, 200)]
    for n, array in enumerate(held, 1):
        array[:] = n
    assert all((array == n).all() and array.shape == (n, 3) for n, array in enumerate(held, 1))
