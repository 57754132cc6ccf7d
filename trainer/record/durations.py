"""Formats durations for people."""

from __future__ import annotations

import time


def clock(seconds: float) -> str:
    """A duration as `MM:SS`, `HH:MM:SS` or `1d HH:MM:SS`."""
    whole = time.gmtime(max(0, round(seconds)))
    days, rest = divmod(max(0, round(seconds)), 86400)
    return (f"{days}d " if days else "") + time.strftime("%H:%M:%S" if rest >= 3600 or days else "%M:%S", whole)
