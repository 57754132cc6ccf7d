"""Engines behind one protocol, chosen by `engine.kind`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from parallel.layout import Layout
from parallel.mesh import make_groups
from trainer.config import RunConfig
from trainer.engines.base import Engine
from trainer.engines.carry import build_parts
from trainer.engines.native import NativeEngine, fill_initial


def leave_empty(*_: Any) -> None:
    """For `fill_weights`: they come from a checkpoint, or have no memory."""


def build_engine(
    config: RunConfig, layout: Layout, device: torch.device, fill_weights: Callable[..., None] = fill_initial
) -> Engine:
    """The engine of the config, its weights initialised. Needs the process group of `layout.world` ranks; collective."""
    groups = make_groups(layout, device.type, config.model.moe is not None, config.model.tied)
    parts = build_parts(config, layout, groups, layout.coordinates(dist.get_rank()), device)
    return NativeEngine(config, layout, device, groups, parts, fill_weights)
