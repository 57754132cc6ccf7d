"""Expert parallelism: rows that chose an expert travel to the rank that holds it, and their results travel back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from mikoshi.parallel.collectives import all_reduce, exchange, exchange_counts, gather, reduce_scatter, split_sizes
from mikoshi.parallel.tensor import own


def expert_parallel(experts: Any, ep: ProcessGroup | None, expert_tp: ProcessGroup | None) -> None:
    """Let a module of experts, called with rows sorted by expert and the number of rows of each, compute with those that
    this rank holds, on every rank's rows.

    `expert_tp` ranks hold slices of the same experts: they take each other's rows first, and add up their results.
    """
    compute: Callable[..., Tensor] = experts.compute

    def weights() -> tuple[Tensor, Tensor, Tensor]:
        return own(experts.gate), own(experts.up), own(experts.down)

    def compute_local(x_MC: Tensor, counts_E: Tensor) -> Tensor:
        return compute(x_MC, counts_E, *weights())

    def compute_exchanged(x_MC: Tensor, counts_E: Tensor) -> Tensor:
        assert ep is not None
        ranks = ep.size()
        sent_RE = counts_E.view(ranks, -1)
        even = [1] * ranks
        received_RE = exchange_counts(sent_RE, even, even, ep)  # rows from each rank for each expert here
        sent = split_sizes(sent_RE.sum(1), len(x_MC))
        received = split_sizes(received_RE.sum(1), len(x_MC))
        x = exchange(x_MC, received, sent, ep)
        order, back = _by_expert(received_RE, len(x))
        y = compute_local(x[order], received_RE.sum(0))
        return exchange(y[back], sent, received, ep)

    def shared_rows(x_MC: Tensor, counts_E: Tensor) -> Tensor:
        assert expert_tp is not None
        x = gather(x_MC, 0, expert_tp)
        counts_RE = _gathered_counts(counts_E, expert_tp)
        order, back = _by_expert(counts_RE, len(x))
        y = compute_own(x[order], counts_RE.sum(0))
        return reduce_scatter(y[back], 0, expert_tp)

    compute_own = compute_local if ep is None else compute_exchanged
    experts.forward = compute_own if expert_tp is None else shared_rows


def _gathered_counts(counts_E: Tensor, group: ProcessGroup) -> Tensor:
    """Every rank's counts, [ranks, E]."""
    mine = torch.zeros((group.size(), len(counts_E)), dtype=counts_E.dtype, device=counts_E.device)
    mine[group.rank()] = counts_E
    return all_reduce(mine, group)


def _by_expert(counts_RE: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Rows that lie rank by rank, and in a rank expert by expert: the order that sorts them by expert, and its inverse."""
    ranks, experts = counts_RE.shape
    expert = torch.arange(experts, device=counts_RE.device).repeat(ranks)
    of_row = expert.repeat_interleave(counts_RE.flatten(), output_size=rows)
    order = of_row.argsort(stable=True)
    back = torch.empty_like(order)
    back[order] = torch.arange(rows, device=order.device)
    return order, back


def share_balance(layer: Any, row: ProcessGroup) -> None:
    """Count an MoE layer's choices over whole rows, where ranks hold parts of them."""
    layer.row_sum = lambda counts: all_reduce(counts, row)


def keep_own_tokens(layer: Any, tp: ProcessGroup) -> None:
    """Have an MoE layer take its part of a mask over all tokens, when its input is a part of the sequence."""
    rank, size = dist.get_rank(tp), dist.get_world_size(tp)
    layer.own_tokens = lambda mask_BT: mask_BT.chunk(size, -1)[rank]


def experts_in(model: nn.Module) -> list[Any]:
    """The MoE layers of a model, in order."""
    return [m for m in model.modules() if hasattr(m, "router") and hasattr(m, "experts")]
