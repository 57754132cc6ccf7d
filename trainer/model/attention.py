"""Attention: who may look at whom, and the kernel that does it.

Shapes: B batch, T query positions, S key positions, H query heads, K key/value heads, D head elements.

Plain causal attention runs in SDPA (flash on CUDA). Everything else a GPT asks for (windows, documents packed in
one row, ALiBi) is one rule, `may_see`, written as a dense mask for SDPA on CPU and as a FlexAttention block mask on
CUDA, where masked blocks are skipped rather than computed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention


@dataclass(frozen=True)
class FlexMask:
    """What FlexAttention needs for one window: the blocks that matter, and ALiBi's change of the scores."""

    blocks: BlockMask
    score_mod: Callable[..., Tensor] | None


Mask = Tensor | FlexMask | None
"""None is plain causal attention; a tensor is added to the scores."""


def alibi_slopes(heads: int, device: torch.device | None = None) -> Tensor:
    """Slope of every head, fp32 [H] (Press et al. 2021, arXiv:2108.12409, and their rule for other head counts)."""
    whole = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (i + 1) / whole) for i in range(whole)]
    slopes += [2.0 ** (-4.0 * (2 * i + 1) / whole) for i in range(heads - whole)]
    return torch.tensor(slopes, dtype=torch.float32, device=device)


def may_see(q_pos: Tensor, k_pos: Tensor, window: int) -> Tensor:
    """Causal, and no further back than `window` positions counting the query's own (0: no limit)."""
    causal = k_pos <= q_pos
    return causal & (q_pos - k_pos < window) if window else causal


def dense_mask(
    window: int, q_T: Tensor, k_S: Tensor, docs_BS: Tensor | None, slopes_H: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The rule as a tensor [B or 1, H or 1, T, S] to add to the scores: ALiBi's bias, and -inf where none may look.

    `q_T`, `k_S`: positions in the row, of the keys all from 0 on. `docs_BS`: document of every key.
    """
    allowed = may_see(q_T[:, None], k_S[None, :], window)[None, None]
    if docs_BS is not None:
        docs_BT = docs_BS[:, q_T]
        allowed = allowed & (docs_BT[:, None, :, None] == docs_BS[:, None, None, :])
    bias = torch.zeros((), dtype=torch.float32, device=q_T.device)
    if slopes_H is not None:
        bias = slopes_H[None, :, None, None] * (k_S[None, :] - q_T[:, None])
    return torch.where(allowed, bias, -torch.inf).to(dtype)


def flex_mask(
    window: int, length: int, queries_T: Tensor | None, docs_BS: Tensor | None, slopes_H: Tensor | None, device: torch.device
) -> FlexMask:
    """The same rule for FlexAttention over a row of `length` keys. `queries_T`: positions of the queries; None: all."""

    def place(q: Tensor) -> Tensor:
        return q if queries_T is None else queries_T[q]

    def rule(b: Tensor, _h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        allowed = may_see(place(q), k, window)
        return allowed if docs_BS is None else allowed & (docs_BS[b, place(q)] == docs_BS[b, k])

    def alibi(score: Tensor, _b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        assert slopes_H is not None
        return score + slopes_H[h] * (k - place(q))

    batch = None if docs_BS is None else docs_BS.shape[0]
    queries = length if queries_T is None else len(queries_T)
    make = _compiled(create_block_mask) if device.type == "cuda" else create_block_mask
    blocks = make(rule, batch, None, queries, length, device=str(device))
    return FlexMask(blocks, None if slopes_H is None else alibi)


def attend(q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask: Mask) -> Tensor:
    """softmax(q k^T / sqrt(D) + mask) v, [B, H, T, D]; query head h reads key/value head h // (H / K)."""
    grouped = q_BHTD.shape[1] != k_BKSD.shape[1]
    if isinstance(mask, FlexMask):
        alone = q_BHTD.is_cuda and not torch.compiler.is_compiling()  # inside a compiled block it is compiled with it
        kernel: Any = _compiled(flex_attention) if alone else flex_attention
        out: Tensor = kernel(q_BHTD, k_BKSD, v_BKSD, score_mod=mask.score_mod, block_mask=mask.blocks, enable_gqa=grouped)
        return out
    if mask is None and q_BHTD.shape[2] > 1:
        return causal_attention(q_BHTD, k_BKSD, v_BKSD)
    return _sdpa(q_BHTD, k_BKSD, v_BKSD, mask, causal=False)


def causal_attention(q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor) -> Tensor:
    """The plain case: every query sees all keys up to its own."""
    return _sdpa(q_BHTD, k_BKSD, v_BKSD, None, causal=True)


def _sdpa(q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    grouped = q_BHTD.shape[1] != k_BKSD.shape[1]
    if grouped and not q_BHTD.is_cuda:
        # The CPU flash kernel has no grouped form; without this SDPA would fall back to materialised scores.
        copies = q_BHTD.shape[1] // k_BKSD.shape[1]
        k_BKSD, v_BKSD = k_BKSD.repeat_interleave(copies, 1), v_BKSD.repeat_interleave(copies, 1)
        grouped = False
    return F.scaled_dot_product_attention(q_BHTD, k_BKSD, v_BKSD, attn_mask=mask, is_causal=causal, enable_gqa=grouped)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """FlexAttention skips blocks, and its masks are made without a dense one, only in compiled form."""
    compiled: Callable[..., Any] = torch.compile(function)
    return compiled
