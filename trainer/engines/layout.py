"""The layout of a run: the one its config asks for, which its engine can have."""

from __future__ import annotations

from mikoshi.parallel.layout import Layout
from mikoshi.trainer.config.run import RunConfig
from mikoshi.trainer.engines.limits import supports
from mikoshi.trainer.engines.planned import plan_layout


def layout_of(config: RunConfig, world: int) -> Layout:
    """Returns the layout of a run on `world` ranks.

    Raises LayoutError with the reason and the nearest layouts that the config's engine supports.
    """
    return plan_layout(config, world, lambda layout: supports(config, layout))
