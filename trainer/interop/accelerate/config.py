"""Converts an `accelerate` config file to settings of a run: each of its keys becomes one, or is named as having none.

The keys are those of accelerate 1.10 to 1.15 (its ClusterConfig). They say how a model is parallelised and not what is
trained: model, data, batch and optimizer stand in the script that `accelerate launch` starts, and here in a run's own TOML.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w

from mikoshi.trainer.config.engine import EngineSection
from mikoshi.trainer.config.run import OptimSection, ParallelSection
from mikoshi.trainer.config.toml import validate
from mikoshi.trainer.errors import ConfigError
from mikoshi.trainer.interop.accelerate.deepspeed import deepspeed
from mikoshi.trainer.interop.accelerate.keys import ALWAYS, FSDP_STRATEGIES, KEYS, LAUNCHING, OTHER_KINDS, PREFIXES
from mikoshi.trainer.interop.accelerate.read import ConfigTable, Conversion, read_yaml, safe, shown


def convert(path: Path) -> str:
    """Returns TOML for an accelerate config file: a `base` for runs.

    Its comments name what has no setting and how to start the run. Raises ConfigError for what no run can do.
    """
    table, out = read_yaml(path), Conversion()
    _check_names(table)
    processes = _process_count(table)
    kind = _kind(table)
    _precision(table, kind, out)
    out.set("parallel.zero", 0)  # one process or DDP, unless an engine sets more
    steps = None
    if kind in (readers := {"FSDP": _fsdp, "DEEPSPEED": deepspeed, "MEGATRON_LM": _megatron}):
        steps = readers[kind](table, out)
    _parallelism(table, out, processes)
    _compiled(table, out)
    start = _start(table, processes, kind)
    out.notes += _batch(steps, out, processes)
    _check(out, processes, path)
    unsupported = [*out.unsupported, *_explained(table), *(f"{safe(key)} = {shown(value)}" for key, value in table.unused())]
    return _text(path, out, unsupported, start)


def _check_names(config: ConfigTable) -> None:
    """Raises ConfigError for a misspelt key of accelerate, which would be lost otherwise."""
    for section, prefix in PREFIXES.items():
        table = config.values.get(section) if section else config.values
        known = KEYS[section].split()
        for key in table if isinstance(table, Mapping) else ():
            plain = str(key).removeprefix(prefix)
            near = difflib.get_close_matches(plain, known, 1, 0.8) if plain not in known else []
            if near:
                where = ".".join(part for part in (section, safe(str(key))) if part)
                right = ".".join(part for part in (section, prefix + near[0]) if part)
                raise ConfigError(f"{config.path}: {where}: not a key of accelerate; did you mean {right}?")


def _process_count(table: ConfigTable) -> int | None:
    """Returns the number of processes, or None if the file leaves that to the command line."""
    if table.text("compute_environment", "LOCAL_MACHINE") != "LOCAL_MACHINE":
        raise table.error("compute_environment", "SageMaker is no cluster of ours: give the file of LOCAL_MACHINE")
    count = table.count("num_processes", None, least=-1)
    return None if count in (None, -1) else count


def _kind(table: ConfigTable) -> str:
    kind = table.text("distributed_type", "NO").upper()
    if kind in OTHER_KINDS:
        raise table.error(
            "distributed_type", "only CUDA GPUs and CPUs carry a run: use MULTI_GPU, FSDP, DEEPSPEED or MULTI_CPU"
        )
    if kind not in ("NO", "MULTI_CPU", "MULTI_GPU", "FSDP", "DEEPSPEED", "MEGATRON_LM"):
        raise table.error("distributed_type", "none of NO, MULTI_CPU, MULTI_GPU, FSDP, DEEPSPEED, MEGATRON_LM")
    return kind


def _precision(table: ConfigTable, kind: str, out: Conversion) -> None:
    mixed = table.text("mixed_precision", "no").lower()
    if table.flag("fp16"):  # files of accelerate before 0.5
        mixed = "fp16"
    if mixed == "fp16":
        raise table.error(
            "mixed_precision", "fp16 needs loss scaling, which no run here does: set mixed_precision: bf16", "fp16"
        )
    if mixed == "fp8" and kind != "MEGATRON_LM":
        raise table.error("mixed_precision", "only Megatron's engine computes in FP8: use MEGATRON_LM, or bf16")
    if mixed not in ("no", "bf16", "fp8"):
        raise table.error("mixed_precision", "none of no, bf16, fp8")
    out.set("engine.precision", "fp32" if mixed == "no" else "bf16")
    if mixed == "fp8":
        out.set("engine.megatron.fp8", True)
    if table.flag("use_cpu") or kind == "MULTI_CPU":
        out.set("engine.device", "cpu")


def _fsdp(table: ConfigTable, out: Conversion) -> int | None:
    fsdp = table.section("fsdp_config", "fsdp_")
    reshard, strategy = fsdp.get("fsdp_reshard_after_forward"), fsdp.get("fsdp_sharding_strategy")
    if fsdp.count("fsdp_version", 1) == 2:
        if strategy is not None:
            raise fsdp.error("fsdp_sharding_strategy", "is of FSDP1: with fsdp_version: 2 use fsdp_reshard_after_forward")
        out.set("parallel.zero", 3 if fsdp.as_flag("fsdp_reshard_after_forward", reshard, True) else 2)
    else:
        # Versions before 1.4 call it fsdp_sharding_strategy, and number the strategies from 1.
        name = str(strategy if strategy is not None else reshard if isinstance(reshard, str) else "FULL_SHARD").upper()
        numbered = list(FSDP_STRATEGIES)
        name = numbered[int(name) - 1] if name in map(str, range(1, len(numbered) + 1)) else name
        if name not in FSDP_STRATEGIES:
            raise fsdp.error("fsdp_reshard_after_forward", f"none of {', '.join(FSDP_STRATEGIES)}", name)
        zero, hybrid = FSDP_STRATEGIES[name]
        out.set("parallel.zero", zero)
        machines = table.peek_count("num_machines", 1)
        if hybrid and machines > 1:
            out.set("parallel.replicas", machines)
    if fsdp.flag("fsdp_offload_params"):
        out.set("parallel.offload", "optimizer")
    if fsdp.flag("fsdp_activation_checkpointing"):
        out.set("engine.recompute", "full")
    if fsdp.flag("fsdp_activation_checkpointing_offload"):
        raise fsdp.error(
            "fsdp_activation_checkpointing_offload", "activations are made again, never kept on the host: set false"
        )
    return None


def _megatron(table: ConfigTable, out: Conversion) -> int | None:
    megatron = table.section("megatron_lm_config", "megatron_lm_")
    out.set("engine.kind", "megatron")
    for theirs, ours in (
        ("tp_degree", "tp"), ("pp_degree", "pp"), ("context_parallel_size", "cp"), ("expert_model_parallel_size", "ep"),
        ("expert_tensor_parallel_size", "expert_tp"),
    ):  # fmt: skip
        degree = megatron.count(f"megatron_lm_{theirs}", None)
        if degree is not None and (degree > 1 or ours in ("tp", "pp")):
            out.set(f"parallel.{ours}", degree)
    out.set("parallel.zero", 1 if megatron.flag("megatron_lm_use_distributed_optimizer") else 0)
    out.set("optim.clip", megatron.number("megatron_lm_gradient_clipping", 1.0))
    granularity = megatron.text("megatron_lm_recompute_granularity", "")
    if granularity not in ("", "selective", "full"):
        raise megatron.error("megatron_lm_recompute_granularity", "neither selective nor full", granularity)
    if granularity or megatron.flag("megatron_lm_recompute_activations"):
        out.set("engine.recompute", granularity or "selective")
    if megatron.flag("megatron_lm_optimizer_cpu_offload"):
        out.set("parallel.offload", "optimizer")
    for name in ("megatron_lm_attention_dropout", "megatron_lm_hidden_dropout"):
        if megatron.number(name, 0.0):
            raise megatron.error(name, "there is no dropout here, so that every engine computes the same: set 0")
    return megatron.count("megatron_lm_num_micro_batches", None)


def _parallelism(table: ConfigTable, out: Conversion, processes: int | None) -> None:
    part = table.section("parallelism_config", "parallelism_config_")
    sizes = {
        name: part.count(f"parallelism_config_{name}_size", 1) or 1 for name in ("dp_replicate", "dp_shard", "tp", "cp", "sp")
    }
    strategy = part.text("parallelism_config_cp_comm_strategy", "allgather")
    total = 1
    for size in sizes.values():
        total *= size
    if total == 1:
        return
    if processes is not None and total != processes:
        degrees = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
        raise part.error("", f"{degrees} = {total} ranks, and num_processes is {processes}: make them agree")
    if sizes["cp"] > 1 and sizes["sp"] > 1:
        raise part.error(
            "parallelism_config_sp_size", "cp_size and sp_size both split rows of tokens: leave one at 1", sizes["sp"]
        )
    if sizes["tp"] > 1:
        out.set("parallel.tp", sizes["tp"])
    if sizes["cp"] * sizes["sp"] > 1:
        out.set("parallel.cp", sizes["cp"] * sizes["sp"])
        kind = "ulysses" if sizes["sp"] > 1 else "ring" if strategy == "alltoall" else "all-gather"
        out.set("parallel.context_kind", kind)
        if kind == "ring":
            out.notes.append('parallel.context_kind = "ring" needs data.document_mask = false; "all-gather" does not')
    if sizes["dp_replicate"] > 1 and sizes["dp_shard"] == 1:
        out.set("parallel.zero", 0)
    elif sizes["dp_replicate"] > 1:
        out.set("parallel.replicas", sizes["dp_replicate"])


def _compiled(table: ConfigTable, out: Conversion) -> None:
    dynamo = table.section("dynamo_config", "dynamo_")
    backend = table.text("dynamo_backend", dynamo.text("dynamo_backend", "no")).upper()
    if backend == "INDUCTOR":
        out.set("engine.compile", "on")
    elif backend != "NO":
        raise dynamo.error("dynamo_backend", "blocks are compiled by inductor or not at all: use INDUCTOR or NO", backend)


def _start(table: ConfigTable, processes: int | None, kind: str) -> list[str]:
    """Returns the command that starts a run on the machines that the file describes."""
    machines = table.count("num_machines", 1) or 1
    address, port = table.text("main_process_ip", ""), table.count("main_process_port", None, least=0)
    gpus = table.text("gpu_ids", "all")
    for key in LAUNCHING:
        table.get(key)
    if kind == "NO" and processes is None:
        processes = 1
    if machines > 1:
        if processes is not None and processes % machines:
            raise table.error(
                "num_processes", f"does not come out even on num_machines = {machines}: use a multiple", processes
            )
        each = "" if processes is None else f" --set cluster.ranks={processes // machines}"
        met = (
            f" (main_process_ip {shown(address)}{'' if port is None else f', port {port}'}: ranks meet by themselves)"
            if address
            else ""
        )
        return [f"mikoshi submit run.toml --on CLUSTER --nodes {machines}{each}{met}"]
    chosen = "" if gpus == "all" else f"CUDA_VISIBLE_DEVICES={gpus} " if re.fullmatch(r"[\d,]+", gpus) else ""
    return [f"{chosen}mikoshi train run.toml{'' if processes is None else f' --ranks {processes}'}"]


def _batch(steps: int | None, out: Conversion, processes: int | None) -> list[str]:
    """Returns a note on the batch size, which is a run's setting here and in accelerate the script's times the file's."""
    if not steps or steps == 1:
        return []
    parallel = out.values["parallel"]
    inner = parallel.get("tp", 1) * parallel.get("pp", 1) * parallel.get("cp", 1)
    ranks = "data ranks" if processes is None else f"{processes // inner} data ranks"
    return [f"train.micro_batch = the script's batch size, train.global_batch = that x {steps} (accumulated) x {ranks}"]


def _check(out: Conversion, processes: int | None, path: Path) -> None:
    """Raises ConfigError if the settings contradict each other."""
    for name, model in (("parallel", ParallelSection), ("engine", EngineSection), ("optim", OptimSection)):
        validate(model, out.values.get(name, {}), {})
    parallel = out.values["parallel"]
    inner = parallel.get("tp", 1) * parallel.get("pp", 1) * parallel.get("cp", 1)
    if processes is not None and processes % inner:
        raise ConfigError(f"{path}: num_processes = {processes}: tp x pp x cp = {inner} does not divide it: use a multiple")
    data = 1 if processes is None else processes // inner
    if processes is not None and data % parallel.get("replicas", 1):
        raise ConfigError(
            f"{path}: num_processes = {processes}: {data} data ranks are no multiple of {parallel['replicas']} replicas"
        )


def _explained(table: ConfigTable) -> list[str]:
    """Returns lines for keys without a setting that there is a known reason for."""
    return [f"{safe(key)} = {shown(value)}: {why}" for key, value, why in table.explained(ALWAYS)]


def _text(path: Path, out: Conversion, unsupported: list[str], start: list[str]) -> str:
    lines = [f'# From {shown(str(path))}, a config of accelerate. A run takes it as base = ["this file", ...].', "# Start:"]
    lines += [f"#   {line}" for line in start]
    if out.notes:
        lines += ["# To be set in the run:", *(f"#   {note}" for note in out.notes)]
    if unsupported:
        lines += ["# Without a setting here:", *(f"#   {line}" for line in unsupported)]
    ordered: Mapping[str, Any] = {key: out.values[key] for key in ("optim", "parallel", "engine") if key in out.values}
    return "\n".join(lines) + "\n\n" + tomli_w.dumps(ordered)
