"""Numbers of a record that another wrote: each is whole and within its bounds, or the record is refused by its name."""

from __future__ import annotations

from mikoshi.data.errors import DataError

MOST = 1 << 62
_SHOWN = 40
WAY = "it was altered, or made by another version: remove that checkpoint, or give another run.name"


def whole(value: object, name: str, least: int = 0, most: int = MOST) -> int:
    """The number called `name`. Raises DataError if it is none, or not one of least..most."""
    if type(value) is not int or not least <= value <= most:
        told = repr(value)
        shown = told if len(told) <= _SHOWN else f"{told[:_SHOWN]}..."
        raise DataError(f"data: the record says {name} = {shown}, which is no whole number from {least} to {most}: {WAY}")
    return value


def text(value: object, name: str) -> str:
    """The text called `name`. Raises DataError if it is none."""
    if not isinstance(value, str):
        raise DataError(f"data: the record says {name} = {value!r:.{_SHOWN}}, which is no text: {WAY}")
    return value
