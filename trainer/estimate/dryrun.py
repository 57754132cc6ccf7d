"""The real run at any world size in one CPU process: the engine's own code builds the model and takes a step, on tensors
that have a shape and no memory, among ranks that answer at once and are not there."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any, cast
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import FSDPModule, fully_shard

from mikoshi.data.dataset.rows import Batch
from mikoshi.parallel.errors import LayoutError
from mikoshi.parallel.layout import Layout
from mikoshi.parallel.mesh import make_groups
from mikoshi.parallel.process.process_group import leave
from mikoshi.parallel.sharding import local
from mikoshi.trainer.config.run import RunConfig
from mikoshi.trainer.engines.build import leave_empty
from mikoshi.trainer.engines.layout import layout_of
from mikoshi.trainer.engines.native.engine import NativeEngine
from mikoshi.trainer.engines.parts import build_parts, stage_layers
from mikoshi.trainer.engines.precision import choose_precision
from mikoshi.trainer.errors import ConfigError
from mikoshi.trainer.estimate.ledger import Ledger
from mikoshi.trainer.model import attention
from mikoshi.trainer.model.loss import CHUNK_ELEMENTS


@dataclass(frozen=True)
class Collective:
    """One kind of collective over one axis in a step: calls, and bytes that the rank puts in."""

    axis: str
    name: str
    calls: int
    bytes: int


@dataclass(frozen=True)
class DryRun:
    """What a step costs one rank. memory: bytes by kind at the peak; they add up to `peak`, of which `offloaded` are in
    the host's memory. flops: of the rank's part of the step, recomputation included. seconds: what the dry run itself
    took; host_bytes: the most its process has held."""

    rank: int
    pp: int
    stages: list[str]
    parameters: int
    memory: dict[str, int]
    peak: int
    offloaded: int
    flops: float
    collectives: list[Collective]
    seconds: float
    host_bytes: int

    @property
    def device_peak(self) -> int:
        """Bytes of a GPU's memory at the peak."""
        return self.peak - self.offloaded

    def as_json(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return asdict(self)


KINDS = ("parameters", "gathered", "gradients", "optimizer", "activations", "buffers")


def dry_run(config: RunConfig, world: int, rank: int) -> DryRun:
    """Build rank `rank` of `world` and take one step. Needs a process that has no process group; leaves none.

    Unless engine.device is "cpu" the figures are a GPU's, of one that has bf16: the loss is made in a GPU's chunks, attention
    keeps what a GPU's kernels keep, and has no dense mask, as there FlexAttention needs none (the rows are read as one
    document each).
    Blocks are not compiled; compiled ones need a little less. Raises LayoutError if the layout cannot be, and ConfigError for
    another engine than the native one.
    """
    if config.engine.kind != "native":
        raise ConfigError(f'engine.kind = "{config.engine.kind}": only the native engine runs dry: add engine.kind=native')
    config = config.model_copy(update={"engine": config.engine.model_copy(update={"compile": "off"})})
    started = time.perf_counter()
    layout = layout_of(config, world)
    config, _ = choose_precision(config, layout, "cpu" if config.engine.device == "cpu" else "cuda", bf16_everywhere=True)
    stages = stage_layers(config.model, config.train.context, layout.stages)
    _join_nobody(rank, world)
    try:
        rows = layout.micro_rows * layout.micro_batches
        shape = (rows, config.train.context)
        batch = Batch(np.zeros(shape, np.int64), np.zeros(shape, np.int64), None, None)
        groups = make_groups(layout, "cpu", config.model.moe is not None, config.model.tied)
        parts = build_parts(config, layout, groups, layout.coordinates(rank), torch.device("cpu"))
        with ExitStack() as held:
            held.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            engine = NativeEngine(config, layout, torch.device("cpu"), groups, parts, leave_empty, _ones)
            if config.engine.device != "cpu":
                held.enter_context(mock.patch.dict(CHUNK_ELEMENTS, {"cpu": CHUNK_ELEMENTS["cuda"]}))
                held.enter_context(mock.patch.object(attention, "causal_attention", _grouped_attention))
                for part in engine.parts.values():
                    part.masks = _no_masks(part)  # type: ignore[method-assign]
            ledger = held.enter_context(Ledger(kinds_of(engine)))
            engine.step(engine.own_positions(batch), lr=1e-4)
        here, kinds = engine.coordinates, ledger.by_kind()
        away = ("parameters", "optimizer") if config.parallel.offload == "optimizer" else ()
        return DryRun(
            rank=rank,
            pp=here.pp,
            stages=[f"{r.start}-{r.stop - 1}" for r in (stages[s] for s in layout.stages_of(here.pp))],
            parameters=sum(p.numel() for p in engine.parameters),
            memory={kind: kinds.get(kind, 0) for kind in KINDS},
            peak=ledger.peak,
            offloaded=sum(kinds.get(kind, 0) for kind in away),
            flops=ledger.flops,
            collectives=_collectives(ledger, engine),
            seconds=time.perf_counter() - started,
            host_bytes=_peak_host_bytes(),
        )
    finally:
        leave()


def _join_nobody(rank: int, world: int) -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)


def _ones(figures: Tensor) -> list[float]:
    return [1.0] * figures.numel()


class _GroupedAttention(torch.autograd.Function):
    """What a GPU's kernel keeps for its backward pass: keys and values once for each of their heads, not for each query
    head, as the CPU's needs them."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        copies = q.shape[1] // k.shape[1]
        wide = (part.repeat_interleave(copies, 1) for part in (k, v))
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, *wide, 0.0, True)
        ctx.save_for_backward(q, k, v, out, lse)
        return cast(Tensor, out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        heads = k.shape[1]
        wide = (part.repeat_interleave(q.shape[1] // heads, 1) for part in (k, v))
        back = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        grad_q, grad_k, grad_v = back(grads[0], q, *wide, out, lse, 0.0, True)
        return grad_q, grad_k.unflatten(1, (heads, -1)).sum(2), grad_v.unflatten(1, (heads, -1)).sum(2)


def _grouped_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return cast(Tensor, _GroupedAttention.apply(q, k, v))  # type: ignore[no-untyped-call]


def _no_masks(part: Any) -> Any:
    return lambda *_: {part.config.window(layer): None for layer in part.part.layers}


def _peak_host_bytes() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def kinds_of(engine: NativeEngine) -> Any:
    """For a Ledger: the engine's parameters, gradients and optimizer state at the time of asking."""
    gathered: dict[int, nn.Parameter] = {}

    def known() -> Mapping[str, Iterable[Tensor]]:
        for part in engine.parts.values():
            for p in part.parameters():  # what FSDP2 has put in their place while it is gathered
                gathered[id(p)] = p
        gradients = [p.grad for p in [*engine.parameters, *gathered.values()] if p.grad is not None]
        own = {id(p) for p in engine.parameters}
        return {
            "gathered": [p for key, p in gathered.items() if key not in own],
            "parameters": engine.parameters,
            "gradients": [*gradients, *_accumulated(engine.parts.values())],
            "optimizer": [t for moments in engine.optimizers.moments.values() for t in moments.values()],
        }

    return known


def _accumulated(parts: Iterable[nn.Module]) -> list[Tensor]:
    """Whole gradients in reduce precision that FSDP2 keeps between the micro-batches of bf16."""
    found = []
    for module in (m for part in parts for m in part.modules() if isinstance(m, FSDPModule)):
        state = fully_shard.state(module)  # type: ignore[attr-defined]
        groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
        for group in (g for g in groups if g is not None):
            found += [p.unsharded_accumulated_grad for p in group.fsdp_params if p.unsharded_accumulated_grad is not None]
    return [local(t) for t in found]


def _collectives(ledger: Ledger, engine: NativeEngine) -> list[Collective]:
    axes = axis_names(engine)
    return sorted(
        (Collective(axes.get(group, group), name, t.calls, t.bytes) for (group, name), t in ledger.traffic.items()),
        key=lambda c: -c.bytes,
    )


def axis_names(engine: NativeEngine) -> dict[str, str]:
    """Process group's name -> axis of the layout. Groups of one rank carry nothing and are left out by their size."""
    groups = engine.groups
    names: dict[str, str] = {dist.group.WORLD.group_name: "all"} if dist.group.WORLD is not None else {}
    for mesh, kind in ((groups.experts, "expert "), (groups.dense, "")):
        if mesh is not None:
            for axis in mesh.mesh_dim_names or ():
                plain = axis in ("ep", "expert_tp", "tp", "pp")
                names[mesh.get_group(axis).group_name] = axis if plain else kind + axis
    for axis, group in (("cp", groups.cp), ("row", groups.row), ("ends", groups.ends)):
        if group is not None:
            names[group.group_name] = axis
    return names


def ranks_of(layout: Layout, which: str) -> list[int]:
    """The ranks meant by a number, "ends" or "all": one of every kind, as all ranks of a stage cost the same. Raises
    LayoutError for anything else."""
    kinds = [pp * layout.stage_ranks for pp in range(layout.pp)]
    if which == "all":
        return kinds
    if which == "ends":
        return list(dict.fromkeys((kinds[0], kinds[-1])))
    if which.isdigit() and int(which) < layout.world:
        return [int(which)]
    raise LayoutError(f'--rank {which}: give a number below {layout.world}, "ends" or "all"')
