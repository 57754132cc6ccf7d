"""Passes a rank's answer to its node agent as a JSON file, which is complete or absent."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mikoshi.data.io.atomic import write_file
from mikoshi.data.io.json import dumps

VARIABLE = "MIKOSHI_ANSWER"


def write_answer(answer: Mapping[str, Any]) -> None:
    """Write this rank's answer for its node agent. Does nothing if no agent has asked for one."""
    if path := os.environ.get(VARIABLE):
        write_file(Path(path), dumps(answer).encode(), durable=False)


def read_answer(path: Path) -> dict[str, Any]:
    """Read a rank's answer; empty if there is none, or if it is not an object."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
