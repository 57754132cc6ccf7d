"""JSON as its standard has it: every reader takes it."""

from __future__ import annotations

import json
import math
from typing import Any


def dumps(value: Any, **how: Any) -> str:
    """As json.dumps, with null for a number that is not finite, for which JSON has no word: Python's own NaN and Infinity are
    refused by other readers."""
    try:
        return json.dumps(value, allow_nan=False, **how)
    except ValueError:
        return json.dumps(_finite(value), allow_nan=False, **how)


def non_finite(values: dict[str, Any]) -> dict[str, str]:
    """Which numbers of a record dumps writes as null, and what they are."""
    return {name: str(value) for name, value in values.items() if isinstance(value, float) and not math.isfinite(value)}


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return value
