"""The tasks that a head may run in ranks, by name. No name from the wire is looked up as code."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from mikoshi.trainer.errors import LaunchError


def resolve_task(name: str, arguments: dict[str, Any]) -> tuple[Callable[..., int], tuple[Any, ...]]:
    """Return a task's function and arguments. Raises LaunchError for an unknown name."""
    if name == "train":
        from mikoshi.trainer.config.run import RunConfig
        from mikoshi.trainer.train.rank import train_supervised

        config = RunConfig.model_validate_json(json.dumps(arguments["config"]), strict=True)
        return train_supervised, (config,)
    if name == "bandwidth":
        from mikoshi.launch.agent.bandwidth import measure

        return measure, (arguments,)
    raise LaunchError(f"{name!r}: this node's Mikoshi knows no such work: install the same version on all nodes")
