"""Hugging Face models as ours: the same config and weights, so that the same tokens give the same logits.

Each family has one table of names. Differences in layout, such as transposed or fused matrices, are undone while reading.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from mikoshi.trainer.model.config import ModelConfig, MoEConfig, RopeConfig


class InteropError(ValueError):
    """A Hugging Face model that ours cannot represent. The message names the setting."""


_GELU = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}


# Settings that change the computation and of which our model supports one value.
_ONE_VALUE = {
    "apply_residual_connection_post_layernorm": False, "scale_attn_by_inverse_layer_idx": False, "scale_attn_weights": True,
    "attention_bias": False, "mlp_bias": False, "use_qk_norm": False, "add_cross_attention": False,
    "router_jitter_noise": 0.0,
}  # fmt: skip


def model_config(hf: Any) -> ModelConfig:
    """Returns the ModelConfig of a `transformers` config object. Raises InteropError for what it cannot express."""
    family = hf.model_type
    for key, only in _ONE_VALUE.items():
        if getattr(hf, key, only) != only:
            raise InteropError(f"{key} = {getattr(hf, key)!r}: only {only!r} is known for {family}")
    if family in ("gpt2", "openai-gpt"):
        return _gpt2(hf)
    if family == "bloom":
        return ModelConfig(
            vocab=hf.vocab_size, context=2048, layers=hf.n_layer, width=hf.hidden_size, heads=hf.n_head,
            position="alibi", norm="layernorm", norm_eps=hf.layer_norm_epsilon, mlp="gelu_tanh", bias=True,
            embedding_norm=True, tied=hf.tie_word_embeddings,
        )  # fmt: skip
    if family not in ("llama", "mistral", "qwen2", "qwen3", "cohere", "mixtral", "qwen3_moe"):
        known = "gpt2, openai-gpt, bloom, llama, mistral, qwen2, qwen3, cohere, mixtral, qwen3_moe"
        raise InteropError(f"model_type {family!r} is not one of {known}")
    if hf.hidden_act != "silu":
        raise InteropError(f"hidden_act {hf.hidden_act!r}: only silu is known for {family}")
    return ModelConfig(
        vocab=hf.vocab_size, context=hf.max_position_embeddings, layers=hf.num_hidden_layers, width=hf.hidden_size,
        heads=hf.num_attention_heads, kv_heads=hf.num_key_value_heads, head_dim=getattr(hf, "head_dim", None),
        mlp_width=hf.intermediate_size, position="rotary", rope=_rope(hf),
        norm="layernorm" if family == "cohere" else "rmsnorm",
        norm_eps=hf.layer_norm_eps if family == "cohere" else hf.rms_norm_eps,
        block="parallel" if family == "cohere" else "serial",
        logit_scale=hf.logit_scale if family == "cohere" else 1.0,
        mlp="swiglu", qkv_bias=family == "qwen2", qk_norm=family in ("qwen3", "qwen3_moe"), windows=_windows(hf),
        tied=hf.tie_word_embeddings, moe=_moe(hf),
    )  # fmt: skip


def _moe(hf: Any) -> MoEConfig | None:
    if hf.model_type == "mixtral":
        return MoEConfig(experts=hf.num_local_experts, top_k=hf.num_experts_per_tok)
    if hf.model_type != "qwen3_moe":
        return None
    step, dense = hf.decoder_sparse_step, set(hf.mlp_only_layers)
    sparse = [i for i in range(hf.num_hidden_layers) if i not in dense and (i + 1) % step == 0 and hf.num_experts > 0]
    if not sparse:
        return None
    first, every = sparse[0], sparse[1] - sparse[0] if len(sparse) > 1 else hf.num_hidden_layers
    if sparse != list(range(first, hf.num_hidden_layers, every)):
        raise InteropError(
            f"decoder_sparse_step = {step} with mlp_only_layers = {sorted(dense)}: layers with experts must follow at "
            f"even distances from the first to the last, and they are {sparse}"
        )
    return MoEConfig(
        experts=hf.num_experts, top_k=hf.num_experts_per_tok, width=hf.moe_intermediate_size,
        normalise=hf.norm_topk_prob, first=first, every=every,
    )  # fmt: skip


def deepseek_moe_config(hf: Any) -> MoEConfig:
    """Returns the experts of a DeepSeek-V3 config object. Its attention (MLA) is not supported. bias_rate is as in its
    training.
    """
    return MoEConfig(
        experts=hf.n_routed_experts, top_k=hf.num_experts_per_tok, width=hf.moe_intermediate_size,
        shared=hf.n_shared_experts or 0, router="sigmoid", normalise=hf.norm_topk_prob, scale=hf.routed_scaling_factor,
        groups=hf.n_group, top_groups=hf.topk_group, bias_rate=0.001, first=hf.first_k_dense_replace,
    )  # fmt: skip


def _gpt2(hf: Any) -> ModelConfig:
    post = hf.model_type == "openai-gpt"
    activation = hf.afn if post else hf.activation_function
    return ModelConfig(
        vocab=hf.vocab_size, context=hf.n_positions, layers=hf.n_layer, width=hf.n_embd, heads=hf.n_head,
        mlp_width=getattr(hf, "n_inner", None), position="learned", norm="layernorm",
        norm_eps=hf.layer_norm_epsilon, norm_order="post" if post else "pre",
        mlp="gelu_tanh" if post and activation == "gelu" else _GELU[activation], bias=True, tied=hf.tie_word_embeddings,
    )  # fmt: skip


# Keys of older files, and keys that transformers itself ignores.
_ROPE_KNOWN = {"rope_theta", "rope_type", "type", "original_max_position_embeddings", "finetuned"}
_ROPE_SAME = ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow")
_YARN_SAME = ("attention_factor", "mscale", "mscale_all_dim")


def _rope(hf: Any) -> RopeConfig:
    given = dict(hf.rope_parameters)
    if nested := sorted(key for key in given if isinstance(given[key], dict)):
        raise InteropError(f"rope_parameters: one for {' and one for '.join(nested)} cannot be expressed")
    kind = given.get("rope_type", given.get("type", "default"))
    scaling = "none" if kind == "default" else kind
    if scaling not in ("none", "linear", "dynamic", "yarn", "llama3"):
        raise InteropError(f"rope_type {kind!r} is not one of default, linear, dynamic, yarn, llama3")
    known = _ROPE_KNOWN | {*_ROPE_SAME} | ({*_YARN_SAME, "truncate"} if scaling == "yarn" else set())
    if unknown := sorted(key for key in given.keys() - known if given[key] not in (None, 1.0)):
        raise InteropError(f"rope_parameters: {', '.join(unknown)} cannot be expressed")
    trained = given.get("original_max_position_embeddings") or hf.max_position_embeddings
    values = {key: given[key] for key in _ROPE_SAME if given.get(key) is not None}
    if scaling == "yarn":
        # As in transformers: 0 counts as not set, except for attention_factor.
        values |= {key: given[key] for key in ("mscale", "mscale_all_dim") if given.get(key)}
        values |= {"attention_factor": given.get("attention_factor"), "truncate": given.get("truncate", True)}
        values.setdefault("factor", hf.max_position_embeddings / trained)
    try:
        return RopeConfig(
            theta=given["rope_theta"],
            scaling=scaling,
            # In transformers dynamic scaling begins after max_position_embeddings, whatever else the file says.
            original_context=hf.max_position_embeddings if scaling == "dynamic" else trained,
            **values,
        )
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))} = {e['input']!r}: {e['msg']}" for e in error.errors())
        raise InteropError(f"rope_parameters: {problems}") from None


def _windows(hf: Any) -> tuple[int, ...]:
    window = getattr(hf, "sliding_window", None) or 0
    kinds = getattr(hf, "layer_types", None)
    if kinds is None:
        return (window,)
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)


Convert = Callable[[Tensor, ModelConfig], Tensor]


def _same(t: Tensor, _c: ModelConfig) -> Tensor:
    return t


def _transposed(t: Tensor, _c: ModelConfig) -> Tensor:
    return t.T.contiguous() if t.ndim == 2 else t


def _third(which: int) -> Convert:
    """Returns the conversion that takes q, k or v out of GPT-2's fused and transposed matrix."""
    return lambda t, c: _transposed(t.split(c.width, dim=-1)[which], c).contiguous()


def _interleaved(which: int) -> Convert:
    """Returns the conversion that takes q, k or v out of BLOOM's matrix, whose rows go head by head and in a head q, k, v."""
    return lambda t, c: t.unflatten(0, (c.heads, 3, c.d_head))[:, which].flatten(0, 1).contiguous()


def _halves(t: Tensor, c: ModelConfig) -> Tensor:
    """Reorder rows: Cohere rotates neighbouring elements (0,1), (2,3)..., ours rotates (i, i + D/2)."""
    heads = t.unflatten(0, (-1, c.d_head // 2, 2))
    out: Tensor = heads.transpose(1, 2).flatten(0, 2).contiguous()
    return out


def _half(which: int) -> Convert:
    """Returns the conversion that takes gate or up of every expert, [E, F, C], out of the fused [E, 2F, C]."""
    return lambda t, _c: t.chunk(2, dim=1)[which].contiguous()


NameRule = tuple[str, str, Convert]
"""Their name (of a module with `.weight` and `.bias`, or of a tensor), ours, and the conversion of the tensor."""

_GPT2: list[NameRule] = [
    ("wte", "embed", _same), ("wpe", "position", _same), ("ln_f", "norm", _same),
    (r"h.#.ln_1", "blocks.#.attn_norm", _same), (r"h.#.ln_2", "blocks.#.mlp_norm", _same),
    *((r"h.#.attn.c_attn", f"blocks.#.attn.{part}", _third(i)) for i, part in enumerate("qkv")),
    (r"h.#.attn.c_proj", "blocks.#.attn.out", _transposed),
    (r"h.#.mlp.c_fc", "blocks.#.mlp.up", _transposed), (r"h.#.mlp.c_proj", "blocks.#.mlp.down", _transposed),
]  # fmt: skip
_BLOOM: list[NameRule] = [
    ("word_embeddings", "embed", _same), ("word_embeddings_layernorm", "embed_norm", _same), ("ln_f", "norm", _same),
    (r"h.#.input_layernorm", "blocks.#.attn_norm", _same),
    (r"h.#.post_attention_layernorm", "blocks.#.mlp_norm", _same),
    *((r"h.#.self_attention.query_key_value", f"blocks.#.attn.{p}", _interleaved(i)) for i, p in enumerate("qkv")),
    (r"h.#.self_attention.dense", "blocks.#.attn.out", _same),
    (r"h.#.mlp.dense_h_to_4h", "blocks.#.mlp.up", _same), (r"h.#.mlp.dense_4h_to_h", "blocks.#.mlp.down", _same),
]  # fmt: skip
_LLAMA: list[NameRule] = [
    ("embed_tokens", "embed", _same), ("norm", "norm", _same),
    (r"layers.#.input_layernorm", "blocks.#.attn_norm", _same),
    (r"layers.#.post_attention_layernorm", "blocks.#.mlp_norm", _same),
    *((rf"layers.#.self_attn.{p}_proj", f"blocks.#.attn.{p}", _same) for p in "qkv"),
    (r"layers.#.self_attn.o_proj", "blocks.#.attn.out", _same),
    *((rf"layers.#.self_attn.{p}_norm", f"blocks.#.attn.{p}_norm", _same) for p in "qk"),
    *((rf"layers.#.mlp.{p}_proj", f"blocks.#.mlp.{p}", _same) for p in ("gate", "up", "down")),
]  # fmt: skip
_EXPERTS: list[NameRule] = [
    ("layers.#.mlp.gate", "blocks.#.mlp.router", _same),
    *(("layers.#.mlp.experts.gate_up_proj", f"blocks.#.mlp.experts.{p}", _half(i)) for i, p in enumerate(("gate", "up"))),
    ("layers.#.mlp.experts.down_proj", "blocks.#.mlp.experts.down", _same),
]
_DEEPSEEK_MOE: list[NameRule] = [
    ("gate.e_score_correction_bias", "router.bias", _same),
    *((theirs.removeprefix("layers.#.mlp."), ours.removeprefix("blocks.#.mlp."), read) for theirs, ours, read in _EXPERTS),
    *((f"shared_experts.{p}_proj", f"shared.{p}", _same) for p in ("gate", "up", "down")),
]
_COHERE = [(hf, ours, _halves if ours.endswith((".q", ".k")) else read) for hf, ours, read in _LLAMA]

TABLES: dict[str, list[NameRule]] = {
    "gpt2": _GPT2,
    "openai-gpt": [("tokens_embed", "embed", _same), ("positions_embed", "position", _same), *_GPT2],
    "bloom": _BLOOM,
    "cohere": _COHERE,
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _LLAMA),
    **dict.fromkeys(("mixtral", "qwen3_moe"), _LLAMA + _EXPERTS),
    "deepseek_moe": _DEEPSEEK_MOE,
}
# Buffers that some releases store among the weights; they are not trained.
_NOT_WEIGHTS = re.compile(r"(\.attn\.(masked_)?bias|rotary_emb\.inv_freq|position_ids)$")
# Released files store each expert separately, under two spellings; transformers' classes stack them, gate and up fused.
_ONE_EXPERT = re.compile(r"^(.*)\.(?:block_sparse_moe|mlp)\.experts\.(\d+)\.(\w+)\.weight$")
_MIXTRAL_PARTS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def _stacked(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    apart: dict[str, dict[tuple[str, int], Tensor]] = {}
    for name, tensor in state.items():
        if found := _ONE_EXPERT.match(name):
            owner, number, part = found.groups()
            apart.setdefault(f"{owner}.mlp.experts", {})[_MIXTRAL_PARTS.get(part, part), int(number)] = tensor
        else:
            out[name.replace(".block_sparse_moe.gate.", ".mlp.gate.")] = tensor
    experts = range(config.moe.experts if config.moe else 0)
    for owner, parts in apart.items():
        if parts.keys() != {(part, e) for part in ("gate_proj", "up_proj", "down_proj") for e in experts}:
            raise InteropError(f"{owner}: not the gate, up and down matrices of {len(experts)} experts")
        out[f"{owner}.gate_up_proj"] = torch.stack([torch.cat((parts["gate_proj", e], parts["up_proj", e])) for e in experts])
        out[f"{owner}.down_proj"] = torch.stack([parts["down_proj", e] for e in experts])
    return out


def convert_state(family: str, state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Returns weights (or gradients) under Hugging Face's names as a state dict of our GPT.

    Raises InteropError for a name that the family's table does not have: nothing is dropped silently.

    family: a key of TABLES; "deepseek_moe" is one DeepseekV3MoE block as one of our MoE layers.
    """
    ours: dict[str, Tensor] = {}
    unknown: list[str] = []
    for name, tensor in _stacked(state, config).items():
        bare = re.sub(r"^(transformer|model)\.", "", name)
        if _NOT_WEIGHTS.search(bare):
            continue
        if bare == "lm_head.weight":
            ours["head.weight"] = tensor
            continue
        rows = list(_matching(TABLES[family], bare))
        if not rows:
            unknown.append(name)
        for target, read in rows:
            ours[target] = read(tensor, config)
    if unknown:
        raise InteropError(f"{family}: no place in our model for {', '.join(unknown[:5])} ({len(unknown)} in all)")
    return _without_tied_head(ours) if config.tied else ours


def _without_tied_head(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns a tied model's state without the head that a file may have beside the embedding, or in its place."""
    head = ours.pop("head.weight", None)
    if head is not None and not torch.equal(head, ours.setdefault("embed.weight", head)):
        raise InteropError(
            "tie_word_embeddings = true, but lm_head.weight differs from the embedding: set tie_word_embeddings = false to "
            "keep both, or remove lm_head.weight"
        )
    return ours


def _matching(table: Iterable[NameRule], name: str) -> Iterable[tuple[str, Convert]]:
    owner, _, leaf = name.rpartition(".")
    layer = re.search(r"\.(\d+)\.", name)
    number = layer.group(1) if layer else ""
    for theirs, target, read in table:
        if theirs.replace("#", number) == name:
            yield target.replace("#", number), read
        elif theirs.replace("#", number) == owner and leaf in ("weight", "bias"):
            yield f"{target.replace('#', number)}.{leaf}", read


def load_into(model: torch.nn.Module, family: str, state: Mapping[str, Tensor], config: ModelConfig) -> None:
    """Copy Hugging Face weights into our GPT. Every parameter must be given, in its shape."""
    model.load_state_dict(convert_state(family, state, config), strict=True)
