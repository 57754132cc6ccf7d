"""Assigns cores to ranks: those beside the rank's GPU, a share of its own, with both hyperthreads of a core together."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_SYS = Path("/sys")


def cores_for_rank(local_rank: int, local_size: int, buses: Sequence[str] = ()) -> set[int]:
    """Return the cores for a rank, out of those that this process may use.

    All of them are returned if there are fewer cores than ranks, or only one rank.

    buses: PCI addresses of the GPUs of all local ranks, in order (see gpu_buses); empty without GPUs
    """
    return assign_cores(local_rank, local_size, os.sched_getaffinity(0), buses, _SYS)


def gpu_buses(count: int) -> list[str]:
    """PCI addresses of the first `count` GPUs as in /sys; fewer if torch sees fewer."""
    import torch

    if not torch.cuda.is_available():
        return []
    found = []
    for number in range(min(count, torch.cuda.device_count())):
        about: Any = torch.cuda.get_device_properties(number)  # torch's stubs lack the PCI fields
        found.append(f"{about.pci_domain_id:04x}:{about.pci_bus_id:02x}:{about.pci_device_id:02x}.0")
    return found


def assign_cores(local_rank: int, local_size: int, allowed: set[int], buses: Sequence[str], sys: Path) -> set[int]:
    """The same for a machine that the folder `sys` describes. Ranks share a core only if there are too few.

    allowed: cores that this process may use
    """
    if local_size < 2 or len(allowed) < local_size:
        return set(allowed)
    near = [_numa_cores(bus, sys) & allowed for bus in buses]
    # All ranks must decide alike, since each computes its own part.
    if len(near) == local_size and all(near) and _fair(near):
        beside = [rank for rank in range(local_size) if near[rank] == near[local_rank]]
        return _split(near[local_rank], beside.index(local_rank), len(beside), sys)
    return _split(allowed, local_rank, local_size, sys)


def _fair(near: Sequence[set[int]]) -> bool:
    """Whether the NUMA nodes do not overlap, and each has at least one core for every rank beside it."""
    apart = all(one == other or not one & other for one in near for other in near)
    return apart and all(len(one) >= sum(one == other for other in near) for one in near)


def _split(cores: set[int], part: int, parts: int, sys: Path) -> set[int]:
    """Return one of `parts` equal parts in the machine's order. Hyperthreads stay together while there are enough cores."""
    groups = _siblings(cores, sys)
    if len(groups) < parts:
        groups = [{core} for core in sorted(cores)]
    first, last = part * len(groups) // parts, (part + 1) * len(groups) // parts
    return set().union(*groups[first:last])


def _siblings(cores: set[int], sys: Path) -> list[set[int]]:
    """The allowed cores grouped by physical core, sorted by socket and number."""
    groups: dict[frozenset[int], tuple[int, int]] = {}
    for core in sorted(cores):
        topology = sys / "devices/system/cpu" / f"cpu{core}" / "topology"
        together = frozenset(parse_cores(_text(topology / "thread_siblings_list"))) & cores or frozenset([core])
        package = _text(topology / "physical_package_id")
        groups.setdefault(together | {core}, (int(package) if package.isdigit() else 0, core))
    return [set(group) for group, _ in sorted(groups.items(), key=lambda item: item[1])]


def _numa_cores(bus: str, sys: Path) -> set[int]:
    """The cores of a PCI device's NUMA node; none if the machine does not report it (numa_node is -1)."""
    node = _text(sys / "bus/pci/devices" / bus.lower() / "numa_node")
    return set(parse_cores(_text(sys / "devices/system/node" / f"node{node}" / "cpulist"))) if node.isdigit() else set()


def parse_cores(text: str) -> list[int]:
    """Parse Linux's notation for sets of cores, such as 0-3,8,10-11. Empty if the text is invalid."""
    found: list[int] = []
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        if not first.isdigit() or not (last or first).isdigit():
            return []
        found.extend(range(int(first), int(last or first) + 1))
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return ""
