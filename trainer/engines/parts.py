"""From the plain GPT to the pipeline stages of one rank, sharded and wrapped as the layout says."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import SAC_IGNORED_OPS, CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from mikoshi.data.io.cores import cores
from mikoshi.parallel.context import exchanged_heads, gathered_keys
from mikoshi.parallel.expert import expert_parallel, experts_in, keep_own_tokens, share_balance
from mikoshi.parallel.layout import Coordinates, Layout
from mikoshi.parallel.mesh import Groups
from mikoshi.parallel.pipeline import split_layers
from mikoshi.parallel.process import heartbeat
from mikoshi.parallel.ring import ring_attend
from mikoshi.parallel.tensor import distribute, overlap_collectives, tensor_parallel, vocabulary_parallel, whole_logits
from mikoshi.parallel.zero import shard_model
from mikoshi.trainer.config.run import RunConfig
from mikoshi.trainer.model.config import ModelConfig
from mikoshi.trainer.model.gpt import GPT, Attention, Block, Part
from mikoshi.trainer.model.moe import MoE

_SAVED_OPS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._grouped_mm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.higher_order.flex_attention,
}


# FSDP2's hooks run around routers and experts inside a block. The profiler ranges that they open differ between the forward
# pass and its recomputation.
SAC_IGNORED_OPS.update(
    {torch.ops.profiler._record_function_enter_new.default, torch.ops.profiler._record_function_exit._RecordFunction}
)


def compute_dtype(config: RunConfig) -> torch.dtype:
    """Returns the dtype in which the config's engine computes."""
    return torch.bfloat16 if config.engine.precision == "bf16" else torch.float32


def build_parts(
    config: RunConfig, layout: Layout, groups: Groups, coordinates: Coordinates, device: torch.device
) -> dict[int, GPT]:
    """Returns this rank's pipeline stages by number, sharded and wrapped as the layout says, still on the meta device.

    coordinates: this rank's place in the layout.
    """
    layers = stage_layers(config.model, config.train.context, layout.stages)
    parts = {}
    for stage in layout.stages_of(coordinates.pp):
        part = Part(layers[stage], first=stage == 0, last=stage == layout.stages - 1)
        with torch.device("meta"):
            model = GPT(config.model, part)
        _wrap(model, config, layout, groups, coordinates, device)
        parts[stage] = model
    return parts


def build_experts(
    config: RunConfig, layout: Layout, groups: Groups, coordinates: Coordinates, device: torch.device, part: Part
) -> dict[int, MoE]:
    """Returns the mixture-of-experts layers of a part by layer number, sharded and on the meta device.

    They are for layers of another maker, which hold them in place of their own.
    """
    with torch.device("meta"):
        model = GPT(config.model, part)
    _parallelize(model, config, layout, groups, coordinates, device)
    return {int(name): block.mlp for name, block in model.blocks.items() if isinstance(block.mlp, MoE)}


def _wrap(
    model: GPT, config: RunConfig, layout: Layout, groups: Groups, coordinates: Coordinates, device: torch.device
) -> None:
    _parallelize(model, config, layout, groups, coordinates, device)
    blocks = [block for block in model.blocks.values() if isinstance(block, Block)]
    wrap_forwards(blocks, config.engine.recompute, compiles(config, device))
    shard_model(model, blocks, layout, groups, compute_dtype(config), config.parallel.offload == "optimizer")


def _parallelize(
    model: GPT, config: RunConfig, layout: Layout, groups: Groups, coordinates: Coordinates, device: torch.device
) -> None:
    too_few_kv_heads = config.model.n_kv < layout.tp
    distribute(model, None if groups.tp is None else groups.dense["tp"], _expert_mesh(groups), too_few_kv_heads)
    for layer in experts_in(model):
        if groups.experts is not None:
            expert_parallel(layer.experts, groups.ep, groups.expert_tp)
        if groups.row is not None:
            share_balance(layer, groups.row)
        if groups.tp is not None:
            keep_own_tokens(layer, groups.tp)
    attentions = [m for m in model.modules() if isinstance(m, Attention)]
    heads = config.model.heads // layout.tp
    model.heads = slice(coordinates.tp * heads, (coordinates.tp + 1) * heads)
    if groups.cp is not None and layout.context_kind == "ulysses":
        first, own = model.heads.start, heads // layout.cp
        model.heads = slice(first + coordinates.cp * own, first + (coordinates.cp + 1) * own)
    for attention in attentions:
        attention.attend = whole_row_attention(attention.attend, config, layout, groups, device)
    if groups.tp is not None:
        tensor_parallel(model, groups.tp, config.model.n_kv)
        if config.parallel.async_tp:
            overlap_collectives(groups.tp)
        model.predict = vocabulary_parallel(model.predict, groups.tp)
        model.logits = whole_logits(groups.tp)


def whole_row_attention(
    attend: Callable[..., Tensor], config: RunConfig, layout: Layout, groups: Groups, device: torch.device
) -> Callable[..., Tensor]:
    """Returns an attention function that sees whole rows when each context-parallel rank holds a part of them."""
    if groups.cp is None:
        return attend
    if layout.context_kind == "ulysses":
        return exchanged_heads(attend, groups.cp)
    if layout.context_kind == "ring":
        return ring_attend(groups.cp)
    return gathered_keys(attend, groups.cp, config.train.context, device)


def _expert_mesh(groups: Groups) -> Any:
    return None if groups.experts is None else groups.experts["ep", "expert_tp"]


def compiles(config: RunConfig, device: torch.device) -> bool:
    """Whether the engine's blocks are compiled: with engine.compile = "auto", on CUDA if the engine can."""
    can = config.engine.kind == "native" or (config.engine.kind == "deepspeed" and config.parallel.zero < 3)
    return config.engine.compile == "on" or (config.engine.compile == "auto" and device.type == "cuda" and can)


def cores_per_rank(device: torch.device) -> int:
    """Returns how many threads this rank may use on its host to fill weights."""
    if device.type == "cpu":
        return torch.get_num_threads()
    return max(1, cores() // max(1, torch.cuda.device_count()))


def stage_layers(model: ModelConfig, context: int, stages: int) -> list[range]:
    """Returns the layers of each pipeline stage, balanced by FLOPs.

    The last stage also has the FLOPs of the head. The embedding is a lookup and costs nothing.
    """
    if stages == 1:
        return [range(model.layers)]
    costs = [layer_flops(model, context, layer) for layer in range(model.layers)]
    return split_layers(costs, before=0.0, after=head_flops(model, context), stages=stages)


def layer_flops(model: ModelConfig, context: int, layer: int) -> float:
    """Returns the FLOPs of one layer's forward pass over one row.

    They are counted on fake tensors. Attention scores outside of the layer's window are left out.
    """
    window = min(model.window(layer) or context, context)
    unseen = 4.0 * model.heads * model.d_head * context * (context - window)
    return _counted_flops(model, context, model.is_moe(layer)) - unseen


@lru_cache(maxsize=64)
def _counted_flops(model: ModelConfig, context: int, moe: bool) -> float:
    layer = next(n for n in range(model.layers) if model.is_moe(n) == moe)
    return _flops(model, Part(range(layer, layer + 1), first=False, last=False), context)


@lru_cache(maxsize=64)
def head_flops(model: ModelConfig, context: int) -> float:
    """Returns the FLOPs of the final norm and the head for one row."""
    return _flops(model, Part(range(0), first=False, last=True), context)


def _flops(model: ModelConfig, part: Part, context: int) -> float:
    counter = FlopCounterMode(display=False)
    with FakeTensorMode(), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        GPT(model, part)(torch.empty(1, context, model.width))
    return float(counter.get_total_flops())


@lru_cache(maxsize=1)
def _report_compilations() -> None:
    """Report compilations as heartbeats: one in the middle of a step may take minutes and is no hang."""
    from torch._dynamo.callback import on_compile_end, on_compile_start  # takes seconds to import

    phase = [""]

    def on_start(_: Any) -> None:
        phase[0] = heartbeat.current_phase()
        heartbeat.send_heartbeat("compile")

    on_compile_start(on_start)
    on_compile_end(lambda _: heartbeat.send_heartbeat(phase[0]))


def wrap_forwards(blocks: list[Block], recompute: str, compiled: bool) -> None:
    """Add recompute and compilation to each block's `forward`.

    Inside `forward`, neither changes parameter names or the order of FSDP's hooks.
    """
    for block in blocks:
        forward = with_recompute(block.forward, recompute)
        if compiled:
            _report_compilations()
            forward = torch.compile(forward)
        block.forward = forward  # type: ignore[method-assign]


def with_recompute(forward: Callable[..., Any], recompute: str) -> Callable[..., Any]:
    """Returns a block's forward that recomputes its activations, or the cheap ones, in the backward pass."""
    if recompute == "none":
        return forward
    context: dict[str, Any] = {} if recompute == "full" else {"context_fn": _save_products}
    return partial(checkpoint, forward, use_reentrant=False, **context)


def _save_products() -> Any:
    """Selective recompute: save the results of matrix products and attention, recompute the rest."""

    def policy(_context: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in _SAVED_OPS else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
