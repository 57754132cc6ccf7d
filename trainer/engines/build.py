"""Engines behind one protocol, chosen by `engine.kind`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from mikoshi.parallel.layout import Layout
from mikoshi.parallel.mesh import make_groups
from mikoshi.trainer.config.run import RunConfig
from mikoshi.trainer.engines.base import Engine
from mikoshi.trainer.engines.limits import refuse
from mikoshi.trainer.engines.native.engine import NativeEngine, fill_initial
from mikoshi.trainer.engines.parts import build_parts
from mikoshi.trainer.engines.precision import settled
from mikoshi.trainer.errors import ConfigError


def leave_empty(*_: Any) -> None:
    """For `fill_weights`: they come from a checkpoint, or have no memory."""


def _refuse_alike(config: RunConfig, layout: Layout, device: torch.device) -> None:
    """What one rank knows of its node, a disk or a compiler that is not there, ends all of them."""
    if config.engine.kind == "native" and layout.context_kind != "ring":  # nothing else is not known to all before
        return
    told: list[str] = [""] * layout.world
    mine = ""
    try:
        refuse(config, layout, device.type == "cuda")
    except ConfigError as error:
        mine = str(error)
    dist.all_gather_object(told, mine)
    if first := next(filter(None, told), ""):
        raise ConfigError(first)


def build_engine(
    config: RunConfig, layout: Layout, device: torch.device, fill_weights: Callable[..., None] = fill_initial
) -> Engine:
    """The engine of the config, its weights initialised. Needs the process group of `layout.world` ranks; collective. Raises
    ConfigError on all ranks for what the engine cannot do: what only they know, their device, no submitting machine could."""
    config, _ = settled(config, layout, device)
    _refuse_alike(config, layout, device)
    groups = make_groups(layout, device.type, config.model.moe is not None, config.model.tied)
    if config.engine.kind == "deepspeed":
        from mikoshi.trainer.engines.deepspeed.engine import DeepSpeedEngine  # an extra, and seconds to import
        from mikoshi.trainer.engines.deepspeed.pipeline import DeepSpeedPipeline

        carried = DeepSpeedPipeline if layout.pp > 1 else DeepSpeedEngine
        return carried(config, layout, device, groups, fill_weights)
    if config.engine.kind == "megatron":
        from mikoshi.trainer.engines.megatron.engine import megatron_engine

        return megatron_engine(config, layout, device, groups, fill_weights)
    parts = build_parts(config, layout, groups, layout.coordinates(dist.get_rank()), device)
    return NativeEngine(config, layout, device, groups, parts, fill_weights)
