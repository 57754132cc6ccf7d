"""Reads the last lines of a log from its end, however long it is."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

BLOCK = 1 << 14


def last_records(path: Path, most: int, size: int = BLOCK) -> list[dict[str, Any]]:
    """The last records of a JSON-lines log, oldest first: `most` at most, of those within its last `size` bytes.

    Incomplete records are left out. A log that cannot be read has none.
    """
    records: list[dict[str, Any]] = []
    for line in reversed(_end(path, size).split(b"\n")):
        if len(records) == most:
            break
        if line.startswith(b"{"):
            try:
                record = json.loads(line.decode())
            except ValueError:  # cut off by the block, or by a kill
                continue
            if isinstance(record, dict):
                records.append(record)
    return records[::-1]


def _end(path: Path, size: int) -> bytes:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        start = max(0, os.fstat(handle).st_size - size)
        content = os.pread(handle, size, start)
    except OSError:
        return b""
    finally:
        os.close(handle)
    return content if not start else content.partition(b"\n")[2]


def start_of_last(path: Path, lines: int) -> int:
    """Offset in bytes at which the last `lines` lines of a text begin."""
    with path.open("rb") as file:
        at = file.seek(0, os.SEEK_END)
        if lines <= 0 or not at:
            return at
        file.seek(at - 1)
        wanted = lines + (file.read(1) == b"\n")
        while at > 0:
            begin = max(0, at - BLOCK)
            file.seek(begin)
            block = file.read(at - begin)
            found = block.count(b"\n")
            if found >= wanted:
                place = len(block)
                for _ in range(wanted):
                    place = block.rindex(b"\n", 0, place)
                return begin + place + 1
            wanted, at = wanted - found, begin
    return 0
