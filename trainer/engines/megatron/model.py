"""A stage of the GPT in Megatron-core's layers, with the interface of our own: Megatron's GPTModel through public hooks
only.

The hooks are a layer spec whose attention core and norms are our modules, and a rotary module that knows where documents
begin. So it runs without Transformer Engine or Apex, on a CPU too, and documents packed in one row stay separate.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

with warnings.catch_warnings():  # Transformer Engine and Apex are missing on purpose
    warnings.simplefilter("ignore")
    from megatron.core import parallel_state as parallel_state
    from megatron.core import tensor_parallel as tensor_parallel
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer import ModuleSpec, TransformerConfig
    from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.mlp import MLP, MLPSubmodules
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from mikoshi.parallel.collectives import join, own_part
from mikoshi.trainer.model.attention import attend
from mikoshi.trainer.model.config import GATED, ModelConfig
from mikoshi.trainer.model.gpt import GPT
from mikoshi.trainer.model.loss import IGNORED
from mikoshi.trainer.model.moe import MoE
from mikoshi.trainer.model.rotary import frequencies


class AttentionCore(nn.Module):
    """Our GPT's attention in the place of Megatron's.

    window: attention window of its layer, which selects the mask.
    """

    def __init__(self, **_: Any) -> None:
        super().__init__()
        self.window = 0
        self.attend: Callable[..., Tensor] = attend

    def forward(self, q_TBHD: Tensor, k_TBKD: Tensor, v_TBKD: Tensor, masks: Any, **_: Any) -> Tensor:
        """Returns the attention output [T, B, H x D].

        masks: one a window, as GPT.masks makes them.
        """
        q, k, v = (part.permute(1, 2, 0, 3) for part in (q_TBHD, k_TBKD, v_TBKD))
        y_BHTD = self.attend(q, k, v, masks[self.window])
        return y_BHTD.permute(2, 0, 1, 3).flatten(2)


class Rotary(nn.Module):
    """The rotary angles of every position of every row, for Megatron's own rotation.

    positions_BT: set before each pass.
    """

    def __init__(self, model: ModelConfig, length: int) -> None:
        super().__init__()
        self.model, self.length = model, length
        self.positions_BT = torch.arange(length)[None]

    def get_rotary_seq_len(self, *_: Any, **__: Any) -> int:
        """Returns the number of positions, which Megatron asks for before it calls the module."""
        return self.length

    def forward(self, *_: Any, **__: Any) -> Tensor:
        """Returns the angles, fp32 [T, B or 1, 1, 2R]."""
        radians_R, _magnitude = frequencies(self.model.rope, self.model.d_rotary, self.length, self.positions_BT.device)
        angles_TBR = self.positions_BT.T[..., None].float() * radians_R
        return torch.cat((angles_TBR, angles_TBR), dim=-1)[:, :, None]


class NormBuilder:
    """Builds our norm where Megatron's specs name a class."""

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float) -> Any:
        if config.normalization == "LayerNorm":
            return nn.LayerNorm(hidden_size, eps=eps, bias=config.add_bias_linear)
        return nn.RMSNorm(hidden_size, eps=eps)


class HeadNormBuilder:
    """Builds the norm of a head's queries or keys: RMSNorm, whatever norm the layers have."""

    def __new__(cls, hidden_size: int, eps: float, **_: Any) -> Any:
        return nn.RMSNorm(hidden_size, eps=eps)


class RoutedExperts(nn.Module):
    """Our mixture of experts in the place of Megatron's MLP.

    whole_sequence_group: tensor-parallel ranks that all hold the whole sequence here, so that each routes a part of it; None
      if the input is already this rank's part.
    """

    def __init__(self, config: TransformerConfig, moe: MoE, whole_sequence_group: ProcessGroup | None, **_: Any) -> None:
        super().__init__()
        self.moe, self.whole_sequence_group = moe, whole_sequence_group

    def forward(self, x_TBC: Tensor, *_: Any, padding_mask: Tensor | None = None, **__: Any) -> tuple[Tensor, None]:
        """Returns the output [T, B, C] and None, as Megatron's layers expect a bias that is still to be added."""
        mine = x_TBC if self.whole_sequence_group is None else own_part(x_TBC, 0, self.whole_sequence_group)
        y = self.moe(mine.transpose(0, 1), padding_mask).transpose(0, 1)
        return y if self.whole_sequence_group is None else join(y, 0, self.whole_sequence_group), None


def transformer_config(model: ModelConfig, layers: int, tp: int, **more: Any) -> Any:
    """Returns Megatron's config of `layers` layers of our model, without dropout and without fused kernels.

    more: further settings, which take precedence.
    """
    activations = {"gelu": F.gelu, "gelu_tanh": _GELU_TANH, "relu": F.relu, "swiglu": F.silu, "geglu": F.gelu}
    settings: dict[str, Any] = dict(
        num_layers=layers, hidden_size=model.width, num_attention_heads=model.heads, num_query_groups=model.n_kv,
        kv_channels=model.d_head, ffn_hidden_size=model.d_mlp, layernorm_epsilon=model.norm_eps,
        normalization="LayerNorm" if model.norm == "layernorm" else "RMSNorm", add_bias_linear=model.bias,
        add_qkv_bias=model.bias_qkv, gated_linear_unit=model.mlp in GATED, activation_func=activations[model.mlp],
        qk_layernorm=model.qk_norm, tensor_model_parallel_size=tp, hidden_dropout=0.0, attention_dropout=0.0,
        use_cpu_initialization=True, perform_initialization=False, bias_activation_fusion=False, bias_dropout_fusion=False,
        masked_softmax_fusion=False, persist_layer_norm=False, gradient_accumulation_fusion=False, apply_rope_fusion=False,
    )  # fmt: skip
    return TransformerConfig(**(settings | more))


_GELU_TANH = partial(F.gelu, approximate="tanh")


def _layer(model: ModelConfig, moe: MoE | None, whole_sequence_group: ProcessGroup | None) -> Any:
    """Returns the spec of Megatron's layer with our attention core, norms and mixture of experts."""
    dense = ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear))
    routed = ModuleSpec(module=RoutedExperts, params={"moe": moe, "whole_sequence_group": whole_sequence_group})
    head_norm = HeadNormBuilder if model.qk_norm else IdentityOp
    attention = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear, core_attention=AttentionCore, linear_proj=RowParallelLinear,
        q_layernorm=head_norm, k_layernorm=head_norm,
    )  # fmt: skip
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=NormBuilder,
            self_attention=ModuleSpec(
                module=SelfAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=attention
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=NormBuilder,
            mlp=dense if moe is None else routed,
            mlp_bda=get_bias_dropout_add,
        ),
    )


class MegatronStage(nn.Module):
    """Some of the GPT's layers in Megatron's form, with the embedding and the head if they belong to the stage.

    It is called as GPT is and has the attributes of GPT that an engine reads.

    reference: our own GPT's same part, on the meta device, which makes the masks; it is not a submodule.
    length: tokens in a row.
    dtype: of the hidden states.
    fused: whether the layers are Transformer Engine's, with its attention and norms; these see a row as one document.
    experts: our mixture-of-experts layers by layer number.
    whole_sequence_group: see `RoutedExperts`.
    settings: further settings of Megatron's config.
    """

    def __init__(
        self,
        reference: GPT,
        tp: int,
        length: int,
        dtype: torch.dtype,
        fused: bool,
        experts: Mapping[int, MoE],
        whole_sequence_group: ProcessGroup | None,
        **settings: Any,
    ) -> None:
        super().__init__()
        model, self.part = reference.config, reference.part
        self.length, self.dtype, self.fused = length, dtype, fused
        self.known: int | None = None
        self.reference = (reference,)  # in a tuple, so that it is no submodule
        layers = [_layer(model, experts.get(number), whole_sequence_group) for number in self.part.layers]
        ours = TransformerBlockSubmodules(layer_specs=layers, layer_norm=NormBuilder)
        spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=model.qk_norm) if fused else ours
        position = {"rotary": "rope", "learned": "learned_absolute"}.get(model.position, "none")
        self.inner = GPTModel(
            transformer_config(model, len(layers), tp, **settings),
            spec,
            vocab_size=model.vocab, max_sequence_length=model.context, pre_process=self.part.first,
            post_process=self.part.last, parallel_output=True, share_embeddings_and_output_weights=model.tied,
            position_embedding_type=position,
        )  # fmt: skip
        if position == "rope":
            self.inner.rotary_pos_emb = Rotary(model, length)
        for number, core in zip(self.part.layers, self.cores, strict=not fused):
            core.window = model.window(number)
        self.blocks = {str(number): SimpleNamespace(mlp=moe) for number, moe in experts.items()}  # those that hold experts

    @property
    def layers(self) -> list[Any]:
        """Megatron's layers of this stage."""
        return list(self.inner.decoder.layers)

    @property
    def cores(self) -> list[AttentionCore]:
        """The attention cores that are ours: one a layer, or none with Transformer Engine."""
        cores = [layer.self_attention.core_attention for layer in self.layers]
        return [core for core in cores if isinstance(core, AttentionCore)]

    @property
    def embed(self) -> Any:
        """The module that holds a tied embedding in this stage, or None."""
        if self.part.first:
            return self.inner.embedding.word_embeddings
        return self.inner.output_layer if self.part.last and self.reference[0].config.tied else None

    def forward(
        self,
        x: Tensor,
        labels_BT: Tensor | None = None,
        docs_BS: Tensor | None = None,
        positions_BT: Tensor | None = None,
        padding_BT: Tensor | None = None,
        queries_T: Tensor | None = None,
        length: int | None = None,
    ) -> Tensor:
        """See `GPT.forward`."""
        length = length or self.length
        if positions_BT is None:
            positions_BT = (torch.arange(length, device=x.device) if queries_T is None else queries_T)[None]
        if isinstance(rotary := getattr(self.inner, "rotary_pos_emb", None), Rotary):
            rotary.positions_BT = positions_BT
        like = x if x.is_floating_point() else torch.empty((), device=x.device, dtype=self.dtype)
        masks = None if self.fused else self.reference[0].masks(0, length, docs_BS, queries_T, like)
        tokens = x if self.part.first else None
        if not self.part.first:
            self.inner.set_input_tensor(x.transpose(0, 1))
        if tokens is not None:
            positions_BT = positions_BT.expand_as(tokens)
        gather = labels_BT is None and self.part.last
        out: Tensor = self.inner(
            tokens, positions_BT, masks, runtime_gather_output=True if gather else None,
            padding_mask=padding_BT if self.blocks else None,
        )  # fmt: skip
        if not self.part.last:
            # The pipeline frees the tensor in place, which does not work for a view.
            return out.transpose(0, 1).clone(memory_format=torch.contiguous_format)
        known = None if torch.is_grad_enabled() else self.known
        return out if labels_BT is None else next_token_loss(out, labels_BT, known)


def next_token_loss(logits_BTV: Tensor, labels_BT: Tensor, known: int | None = None) -> Tensor:
    """Returns the cross-entropy summed over the predicted positions, a scalar in nats, by Megatron's vocabulary-parallel
    loss.

    logits_BTV: this rank's share of the vocabulary. It is overwritten.
    known: as for our own loss.
    """
    if known is not None:
        first = parallel_state.get_tensor_model_parallel_rank() * logits_BTV.shape[-1]
        logits_BTV[..., max(0, known - first) :] = -torch.inf
    losses_BT = tensor_parallel.vocab_parallel_cross_entropy(logits_BTV, labels_BT.clamp(min=0))
    total: Tensor = (losses_BT * (labels_BT != IGNORED)).sum()
    return total
