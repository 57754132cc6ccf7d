"""The plain GPT in the form that DeepSpeed takes, and its parameters and moments read and written whole, one at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from mikoshi.parallel.expert import experts_in, share_balance
from mikoshi.parallel.layout import Coordinates, Layout
from mikoshi.parallel.mesh import Groups
from mikoshi.trainer.config.run import RunConfig
from mikoshi.trainer.engines.deepspeed.optim import GatedAdamW
from mikoshi.trainer.engines.parts import compiles, wrap_forwards
from mikoshi.trainer.model.gpt import GPT, Attention, Block, Part


def build_model(
    deepspeed: Any,
    config: RunConfig,
    layout: Layout,
    groups: Groups,
    coordinates: Coordinates,
    device: torch.device,
    ds_config: Any,
    part: Part | None = None,
) -> GPT:
    """Returns the whole model or a part of it, its weights not yet written. Collective.

    With ZeRO 3 the model is always whole, and a rank never holds more than its pieces and one gathered module.

    coordinates: this rank's place in the layout.
    ds_config: DeepSpeed's configuration.
    part: the part of the model; None means all of it.
    """
    if layout.zero == 3:
        with deepspeed.zero.Init(config_dict_or_path=copy.deepcopy(ds_config)):
            model = GPT(config.model)
        _gather_where_used(deepspeed, model)
    else:
        with torch.device("meta"):
            model = GPT(config.model, part)
        model = model.to_empty(device=device)
    if groups.row is not None:
        for layer in experts_in(model):
            share_balance(layer, groups.row)
    if groups.cp is not None:
        own = config.model.heads // layout.cp
        model.heads = slice(coordinates.cp * own, (coordinates.cp + 1) * own)
        for attention in model.modules():
            if isinstance(attention, Attention):
                attention.attend = ulysses(attention.attend, groups.cp)
    blocks = [block for block in model.blocks.values() if isinstance(block, Block)]
    wrap_forwards(blocks, config.engine.recompute, compiles(config, device))
    return model


def _gather_where_used(deepspeed: Any, model: GPT) -> None:
    """Have ZeRO 3 gather parameters where they are used, and not only when the module that owns them is called.

    The model itself uses the head's matrix. Linear layers save their inputs for the backward pass, and a saved view would
    keep the gathered matrix alive.
    """
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    deepspeed.zero.register_external_parameter(model, model.head_weight)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.forward = _linear_forward(module, zero3_linear_wrap)  # type: ignore[method-assign, assignment]


def _linear_forward(module: nn.Linear, linear: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: linear(x, module.weight, module.bias)


def ulysses(attend: Callable[..., Tensor], group: ProcessGroup) -> Callable[..., Tensor]:
    """Returns attention over whole rows for this rank's share of the heads, by DeepSpeed's exchange of heads for tokens.

    attend: attention on tensors [B, heads, T, D].
    group: the context-parallel ranks.
    """
    from deepspeed.sequence.layer import DistributedAttention

    size = dist.get_world_size(group)

    def whole(q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, mask: object) -> Tensor:
        return attend(*(part.transpose(1, 2) for part in (q_BTHD, k_BTKD, v_BTKD)), mask).transpose(1, 2).contiguous()

    exchanged = DistributedAttention(whole, group, scatter_idx=2, gather_idx=1)

    def attend_heads(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, mask: object) -> Tensor:
        # With too few key/value heads for all ranks, ranks hold copies; autograd sums their gradients.
        kv_heads = k_BKTD.shape[1]
        copies = 1 if kv_heads % size == 0 else size // kv_heads if size % kv_heads == 0 else q_BHTD.shape[1] // kv_heads
        k, v = (part.repeat_interleave(copies, 1) if copies > 1 else part for part in (k_BKTD, v_BKTD))
        out: Tensor = exchanged(*(part.transpose(1, 2).contiguous() for part in (q_BHTD, k, v)), 0, None, mask)
        return out.transpose(1, 2)

    return attend_heads


def read_full(p: nn.Parameter, key: str | None, layout: Layout, optimizer: GatedAdamW) -> Tensor:
    """Returns a parameter in fp32, or one of its moments, whole. Collective.

    key: name of the moment; None means the parameter.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if layout.zero == 0:
        return p.detach() if key is None else optimizer.state[p][key]
    value: Tensor = safe_get_full_fp32_param(p) if key is None else safe_get_full_optimizer_state(p, key)
    return value.view(shape_of(p))


@torch.no_grad()
def write_full(p: nn.Parameter, key: str | None, value: Tensor, layout: Layout, optimizer: GatedAdamW) -> None:
    """Set a parameter or one of its moments from the whole tensor. Collective.

    A parameter is set both in fp32 and in the dtype that the model computes with.

    key: name of the moment; None means the parameter.
    """
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import (
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )

    if layout.zero == 0:
        (p if key is None else optimizer.state[p][key]).copy_(value.view(p.shape))
    elif layout.zero < 3:
        if key is None:
            safe_set_full_fp32_param(p, value)
            p.copy_(value.view(p.shape))
        else:
            safe_set_full_optimizer_state(p, value, key)
    else:
        # DeepSpeed's setter of whole parameters only takes those that divide evenly over the ranks.
        piece: Tensor = p.ds_tensor  # type: ignore[attr-defined]
        own_piece = _piece(value, piece.ds_numel)  # type: ignore[attr-defined]
        # A piece that is on a disk is replaced by one element, which DeepSpeed's setter of pieces would silently overwrite.
        # Gathering the parameter loads the piece first.
        with GatheredParameters([p]) if piece.numel() != len(own_piece) else nullcontext():
            if key is None:
                safe_set_local_fp32_param(p, own_piece)
            else:
                safe_set_local_optimizer_state(p, own_piece, key)
        if key is None:
            with GatheredParameters([p], modifier_rank=0):
                p.copy_(value.view(shape_of(p)))


def _piece(value: Tensor, size: int) -> Tensor:
    """Returns this rank's `size` elements of the flattened tensor, padded with zeros at its end."""
    first = dist.get_rank() * size
    piece = value.new_zeros(size)
    values = value.flatten()[first : first + size]
    piece[: len(values)] = values
    return piece


def shape_of(p: nn.Parameter) -> torch.Size:
    """Returns the shape of the whole parameter, which ZeRO 3 keeps in `ds_shape`."""
    return torch.Size(getattr(p, "ds_shape", p.shape))
