"""Checks of the fields of a stored record: each is of its type and in range, or DataError names it."""

from __future__ import annotations

from mikoshi.data.errors import DataError

LARGEST = 1 << 62
_SHOWN = 40
RECORD_REMEDY = "it was altered, or made by another version: remove that checkpoint, or give another run.name"


def checked_int(value: object, name: str, minimum: int = 0, maximum: int = LARGEST) -> int:
    """`value`, if it is an integer in minimum..maximum. Raises DataError with its `name` otherwise."""
    if type(value) is not int or not minimum <= value <= maximum:
        text = repr(value)
        shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
        raise DataError(
            f"data: the record says {name} = {shown}, which is no whole number from {minimum} to {maximum}: {RECORD_REMEDY}"
        )
    return value


def checked_str(value: object, name: str) -> str:
    """`value`, if it is a string. Raises DataError with its `name` otherwise."""
    if not isinstance(value, str):
        raise DataError(f"data: the record says {name} = {value!r:.{_SHOWN}}, which is no text: {RECORD_REMEDY}")
    return value
