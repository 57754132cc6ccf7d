"""Megatron-core's parameters and ours in one table that is read both ways: each of its parameters is a sequence of row
ranges of ours.

Its layers fuse q, k and v, group by group of the query heads that read one key/value head, and the gate and up projections of
an MLP. The elements are the same, so weights, gradients and optimizer state use the same table, and a rank needs only the
rows that it holds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from mikoshi.trainer.model.config import GATED, ModelConfig


@dataclass(frozen=True)
class RowRun:
    """`count` consecutive rows of our parameter `name`, beginning at row `first`."""

    name: str
    first: int
    count: int


# Outside of the layers: Megatron's name -> ours.
_OUTSIDE = {
    "embedding.word_embeddings.weight": "embed.weight",
    "embedding.position_embeddings.weight": "position.weight",
    "decoder.final_layernorm.weight": "norm.weight",
    "decoder.final_layernorm.bias": "norm.bias",
    "output_layer.weight": "head.weight",
}

# Inside layer N, after "decoder.layers.N." and "blocks.N.". Where Transformer Engine fuses a norm with the product after
# it, the norm's parameters have the product's name.
_INSIDE = {
    "input_layernorm.weight": "attn_norm.weight",
    "input_layernorm.bias": "attn_norm.bias",
    "self_attention.linear_qkv.layer_norm_weight": "attn_norm.weight",
    "self_attention.linear_qkv.layer_norm_bias": "attn_norm.bias",
    "self_attention.q_layernorm.weight": "attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "attn.k_norm.weight",
    "self_attention.linear_proj.weight": "attn.out.weight",
    "self_attention.linear_proj.bias": "attn.out.bias",
    "pre_mlp_layernorm.weight": "mlp_norm.weight",
    "pre_mlp_layernorm.bias": "mlp_norm.bias",
    "mlp.linear_fc1.layer_norm_weight": "mlp_norm.weight",
    "mlp.linear_fc1.layer_norm_bias": "mlp_norm.bias",
    "mlp.linear_fc2.weight": "mlp.down.weight",
    "mlp.linear_fc2.bias": "mlp.down.bias",
}

_PRODUCTS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_QKV, _FC1 = re.compile(r"self_attention\.linear_qkv\.(weight|bias)"), re.compile(r"mlp\.linear_fc1\.(weight|bias)")

# What tensor parallelism splits, and along which dimension; every rank holds the rest whole.
_CUT = {
    r"(embedding\.word_embeddings|output_layer)\.weight": 0,
    r".*\.linear_(qkv|fc1)\.(weight|bias)": 0,
    r".*\.linear_(proj|fc2)\.weight": 1,
}


def rows_of(name: str, model: ModelConfig, tp: int = 1, rank: int = 0) -> tuple[RowRun, ...]:
    """Returns the rows of our parameters that Megatron's parameter `name` holds on a tensor-parallel rank, in order.

    For a parameter that tensor parallelism splits by columns these are all of its rows. Raises KeyError for a name that is
    not one of a dense GPT's.

    name: counts layers from the first of the whole model.
    """
    if name in _OUTSIDE:
        ours = "embed.weight" if name == "output_layer.weight" and model.tied else _OUTSIDE[name]
        here = (tp, rank) if cut_of(name) == 0 else (1, 0)
        return (_own_rows(ours, _outside_rows(ours, model), *here),)
    match = _LAYER.fullmatch(name)
    if match is None:
        raise KeyError(name)
    block, inside = f"blocks.{match[1]}.", match[2]
    if fused := _QKV.fullmatch(inside):
        return tuple(_groups(block, fused[1], model, tp, rank))
    if fused := _FC1.fullmatch(inside):
        kinds = ("gate", "up") if model.mlp in GATED else ("up",)
        return tuple(_own_rows(f"{block}mlp.{kind}.{fused[1]}", model.d_mlp, tp, rank) for kind in kinds)
    ours = _INSIDE[inside]
    count = model.d_head if ours.endswith(("q_norm.weight", "k_norm.weight")) else model.width
    return (RowRun(block + ours, 0, count),)


def names_of(model: ModelConfig) -> tuple[str, ...]:
    """Returns the names of a dense GPT's parameters in Megatron's checkpoints.

    A norm before a product has the name that Transformer Engine gives it, whichever module computes it.
    """
    outside = [name for name, ours in _OUTSIDE.items() if ours != "head.weight" or not model.tied]
    if model.position != "learned":
        outside.remove("embedding.position_embeddings.weight")
    if not _norm_bias(model):
        outside.remove("decoder.final_layernorm.bias")
    inside = ["self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight"]
    inside += [f"{name}.weight" for name in _PRODUCTS]
    if _norm_bias(model):
        inside += ["self_attention.linear_qkv.layer_norm_bias", "mlp.linear_fc1.layer_norm_bias"]
    inside += [f"{name}.bias" for name in _PRODUCTS if (model.bias_qkv if name.endswith("qkv") else model.bias)]
    if model.qk_norm:
        inside += ["self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight"]
    return (*outside, *(f"decoder.layers.{layer}.{name}" for layer in range(model.layers) for name in inside))


def cut_of(name: str) -> int | None:
    """Returns the dimension along which tensor parallelism splits Megatron's parameter `name`, or None."""
    return next((dim for pattern, dim in _CUT.items() if re.fullmatch(pattern, name)), None)


def _norm_bias(model: ModelConfig) -> bool:
    return model.norm == "layernorm" and model.bias


def _outside_rows(ours: str, model: ModelConfig) -> int:
    return {"embed.weight": model.vocab, "head.weight": model.vocab, "position.weight": model.context}.get(ours, model.width)


def _own_rows(name: str, rows: int, tp: int, rank: int) -> RowRun:
    each = rows // tp
    return RowRun(name, rank * each, each)


def _groups(block: str, leaf: str, model: ModelConfig, tp: int, rank: int) -> Iterator[RowRun]:
    """Yields for each key/value head of the rank the queries that read it, the key and the value."""
    d, queries, each = model.d_head, model.heads // model.n_kv, model.n_kv // tp
    for group in range(rank * each, (rank + 1) * each):
        yield RowRun(f"{block}attn.q.{leaf}", group * queries * d, queries * d)
        yield RowRun(f"{block}attn.k.{leaf}", group * d, d)
        yield RowRun(f"{block}attn.v.{leaf}", group * d, d)
