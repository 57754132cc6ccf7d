"""accelerator.prepare, and then a look at what came out of it: what was asked for is what trains, or there is an error.

Accelerate drops to less in silence: with `cpu=True` a DeepSpeed or FSDP plugin becomes plain DDP; without it FSDP2 on CPUs is
nothing at all, and every process is rank 0 of 1 and writes the same checkpoint; and `accelerate launch --cpu` starts one
process, however many it was asked for.

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
from mikoshi.trainer.interop.accelerate.start import lone_of_several, ranks_told
from mikoshi.trainer.interop.dataloader import TrainingBatches
from mikoshi.trainer.train.rank import end_now

Kind = Literal["alone", "ddp", "fsdp", "deepspeed"]

_ON_CPU = (
    "on GPUs leave cpu=True, --cpu and use_cpu out; on CPUs do so too, set DS_ACCELERATOR=cpu and give "
    'kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")]'
)
_NO_FSDP = "accelerate's FSDP needs GPUs: leave cpu=True, --cpu and use_cpu out there, or train on CPUs with `mikoshi train`"


def prepare(
    accelerator: Any, *objects: Any, ranks: int | None = None, precision: Literal["fp32", "bf16"] | None = None
) -> tuple[Any, ...]:
    """What `accelerator.prepare(*objects)` returns, which is what the accelerator was asked for, or ConfigError.

    Asked for is the plugin that it was given, or `accelerate launch`, and as many processes as the launcher says, or `ranks`.
    `precision`: checked too where it is given. Of `training_batches` among the objects DeepSpeed is told the size. Collective.
    """
    kind = _asked(told := _ranks(ranks))
    _check_processes(accelerator, kind, told)
    if precision is not None:
        _check_precision(accelerator, precision)
    batches = [one for one in objects if isinstance(one, TrainingBatches)]
    if kind == "deepspeed" and batches:
        _tell_size(accelerator, batches[0])
    out = accelerator.prepare(*objects)
    prepared = out if isinstance(out, tuple) else (out,)
    for before, after in zip(objects, prepared, strict=True):
        if isinstance(before, nn.Module):
            _check_wrapper(after, kind, told)
    steps = accelerator.gradient_accumulation_steps
    if batches and batches[0].micro_batches != steps:
        raise ConfigError(
            f"gradient_accumulation_steps = {steps}: training_batches gives {batches[0].micro_batches} batches a step: "
            f"use Accelerator(gradient_accumulation_steps={batches[0].micro_batches})"
        )
    return prepared


def finish(code: int = 0) -> NoReturn:
    """The end of a script that trained on several processes, after `accelerator.end_training()`: all wait for each other, then
    each is gone at once.

    An interpreter that ends by itself destroys DDP's reducer while it holds its lock, and with it gloo's group, which waits
    for a thread that waits for the lock: such a script may never end. What is registered with atexit is not run.
    """
    wait_for_all()
    end_now(code)


def _ranks(given: int | None) -> int:
    """Processes that there should be."""
    told = ranks_told(os.environ)
    if given is not None and told is not None and given != told:
        raise ConfigError(f"ranks = {given}: the launcher started {told}: start {given}, or leave ranks out")
    if told is None and (why := lone_of_several(os.environ)):
        raise ConfigError(why)
    if told is None and (given or 1) > 1:
        raise ConfigError(
            f"ranks = {given}: this is one process alone, with no RANK and WORLD_SIZE: start it with "
            f"`torchrun --nproc-per-node {given}`, or `accelerate launch --multi_gpu --num_processes {given}`"
        )
    return given or told or 1


def _asked(ranks: int) -> Kind:
    """By the plugin, which leaves word in the environment whether it was given to the Accelerator or to its launcher."""
    for kind, name in (("deepspeed", "DEEPSPEED"), ("fsdp", "FSDP")):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            return "deepspeed" if kind == "deepspeed" else "fsdp"
    return "alone" if ranks == 1 else "ddp"


def _check_processes(accelerator: Any, kind: Kind, ranks: int) -> None:
    """Raises ConfigError unless the processes know of each other, and accelerate of what was asked for."""
    found = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    here = f"accelerate's distributed_type is {found}, of {accelerator.num_processes} processes"
    wanted = {"deepspeed": ("DEEPSPEED",), "fsdp": ("FSDP",), "ddp": ("MULTI_GPU", "MULTI_CPU"), "alone": ("NO",)}[kind]
    if kind == "deepspeed" and found not in wanted:
        raise ConfigError(f"DeepSpeed was asked for, and {here}: what would train is plain DDP: {_ON_CPU}")
    if accelerator.num_processes != ranks:
        raise ConfigError(
            f"{ranks} processes were started, and {here}: each would train by itself and write over the others: "
            + (_NO_FSDP if kind == "fsdp" else "give Accelerator(cpu=True) on CPUs, or make the GPUs visible")
        )
    if kind == "fsdp" and found not in wanted:
        raise ConfigError(f"FSDP was asked for, and {here}: every process would hold the whole model: {_NO_FSDP}")
    if found not in wanted:
        raise ConfigError(f"{here}, and {' or '.join(wanted)} was expected: give Accelerator(cpu=True) on CPUs")
    number = os.environ.get("RANK")
    if number is not None and accelerator.process_index != int(number):
        raise ConfigError(f"RANK = {number}: accelerate takes this process for number {accelerator.process_index}")
    _check_numbers(accelerator, ranks)


def _check_numbers(accelerator: Any, ranks: int) -> None:
    """That no two processes have the same number."""
    if ranks == 1:
        return
    met = dist.get_world_size() if dist.is_initialized() else 1
    if met != ranks:
        raise ConfigError(f"{ranks} processes were started, and the process group is of {met}: begin it with accelerate")
    mine = torch.zeros(ranks, dtype=torch.int64, device=accelerator.device)
    mine[accelerator.process_index] = 1
    dist.all_reduce(mine)
    if mine.tolist() != [1] * ranks:
        raise ConfigError(f"accelerate's processes have the numbers {mine.tolist()} times each, not once: set RANK anew")


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


def _tell_size(accelerator: Any, batches: TrainingBatches) -> None:
    """DeepSpeed wants to know the rows of a batch, which a DataLoader of ready batches does not say."""
    settings = accelerator.state.deepspeed_plugin.deepspeed_config
    if settings.get("train_micro_batch_size_per_gpu", "auto") == "auto":
        settings["train_micro_batch_size_per_gpu"] = batches.largest


def _check_wrapper(model: nn.Module, kind: Kind, ranks: int) -> None:
    """Raises ConfigError unless the model is carried by what was asked for, over all ranks."""
    inner = getattr(model, "_orig_mod", model)  # accelerate compiles what it has wrapped
    assert isinstance(inner, nn.Module)
    model = inner
    if kind == "deepspeed":
        engine = getattr(sys.modules.get("deepspeed"), "DeepSpeedEngine", None)
        good = engine is not None and isinstance(model, engine) and model.dp_world_size == ranks
    elif kind == "fsdp" and isinstance(model, FSDPModule):
        meshes = [p.device_mesh.size() for p in model.parameters() if isinstance(p, DTensor)]
        good = bool(meshes) and len(meshes) == len(list(model.parameters())) and set(meshes) == {ranks}
    elif kind == "fsdp":
        good = isinstance(model, FullyShardedDataParallel) and dist.get_world_size(model.process_group) == ranks
    elif kind == "ddp":
        good = isinstance(model, DistributedDataParallel) and dist.get_world_size(model.process_group) == ranks
    else:
        good = not isinstance(model, (DistributedDataParallel, FullyShardedDataParallel, FSDPModule))
    if not good:
        raise ConfigError(
            f"{kind} on {ranks} ranks was asked for, and accelerator.prepare returned a {type(model).__name__}: give the model "
            "to prepare in training mode, and not prepared before (device_placement and evaluation_mode as they are)"
        )
