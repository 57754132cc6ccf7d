"""The Megatron engine: Megatron-core's layers, tensor parallelism and loss in the native engine's pipeline, ZeRO, optimizers
and checkpoints.

Megatron's DistributedOptimizer is not used: without Transformer Engine and Apex it resumes wrongly, and FSDP2 shards the same
state. Megatron keeps its process groups in the process; they are made anew with every engine.
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
from mikoshi.trainer.engines.megatron.model import MegatronStage, parallel_state, tensor_parallel
from mikoshi.trainer.engines.megatron.parameters import MegatronParameters
from mikoshi.trainer.engines.native.engine import NativeEngine
from mikoshi.trainer.engines.parameters import FillWeights
from mikoshi.trainer.engines.parts import build_experts, build_parts, compute_dtype, whole_row_attention, with_recompute
from mikoshi.trainer.model.gpt import GPT


def megatron_engine(
    config: RunConfig, layout: Layout, device: torch.device, groups: Groups, fill_weights: FillWeights
) -> Engine:
    """Returns the engine. Collective over all ranks of the layout.

    groups: the result of make_groups for the layout.
    fill_weights: writes a parameter's initial values.
    """
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    fused = transformer_engine(config, layout, device.type == "cuda")
    cp = layout.cp if fused else 1  # otherwise our own attention sees the whole row
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        context_parallel_size=cp,
        distributed_timeout_minutes=math.ceil((config.recovery.patience + 60) / 60),  # as for the group of all ranks
        create_gloo_process_groups=False,
    )
    sequence_cut = layout.tp > 1 and sequence_parallel(device)
    settings: dict[str, Any] = {"sequence_parallel": sequence_cut}
    if sequence_cut:
        tensor_parallel.model_parallel_cuda_manual_seed(config.run.seed)  # nothing is random, but its regions require a seed
    if fused:
        settings |= _fused(config, layout)
    references = build_parts(config, layout, groups, layout.coordinates(dist.get_rank()), device)
    logging.getLogger("megatron").setLevel(logging.ERROR)  # each rank would log release notes
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="megatron")
        stages = {
            number: _stage(reference, config, layout, groups, device, fused, settings)
            for number, reference in references.items()
        }
    warnings.filterwarnings(
        "ignore", message="When using async grad allreduce"
    )  # a hint about CUDA that it also gives on the CPU
    map_parameters = partial(MegatronParameters, model=config.model, groups=groups, tp=layout.tp, sequence_cut=sequence_cut)
    parts = cast(dict[int, GPT], stages)  # same interface as our own parts
    return NativeEngine(
        config, layout, device, groups, parts, fill_weights, map_parameters=map_parameters, sequence_cut=sequence_cut
    )


def sequence_parallel(device: torch.device) -> bool:
    """Whether tensor-parallel ranks split the sequence between Megatron's layers, which need CUDA for that."""
    return device.type == "cuda"


def _fused(config: RunConfig, layout: Layout) -> dict[str, Any]:
    """Returns Megatron's settings with Transformer Engine: parameters start on the meta device, and its kernels are fused."""
    settings: dict[str, Any] = {
        "use_cpu_initialization": False, "init_model_with_meta_device": True, "bias_dropout_fusion": True,
        "context_parallel_size": layout.cp, "cp_comm_type": "p2p" if layout.context_kind == "ring" else "all_gather",
        "params_dtype": torch.float32, "bf16": config.engine.precision == "bf16",
        # It would reuse the FP8 weights of the first pass until it is told about a new step.
        "disable_parameter_transpose_cache": True,
    }  # fmt: skip
    # Scale by the current tensor: scales from its history would be state that no checkpoint has.
    fp8 = {"fp8": "hybrid", "fp8_recipe": "tensorwise"}
    return settings | (fp8 if config.engine.megatron.fp8 else {})


def _stage(
    reference: GPT,
    config: RunConfig,
    layout: Layout,
    groups: Groups,
    device: torch.device,
    fused: bool,
    settings: dict[str, Any],
) -> MegatronStage:
    experts = build_experts(config, layout, groups, layout.coordinates(dist.get_rank()), device, reference.part)
    whole_sequence_group = None if settings["sequence_parallel"] else groups.tp
    with torch.device("meta"):
        stage = MegatronStage(
            reference, layout.tp, config.train.context, compute_dtype(config), fused, experts, whole_sequence_group, **settings
        )
    for core in stage.cores:
        core.attend = whole_row_attention(core.attend, config, layout, groups, device)
    for layer in stage.layers:
        layer.forward = with_recompute(layer.forward, config.engine.recompute)
    shard_model(stage, stage.layers, layout, groups, compute_dtype(config), config.parallel.offload == "optimizer")
    return stage
