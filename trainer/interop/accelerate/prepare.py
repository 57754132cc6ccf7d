"""`accelerator.prepare` with a check of its result: what was requested is what trains, or there is an error.

Accelerate silently falls back: with `cpu=True` a DeepSpeed or FSDP plugin becomes plain DDP; without it FSDP2 on CPUs does
nothing, and every process is rank 0 of 1 and writes the same checkpoint; and `accelerate launch --cpu` starts one process,
however many are requested.

    batches = training_batches(load_config(Path("run.toml")))
    model, optimizer, batches = prepare(accelerator, model, AdamW(model.parameters(), lr=1e-3), batches, precision="bf16")
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any, Literal, NoReturn

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from mikoshi.parallel.process.process_group import wait_for_all
from mikoshi.trainer.errors import ConfigError
from mikoshi.trainer.interop.accelerate.start import launched_ranks, lone_process_reason
from mikoshi.trainer.interop.dataloader import TrainingBatches
from mikoshi.trainer.train.rank import exit_now

Kind = Literal["alone", "ddp", "fsdp", "deepspeed"]

_CPU_ADVICE = (
    "on GPUs leave cpu=True, --cpu and use_cpu out; on CPUs do so too, set DS_ACCELERATOR=cpu and give "
    'kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")]'
)
_FSDP_ADVICE = (
    "accelerate's FSDP needs GPUs: leave cpu=True, --cpu and use_cpu out there, or train on CPUs with `mikoshi train`"
)


def prepare(
    accelerator: Any, *objects: Any, ranks: int | None = None, precision: Literal["fp32", "bf16"] | None = None
) -> tuple[Any, ...]:
    """Returns what `accelerator.prepare(*objects)` returns, or raises ConfigError if that is not what was requested.
    Collective.

    The request is the plugin that the accelerator was given, or `accelerate launch`. DeepSpeed learns the batch size from
    `training_batches` among the objects.

    ranks: number of processes; by default what the launcher reports.
    precision: checked if it is given.
    """
    world = _ranks(ranks)
    kind = _requested(world)
    _check_processes(accelerator, kind, world)
    if precision is not None:
        _check_precision(accelerator, precision)
    batches = [item for item in objects if isinstance(item, TrainingBatches)]
    if kind == "deepspeed" and batches:
        _set_batch_size(accelerator, batches[0])
    out = accelerator.prepare(*objects)
    prepared = out if isinstance(out, tuple) else (out,)
    for before, after in zip(objects, prepared, strict=True):
        if isinstance(before, nn.Module):
            _check_wrapper(after, kind, world)
    steps = accelerator.gradient_accumulation_steps
    if batches and batches[0].micro_batches != steps:
        raise ConfigError(
            f"gradient_accumulation_steps = {steps}: training_batches gives {batches[0].micro_batches} batches a step: "
            f"use Accelerator(gradient_accumulation_steps={batches[0].micro_batches})"
        )
    return prepared


def finish(code: int = 0) -> NoReturn:
    """End a script that trained on several processes, after `accelerator.end_training()`: wait for all, then exit at once.

    A normal exit destroys DDP's reducer while it holds its lock, and with it gloo's group, which waits for a thread that
    waits for that lock: such a script may never end. Functions registered with atexit do not run.
    """
    wait_for_all()
    exit_now(code)


def _ranks(given: int | None) -> int:
    """Returns the number of processes that there should be."""
    launched = launched_ranks(os.environ)
    if given is not None and launched is not None and given != launched:
        raise ConfigError(f"ranks = {given}: the launcher started {launched}: start {given}, or leave ranks out")
    if launched is None and (why := lone_process_reason(os.environ)):
        raise ConfigError(why)
    if launched is None and (given or 1) > 1:
        raise ConfigError(
            f"ranks = {given}: this is one process alone, with no RANK and WORLD_SIZE: start it with "
            f"`torchrun --nproc-per-node {given}`, or `accelerate launch --multi_gpu --num_processes {given}`"
        )
    return given or launched or 1


def _requested(ranks: int) -> Kind:
    """Returns the requested kind by the plugin, which sets an environment variable wherever it was given."""
    for kind, name in (("deepspeed", "DEEPSPEED"), ("fsdp", "FSDP")):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            return "deepspeed" if kind == "deepspeed" else "fsdp"
    return "alone" if ranks == 1 else "ddp"


def _check_processes(accelerator: Any, kind: Kind, ranks: int) -> None:
    """Raises ConfigError unless the processes know each other and accelerate does what was requested."""
    found = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    state = f"accelerate's distributed_type is {found}, of {accelerator.num_processes} processes"
    wanted = {"deepspeed": ("DEEPSPEED",), "fsdp": ("FSDP",), "ddp": ("MULTI_GPU", "MULTI_CPU"), "alone": ("NO",)}[kind]
    if kind == "deepspeed" and found not in wanted:
        raise ConfigError(f"DeepSpeed was asked for, and {state}: what would train is plain DDP: {_CPU_ADVICE}")
    if accelerator.num_processes != ranks:
        raise ConfigError(
            f"{ranks} processes were started, and {state}: each would train by itself and write over the others: "
            + (_FSDP_ADVICE if kind == "fsdp" else "give Accelerator(cpu=True) on CPUs, or make the GPUs visible")
        )
    if kind == "fsdp" and found not in wanted:
        raise ConfigError(f"FSDP was asked for, and {state}: every process would hold the whole model: {_FSDP_ADVICE}")
    if found not in wanted:
        raise ConfigError(f"{state}, and {' or '.join(wanted)} was expected: give Accelerator(cpu=True) on CPUs")
    number = os.environ.get("RANK")
    if number is not None and accelerator.process_index != int(number):
        raise ConfigError(f"RANK = {number}: accelerate takes this process for number {accelerator.process_index}")
    _check_numbers(accelerator, ranks)


def _check_numbers(accelerator: Any, ranks: int) -> None:
    """Raises ConfigError if two processes have the same number."""
    if ranks == 1:
        return
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world != ranks:
        raise ConfigError(f"{ranks} processes were started, and the process group is of {world}: begin it with accelerate")
    counts = torch.zeros(ranks, dtype=torch.int64, device=accelerator.device)
    counts[accelerator.process_index] = 1
    dist.all_reduce(counts)
    if counts.tolist() != [1] * ranks:
        raise ConfigError(f"accelerate's processes have the numbers {counts.tolist()} times each, not once: set RANK anew")


def _check_precision(accelerator: Any, precision: str) -> None:
    inner: Mapping[str, Any] = {}
    if _is(accelerator, "DEEPSPEED"):
        inner = accelerator.state.deepspeed_plugin.deepspeed_config
    enabled = [name for name in ("bf16", "fp16") if _flag(inner.get(name))]
    found = enabled[0] if enabled else accelerator.mixed_precision
    wanted = "no" if precision == "fp32" else "bf16"
    if found != wanted:
        raise ConfigError(
            f'precision = "{precision}": accelerate computes in mixed precision "{found}": give '
            f'Accelerator(mixed_precision="{wanted}"), or `accelerate launch --mixed_precision {wanted}`'
        )


def _flag(section: Any) -> bool:
    return isinstance(section, Mapping) and section.get("enabled") in (True, "true")


def _is(accelerator: Any, name: str) -> bool:
    return str(getattr(accelerator.distributed_type, "value", "")) == name


def _set_batch_size(accelerator: Any, batches: TrainingBatches) -> None:
    """Tell DeepSpeed the rows of a batch, which a DataLoader of ready batches does not say."""
    settings = accelerator.state.deepspeed_plugin.deepspeed_config
    if settings.get("train_micro_batch_size_per_gpu", "auto") == "auto":
        settings["train_micro_batch_size_per_gpu"] = batches.largest


def _check_wrapper(model: nn.Module, kind: Kind, ranks: int) -> None:
    """Raises ConfigError unless the model is wrapped as requested, over all ranks."""
    inner = getattr(model, "_orig_mod", model)  # accelerate compiles what it has wrapped
    assert isinstance(inner, nn.Module)
    model = inner
    if kind == "deepspeed":
        engine = getattr(sys.modules.get("deepspeed"), "DeepSpeedEngine", None)
        as_requested = engine is not None and isinstance(model, engine) and model.dp_world_size == ranks
    elif kind == "fsdp" and isinstance(model, FSDPModule):
        meshes = [p.device_mesh.size() for p in model.parameters() if isinstance(p, DTensor)]
        as_requested = bool(meshes) and len(meshes) == len(list(model.parameters())) and set(meshes) == {ranks}
    elif kind == "fsdp":
        as_requested = isinstance(model, FullyShardedDataParallel) and dist.get_world_size(model.process_group) == ranks
    elif kind == "ddp":
        as_requested = isinstance(model, DistributedDataParallel) and dist.get_world_size(model.process_group) == ranks
    else:
        as_requested = not isinstance(model, (DistributedDataParallel, FullyShardedDataParallel, FSDPModule))
    if not as_requested:
        raise ConfigError(
            f"{kind} on {ranks} ranks was asked for, and accelerator.prepare returned a {type(model).__name__}: give the model "
            "to prepare in training mode, and not prepared before (device_placement and evaluation_mode as they are)"
        )
