"""Ring attention: keys and values go round the context-parallel ranks, a block at a time, and nobody ever holds them all
(Liu et al. 2023, arXiv:2310.01889). Plain causal attention only, in the flash kernels of CPU and CUDA.

Every rank holds a chunk of the head and one of the tail of the row, so that each block of the ring costs all as much.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from mikoshi.parallel.context import Attend

_aten = torch.ops.aten


def ring_attend(group: ProcessGroup) -> Attend:
    """Attention of this rank's queries to the whole row. Query [B, H, T, D], keys and values of H or fewer heads."""

    def attend(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, mask: object) -> Tensor:
        assert mask is None, "the layout refuses what is not plain causal attention"
        copies = q_BHTD.shape[1] // k_BKTD.shape[1]
        k, v = (part.repeat_interleave(copies, 1) if copies > 1 else part for part in (k_BKTD, v_BKTD))
        return cast(Tensor, _Ring.apply(q_BHTD.contiguous(), k.contiguous(), v.contiguous(), group))  # type: ignore[no-untyped-call]

    apart: Attend = torch.compiler.disable(attend)
    return apart


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, group: ProcessGroup) -> Tensor:
        out = torch.zeros_like(q, dtype=torch.float32)
        lse = torch.full(q.shape[:-1], -torch.inf, dtype=torch.float32, device=q.device)
        for source, (k_block, v_block) in _ring_steps(group, (k, v)):
            queries, keys, causal = _visible(source, group.rank(), q.shape[2])
            part, part_lse = _flash(q[:, :, queries], k_block[:, :, keys], v_block[:, :, keys], causal)
            _merge(out[:, :, queries], lse[:, :, queries], part, part_lse)
        ctx.save_for_backward(q, k, v, out.to(q.dtype), lse)
        ctx.group = group
        return out.to(q.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, lse = ctx.saved_tensors
        group, grad = ctx.group, grads[0].contiguous()
        grad_q = torch.zeros_like(q, dtype=torch.float32)
        # The gradients of a block travel with it and are home when it is.
        kept = (torch.zeros_like(k, dtype=torch.float32), torch.zeros_like(v, dtype=torch.float32))
        for source, (k_block, v_block, grad_k, grad_v) in _ring_steps(group, (k, v, *kept)):
            queries, keys, causal = _visible(source, group.rank(), q.shape[2])
            grad_part, q_part, out_part, lse_part = (t[:, :, queries].contiguous() for t in (grad, q, out, lse))
            parts = _flash_backward(grad_part, q_part, out_part, lse_part, k_block[:, :, keys], v_block[:, :, keys], causal)
            for total, part, where in zip((grad_q, grad_k, grad_v), parts, (queries, keys, keys), strict=True):
                total[:, :, where] += part
            kept = (grad_k, grad_v)
        back = _rotated(kept, group)
        return grad_q.to(q.dtype), back[0].to(k.dtype), back[1].to(v.dtype), None


def _ring_steps(group: ProcessGroup, blocks: tuple[Tensor, ...]) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """The blocks of every rank in turn, with the rank whose they are. What is written into one goes on with it."""
    for step in range(group.size()):
        yield (group.rank() - step) % group.size(), blocks
        if step < group.size() - 1:
            blocks = _rotated(blocks, group)


def _rotated(blocks: tuple[Tensor, ...], group: ProcessGroup) -> tuple[Tensor, ...]:
    """Give the blocks to the next rank and take those of the one before."""
    size, rank = group.size(), group.rank()
    received = tuple(torch.empty_like(block) for block in blocks)
    after, before = (rank + 1) % size, (rank - 1) % size
    ops = [dist.P2POp(dist.isend, b.contiguous(), group=group, group_peer=after, tag=i) for i, b in enumerate(blocks)]
    ops += [dist.P2POp(dist.irecv, b, group=group, group_peer=before, tag=i) for i, b in enumerate(received)]
    for work in dist.batch_isend_irecv(ops):
        work.wait()
    return received


def _visible(source: int, rank: int, length: int) -> tuple[slice, slice, bool]:
    """Which of this rank's queries see which keys of the block of `source`, and whether by the causal rule.

    A rank's head chunk lies before, and its tail chunk behind, those of every rank of a higher number.
    """
    half, whole = length // 2, slice(0, length)
    if source == rank:
        return whole, whole, True
    return (whole, slice(0, half), False) if source < rank else (slice(half, length), whole, False)


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Take a block's attention into the sum so far, both normalised by their own log-sum-exp, in place."""
    total = torch.logaddexp(lse, part_lse)
    out.mul_((lse - total).exp()[..., None]).add_(part * (part_lse - total).exp()[..., None])
    lse.copy_(total)


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    if q.is_cuda:
        out, lse, *_ = _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)
    else:
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
    return out, lse


def _flash_backward(
    grad: Tensor, q: Tensor, out: Tensor, lse: Tensor, k: Tensor, v: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """With the log-sum-exp of the whole row these are the block's parts of the whole gradients."""
    if q.is_cuda:
        seed = torch.zeros(2, dtype=torch.uint64, device=q.device)
        back = _aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, causal, seed, seed
        )
    else:
        back = _aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, lse, 0.0, causal)
    return cast(tuple[Tensor, Tensor, Tensor], back[:3])
