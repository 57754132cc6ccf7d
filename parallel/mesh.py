"""The meshes and process groups that a layout makes. Tensor parallelism is innermost, the pipeline outermost."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from mikoshi.parallel.layout import Layout


@dataclass(frozen=True)
class Groups:
    """This rank's peers along every axis; None where an axis has one rank only.

    dense: mesh of pp x replica x shard x tp for all parameters but experts; context-parallel ranks read different tokens,
    so they are part of `shard` here. experts: the same ranks as pp x replica x shard x ep x expert_tp.
    row: the ranks that hold parts of the same rows (cp x tp). ends: first and last stage, for a tied embedding.
    """

    dense: DeviceMesh
    experts: DeviceMesh | None
    pp: ProcessGroup | None
    tp: ProcessGroup | None
    cp: ProcessGroup | None
    row: ProcessGroup | None
    ep: ProcessGroup | None
    expert_tp: ProcessGroup | None
    ends: ProcessGroup | None


def make_groups(layout: Layout, device_type: str, has_experts: bool, tied: bool) -> Groups:
    """Collective over all ranks of the layout."""
    sizes = (layout.pp, *layout.state_grid, layout.tp)
    dense = init_device_mesh(device_type, sizes, mesh_dim_names=("pp", "replica", "shard", "tp"))
    experts = None
    if has_experts and layout.ep * layout.tp > 1:  # with tp alone, because its ranks hold different tokens of a sequence
        inner = (layout.pp, *layout.expert_grid, layout.ep, layout.expert_tp)
        experts = init_device_mesh(device_type, inner, mesh_dim_names=("pp", "replica", "shard", "ep", "expert_tp"))
    world, part = layout.world, layout.cp * layout.tp
    per_stage = layout.stage_ranks
    last = next(pp for pp in range(layout.pp) if layout.stages - 1 in layout.stages_of(pp))
    return Groups(
        dense=dense,
        experts=experts,
        pp=dense.get_group("pp") if layout.pp > 1 else None,
        tp=dense.get_group("tp") if layout.tp > 1 else None,
        cp=_group([first + i * layout.tp for i in range(layout.cp)]
                  for block in range(0, world, part) for first in range(block, block + layout.tp)) if layout.cp > 1 else None,
        row=_group(range(block, block + part) for block in range(0, world, part)) if has_experts and part > 1 else None,
        ep=experts.get_group("ep") if experts is not None and layout.ep > 1 else None,
        expert_tp=experts.get_group("expert_tp") if experts is not None and layout.expert_tp > 1 else None,
        ends=_group([rank, last * per_stage + rank] for rank in range(per_stage)) if tied and last > 0 else None,
    )  # fmt: skip


def _group(members: Iterable[Iterable[int]]) -> ProcessGroup | None:
    """The group, of all those given, that this rank is in. Every rank makes them all, in the same order."""
    own, _ = dist.new_subgroups_by_enumeration([list(ranks) for ranks in members])
    return own if isinstance(own, ProcessGroup) else None
