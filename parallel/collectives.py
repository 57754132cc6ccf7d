"""The collectives that gradients flow through, each with its transpose as backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed import ProcessGroup

_ops = torch.ops._c10d_functional  # functional, so that torch.compile sees through them


def _gathered(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    joined = _ops.wait_tensor(_ops.all_gather_into_tensor(x.contiguous(), group.size(), group.group_name))
    return torch.cat(joined.chunk(group.size()), dim) if dim % x.ndim else cast(Tensor, joined)


def _scattered(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    parts = torch.cat(x.chunk(group.size(), dim)) if dim % x.ndim else x.contiguous()
    return cast(Tensor, _ops.wait_tensor(_ops.reduce_scatter_tensor(parts, "sum", group.size(), group.group_name)))


def _exchanged(x: Tensor, output_splits: Sequence[int], input_splits: Sequence[int], group: ProcessGroup) -> Tensor:
    return cast(
        Tensor,
        _ops.wait_tensor(_ops.all_to_all_single(x.contiguous(), list(output_splits), list(input_splits), group.group_name)),
    )


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _gathered(x, dim, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _scattered(grads[0], ctx.dim, ctx.group), None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _scattered(x, dim, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _gathered(grads[0], ctx.dim, ctx.group), None, None


class _OwnPart(_Scatter):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return x.chunk(group.size(), dim)[group.rank()].contiguous()


class _Join(_Gather):
    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].chunk(ctx.group.size(), ctx.dim)[ctx.group.rank()].contiguous(), None, None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, output_splits: Sequence[int], input_splits: Sequence[int], group: ProcessGroup) -> Tensor:
        ctx.output_splits, ctx.input_splits, ctx.group = output_splits, input_splits, group
        return _exchanged(x, output_splits, input_splits, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchanged(grads[0], ctx.input_splits, ctx.output_splits, ctx.group), None, None, None


def gather(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """All ranks' `x` joined along `dim`, in rank order. Backward: the sum of all ranks' gradients, each its own part."""
    return cast(Tensor, _Gather.apply(x, dim, group))  # type: ignore[no-untyped-call]


def reduce_scatter(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """The sum of all ranks' `x`, of which each rank gets its part along `dim`. Backward: gather."""
    return cast(Tensor, _Scatter.apply(x, dim, group))  # type: ignore[no-untyped-call]


def own_part(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """Each rank's part, along `dim`, of an `x` that is equal on all ranks. Backward: gather, of gradients that are again
    equal."""
    return cast(Tensor, _OwnPart.apply(x, dim, group))  # type: ignore[no-untyped-call]


def join(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """All ranks' `x` joined along `dim`, for a computation that is equal on all ranks. Backward: this rank's part of a
    gradient that is equal on all."""
    return cast(Tensor, _Join.apply(x, dim, group))  # type: ignore[no-untyped-call]


def exchange(x: Tensor, output_splits: Sequence[int], input_splits: Sequence[int], group: ProcessGroup) -> Tensor:
    """All-to-all of rows: `input_splits[r]` rows, in order, go to rank r, and `output_splits[r]` rows come from it.
    Backward: the reverse."""
    return cast(Tensor, _Exchange.apply(x, output_splits, input_splits, group))  # type: ignore[no-untyped-call]


def exchange_counts(x: Tensor, output_splits: Sequence[int], input_splits: Sequence[int], group: ProcessGroup) -> Tensor:
    """As `exchange`, for integers, through which no gradient flows."""
    return _exchanged(x, output_splits, input_splits, group)


def all_reduce(x: Tensor, group: ProcessGroup, how: str = "sum") -> Tensor:
    """All ranks' `x`, reduced by `how` ("sum", "max", ...). No gradient flows through it."""
    return cast(Tensor, _ops.wait_tensor(_ops.all_reduce(x.detach().contiguous(), how, group.group_name)))


def split_sizes(counts: Tensor, rows: int) -> list[int]:
    """Row counts as integers. Fake tensors hold no values: then `rows` divided evenly, which a dry run assumes."""
    if isinstance(counts, FakeTensor):
        each, over = divmod(rows, len(counts))
        return [each + (i < over) for i in range(len(counts))]
    return cast(list[int], counts.tolist())
