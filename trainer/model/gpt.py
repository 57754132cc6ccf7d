"""The GPT: token ids in, logits or the loss out. Plain torch; it does not know how many GPUs carry it.

Shapes: B batch, T positions, C width, H heads, K key/value heads, D head elements, F mlp width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.model.attention import Mask, alibi_slopes, attend, dense_mask, flex_mask
from trainer.model.config import ModelConfig
from trainer.model.loss import next_token_loss
from trainer.model.rotary import rotate, rotation

Rotation = tuple[Tensor, Tensor]


@dataclass
class LayerCache:
    """Keys and values of the positions already seen by one layer, [B, K, room, D]."""

    k: Tensor
    v: Tensor

    def append(self, k: Tensor, v: Tensor, at: int) -> tuple[Tensor, Tensor]:
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
        shape = (batch, config.n_kv, room, config.d_head)

        def zeros() -> Tensor:
            return torch.zeros(shape, device=device, dtype=dtype)

        return cls([LayerCache(zeros(), zeros()) for _ in range(config.layers)])


def make_norm(config: ModelConfig, width: int) -> nn.Module:
    if config.norm == "layernorm":
        return nn.LayerNorm(width, eps=config.norm_eps, bias=config.bias)
    return nn.RMSNorm(width, eps=config.norm_eps)


class Attention(nn.Module):
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

    def forward(self, x_BTC: Tensor, rotary: Rotation | None, mask: Mask, cache: LayerCache | None, past: int) -> Tensor:
        q, k, v = (part(x_BTC).unflatten(-1, (-1, self.d_head)) for part in (self.q, self.k, self.v))  # each [B, T, heads, D]
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        if cache is not None:
            k, v = cache.append(k, v, past)
        y_BHTD = attend(q, k, v, mask)
        out: Tensor = self.out(y_BHTD.transpose(1, 2).flatten(2))
        return out


class MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.kind = config.mlp
        gated = config.mlp in ("swiglu", "geglu")
        self.gate = nn.Linear(config.width, config.d_mlp, bias=config.bias) if gated else None
        self.up = nn.Linear(config.width, config.d_mlp, bias=config.bias)
        self.down = nn.Linear(config.d_mlp, config.width, bias=config.bias)

    def forward(self, x_BTC: Tensor) -> Tensor:
        up_BTF = self.up(x_BTC)
        if self.gate is not None:
            gate = self.gate(x_BTC)
            h_BTF = (F.silu(gate) if self.kind == "swiglu" else F.gelu(gate)) * up_BTF
        elif self.kind == "relu":
            h_BTF = F.relu(up_BTF)
        else:
            h_BTF = F.gelu(up_BTF, approximate="tanh" if self.kind == "gelu_tanh" else "none")
        out: Tensor = self.down(h_BTF)
        return out


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.post, self.parallel = config.norm_order == "post", config.block == "parallel"
        self.attn_norm = make_norm(config, config.width)
        self.attn = Attention(config)
        self.mlp_norm = None if self.parallel else make_norm(config, config.width)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rotary: Rotation | None, mask: Mask, cache: LayerCache | None = None, past: int = 0) -> Tensor:
        if self.mlp_norm is None:
            h = self.attn_norm(x)
            out: Tensor = x + self.attn(h, rotary, mask, cache, past) + self.mlp(h)
            return out
        if self.post:
            x = self.attn_norm(x + self.attn(x, rotary, mask, cache, past))
            out = self.mlp_norm(x + self.mlp(x))
            return out
        x = x + self.attn(self.attn_norm(x), rotary, mask, cache, past)
        out = x + self.mlp(self.mlp_norm(x))
        return out


class GPT(nn.Module):
    """One decoder-only transformer, GPT-1 to Qwen3 by `ModelConfig` alone. Holds parameters only, no buffers."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab, config.width)
        self.position = nn.Embedding(config.context, config.width) if config.position == "learned" else None
        self.embed_norm = make_norm(config, config.width) if config.embedding_norm else None
        # Keyed by the global layer number, so that a part of the layers keeps its parameters' names.
        self.blocks = nn.ModuleDict({str(i): Block(config) for i in range(config.layers)})
        self.norm = make_norm(config, config.width) if config.norm_order == "pre" else None
        self.head = None if config.tied else nn.Linear(config.width, config.vocab, bias=False)

    @property
    def head_weight(self) -> Tensor:
        """[V, C]: the head's own, or the embedding's where they are tied."""
        return self.embed.weight if self.head is None else self.head.weight

    def forward(
        self,
        tokens_BT: Tensor,
        labels_BT: Tensor | None = None,
        docs_BT: Tensor | None = None,
        positions_BT: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Logits [B, T, V], or with labels the summed next-token loss, a scalar in nats (see next_token_loss).

        docs_BT: which document each position belongs to; attention stays inside it. None: one document a row.
        positions_BT: position of each token in its document, for rotary and learned positions; default 0, 1, 2...
        cache: keys and values of earlier positions; `tokens_BT` are the next ones and are added to it.
        """
        past = 0 if cache is None else cache.length
        span = past + tokens_BT.shape[1]
        if positions_BT is None:
            positions_BT = torch.arange(past, span, device=tokens_BT.device)[None]
        x_BTC = self.embed(tokens_BT)
        if self.position is not None:
            x_BTC = x_BTC + self.position(positions_BT)
        if self.embed_norm is not None:
            x_BTC = self.embed_norm(x_BTC)
        rotary = None
        if self.config.position == "rotary":
            rotary = rotation(self.config.rope, self.config.d_rotary, positions_BT, max(span, 1))
        masks = self.masks(past, span, docs_BT, x_BTC)
        for name, block in self.blocks.items():
            layer = int(name)
            layer_cache = None if cache is None else cache.layers[layer]
            x_BTC = block(x_BTC, rotary, masks[self.config.window(layer)], layer_cache, past)
        if cache is not None:
            cache.length = span
        if self.norm is not None:
            x_BTC = self.norm(x_BTC)
        if labels_BT is not None:
            return next_token_loss(x_BTC, self.head_weight, labels_BT, self.config.logit_scale)
        return F.linear(x_BTC, self.head_weight) * self.config.logit_scale

    def masks(self, past: int, span: int, docs_BT: Tensor | None, like: Tensor) -> dict[int, Mask]:
        """The mask of every window the layers use, made once a pass. `span`: positions seen in all; `past` cached."""
        device = like.device
        slopes = alibi_slopes(self.config.heads, device) if self.config.position == "alibi" else None
        made: dict[int, Mask] = {}
        for window in set(self.config.windows):
            reach = 0 if window >= span else window
            if not reach and docs_BT is None and slopes is None and (past == 0 or span - past == 1):
                made[window] = None
            elif like.is_cuda and past == 0:
                made[window] = flex_mask(reach, span, docs_BT, slopes, device)
            else:
                k_pos = torch.arange(span, device=device)
                made[window] = dense_mask(reach, k_pos[past:], k_pos, docs_BT, slopes, like.dtype)
        return made
