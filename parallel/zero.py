"""ZeRO 0 to 3 with FSDP2: one mechanism whose resharding and gradient-sync switches make the stages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from parallel.layout import Layout

# A collective of a few megabytes costs mostly its start, and a meeting of the ranks.
_UNIT_BYTES = 8 << 20


def shard_model(
    model: nn.Module, blocks: Iterable[nn.Module], layout: Layout, mesh: DeviceMesh, compute_dtype: torch.dtype
) -> None:
    """Share the model's state out over the mesh, in place, gathering some blocks at a time.

    Gradients are summed, not averaged, in fp32: the caller normalises by the global count of tokens. Parameters stay
    fp32; they are cast to `compute_dtype` when gathered. Nothing is wrapped when there is nothing to share or cast.
    """
    if layout.world == 1 and compute_dtype == torch.float32:
        return
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    whole_mesh = mesh if layout.zero == 0 else mesh["shard"]
    for unit in [*_units(blocks), [model]]:
        fully_shard(unit, mesh=whole_mesh, reshard_after_forward=layout.zero == 3, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no pre-multiplied sum


def _units(blocks: Iterable[nn.Module]) -> Iterator[list[nn.Module]]:
    """Runs of blocks of about _UNIT_BYTES that are gathered and reduced together; the root takes what is left over."""
    unit: list[nn.Module] = []
    size = 0
    for block in blocks:
        unit.append(block)
        size += sum(p.numel() * p.element_size() for p in block.parameters())
        if size >= _UNIT_BYTES:
            yield unit
            unit, size = [], 0


def set_gradient_sync(model: nn.Module, layout: Layout, last: bool) -> None:
    """Before the backward pass of a micro-batch: whether its gradients are reduced now.

    ZeRO 2 and 3 keep no whole gradient, so they reduce every micro-batch; 0 and 1 add up and reduce the `last`.
    """
    if isinstance(model, FSDPModule):
        cast(FSDPModule, model).set_requires_gradient_sync(last or layout.zero >= 2)
