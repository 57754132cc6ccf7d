"""The GPT: token ids in, logits or the loss out. Plain torch; it does not know how many GPUs carry it.

Shapes: B batch, T positions, C width, H heads, K key/value heads, D head elements, F mlp width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mikoshi.trainer.model.attention import Mask, alibi_slopes, attend, dense_mask, flex_mask
from mikoshi.trainer.model.config import ModelConfig
from mikoshi.trainer.model.loss import next_token_loss
from mikoshi.trainer.model.mlp import MLP
from mikoshi.trainer.model.moe import MoE
from mikoshi.trainer.model.rotary import rotate, rotation

Rotation = tuple[Tensor, Tensor]


@dataclass
class LayerCache:
    """Keys and values of the positions already seen by one layer, [B, K, room, D]."""

    k: Tensor
    v: Tensor

    def append(self, k: Tensor, v: Tensor, at: int) -> tuple[Tensor, Tensor]:
        """Store keys and values [B, K, T, D] from position `at` on; returns those of all positions so far."""
        end = at + k.shape[2]
        self.k[:, :, at:end], self.v[:, :, at:end] = k, v
        return self.k[:, :, :end], self.v[:, :, :end]


@dataclass
class KVCache:
    """What generation keeps between tokens: one LayerCache a layer, `length` positions filled."""

    layers: list[LayerCache]
    length: int = 0

    @classmethod
    def empty(cls, config: ModelConfig, batch: int, room: int, device: torch.device, dtype: torch.dtype) -> KVCache:
        """Returns an empty cache.

        batch: number of rows.
        room: number of positions that fit.
        """
        shape = (batch, config.n_kv, room, config.d_head)

        def zeros() -> Tensor:
            return torch.zeros(shape, device=device, dtype=dtype)

        return cls([LayerCache(zeros(), zeros()) for _ in range(config.layers)])


def make_norm(config: ModelConfig, width: int) -> nn.Module:
    """Returns the norm of the config's kind over the last dimension of size `width`."""
    if config.norm == "layernorm":
        return nn.LayerNorm(width, eps=config.norm_eps, bias=config.bias)
    return nn.RMSNorm(width, eps=config.norm_eps)


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads, and optional rotary positions and norms of queries and keys.

    attend: computes attention from q [B, H, T, D], k and v [B, K, T, D] and the mask; an engine may replace it.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c, d = config.width, config.d_head
        self.d_head = d
        self.q = nn.Linear(c, config.heads * d, bias=config.bias_qkv)
        self.k = nn.Linear(c, config.n_kv * d, bias=config.bias_qkv)
        self.v = nn.Linear(c, config.n_kv * d, bias=config.bias_qkv)
        self.out = nn.Linear(config.heads * d, c, bias=config.bias)
        self.q_norm = nn.RMSNorm(d, eps=config.norm_eps) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(d, eps=config.norm_eps) if config.qk_norm else None
        self.attend: Callable[[Tensor, Tensor, Tensor, Mask], Tensor] = attend

    def forward(self, x_BTC: Tensor, rotary: Rotation | None, mask: Mask, cache: LayerCache | None, past: int) -> Tensor:
        """Returns [B, T, C].

        rotary: cos and sin of the positions; None without rotary positions.
        cache: keys and values of earlier positions; the new ones are appended.
        past: number of positions in the cache.
        """
        q, k, v = (part(x_BTC).unflatten(-1, (-1, self.d_head)) for part in (self.q, self.k, self.v))  # each [B, T, heads, D]
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        if cache is not None:
            k, v = cache.append(k, v, past)
        y_BHTD = self.attend(q, k, v, mask)
        out: Tensor = self.out(y_BHTD.transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """One layer: attention and an MLP or a mixture of experts, with pre-norm, post-norm or in parallel, each with a
    residual.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.post, self.parallel = config.norm_order == "post", config.block == "parallel"
        self.attn_norm = make_norm(config, config.width)
        self.attn = Attention(config)
        self.mlp_norm = None if self.parallel else make_norm(config, config.width)
        self.mlp = MoE(config) if config.is_moe(layer) else MLP(config)

    def forward(
        self, x: Tensor, rotary: Rotation | None, mask: Mask, cache: LayerCache | None = None, past: int = 0,
        padding: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Returns [B, T, C].

        x: [B, T, C].
        rotary, mask, cache, past: see `Attention.forward`.
        padding: True where a token is padding, which experts leave out, [B, T].
        """
        experts = (padding,) if isinstance(self.mlp, MoE) else ()
        if self.mlp_norm is None:
            h = self.attn_norm(x)
            out: Tensor = x + self.attn(h, rotary, mask, cache, past) + self.mlp(h, *experts)
            return out
        if self.post:
            x = self.attn_norm(x + self.attn(x, rotary, mask, cache, past))
            out = self.mlp_norm(x + self.mlp(x, *experts))
            return out
        x = x + self.attn(self.attn_norm(x), rotary, mask, cache, past)
        out = x + self.mlp(self.mlp_norm(x), *experts)
        return out


def logits(x_BTC: Tensor, w_VC: Tensor, scale: float) -> Tensor:
    """Returns the logits [B, T, V] of hidden states: the product with the head's matrix, times `scale`."""
    return F.linear(x_BTC, w_VC) * scale


@dataclass(frozen=True)
class Part:
    """Which part of the GPT a module holds: some layers, in order, and whether the embedding and the head."""

    layers: range
    first: bool
    last: bool

    @classmethod
    def whole(cls, config: ModelConfig) -> Part:
        """Returns the part that is all of the model."""
        return cls(range(config.layers), first=True, last=True)


class GPT(nn.Module):
    """One decoder-only transformer, GPT-1 to Qwen3 and Mixtral by `ModelConfig` alone, or a part of its layers.

    Some attributes let a part of the work be done elsewhere, and are the whole by default: `heads`, the query heads that
    attention is computed for here; each attention's `attend`; `predict` and `logits`, the loss and the scores of the head.
    `known`: the tokens that there are, where the embedding has more rows; without gradients, the loss is over them alone.
    """

    def __init__(self, config: ModelConfig, part: Part | None = None) -> None:
        super().__init__()
        self.config = config
        self.part = part = part or Part.whole(config)
        learned, tied_head = config.position == "learned", part.last and config.tied
        self.embed = nn.Embedding(config.vocab, config.width) if part.first or tied_head else None
        self.position = nn.Embedding(config.context, config.width) if learned and part.first else None
        self.embed_norm = make_norm(config, config.width) if config.embedding_norm and part.first else None
        # Keyed by the global layer number, so that a part of the layers keeps its parameters' names.
        self.blocks = nn.ModuleDict({str(i): Block(config, i) for i in part.layers})
        self.norm = make_norm(config, config.width) if config.norm_order == "pre" and part.last else None
        self.head = nn.Linear(config.width, config.vocab, bias=False) if part.last and not config.tied else None
        self.heads = slice(0, config.heads)
        self.known: int | None = None
        self.predict: Callable[..., Tensor] = next_token_loss
        self.logits: Callable[[Tensor, Tensor, float], Tensor] = logits

    @property
    def head_weight(self) -> Tensor:
        """[V, C]: the head's own, or the embedding's where they are tied. Only the last part has it."""
        owner = self.embed if self.head is None else self.head
        assert owner is not None
        return owner.weight

    def forward(
        self,
        x: Tensor,
        labels_BT: Tensor | None = None,
        docs_BS: Tensor | None = None,
        positions_BT: Tensor | None = None,
        cache: KVCache | None = None,
        padding_BT: Tensor | None = None,
        queries_T: Tensor | None = None,
        length: int | None = None,
    ) -> Tensor:
        """Logits [B, T, V], or with labels the summed next-token loss, a scalar in nats (see next_token_loss).

        x: token ids [B, T]; for a part that is not the first, the hidden states [B, T, C] of the part before it. A part
        that is not the last returns hidden states.
        docs_BS: which document each position of the row belongs to; attention stays inside it. None: one document a row.
        positions_BT: position of each token in its document, for rotary and learned positions; default 0, 1, 2...
        cache: keys and values of earlier positions; `x` are the next tokens and are added to it.
        padding_BT: true at places that hold no token, which count in no balance of experts. None: there are none.
        queries_T, length: where in a row of `length` the queries of attention stand, when `x` is a part of the row and
        `attend` brings in the rest; by default they are all of it, one after another.
        """
        past = 0 if cache is None else cache.length
        span = past + x.shape[1] if length is None else length
        if positions_BT is None:
            positions_BT = torch.arange(past, span, device=x.device)[None]
        x_BTC = self.enter(x, positions_BT) if self.part.first else x
        rotary = None
        if self.config.position == "rotary":
            if (cache is not None or docs_BS is not None) and self.config.rope.varies(span):
                raise ValueError(
                    f'rope.scaling "dynamic" beyond rope.original_context {self.config.rope.original_context}: every length '
                    "has frequencies of its own, which neither kept keys nor documents in one row can have"
                )
            rotary = rotation(self.config.rope, self.config.d_rotary, positions_BT, max(span, 1))
        masks = self.masks(past, span, docs_BS, queries_T, x_BTC)
        for name, block in self.blocks.items():
            layer = int(name)
            layer_cache = None if cache is None else cache.layers[layer]
            x_BTC = block(x_BTC, rotary, masks[self.config.window(layer)], layer_cache, past, padding_BT)
        if cache is not None:
            cache.length = span
        return self.leave(x_BTC, labels_BT) if self.part.last else x_BTC

    def enter(self, tokens_BT: Tensor, positions_BT: Tensor) -> Tensor:
        """Returns the embedding of tokens, with learned positions if the model has them, [B, T, C]."""
        assert self.embed is not None
        x_BTC: Tensor = self.embed(tokens_BT)
        if self.position is not None:
            x_BTC = x_BTC + self.position(positions_BT)
        return x_BTC if self.embed_norm is None else self.embed_norm(x_BTC)

    def leave(self, x_BTC: Tensor, labels_BT: Tensor | None) -> Tensor:
        """Returns the loss if labels are given, else the logits [B, T, V]."""
        if self.norm is not None:
            x_BTC = self.norm(x_BTC)
        if labels_BT is not None:
            known = None if torch.is_grad_enabled() else self.known
            return self.predict(x_BTC, self.head_weight, labels_BT, self.config.logit_scale, known=known)
        return self.logits(x_BTC, self.head_weight, self.config.logit_scale)

    def masks(self, past: int, span: int, docs_BS: Tensor | None, queries_T: Tensor | None, like: Tensor) -> dict[int, Mask]:
        """The mask of every window the layers use, made once a pass. `span`: positions seen in all; `past` cached."""
        device = like.device
        slopes = alibi_slopes(self.config.heads, device)[self.heads] if self.config.position == "alibi" else None
        made: dict[int, Mask] = {}
        whole = queries_T is None and (past == 0 or span - past == 1)
        for window in {self.config.window(layer) for layer in self.part.layers}:
            reach = 0 if window >= span else window
            if not reach and docs_BS is None and slopes is None and whole:
                made[window] = None
            elif like.is_cuda and past == 0:
                made[window] = flex_mask(reach, span, queries_T, docs_BS, slopes, device)
            else:
                k_pos = torch.arange(span, device=device)
                q_pos = k_pos[past:] if queries_T is None else queries_T
                made[window] = dense_mask(reach, q_pos, k_pos, docs_BS, slopes, like.dtype)
        return made
