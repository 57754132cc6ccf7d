"""The number of CPU cores that this process may use: its affinity, limited by the quota of every control group above it."""

from __future__ import annotations

import math
import os
from pathlib import Path


def cores(root: Path = Path("/"), affinity: int | None = None) -> int:
    """How many threads can run at once, at least 1.

    root: where /proc and /sys are.
    affinity: cores that the scheduler allows this process. A container's quota is a share of time rather than a set of cores
        and is rounded down.
    """
    if affinity is None:
        affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.floor(min(affinity, _quota(root))))


def _quota(root: Path) -> float:
    """Cores' worth of CPU time that the control groups of this process allow, the minimum over all levels; infinite without
    one."""
    found = float("inf")
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            mount, read = root / "sys/fs/cgroup", _of_version_2
        elif "cpu" in controllers.split(","):
            mount, read = root / "sys/fs/cgroup" / controllers, _of_version_1
            mount = mount if mount.is_dir() else root / "sys/fs/cgroup/cpu"
        else:
            continue
        # In a container the path may be the host's, of which only the end, or nothing, is seen here.
        parts = [part for part in path.split("/") if part and part != ".."]
        found = min(found, *(read(mount.joinpath(*parts[:depth])) for depth in range(len(parts) + 1)))
    return found


def _of_version_2(group: Path) -> float:
    quota, _, period = _text(group / "cpu.max").partition(" ")
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() and int(period) else float("inf")


def _of_version_1(group: Path) -> float:
    quota, period = _text(group / "cpu.cfs_quota_us"), _text(group / "cpu.cfs_period_us")
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() and int(period) else float("inf")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""
