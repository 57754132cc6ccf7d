"""What a rank found out, as a JSON file that its node agent names: whole, or not there."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mikoshi.data.io.atomic import write_file
from mikoshi.data.io.json import dumps

VARIABLE = "MIKOSHI_ANSWER"


def leave(answer: Mapping[str, Any]) -> None:
    """Leave this rank's answer for its node agent; without one nobody has asked, and nothing is written."""
    if path := os.environ.get(VARIABLE):
        write_file(Path(path), dumps(answer).encode(), durable=False)


def read(path: Path) -> dict[str, Any]:
    """What a rank has left there; empty where it left nothing, or something else than an object."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
