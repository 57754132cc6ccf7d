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


def _exchanged(x: Tensor, got: Sequence[int], given: Sequence[int], group: ProcessGroup) -> Tensor:
    return cast(Tensor, _ops.wait_tensor(_ops.all_to_all_single(x.contiguous(), list(got), list(given), group.group_name)))


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
    def forward(ctx: Any, x: Tensor, got: Sequence[int], given: Sequence[int], group: ProcessGroup) -> Tensor:
        ctx.got, ctx.given, ctx.group = got, given, group
        return _exchanged(x, got, given, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchanged(grads[0], ctx.given, ctx.got, ctx.group), None, None, None


def gather(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """All ranks' `x` joined along `dim`, in rank order. Backward: the sum of all ranks' gradients, each its own part."""
    return cast(Tensor, _Gather.apply(x, dim, group))  # type: ignore[no-untyped-call]


def reduce_scatter(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """The sum of all ranks' `x`, of which each rank gets its part along `dim`. Backward: gather."""
    return cast(Tensor, _Scatter.apply(x, dim, group))  # type: ignore[no-untyped-call]


def own_part(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """Of an `x` that all ranks hold alike, each rank's part along `dim`. Backward: gather, of gradients alike again."""
    return cast(Tensor, _OwnPart.apply(x, dim, group))  # type: ignore[no-untyped-call]


def join(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """All ranks' `x` joined along `dim`, for all ranks to do the same with. Backward: of a gradient alike on all, its part."""
    return cast(Tensor, _Join.apply(x, dim, group))  # type: ignore[no-untyped-call]


def exchange(x: Tensor, got: Sequence[int], given: Sequence[int], group: ProcessGroup) -> Tensor:
    """All-to-all of rows: `given[r]` rows, in order, go to rank r, and `got[r]` rows come from it. Backward: the reverse."""
    return cast(Tensor, _Exchange.apply(x, got, given, group))  # type: ignore[no-untyped-call]


def exchange_counts(x: Tensor, got: Sequence[int], given: Sequence[int], group: ProcessGroup) -> Tensor:
    """exchange, for numbers that no gradient flows through."""
    return _exchanged(x, got, given, group)


def total(x: Tensor, group: ProcessGroup, how: str = "sum") -> Tensor:
    """All ranks' `x`, added up or whatever `how` says. No gradient flows through it."""
    return cast(Tensor, _ops.wait_tensor(_ops.all_reduce(x.detach().contiguous(), how, group.group_name)))


def sizes(counts: Tensor, rows: int) -> list[int]:
    """Row counts as numbers. On fake tensors, which hold none, `rows` shared out evenly: what a dry run assumes."""
    if isinstance(counts, FakeTensor):
        each, over = divmod(rows, len(counts))
        return [each + (i < over) for i in range(len(counts))]
    return cast(list[int], counts.tolist())
