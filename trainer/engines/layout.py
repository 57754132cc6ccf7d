"""The layout of a run: as its config asks for it, and one that its engine can have."""

from __future__ import annotations

from mikoshi.parallel.layout import Layout
from mikoshi.trainer.config.run import RunConfig
from mikoshi.trainer.engines.limits import serves
from mikoshi.trainer.engines.planned import plan_layout


def layout_of(config: RunConfig, world: int) -> Layout:
    """The layout of a run on `world` ranks. Raises LayoutError with the reason and the nearest layouts that can be, with the
    config's engine."""
    return plan_layout(config, world, lambda layout: serves(config, layout))
