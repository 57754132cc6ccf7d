"""ZeRO 0 to 3 and hybrid sharding with FSDP2: one mechanism whose resharding and gradient-sync switches make the stages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import Shard

from mikoshi.parallel.layout import Layout
from mikoshi.parallel.mesh import Groups
from mikoshi.parallel.schedule import splits_backward

# A collective of a few megabytes costs mostly its start, and a meeting of the ranks.
_UNIT_BYTES = 8 << 20


def shard_model(
    model: nn.Module,
    blocks: Iterable[nn.Module],
    layout: Layout,
    groups: Groups,
    compute_dtype: torch.dtype,
    offload: bool = False,
) -> None:
    """Share the model's state out over the layout's shards, in place, gathering some blocks at a time.

    Gradients are summed over data ranks, not averaged, in fp32: the caller normalises by the global count of tokens. (What
    tensor-parallel ranks hold whole, norms and such, they sum among each other in `compute_dtype` first.) Parameters stay
    fp32; they are cast to `compute_dtype` when gathered, except those of routers. `offload`: parameters, gradients and
    optimizer state stay in the host's memory, and the step is taken there. Nothing is wrapped when there is nothing to
    share, cast or offload.
    """
    if layout.world == 1 and compute_dtype == torch.float32 and not offload:
        return
    precise = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    # The halves of a split backward pass need the same gathered parameters.
    reshard = layout.zero == 3 and not splits_backward(layout.schedule)
    pinned = groups.dense.device_type == "cuda"
    place = CPUOffloadPolicy(pin_memory=pinned) if offload else OffloadPolicy()
    wrap = partial(fully_shard, reshard_after_forward=reshard, offload_policy=place)
    mesh, blocks = _mesh(groups.dense, layout.state_grid), list(blocks)
    for name, module in model.named_modules():
        if name.endswith(".experts") and groups.experts is not None:
            shards = layout.expert_grid[1]
            wrap(
                module,
                mesh=_mesh(groups.experts, layout.expert_grid),
                mp_policy=policy,
                shard_placement_fn=lambda p, shards=shards: _even_dimension(p, shards),
            )
        elif name.endswith(".router") and compute_dtype != torch.float32:
            wrap(module, mesh=mesh, mp_policy=precise)
    for unit in [*_units(blocks), [model]]:
        wrap(unit, mesh=mesh, mp_policy=policy)
    for module in _wrapped(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo knows no pre-multiplied sum


def _mesh(mesh: DeviceMesh, grid: tuple[int, int]) -> DeviceMesh:
    return mesh["replica", "shard"] if grid[0] > 1 else mesh["shard"]


def _even_dimension(p: Any, shards: int) -> Shard:
    """The first of an expert's dimensions that comes out even; FSDP2 pads only dimension 0."""
    shape = p.to_local().shape
    return Shard(next((dim for dim in (0, 1) if shape[dim] % shards == 0), 0))


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


def _wrapped(model: nn.Module) -> Iterator[FSDPModule]:
    return (module for module in model.modules() if isinstance(module, FSDPModule))


@dataclass(frozen=True)
class Reduction:
    """When gradients are reduced: what to do with a stage before the first pass of a step, before the backward pass of a
    micro-batch (the last one or not), and after the last pass."""

    begin: Callable[[nn.Module], None]
    before_backward: Callable[[nn.Module, bool], None]
    end: Callable[[nn.Module], None]


def reduction(layout: Layout) -> Reduction:
    """Micro-batch by micro-batch where one is finished before the next begins, at the end of the step in a pipeline."""
    if layout.pp == 1:
        return Reduction(lambda _: None, lambda model, last: _reduce_now(model, layout, last), lambda _: None)
    return Reduction(lambda model: _hold(model, layout), lambda _model, _last: None, _release)


def _reduce_now(model: nn.Module, layout: Layout, last: bool) -> None:
    """ZeRO 2 and 3 keep no whole gradient, so they reduce every micro-batch; 0 and 1 add up and reduce the `last`."""
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(last)  # replicas meet once a step
        model.set_requires_gradient_sync(last or layout.zero >= 2)
        # Below ZeRO 3 parameters stay gathered from one micro-batch to the next: they do not change in between.
        model.set_reshard_after_backward(last or layout.zero == 3)


def _hold(model: nn.Module, layout: Layout) -> None:
    """Gradients add up on this rank until _release.

    A pipeline has passes of several micro-batches open at once, and halves of them where the schedule splits backward.
    """
    if isinstance(model, FSDPModule):
        model.set_is_last_backward(False)
        model.set_reshard_after_backward(layout.zero == 3 and not splits_backward(layout.schedule))
        model.set_requires_gradient_sync(False)


def _release(model: nn.Module) -> None:
    """Reduce what has added up, and let go of gathered parameters."""
    if isinstance(model, FSDPModule):
        model.set_is_last_backward(True)
        model.set_reshard_after_backward(True)
        model.set_requires_gradient_sync(True)
        # What FSDP2 runs at the end of an ordinary backward pass; torch's own pipelining calls it in the same way.
        fully_shard.state(model)._root_post_backward_final_callback()  # type: ignore[attr-defined]
