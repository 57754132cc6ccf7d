"""A user's own DeepSpeed settings: what tunes DeepSpeed is passed on, and what contradicts the run is refused by name."""

from __future__ import annotations

import difflib
import json
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from pydantic import NonNegativeInt, PositiveInt, TypeAdapter, ValidationError

from mikoshi.parallel.errors import LayoutError
from mikoshi.parallel.layout import Layout
from mikoshi.trainer.config.run import RunConfig
from mikoshi.trainer.engines.planned import plan_layout
from mikoshi.trainer.errors import ConfigError

_SWITCHES = (
    "wall_clock_breakdown", "memory_breakdown", "dump_state", "disable_python_gc",
    *(f"aio.{name}" for name in ("single_submit", "overlap_events", "use_gds")),
    *(f"zero_optimization.{name}" for name in (
        "contiguous_gradients", "reduce_scatter", "use_multi_rank_bucket_allreduce", "allgather_partitions", "overlap_comm",
        "round_robin_gradients", "parameter_alignment", "ignore_unused_parameters", "override_module_apply",
        "log_trace_cache_warnings", "enable_sanity_checks", "use_all_reduce_for_fetch_params", "allgather_sequential",
        "stage3_use_all_reduce_for_fetch_params", "stage3_allgather_sequential", "offload_param.pin_memory",
        *(f"offload_optimizer.{name}" for name in ("pin_memory", "pipeline_read", "pipeline_write", "fast_init")),
    )),
)  # fmt: skip
_LIMITS = (
    "prefetch_bucket_size", "param_persistence_threshold", "model_persistence_threshold", "max_live_parameters",
    "max_reuse_distance", "module_granularity_threshold",
)  # fmt: skip
_COUNTS = tuple(
    f"zero_optimization.{name}" for name in (
        "reduce_bucket_size", "allgather_bucket_size", "sub_group_size", *_LIMITS, *(f"stage3_{name}" for name in _LIMITS),
        "offload_optimizer.buffer_count", "offload_param.buffer_count", "offload_param.buffer_size", "offload_param.max_in_cpu",
    )
)  # fmt: skip
_POSITIVE = ("steps_per_print", "aio.block_size", "aio.queue_depth", "aio.intra_op_parallelism")
_STRINGS = ("log_level",)
_TABLES = ("flops_profiler", "comms_logger", "timers", "aio", "tensorboard", "csv_monitor", "comet")
"""Keys and tables that tune speed, memory and logging, and change neither what is computed nor what is written. Switches and
counts are checked here, strings and these tables by DeepSpeed."""

_FREE = frozenset((*_SWITCHES, *_COUNTS, *_POSITIVE, *_STRINGS))
_KINDS = {name: (TypeAdapter[Any](bool), "true or false is expected") for name in _SWITCHES} | {
    name: (TypeAdapter[Any](NonNegativeInt), "a whole number of at least 0 is expected") for name in _COUNTS
}
_KINDS |= {name: (TypeAdapter[Any](PositiveInt), "a whole number of at least 1 is expected") for name in _POSITIVE}

_OTHER_PLACES = {
    "scheduler": "the learning rate is optim.lr and optim.schedule's",
    "checkpoint": "checkpoints are the run's own ([checkpoint]); DeepSpeed's, which are pickles, are neither written nor read",
    "load_universal_checkpoint": "checkpoints are the run's own; DeepSpeed's, which are pickles, are not read",
    "nebula": "checkpoints are the run's own ([checkpoint])",
    "datastates_ckpt": "checkpoints are the run's own ([checkpoint])",
    "activation_checkpointing": "set engine.recompute",
    "elasticity": "a run goes on with another number of ranks by itself ([recovery])",
    "autotuning": "`mikoshi fit-batch` finds the micro-batch, `mikoshi compare` the layout",
    "tensor_parallel": 'set parallel.tp with engine.kind="native"',
    "pipeline": "set parallel.pp",
    "sequence_parallel_size": "set parallel.cp",
    "data_parallel_size": "the ranks that parallel.cp leaves over read other rows",
    "data_efficiency": "data are those of [data]",
    "curriculum_learning": "set data.warmup",
    "dataloader_drop_last": "data are those of [data]",
    "wandb": "set log.wandb",
    "optimizer": "set [optim]",
    "fp16": "engine.precision says it",
    "amp": "engine.precision says it",
    "torch_autocast": "engine.precision says it",
    "bf16": "set engine.precision; gradients add up and master weights are kept in fp32",
    "data_types": "gradients add up and master weights are kept in fp32",
    "compression_training": "weights are trained as they are",
    "quantize_training": "weights are trained as they are",
    "sparse_attention": "attention is the model's ([model])",
    "sparse_gradients": "gradients are dense",
    "progressive_layer_drop": "all layers are trained",
    "eigenvalue": "it steers quantisation alone, and weights are trained as they are",
    "seed": "set run.seed",
    "hybrid_engine": "it is for inference in between",
    "compile": 'set engine.compile with engine.kind="native"',
    "zero_optimization.elastic_checkpoint": "checkpoints are the run's own ([checkpoint])",
    "zero_optimization.load_from_fp32_weights": "checkpoints are the run's own ([checkpoint])",
    "zero_optimization.gather_16bit_weights_on_model_save": "checkpoints are the run's own ([checkpoint])",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": "checkpoints are the run's own ([checkpoint])",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": "checkpoints are the run's own ([checkpoint])",
    "zero_optimization.pipeline_loading_checkpoint": "checkpoints are the run's own ([checkpoint])",
    "zero_optimization.zenflow": "it updates weights at other steps than the run's",
    "zero_optimization.mics_shard_size": 'set parallel.replicas with engine.kind="native"',
    "zero_optimization.mics_hierarchical_params_gather": 'set parallel.replicas with engine.kind="native"',
    "zero_optimization.compute_grad_norm": "the norm is needed: the run records it, clips by it and is guarded by it",
    "zero_optimization.cpu_offload_use_pin_memory": "set zero_optimization.offload_optimizer.pin_memory",
    "zero_optimization.cpu_offload": "set engine.deepspeed.offload_optimizer",
    "zero_optimization.cpu_offload_param": "set engine.deepspeed.offload_parameters",
    "zero_optimization.offload_optimizer": "set engine.deepspeed.offload_optimizer; the whole of the step is taken there",
    "zero_optimization.offload_param": "set engine.deepspeed.offload_parameters",
}  # fmt: skip
"""Keys, with all below them, that a run sets elsewhere or does not have, and the reason."""


@dataclass(frozen=True)
class _RunValue:
    """What the run says about a DeepSpeed key.

    value: as the JSON has it.
    reason: which setting of the run decides it.
    instead: what to do.
    """

    value: Any
    reason: str
    instead: str


def user_settings(config: RunConfig, layout: Layout) -> dict[str, Any]:
    """Returns the user's DeepSpeed settings beyond the run's own sections.

    Raises ConfigError with one line a mistake.
    """
    section, out, wrong = config.engine.deepspeed, dict[str, Any](), list[str]()
    if section.config is not None:
        where = f"engine.deepspeed.config = {str(section.config)!r}"
        wrong += [f"{where}: {line}" for line in _collect(_read(section.config), config, layout, out)]
    wrong += [f"engine.deepspeed.settings: {line}" for line in _collect(section.settings, config, layout, out)]
    if wrong:
        raise ConfigError("\n".join(dict.fromkeys(wrong)))
    return out


def _collect(read: Mapping[str, Any], config: RunConfig, layout: Layout, out: dict[str, Any]) -> list[str]:
    """Put what tunes DeepSpeed into `out`; returns what is wrong with the rest."""
    run_values, disabled, wrong = _run_values(config, layout), _disabled_sections(read), list[str]()
    for key, value in leaves(read):
        if value == "auto" and (key in run_values or _tunes(key) or _other_place(key)):
            continue
        if key == "bf16.enabled" and config.engine.precision == "auto":  # decided later on the ranks, which check again
            continue
        if key in run_values:
            if not _same(value, run_values[key].value):
                expected = _of_batch(key, value, config, layout) or run_values[key]
                wrong.append(f"{key} = {json.dumps(value)}: {expected.reason}: {expected.instead}")
        elif _tunes(key):
            if why := _invalid(key, value):
                wrong.append(why)
            _set_dotted(out, key, value)
        elif key.partition(".")[0] not in disabled:
            wrong.append(_refusal(key, value, run_values))
    return wrong


def split_settings(read: Mapping[str, Any], converted: Container[str]) -> tuple[dict[str, Any], list[tuple[str, Any, str]]]:
    """Returns the part of a DeepSpeed JSON that engine.deepspeed.settings takes, and the rest as (key, value, reason).

    Raises ConfigError for a misspelt name or an impossible value.

    read: the JSON.
    converted: dotted keys that have become settings of the run already.
    """
    out, refused, disabled = dict[str, Any](), list[tuple[str, Any, str]](), _disabled_sections(read)
    known = {*_SAME_VALUE, *_FIXED, *_REWORDED}
    for key, value in leaves(read):
        if (
            key in converted
            or (value in ("auto", None) and (key in known or _tunes(key) or _other_place(key)))
            or (key in _FIXED and _same(value, _FIXED[key]))
        ):
            continue
        if _tunes(key):
            if why := _invalid(key, value):
                raise ConfigError(why)
            if _of_toml(value):
                _set_dotted(out, key, value)
            else:
                refused.append((key, value, "TOML has no such value"))
        elif key in _FIXED:
            refused.append((key, value, f"it is always {json.dumps(_FIXED[key])}"))
        elif key.partition(".")[0] not in disabled:
            why = "" if key in known else _refusal(key, value, known)
            if "did you mean" in why or "expected" in why:
                raise ConfigError(why)
            refused.append((key, value, _other_place(key) or "it has no place in a run"))
    return out, refused


def _tunes(key: str) -> bool:
    return key in _FREE or key.startswith(tuple(f"{table}." for table in _TABLES))


def _of_toml(value: Any) -> bool:
    if isinstance(value, list | dict):
        return all(_of_toml(item) for item in (value if isinstance(value, list) else value.values()))
    return value is not None and value == value and value not in (float("inf"), float("-inf"))


def _disabled_sections(read: Mapping[str, Any]) -> set[str]:
    """Returns the sections that are switched off, or left to the run ("auto")."""
    switched = {name.partition(".")[0] for name in (*_REWORDED, *_TABLES, *_OTHER_PLACES)} - {"zero_optimization", "optimizer"}
    return {
        name for name, table in read.items()
        if name in switched and isinstance(table, dict) and table.get("enabled") in (False, "auto")
    }  # fmt: skip


def _run_values(config: RunConfig, layout: Layout) -> dict[str, _RunValue]:
    """Returns the run's value for each DeepSpeed key."""
    section = config.engine.deepspeed
    home = (
        "cpu" if section.offload_optimizer == "none" and config.parallel.offload == "optimizer" else section.offload_optimizer
    )
    values = {
        "train.micro_batch": layout.micro_rows, "parallel.zero": layout.zero, "engine.deepspeed.offload_optimizer": home,
        "optim.betas": list(config.optim.betas), "engine.deepspeed.nvme": None if section.nvme is None else str(section.nvme),
    }  # fmt: skip
    run_values = {}
    for ds_key, key in _SAME_VALUE.items():
        value = values[key] if key in values else attrgetter(key)(config)
        run_values[ds_key] = _RunValue(value, _is(key, value), f"set {key}, or leave it out")
    accumulated = layout.micro_batches
    run_values["gradient_accumulation_steps"] = _RunValue(
        accumulated, _is("it", accumulated), "set train.micro_batch, or leave it out"
    )
    fixed = {
        ds_key: _RunValue(value, _is("it", value), "leave it out: it cannot be another") for ds_key, value in _FIXED.items()
    }
    kind = _RunValue("AdamW", 'optim.kind is "adamw"', "leave it out: no other goes with this engine")
    return run_values | fixed | {"optimizer.type": kind} | _precisions(config.engine.precision)


_SAME_VALUE = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_clipping": "optim.clip",
    "optimizer.params.lr": "optim.lr",
    "optimizer.params.betas": "optim.betas",
    "optimizer.params.eps": "optim.eps",
    "optimizer.params.weight_decay": "optim.weight_decay",
    "zero_optimization.stage": "parallel.zero",
    "zero_optimization.zero_hpz_partition_size": "engine.deepspeed.hpz",
    "zero_optimization.zero_quantized_weights": "engine.deepspeed.quantized_weights",
    "zero_optimization.zero_quantized_gradients": "engine.deepspeed.quantized_gradients",
    "zero_optimization.offload_optimizer.device": "engine.deepspeed.offload_optimizer",
    "zero_optimization.offload_optimizer.nvme_path": "engine.deepspeed.nvme",
    "zero_optimization.offload_param.device": "engine.deepspeed.offload_parameters",
    "zero_optimization.offload_param.nvme_path": "engine.deepspeed.nvme",
}
"""DeepSpeed's key -> the run's key with the same value."""

_REWORDED = (
    "gradient_accumulation_steps", "optimizer.type", "bf16.enabled", "fp16.enabled", "amp.enabled", "torch_autocast.enabled",
)  # fmt: skip
"""DeepSpeed's keys that a run sets under keys with other values."""

_FIXED = {
    "data_types.grad_accum_dtype": "fp32",
    "communication_data_type": "fp32",
    "seq_parallel_communication_data_type": "fp32",
    "prescale_gradients": False,
    "gradient_predivide_factor": 1.0,
    "gradient_allreduce_op": "mean",
    "managed_gradient_accumulation": True,
    "disable_allgather": False,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "zero_optimization.zero_quantized_nontrainable_weights": False,
    "zero_optimization.memory_efficient_linear": True,
}
"""Values that no setting of a run changes."""


def _precisions(precision: str) -> dict[str, _RunValue]:
    """Returns the run's values of the precision keys. fp16 is never on: no run scales its loss."""
    reason, other = _is("engine.precision", precision), "fp32" if precision == "bf16" else "bf16"
    instead = "leave it out" if precision == "bf16" else 'leave it out, or use engine.precision="bf16" in its place'
    run_values = {"bf16.enabled": _RunValue(precision == "bf16", reason, f'set engine.precision="{other}", or leave it out')}
    for name in ("fp16", "amp", "torch_autocast"):
        run_values[f"{name}.enabled"] = _RunValue(False, f'{reason}, which can be "fp32" or "bf16"', instead)
    return run_values


def _is(place: str, value: Any) -> str:
    return f"{place} is {json.dumps(value)}"


def _of_batch(key: str, value: Any, config: RunConfig, layout: Layout) -> _RunValue | None:
    """Returns the run's value of a key that train.micro_batch decides, with the train.micro_batch that gives `value`, if
    any.
    """
    names = {"train_micro_batch_size_per_gpu": "micro_rows", "gradient_accumulation_steps": "micro_batches"}
    if key not in names:
        return None
    rows = layout.micro_rows * layout.micro_batches
    reason = f"a rank's {rows} row(s) of a step go in {layout.micro_batches} micro-batch(es) of {layout.micro_rows}"
    for size in [n for n in range(1, rows + 1) if rows % n == 0]:
        train = config.train.model_copy(update={"micro_batch": size})
        try:
            other = plan_layout(config.model_copy(update={"train": train}), layout.world)
        except LayoutError:
            continue
        if _same(value, getattr(other, names[key])):
            return _RunValue(None, reason, f"set train.micro_batch={size}, or leave it out")
    return _RunValue(None, reason, "leave it out: no train.micro_batch gives that")


def _read(path: Path) -> dict[str, Any]:
    where = f"engine.deepspeed.config = {str(path)!r}"
    try:
        text = path.read_text(encoding="utf-8")
        read = json.loads(text, object_pairs_hook=_unique_keys)
    except OSError as error:
        start = "" if path.is_absolute() else f" (from the current folder, {Path.cwd()})"
        raise ConfigError(f"{where}: cannot be read: {error.strerror}{start}: give its full path") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not JSON: {error}") from None
    if not isinstance(read, dict):
        raise ConfigError(f"{where}: not a JSON object")
    return read


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if twice := sorted({key for key in keys if keys.count(key) > 1}):
        raise ValueError(f"{twice[0]!r} is there twice")
    return dict(pairs)


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields dotted keys and values of nested tables. An empty table yields nothing."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _set_dotted(tree: dict[str, Any], key: str, value: Any) -> None:
    *path, leaf = key.split(".")
    for part in path:
        if not isinstance(tree.get(part), dict):  # the last value wins
            tree[part] = {}
        tree = tree[part]
    tree[leaf] = value


def _same(value: Any, expected: Any) -> bool:
    if isinstance(value, bool) or isinstance(expected, bool):
        return value is expected
    if isinstance(value, str) and isinstance(expected, str):
        return value.lower() == expected.lower()
    return bool(value == expected)


def _invalid(key: str, value: Any) -> str | None:
    """Returns why a value is not valid for its key. DeepSpeed would find that only after ranks have started."""
    if key not in _KINDS or (value is None and key == "zero_optimization.overlap_comm"):
        return None
    kind, expected = _KINDS[key]
    try:
        kind.validate_python(value)  # as lenient as DeepSpeed: 5e8 is a whole number
    except ValidationError:
        return f"{key} = {json.dumps(value)}: {expected}"
    return None


def _other_place(key: str) -> str | None:
    """Returns why a key, or the innermost table around it with a reason, does not belong in DeepSpeed's settings."""
    parts = key.split(".")
    sections = (".".join(parts[:depth]) for depth in range(len(parts), 0, -1))
    return next((_OTHER_PLACES[section] for section in sections if section in _OTHER_PLACES), None)


def _refusal(key: str, value: Any, run_keys: Iterable[str]) -> str:
    """Returns why a key is not taken: it belongs elsewhere, should be a table or a value, or is misspelt."""
    parts = key.split(".")
    sections = [".".join(parts[:depth]) for depth in range(1, len(parts) + 1)]
    values = {*run_keys, *_FREE}
    tables = {name.rpartition(".")[0] for name in values} | {*_TABLES, "zero_optimization"}
    if key in tables:
        return f"{key} = {json.dumps(value)}: a table is expected"
    if reason := _other_place(key):
        return f"{key}: leave it out: {reason}"
    if value_key := next((name for name in sections if name in values), None):
        return f"{value_key}: a value is expected, not a table"
    known = {*values, *tables, *_OTHER_PLACES}
    section = next(name for name in sections if name not in known)
    table, _, leaf = section.rpartition(".")
    beside = sorted(name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == table)
    near = difflib.get_close_matches(leaf, beside, 1, 0.6)
    hint = f"; did you mean {f'{table}.{near[0]}'.lstrip('.')}?" if near else ": leave it out"
    return f"{section}: not known{hint}"
