"""Engines behind one protocol, chosen by `engine.kind`."""

from __future__ import annotations

import torch

from parallel.layout import Layout
from trainer.config import RunConfig
from trainer.engines.base import Engine
from trainer.engines.native import NativeEngine


def build_engine(config: RunConfig, layout: Layout, device: torch.device) -> Engine:
    """The engine of the config, its weights initialised. Collective; see the engine's own constructor for errors."""
    return NativeEngine(config, layout, device)
