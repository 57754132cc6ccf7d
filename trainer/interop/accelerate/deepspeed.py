"""What an accelerate config says of DeepSpeed, with the JSON that it names, as settings of a run: what a run has a setting for
becomes that, what tunes DeepSpeed goes along, and the rest is told."""

from __future__ import annotations

from pathlib import Path

from mikoshi.trainer.engines.deepspeed.settings import apart
from mikoshi.trainer.errors import ConfigError
from mikoshi.trainer.interop.accelerate.read import Asked, Found, read_json, safe, shown

_ADAM = {"lr": 1e-3, "eps": 1e-8, "weight_decay": 0.0}
"""What DeepSpeed's Adam and AdamW have where nothing else is said; betas: 0.9 and 0.999."""

_SCHEDULES = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}


def deepspeed(asked: Asked, found: Found) -> int | None:
    """Sets what a run has settings for; the steps of accumulation, None where they are not said, or the batch is said whole.
    Raises ConfigError."""
    own = asked.below("deepspeed_config", "")
    found.set("engine.kind", "deepspeed")
    inner, name = Asked({}, "", Path()), own.text("deepspeed_config_file", "")
    if name and name != "none":
        inner = read_json(own, "deepspeed_config_file", name)
    zero = inner.below("zero_optimization", "")
    for part, fp in (("fp16", inner.below("fp16", "")), ("bf16", inner.below("bf16", ""))):
        if fp.flag("enabled") and part == "fp16":
            raise fp.error("enabled", "fp16 needs loss scaling, which no run here does: use bf16")
        if fp.flag("enabled"):
            found.set("engine.precision", "bf16")
    stage = zero.count("stage", 0 if name else None, least=0, most=3)
    found.set("parallel.zero", own.count("zero_stage", 2 if stage is None else stage, least=0, most=3))
    _offload(own, zero, found)
    _plus_plus(zero, found)
    clip = own.number("gradient_clipping", inner.number("gradient_clipping", None))
    if clip is not None:
        found.set("optim.clip", clip)
    _optimizer(inner, found)
    _schedule(inner, found)
    steps = own.count("gradient_accumulation_steps", inner.count("gradient_accumulation_steps", None))
    rows = inner.count("train_batch_size", None)
    micro = inner.count("train_micro_batch_size_per_gpu", None)
    told = {"train.global_batch": rows, "train.micro_batch": micro}
    found.notes += [f"{key} = {value}, as {inner.path.name} has it" for key, value in told.items() if value is not None]
    _rest(inner, found)
    return steps if rows is None else None


def _offload(own: Asked, zero: Asked, found: Found) -> None:
    folders: list[str] = []
    for ours, theirs, before in (("optimizer", "optimizer", "cpu_offload"), ("parameters", "param", "cpu_offload_param")):
        place = zero.below(f"offload_{theirs}", "")
        usual = place.text("device", "cpu" if zero.flag(before) else "none")
        device = own.text(f"offload_{theirs}_device", usual).lower()
        if device not in ("none", "cpu", "nvme"):
            raise own.error(f"offload_{theirs}_device", "none of none, cpu, nvme", device)
        if device != "none":
            found.set(f"engine.deepspeed.offload_{ours}", device)
        folder = own.text(f"offload_{theirs}_nvme_path", place.text("nvme_path", ""))
        if device == "nvme" and folder:
            folders.append(folder)
            if folders[0] != folder:
                raise own.error(f"offload_{theirs}_nvme_path", f"both go to one folder: use {folders[0]!r} twice", folder)
            found.set("engine.deepspeed.nvme", folder)


def _plus_plus(zero: Asked, found: Found) -> None:
    group = zero.count("zero_hpz_partition_size", None)
    if group is not None and group > 1:
        found.set("engine.deepspeed.hpz", group)
    for name in ("quantized_weights", "quantized_gradients"):
        if zero.flag(f"zero_{name}"):
            found.set(f"engine.deepspeed.{name}", True)


def _optimizer(inner: Asked, found: Found) -> None:
    """AdamW's; another optimizer is left, with all that it is given."""
    section = inner.below("optimizer", "")
    kind = section.text("type", "AdamW").lower()
    if kind not in ("adamw", "adam", "auto"):  # by default DeepSpeed's Adam decays as AdamW does
        section.taken.discard("type")
        return
    params = section.below("params", "")
    named = "type" in section.values  # what it does not say is then what DeepSpeed's optimizers have, not what a run has
    for name, usual in _ADAM.items():
        value = params.number(name, usual if named and name not in params.values else None)
        if value is not None:
            found.set(f"optim.{name}", value)
    betas = params.take("betas")
    if isinstance(betas, list):
        found.set("optim.betas", betas)
    elif betas is None and named:
        found.set("optim.betas", [0.9, 0.999])
    elif betas not in (None, "auto"):
        raise params.error("betas", "two numbers are expected")


def _schedule(inner: Asked, found: Found) -> None:
    """A note: how long a run is stands in the run, and a schedule is of its length."""
    section = inner.below("scheduler", "")
    kind = section.text("type", "auto")
    if kind not in _SCHEDULES:
        section.taken.discard("type")
        return
    params = section.below("params", "")
    told = [f'optim.schedule.kind = "{_SCHEDULES[kind]}"']
    for theirs, ours in (("warmup_num_steps", "optim.schedule.warmup"), ("total_num_steps", "train.steps")):
        count = params.count(theirs, None, least=0)
        if count is not None:
            told.append(f"{ours} = {count}")
    final = params.number("cos_min_ratio", 0.0)
    if kind != "WarmupLR":
        told.append(f"optim.schedule.final = {final}")
    largest = params.number("warmup_max_lr", None)
    if largest is not None:
        told.append(f"optim.lr = {largest}")
    found.notes.append(f"{', '.join(told)}, as the scheduler {kind} has it")


def _rest(inner: Asked, found: Found) -> None:
    """What tunes DeepSpeed is written out in the base, and not left to the JSON, which says more than a run can take."""
    try:
        settings, left = apart(inner.values, _taken(inner))
    except ConfigError as error:
        raise ConfigError(f"{inner.path}: {error}") from None
    if settings:
        found.set("engine.deepspeed.settings", settings)
    found.left += [f"{safe(key)} = {shown(value)}: {why}" for key, value, why in left]


def _taken(asked: Asked) -> set[str]:
    """Dotted keys of a file that were asked for."""
    mine = {".".join(part for part in (asked.place, key) if part) for key in asked.taken}
    return mine.union(*(_taken(part) for part in asked.parts))
