"""Which cores a rank may run on: those beside its GPU, its own share of them, and both threads of a core together."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_SYS = Path("/sys")


def bind(local_rank: int, local_size: int, buses: Sequence[str] = ()) -> set[int]:
    """The cores for a rank out of those that this process may use; all of them where there are fewer cores than ranks, or
    one rank alone. buses: PCI addresses of the GPUs of all local ranks, in their order (gpu_buses), if they have any."""
    return share(local_rank, local_size, os.sched_getaffinity(0), buses, _SYS)


def gpu_buses(count: int) -> list[str]:
    """PCI addresses of the first `count` GPUs, as /sys has them; fewer where torch does not see so many."""
    import torch

    if not torch.cuda.is_available():
        return []
    found = []
    for number in range(min(count, torch.cuda.device_count())):
        about: Any = torch.cuda.get_device_properties(number)  # torch's stubs lack what the buses are called by
        found.append(f"{about.pci_domain_id:04x}:{about.pci_bus_id:02x}:{about.pci_device_id:02x}.0")
    return found


def share(local_rank: int, local_size: int, allowed: set[int], buses: Sequence[str], sys: Path) -> set[int]:
    """The same, of a machine as `sys` describes it. Ranks never share a core, unless there are too few of them."""
    if local_size < 2 or len(allowed) < local_size:
        return set(allowed)
    near = [_numa_cores(bus, sys) & allowed for bus in buses]
    # What all ranks decide alike, for each of them takes its part by itself.
    if len(near) == local_size and all(near) and _fair(near):
        beside = [rank for rank in range(local_size) if near[rank] == near[local_rank]]
        return _split(near[local_rank], beside.index(local_rank), len(beside), sys)
    return _split(allowed, local_rank, local_size, sys)


def _fair(near: Sequence[set[int]]) -> bool:
    """Whether NUMA nodes do not overlap, and each has a core for every rank beside it."""
    apart = all(one == other or not one & other for one in near for other in near)
    return apart and all(len(one) >= sum(one == other for other in near) for one in near)


def _split(cores: set[int], part: int, parts: int, sys: Path) -> set[int]:
    """One of equal parts, in the order of the machine; hyperthreads of a core stay together while there are enough cores."""
    groups = _siblings(cores, sys)
    if len(groups) < parts:
        groups = [{core} for core in sorted(cores)]
    first, last = part * len(groups) // parts, (part + 1) * len(groups) // parts
    return set().union(*groups[first:last])


def _siblings(cores: set[int], sys: Path) -> list[set[int]]:
    """The allowed cores by physical core, sorted by socket and number."""
    groups: dict[frozenset[int], tuple[int, int]] = {}
    for core in sorted(cores):
        topology = sys / "devices/system/cpu" / f"cpu{core}" / "topology"
        together = frozenset(parse_cores(_text(topology / "thread_siblings_list"))) & cores or frozenset([core])
        package = _text(topology / "physical_package_id")
        groups.setdefault(together | {core}, (int(package) if package.isdigit() else 0, core))
    return [set(group) for group, _ in sorted(groups.items(), key=lambda item: item[1])]


def _numa_cores(bus: str, sys: Path) -> set[int]:
    """Cores of the NUMA node that a PCI device hangs on; none where the machine does not say (numa_node is -1 then)."""
    node = _text(sys / "bus/pci/devices" / bus.lower() / "numa_node")
    return set(parse_cores(_text(sys / "devices/system/node" / f"node{node}" / "cpulist"))) if node.isdigit() else set()


def parse_cores(text: str) -> list[int]:
    """Linux's way to write sets of cores: 0-3,8,10-11. Empty for text that is none."""
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
