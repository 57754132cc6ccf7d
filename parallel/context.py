"""Context parallelism: a row's tokens are shared out over ranks, and attention still sees the whole row.

all-gather: keys and values of the whole row come to every rank; each rank has one chunk from the head and one from the
tail of the row, so that all have as many keys to look at under a causal mask (Llama 3, arXiv:2407.21783, section 3.3.2).
ring: see parallel.ring. ulysses: heads are exchanged for tokens around attention (Jacobs et al. 2023, arXiv:2309.14509).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from mikoshi.parallel.collectives import exchange, gather
from mikoshi.parallel.layout import ContextKind

Attend = Callable[[Tensor, Tensor, Tensor, object], Tensor]


def token_positions(rank: int, size: int, context: int, kind: ContextKind) -> npt.NDArray[np.int64]:
    """Positions in the row that a context-parallel rank holds, [context / size]."""
    index = np.arange(context, dtype=np.int64)
    if kind == "ulysses":
        return np.split(index, size)[rank]
    chunks = np.split(index, 2 * size)
    return np.concatenate((chunks[rank], chunks[2 * size - 1 - rank]))


def gathered_keys(attend: Attend, group: ProcessGroup, context: int, device: torch.device) -> Attend:
    """Attention of this rank's queries to the keys and values of the whole row."""
    size = dist.get_world_size(group)
    positions = np.concatenate([token_positions(rank, size, context, "all-gather") for rank in range(size)])
    in_order = torch.from_numpy(positions.argsort()).to(device)

    def attend_row(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, mask: object) -> Tensor:
        k, v = (gather(part, 2, group).index_select(2, in_order) for part in (k_BKTD, v_BKTD))
        return attend(q_BHTD, k, v, mask)

    return attend_row


def exchanged_heads(attend: Attend, group: ProcessGroup) -> Attend:
    """Attention of this rank's share of the heads over the whole row, between two exchanges."""
    size = dist.get_world_size(group)

    def attend_heads(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, mask: object) -> Tensor:
        # Where there are too few key/value heads to share out, ranks hold copies; their gradients add up by themselves.
        kv_heads = k_BKTD.shape[1]
        copies = 1 if kv_heads % size == 0 else size // kv_heads if size % kv_heads == 0 else q_BHTD.shape[1] // kv_heads
        k, v = (part.repeat_interleave(copies, 1) if copies > 1 else part for part in (k_BKTD, v_BKTD))
        q, k, v = (_to_heads(part, size, group) for part in (q_BHTD, k, v))
        return _to_tokens(attend(q, k, v, mask), size, group)

    return attend_heads


def _to_heads(x_BHTD: Tensor, size: int, group: ProcessGroup) -> Tensor:
    """[B, H, T/size, D] -> [B, H/size, T, D]."""
    parts = torch.stack(x_BHTD.chunk(size, 1)).flatten(0, 1)  # the part of each rank's heads, one after another
    even = [x_BHTD.shape[0]] * size
    received = exchange(parts, even, even, group).unflatten(0, (size, -1))
    return torch.cat(received.unbind(0), 2)


def _to_tokens(x_BHTD: Tensor, size: int, group: ProcessGroup) -> Tensor:
    """[B, H/size, T, D] -> [B, H, T/size, D]."""
    parts = torch.stack(x_BHTD.chunk(size, 2)).flatten(0, 1)
    even = [x_BHTD.shape[0]] * size
    received = exchange(parts, even, even, group).unflatten(0, (size, -1))
    return torch.cat(received.unbind(0), 1)
