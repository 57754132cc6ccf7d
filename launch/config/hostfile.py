"""Reads hosts from a file in DeepSpeed's format."""

from __future__ import annotations

import re
from pathlib import Path

from mikoshi.launch.config.names import host_name, same_host
from mikoshi.trainer.errors import LaunchError


def read_hostfile(path: Path) -> dict[str, int]:
    """Ranks by host, in the file's order: lines `name slots=8`, comments after #. Raises LaunchError with the line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise LaunchError(f"hostfile {path}: cannot be read: {why}") from None
    hosts: dict[str, int] = {}
    seen: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        found = re.fullmatch(r"(\S+)\s+slots=([1-9][0-9]{0,4})", text)
        if found is None:
            raise LaunchError(f"{path}:{number}: {text!r}: a line is a host name and its ranks: worker-1 slots=8")
        try:
            name = host_name(found.group(1))
        except ValueError as error:
            raise LaunchError(f"{path}:{number}: {error}") from None
        if other := seen.get(same_host(name)):
            also = "" if other == name else f", as {other}"
            raise LaunchError(f"{path}:{number}: {name} stands there twice{also}")
        seen[same_host(name)] = name
        hosts[name] = int(found.group(2))
    if not hosts:
        raise LaunchError(f"hostfile {path}: it names no host")
    return hosts
