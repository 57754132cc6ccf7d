"""Which piece of a parameter this rank holds: its place in the global tensor, and how many ranks hold the same."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def local(tensor: Tensor) -> Tensor:
    """The elements this rank holds, as a plain tensor that shares their memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def place(tensor: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Offset and shape of this rank's piece in the global tensor."""
    if not isinstance(tensor, DTensor):
        return (0,) * tensor.ndim, tuple(tensor.shape)
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(offset), tuple(shape)


def holders(tensor: Tensor, world: int) -> int:
    """How many of `world` ranks hold the same piece as this one."""
    if not isinstance(tensor, DTensor):
        return world
    mesh = tensor.device_mesh
    pieces = math.prod(mesh.size(i) for i, p in enumerate(tensor.placements) if isinstance(p, Shard))
    return world // pieces


def sum_of_squares(tensors: Sequence[Tensor], world: int) -> Tensor:
    """This rank's part of the global sum of squares, fp64: summed over all ranks it counts every element once."""
    by_holders: dict[int, list[Tensor]] = {}
    for tensor in tensors:
        by_holders.setdefault(holders(tensor, world), []).append(local(tensor))
    parts = [torch.stack(torch._foreach_norm(group)).double().square().sum() / n for n, group in by_holders.items()]
    return torch.stack(parts).sum()
