"""The Megatron engine: Megatron-core's layers, tensor parallelism and loss in the native engine's pipeline, ZeRO, optimizers
and checkpoints.

Its DistributedOptimizer is not used: without Transformer Engine and Apex a resumed one goes on wrongly, and FSDP2 shares the
same state out. Groups: Megatron keeps its own in the process, made anew with every engine.
"""

from __future__ import annotations

import logging
import math
import warnings
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist

from mikoshi.parallel.layout import Layout
from mikoshi.parallel.mesh import Groups
from mikoshi.parallel.zero import shard_model
from mikoshi.trainer.config.run import RunConfig
from mikoshi.trainer.engines.base import Engine
from mikoshi.trainer.engines.megatron.limits import transformer_engine
from mikoshi.trainer.engines.megatron.model import Stage, parallel_state, tensor_parallel
from mikoshi.trainer.engines.megatron.parameters import FusedNames
from mikoshi.trainer.engines.native.engine import NativeEngine
from mikoshi.trainer.engines.parameters import FillWeights
from mikoshi.trainer.engines.parts import build_experts, build_parts, compute_dtype, recomputed, whole_row
from mikoshi.trainer.model.gpt import GPT


def megatron_engine(
    config: RunConfig, layout: Layout, device: torch.device, groups: Groups, fill_weights: FillWeights
) -> Engine:
    """Collective over all ranks of the layout."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    fused = transformer_engine(config, layout, device.type == "cuda")
    cp = layout.cp if fused else 1  # else it is our own attention that sees the whole row
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        context_parallel_size=cp,
        distributed_timeout_minutes=math.ceil((config.recovery.patience + 60) / 60),  # as of the group of all ranks
        create_gloo_process_groups=False,
    )
    cut = layout.tp > 1 and sequence_parallel(device)
    settings: dict[str, Any] = {"sequence_parallel": cut}
    if cut:
        tensor_parallel.model_parallel_cuda_manual_seed(config.run.seed)  # nothing is drawn, but its regions ask for one
    if fused:
        settings |= _fused(config, layout)
    shadows = build_parts(config, layout, groups, layout.coordinates(dist.get_rank()), device)
    logging.getLogger("megatron").setLevel(logging.ERROR)  # each rank would say what is new in each of its versions
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="megatron")
        stages = {number: _stage(shadow, config, layout, groups, device, fused, settings) for number, shadow in shadows.items()}
    warnings.filterwarnings("ignore", message="When using async grad allreduce")  # a hint for CUDA, on the CPU too
    hold = partial(FusedNames, model=config.model, groups=groups, tp=layout.tp, sequence_cut=cut)
    parts = cast(dict[int, GPT], stages)  # called, cut and read as our own parts are
    return NativeEngine(config, layout, device, groups, parts, fill_weights, hold=hold, sequence_cut=cut)


def sequence_parallel(device: torch.device) -> bool:
    """Whether tensor-parallel ranks share out the sequence between Megatron's layers, which ask for CUDA there."""
    return device.type == "cuda"


def _fused(config: RunConfig, layout: Layout) -> dict[str, Any]:
    """Megatron's settings with Transformer Engine: parameters begin with no memory, as ours do, and its kernels are fused."""
    settings: dict[str, Any] = {
        "use_cpu_initialization": False, "init_model_with_meta_device": True, "bias_dropout_fusion": True,
        "context_parallel_size": layout.cp, "cp_comm_type": "p2p" if layout.context_kind == "ring" else "all_gather",
        "params_dtype": torch.float32, "bf16": config.engine.precision == "bf16",
        # It would keep weights in FP8 from the first pass on until it is told of a new step.
        "disable_parameter_transpose_cache": True,
    }  # fmt: skip
    # Scales of the tensor at hand: those of its history would be a state that no checkpoint has.
    fp8 = {"fp8": "hybrid", "fp8_recipe": "tensorwise"}
    return settings | (fp8 if config.engine.megatron.fp8 else {})


def _stage(
    shadow: GPT, config: RunConfig, layout: Layout, groups: Groups, device: torch.device, fused: bool, settings: dict[str, Any]
) -> Stage:
    experts = build_experts(config, layout, groups, layout.coordinates(dist.get_rank()), device, shadow.part)
    alike = None if settings["sequence_parallel"] else groups.tp
    with torch.device("meta"):
        stage = Stage(shadow, layout.tp, config.train.context, compute_dtype(config), fused, experts, alike, **settings)
    for core in stage.cores:
        core.attend = whole_row(core.attend, config, layout, groups, device)
    for layer in stage.layers:
        layer.forward = recomputed(layer.forward, config.engine.recompute)
    shard_model(stage, stage.layers, layout, groups, compute_dtype(config), config.parallel.offload == "optimizer")
    return stage
