"""What a leader may have ranks do, by name: nothing that comes over a wire is looked up as code."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from trainer.errors import LaunchError


def work_of(name: str, arguments: dict[str, Any]) -> tuple[Callable[..., int], tuple[Any, ...]]:
    """The function and its arguments. Raises LaunchError for a name that is not known here."""
    if name == "train":
        from trainer.config import RunConfig
        from trainer.rank import train_supervised

        config = RunConfig.model_validate_json(json.dumps(arguments["config"]), strict=True)
        return train_supervised, (config,)
    if name == "bandwidth":
        from launch.bandwidth import measure

        return measure, (arguments,)
    raise LaunchError(f"{name!r}: this node's Mikoshi knows no such work: install the same version on all nodes")
