"""From the plain GPT to the parts of it that this rank carries: cut into stages, then each part as the layout says."""

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
from mikoshi.parallel.expert import cut_tokens, expert_parallel, experts_in, share_balance
from mikoshi.parallel.layout import Coordinates, Layout
from mikoshi.parallel.mesh import Groups
from mikoshi.parallel.pipeline import split_layers
from mikoshi.parallel.process import heartbeat as pulse
from mikoshi.parallel.ring import ring_attend
from mikoshi.parallel.tensor import distribute, overlap_collectives, tensor_parallel, vocabulary_parallel, whole_logits
from mikoshi.parallel.zero import shard_model
from mikoshi.trainer.config.run import RunConfig
from mikoshi.trainer.model.config import ModelConfig
from mikoshi.trainer.model.gpt import GPT, Attention, Block, Part
from mikoshi.trainer.model.moe import MoE

_KEPT_OPS = {
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


# FSDP2's hooks, which run around routers and experts inside a block, open profiler ranges: others in the forward pass than
# in its repetition.
SAC_IGNORED_OPS.update(
    {torch.ops.profiler._record_function_enter_new.default, torch.ops.profiler._record_function_exit._RecordFunction}
)


def compute_dtype(config: RunConfig) -> torch.dtype:
    return torch.bfloat16 if config.engine.precision == "bf16" else torch.float32


def build_parts(config: RunConfig, layout: Layout, groups: Groups, here: Coordinates, device: torch.device) -> dict[int, GPT]:
    """This rank's stages, cut and wrapped as the layout says, on the meta device still."""
    layers = stage_layers(config.model, config.train.context, layout.stages)
    parts = {}
    for stage in layout.stages_of(here.pp):
        part = Part(layers[stage], first=stage == 0, last=stage == layout.stages - 1)
        with torch.device("meta"):
            model = GPT(config.model, part)
        _carry(model, config, layout, groups, here, device)
        parts[stage] = model
    return parts


def build_experts(
    config: RunConfig, layout: Layout, groups: Groups, here: Coordinates, device: torch.device, part: Part
) -> dict[int, MoE]:
    """The mixtures of experts of a part, by layer, cut as the layout says and on the meta device: for the layers of others."""
    with torch.device("meta"):
        model = GPT(config.model, part)
    _cut(model, config, layout, groups, here, device)
    return {int(name): block.mlp for name, block in model.blocks.items() if isinstance(block.mlp, MoE)}


def _carry(model: GPT, config: RunConfig, layout: Layout, groups: Groups, here: Coordinates, device: torch.device) -> None:
    _cut(model, config, layout, groups, here, device)
    blocks = [block for block in model.blocks.values() if isinstance(block, Block)]
    wrap_forwards(blocks, config.engine.recompute, compiles(config, device))
    shard_model(model, blocks, layout, groups, compute_dtype(config), config.parallel.offload == "optimizer")


def _cut(model: GPT, config: RunConfig, layout: Layout, groups: Groups, here: Coordinates, device: torch.device) -> None:
    few = config.model.n_kv < layout.tp
    distribute(model, None if groups.tp is None else groups.dense["tp"], _expert_mesh(groups), few)
    for layer in experts_in(model):
        if groups.experts is not None:
            expert_parallel(layer.experts, groups.ep, groups.expert_tp)
        if groups.row is not None:
            share_balance(layer, groups.row)
        if groups.tp is not None:
            cut_tokens(layer, groups.tp)
    attentions = [m for m in model.modules() if isinstance(m, Attention)]
    heads = config.model.heads // layout.tp
    model.heads = slice(here.tp * heads, (here.tp + 1) * heads)
    if groups.cp is not None and layout.context_kind == "ulysses":
        first, own = model.heads.start, heads // layout.cp
        model.heads = slice(first + here.cp * own, first + (here.cp + 1) * own)
    for attention in attentions:
        attention.attend = whole_row(attention.attend, config, layout, groups, device)
    if groups.tp is not None:
        tensor_parallel(model, groups.tp, config.model.n_kv)
        if config.parallel.async_tp:
            overlap_collectives(groups.tp)
        model.predict = vocabulary_parallel(model.predict, groups.tp)
        model.logits = whole_logits(groups.tp)


def whole_row(
    attend: Callable[..., Tensor], config: RunConfig, layout: Layout, groups: Groups, device: torch.device
) -> Callable[..., Tensor]:
    """Attention that sees the whole row, of which context-parallel ranks hold parts."""
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
    """Whether the engine's blocks are compiled: on CUDA of itself, where the engine can."""
    can = config.engine.kind == "native" or (config.engine.kind == "deepspeed" and config.parallel.zero < 3)
    return config.engine.compile == "on" or (config.engine.compile == "auto" and device.type == "cuda" and can)


def cores_per_rank(device: torch.device) -> int:
    """Threads that this rank may use on its host for filling weights."""
    if device.type == "cpu":
        return torch.get_num_threads()
    return max(1, cores() // max(1, torch.cuda.device_count()))


def stage_layers(model: ModelConfig, context: int, stages: int) -> list[range]:
    """The layers of each pipeline stage, by the FLOPs of every layer and of the head. The embedding looks rows up: none."""
    if stages == 1:
        return [range(model.layers)]
    costs = [layer_flops(model, context, layer) for layer in range(model.layers)]
    return split_layers(costs, before=0.0, after=head_flops(model, context), stages=stages)


def layer_flops(model: ModelConfig, context: int, layer: int) -> float:
    """FLOPs of one layer's forward pass over one row, counted by running it on fake tensors; of its attention scores, the
    share that its window leaves."""
    window = min(model.window(layer) or context, context)
    unseen = 4.0 * model.heads * model.d_head * context * (context - window)
    return _counted_flops(model, context, model.is_moe(layer)) - unseen


@lru_cache(maxsize=64)
def _counted_flops(model: ModelConfig, context: int, moe: bool) -> float:
    layer = next(n for n in range(model.layers) if model.is_moe(n) == moe)
    return _flops(model, Part(range(layer, layer + 1), first=False, last=False), context)


@lru_cache(maxsize=64)
def head_flops(model: ModelConfig, context: int) -> float:
    """The same of the final norm and the head, for one row."""
    return _flops(model, Part(range(0), first=False, last=True), context)


def _flops(model: ModelConfig, part: Part, context: int) -> float:
    counter = FlopCounterMode(display=False)
    with FakeTensorMode(), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        GPT(model, part)(torch.empty(1, context, model.width))
    return float(counter.get_total_flops())


@lru_cache(maxsize=1)
def _tell_compilations() -> None:
    """A compilation in the middle of a step, for a shape or a mask that is new, may take minutes: it is no hang."""
    from torch._dynamo.callback import on_compile_end, on_compile_start  # takes seconds to import

    before = [""]

    def begin(_: Any) -> None:
        before[0] = pulse.phase()
        pulse.beat("compile")

    on_compile_start(begin)
    on_compile_end(lambda _: pulse.beat(before[0]))


def wrap_forwards(blocks: list[Block], recompute: str, compiled: bool) -> None:
    """Recompute and compile a block inside its `forward`: parameter names and FSDP's hooks, outside, see neither."""
    for block in blocks:
        forward = recomputed(block.forward, recompute)
        if compiled:
            _tell_compilations()
            forward = torch.compile(forward)
        block.forward = forward  # type: ignore[method-assign]


def recomputed(forward: Callable[..., Any], recompute: str) -> Callable[..., Any]:
    """A block's forward whose activations, or the cheap ones of them, are made again in the backward pass."""
    if recompute == "none":
        return forward
    context: dict[str, Any] = {} if recompute == "full" else {"context_fn": _keep_products}
    return partial(checkpoint, forward, use_reentrant=False, **context)


def _keep_products() -> Any:
    """Selective recompute: what took matrix products or attention is kept, the cheap rest is made again."""

    def policy(_context: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in _KEPT_OPS else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
