"""Builds the engine that `engine.kind` names, on all ranks or on none."""

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
from mikoshi.trainer.engines.precision import resolve_precision
from mikoshi.trainer.errors import ConfigError


def leave_empty(*_: Any) -> None:
    """A `fill_weights` that writes nothing, for weights that come from a checkpoint or have no memory."""


def _refuse_on_all_ranks(config: RunConfig, layout: Layout, device: torch.device) -> None:
    """Raises ConfigError on all ranks for what one rank finds missing on its node, such as a disk or a compiler."""
    if config.engine.kind == "native" and layout.context_kind != "ring":  # everything else was checked before the ranks started
        return
    reasons: list[str] = [""] * layout.world
    reason = ""
    try:
        refuse(config, layout, device.type == "cuda")
    except ConfigError as error:
        reason = str(error)
    dist.all_gather_object(reasons, reason)
    if found := next(filter(None, reasons), ""):
        raise ConfigError(found)


def build_engine(
    config: RunConfig, layout: Layout, device: torch.device, fill_weights: Callable[..., None] = fill_initial
) -> Engine:
    """Returns the engine of the config with its weights initialised. Collective.

    Needs a process group of `layout.world` ranks. Raises ConfigError on all ranks for what the engine cannot do, including
    what only a rank can know, such as its device.

    fill_weights: writes the initial values of a parameter; see `FillWeights`.
    """
    config, _ = resolve_precision(config, layout, device)
    _refuse_on_all_ranks(config, layout, device)
    groups = make_groups(layout, device.type, config.model.moe is not None, config.model.tied)
    if config.engine.kind == "deepspeed":
        from mikoshi.trainer.engines.deepspeed.engine import DeepSpeedEngine  # an extra, and seconds to import
        from mikoshi.trainer.engines.deepspeed.pipeline import DeepSpeedPipeline

        engine = DeepSpeedPipeline if layout.pp > 1 else DeepSpeedEngine
        return engine(config, layout, device, groups, fill_weights)
    if config.engine.kind == "megatron":
        from mikoshi.trainer.engines.megatron.engine import megatron_engine

        return megatron_engine(config, layout, device, groups, fill_weights)
    parts = build_parts(config, layout, groups, layout.coordinates(dist.get_rank()), device)
    return NativeEngine(config, layout, device, groups, parts, fill_weights)
