"""The plain GPT as DeepSpeed is given it, and its parameters and moments, one whole at a time, in and out of it."""

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
    deepspeed: Any, config: RunConfig, layout: Layout, groups: Groups, here: Coordinates, device: torch.device, said: Any,
    part: Part | None = None,
) -> GPT:  # fmt: skip
    """The whole model or a part of it, its weights not yet written; under ZeRO 3, where it is whole, a rank never holds more
    than its pieces and one module. `said`: DeepSpeed's configuration. Collective."""
    if layout.zero == 3:
        with deepspeed.zero.Init(config_dict_or_path=copy.deepcopy(said)):
            model = GPT(config.model)
        _gather_from_outside(deepspeed, model)
    else:
        with torch.device("meta"):
            model = GPT(config.model, part)
        model = model.to_empty(device=device)
    if groups.row is not None:
        for layer in experts_in(model):
            share_balance(layer, groups.row)
    if groups.cp is not None:
        own = config.model.heads // layout.cp
        model.heads = slice(here.cp * own, (here.cp + 1) * own)
        for attention in model.modules():
            if isinstance(attention, Attention):
                attention.attend = ulysses(attention.attend, groups.cp)
    blocks = [block for block in model.blocks.values() if isinstance(block, Block)]
    wrap_forwards(blocks, config.engine.recompute, compiles(config, device))
    return model


def _gather_from_outside(deepspeed: Any, model: GPT) -> None:
    """ZeRO 3 gathers parameters when the module that owns them is called. The head's matrix is used by the model itself; and
    products keep what they were given for backward, which a view of a gathered matrix would be."""
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    deepspeed.zero.register_external_parameter(model, model.head_weight)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.forward = _product(module, zero3_linear_wrap)  # type: ignore[method-assign, assignment]


def _product(module: nn.Linear, linear: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: linear(x, module.weight, module.bias)


def ulysses(attend: Callable[..., Tensor], group: ProcessGroup) -> Callable[..., Tensor]:
    """Attention of this rank's share of the heads over the whole row, by DeepSpeed's exchange of heads for tokens."""
    from deepspeed.sequence.layer import DistributedAttention

    size = dist.get_world_size(group)

    def whole(q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, mask: object) -> Tensor:
        return attend(*(part.transpose(1, 2) for part in (q_BTHD, k_BTKD, v_BTKD)), mask).transpose(1, 2).contiguous()

    exchanged = DistributedAttention(whole, group, scatter_idx=2, gather_idx=1)

    def attend_heads(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, mask: object) -> Tensor:
        # Where there are too few key/value heads to share out, ranks hold copies; their gradients add up by themselves.
        held = k_BKTD.shape[1]
        copies = 1 if held % size == 0 else size // held if size % held == 0 else q_BHTD.shape[1] // held
        k, v = (part.repeat_interleave(copies, 1) if copies > 1 else part for part in (k_BKTD, v_BKTD))
        out: Tensor = exchanged(*(part.transpose(1, 2).contiguous() for part in (q_BHTD, k, v)), 0, None, mask)
        return out.transpose(1, 2)

    return attend_heads


def whole(p: nn.Parameter, key: str | None, layout: Layout, optimizer: GatedAdamW) -> Tensor:
    """A parameter in fp32, or one of its moments, whole. Collective."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if layout.zero == 0:
        return p.detach() if key is None else optimizer.state[p][key]
    found: Tensor = safe_get_full_fp32_param(p) if key is None else safe_get_full_optimizer_state(p, key)
    return found.view(shape_of(p))


@torch.no_grad()
def write(p: nn.Parameter, key: str | None, value: Tensor, layout: Layout, optimizer: GatedAdamW) -> None:
    """Set a parameter, in fp32 and as the model computes with it, or one of its moments, from the whole. Collective."""
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
        # Its setter of the whole takes parameters alone that come out even over the ranks.
        piece: Tensor = p.ds_tensor  # type: ignore[attr-defined]
        mine = _piece(value, piece.ds_numel)  # type: ignore[attr-defined]
        # In the place of a piece that is on a disk there is one element, over which its setter of pieces would write without a
        # word: gathering brings it in.
        with GatheredParameters([p]) if piece.numel() != len(mine) else nullcontext():
            if key is None:
                safe_set_local_fp32_param(p, mine)
            else:
                safe_set_local_optimizer_state(p, mine, key)
        if key is None:
            with GatheredParameters([p], modifier_rank=0):
                p.copy_(value.view(shape_of(p)))


def _piece(value: Tensor, size: int) -> Tensor:
    """This rank's `size` elements of a tensor laid flat, zeros where it has come to its end."""
    first = dist.get_rank() * size
    mine = value.new_zeros(size)
    held = value.flatten()[first : first + size]
    mine[: len(held)] = held
    return mine


def shape_of(p: nn.Parameter) -> torch.Size:
    return torch.Size(getattr(p, "ds_shape", p.shape))
