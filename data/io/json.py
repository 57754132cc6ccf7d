"""Standard JSON, which every reader accepts: no NaN or Infinity."""

from __future__ import annotations

import json
import math
from typing import Any


def dumps(value: Any, **how: Any) -> str:
    """As json.dumps, with null in place of NaN and infinities, which standard JSON does not have."""
    try:
        return json.dumps(value, allow_nan=False, **how)
    except ValueError:
        return json.dumps(_finite(value), allow_nan=False, **how)


def non_finite(values: dict[str, Any]) -> dict[str, str]:
    """The entries of a record that `dumps` writes as null, with their values as text."""
    return {name: str(value) for name, value in values.items() if isinstance(value, float) and not math.isfinite(value)}


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return value
