"""Megatron-core's own GPTModel on the CPU, as its users build it: its local layer spec around torch's attention."""

import contextlib
import multiprocessing
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn

GATED = ("swiglu", "geglu")
ACTIVATIONS = {"gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "swiglu": F.silu}


class Attention(nn.Module):
    """Causal attention of [T, B, heads, D], as a core of Megatron's."""

    def __init__(self, **_):
        super().__init__()

    def forward(self, q, k, v, *_, **__):
        q, k, v = (part.permute(1, 2, 0, 3) for part in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return y.permute(2, 0, 1, 3).flatten(2)


class Rotary(nn.Module):
    """Angles [T, 1, 1, D] of positions 0, 1, 2..."""

    def __init__(self, dimensions, theta, length):
        super().__init__()
        self.dimensions, self.theta, self.length = dimensions, theta, length

    def get_rotary_seq_len(self, *_, **__):
        return self.length

    def forward(self, *_, **__):
        radians = self.theta ** (-torch.arange(0, self.dimensions, 2) / self.dimensions)
        angles = torch.outer(torch.arange(self.length), radians)
        return torch.cat((angles, angles), dim=-1)[:, None, None]


@contextlib.contextmanager
def on_cpu(tp):
    """Megatron's groups in this process group, and a machine without a GPU that answers where it asks for one."""
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
    here = mock.patch.multiple(torch.cuda, current_device=lambda: torch.device("cpu"), synchronize=lambda *_: None)
    # Its saves start processes, which one of the pool may not, being a daemon.
    free = mock.patch.dict(multiprocessing.current_process()._config, daemon=False)
    try:
        with here, free:
            yield
    finally:
        parallel_state.destroy_model_parallel()


def gpt_model(model, tp=1, length=16, vocab=None):
    """A GPTModel of the shape of a ModelConfig, its weights as they come."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        num_layers=model.layers, hidden_size=model.width, num_attention_heads=model.heads, num_query_groups=model.n_kv,
        kv_channels=model.d_head, ffn_hidden_size=model.d_mlp, layernorm_epsilon=model.norm_eps,
        normalization="LayerNorm" if model.norm == "layernorm" else "RMSNorm", add_bias_linear=model.bias,
        add_qkv_bias=model.bias_qkv, gated_linear_unit=model.mlp in GATED, activation_func=ACTIVATIONS[model.mlp],
        qk_layernorm=model.qk_norm, tensor_model_parallel_size=tp, hidden_dropout=0.0, attention_dropout=0.0,
        use_cpu_initialization=True, bias_activation_fusion=False, bias_dropout_fusion=False, masked_softmax_fusion=False,
        persist_layer_norm=False, gradient_accumulation_fusion=False, apply_rope_fusion=False,
    )  # fmt: skip
    spec = get_gpt_layer_local_spec(qk_layernorm=model.qk_norm, normalization=config.normalization)
    spec.submodules.self_attention.submodules.core_attention = Attention
    built = GPTModel(
        config, spec, vocab_size=vocab or model.vocab, max_sequence_length=model.context, parallel_output=False,
        share_embeddings_and_output_weights=model.tied,
        position_embedding_type="learned_absolute" if model.position == "learned" else "none",
    )  # fmt: skip
    if model.position == "rotary":
        built.position_embedding_type = "rope"
        built.rotary_pos_emb = Rotary(model.d_head, model.rope.theta, length)
    return built


@torch.no_grad()
def logits_of(built, tokens):
    """[B, T, V] of tokens [B, T]."""
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    return built(tokens, positions, torch.ones(1, 1, 1, 1, dtype=torch.bool))
