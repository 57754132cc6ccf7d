"""What a leader may have ranks do, by name: nothing that comes over a wire is looked up as code."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from mikoshi.trainer.errors import LaunchError


def work_of(name: str, arguments: dict[str, Any]) -> tuple[Callable[..., int], tuple[Any, ...]]:
    """The function and its arguments. Raises LaunchError for a name that is not known here."""
    if name == "train":
        from mikoshi.trainer.config.run import RunConfig
        from mikoshi.trainer.train.rank import train_supervised

        config = RunConfig.model_validate_json(json.dumps(arguments["config"]), strict=True)
        return train_supervised, (config,)
    if name == "bandwidth":
        from mikoshi.launch.agent.bandwidth import measure

        return measure, (arguments,)
    raise LaunchError(f"{name!r}: this node's Mikoshi knows no such work: install the same version on all nodes")
