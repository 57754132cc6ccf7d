"""Converts the DeepSpeed part of an accelerate config, with the JSON that it names, to settings of a run.

What a run has a setting for becomes that setting, what tunes DeepSpeed is passed on, and the rest is reported.
"""

from __future__ import annotations

from pathlib import Path

from mikoshi.trainer.engines.deepspeed.settings import split_settings
from mikoshi.trainer.errors import ConfigError
from mikoshi.trainer.interop.accelerate.read import ConfigTable, Conversion, read_json, safe, shown

_ADAM = {"lr": 1e-3, "eps": 1e-8, "weight_decay": 0.0}
"""Defaults of DeepSpeed's Adam and AdamW; betas are 0.9 and 0.999."""

_SCHEDULES = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}


def deepspeed(table: ConfigTable, out: Conversion) -> int | None:
    """Set what a run has settings for; returns the steps of gradient accumulation.

    Returns None if they are not given, or if the whole batch is. Raises ConfigError.
    """
    plugin = table.section("deepspeed_config", "")
    out.set("engine.kind", "deepspeed")
    ds_config, name = ConfigTable({}, "", Path()), plugin.text("deepspeed_config_file", "")
    if name and name != "none":
        ds_config = read_json(plugin, "deepspeed_config_file", name)
    zero = ds_config.section("zero_optimization", "")
    for part, fp in (("fp16", ds_config.section("fp16", "")), ("bf16", ds_config.section("bf16", ""))):
        if fp.flag("enabled") and part == "fp16":
            raise fp.error("enabled", "fp16 needs loss scaling, which no run here does: use bf16")
        if fp.flag("enabled"):
            out.set("engine.precision", "bf16")
    stage = zero.count("stage", 0 if name else None, least=0, most=3)
    out.set("parallel.zero", plugin.count("zero_stage", 2 if stage is None else stage, least=0, most=3))
    _offload(plugin, zero, out)
    _plus_plus(zero, out)
    clip = plugin.number("gradient_clipping", ds_config.number("gradient_clipping", None))
    if clip is not None:
        out.set("optim.clip", clip)
    _optimizer(ds_config, out)
    _schedule(ds_config, out)
    steps = plugin.count("gradient_accumulation_steps", ds_config.count("gradient_accumulation_steps", None))
    rows = ds_config.count("train_batch_size", None)
    micro = ds_config.count("train_micro_batch_size_per_gpu", None)
    sizes = {"train.global_batch": rows, "train.micro_batch": micro}
    out.notes += [f"{key} = {value}, as {ds_config.path.name} has it" for key, value in sizes.items() if value is not None]
    _remaining(ds_config, out)
    return steps if rows is None else None


def _offload(plugin: ConfigTable, zero: ConfigTable, out: Conversion) -> None:
    folders: list[str] = []
    for kind, theirs, before in (("optimizer", "optimizer", "cpu_offload"), ("parameters", "param", "cpu_offload_param")):
        offload = zero.section(f"offload_{theirs}", "")
        usual = offload.text("device", "cpu" if zero.flag(before) else "none")
        device = plugin.text(f"offload_{theirs}_device", usual).lower()
        if device not in ("none", "cpu", "nvme"):
            raise plugin.error(f"offload_{theirs}_device", "none of none, cpu, nvme", device)
        if device != "none":
            out.set(f"engine.deepspeed.offload_{kind}", device)
        folder = plugin.text(f"offload_{theirs}_nvme_path", offload.text("nvme_path", ""))
        if device == "nvme" and folder:
            folders.append(folder)
            if folders[0] != folder:
                raise plugin.error(f"offload_{theirs}_nvme_path", f"both go to one folder: use {folders[0]!r} twice", folder)
            out.set("engine.deepspeed.nvme", folder)


def _plus_plus(zero: ConfigTable, out: Conversion) -> None:
    group = zero.count("zero_hpz_partition_size", None)
    if group is not None and group > 1:
        out.set("engine.deepspeed.hpz", group)
    for name in ("quantized_weights", "quantized_gradients"):
        if zero.flag(f"zero_{name}"):
            out.set(f"engine.deepspeed.{name}", True)


def _optimizer(inner: ConfigTable, out: Conversion) -> None:
    """Convert AdamW; another optimizer is reported with all its parameters."""
    section = inner.section("optimizer", "")
    kind = section.text("type", "AdamW").lower()
    if kind not in ("adamw", "adam", "auto"):  # by default DeepSpeed's Adam decays as AdamW does
        section.used.discard("type")
        return
    params = section.section("params", "")
    named = "type" in section.values  # then missing values are DeepSpeed's defaults, not the run's
    for name, usual in _ADAM.items():
        value = params.number(name, usual if named and name not in params.values else None)
        if value is not None:
            out.set(f"optim.{name}", value)
    betas = params.get("betas")
    if isinstance(betas, list):
        out.set("optim.betas", betas)
    elif betas is None and named:
        out.set("optim.betas", [0.9, 0.999])
    elif betas not in (None, "auto"):
        raise params.error("betas", "two numbers are expected")


def _schedule(inner: ConfigTable, out: Conversion) -> None:
    """Add a note: a schedule depends on the length of the run, which the run's own config says."""
    section = inner.section("scheduler", "")
    kind = section.text("type", "auto")
    if kind not in _SCHEDULES:
        section.used.discard("type")
        return
    params = section.section("params", "")
    settings = [f'optim.schedule.kind = "{_SCHEDULES[kind]}"']
    for theirs, key in (("warmup_num_steps", "optim.schedule.warmup"), ("total_num_steps", "train.steps")):
        count = params.count(theirs, None, least=0)
        if count is not None:
            settings.append(f"{key} = {count}")
    final = params.number("cos_min_ratio", 0.0)
    if kind != "WarmupLR":
        settings.append(f"optim.schedule.final = {final}")
    largest = params.number("warmup_max_lr", None)
    if largest is not None:
        settings.append(f"optim.lr = {largest}")
    out.notes.append(f"{', '.join(settings)}, as the scheduler {kind} has it")


def _remaining(inner: ConfigTable, out: Conversion) -> None:
    """Write what tunes DeepSpeed into the base, as the JSON may say more than a run can take."""
    try:
        settings, refused = split_settings(inner.values, _used_keys(inner))
    except ConfigError as error:
        raise ConfigError(f"{inner.path}: {error}") from None
    if settings:
        out.set("engine.deepspeed.settings", settings)
    out.unsupported += [f"{safe(key)} = {shown(value)}: {why}" for key, value, why in refused]


def _used_keys(table: ConfigTable) -> set[str]:
    """Returns the dotted keys of a file that were used."""
    keys = {".".join(part for part in (table.name, key) if part) for key in table.used}
    return keys.union(*(_used_keys(part) for part in table.parts))
