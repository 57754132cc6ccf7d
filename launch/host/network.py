"""Selects the network interface by which other nodes reach this machine: the configured one, else the best one."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from mikoshi.trainer.errors import LaunchError

_VIRTUAL_PREFIXES = ("docker", "virbr", "veth", "br-", "cni", "flannel", "cali", "kube", "lxc", "podman", "tailscale", "zt")
"""Prefixes of interfaces that do not lead beyond this machine, or only by a detour."""
RESOLVER = ("RES_OPTIONS", "timeout:1 attempts:2")
"""For glibc, see resolv.conf(5). A client of torch's TCPStore looks its peer's name up by an address that is in no hosts file
(::ffff:10.0.0.1). If no name server answers, that would take 10 s at every start."""

_UP, _GATEWAY = 0x1, 0x2  # flags of <linux/route.h>


@dataclass(frozen=True)
class Interface:
    """An interface that is up.

    address: IPv4 if it has one, else IPv6
    speed: Mbit/s; 0 if the kernel does not know
    """

    name: str
    address: str
    loopback: bool
    speed: int = 0


def select_interface(wanted: str) -> tuple[str, str]:
    """Return name and address of the interface to use.

    That is the wanted one; or, for "", the one of the default route, else the first one that leads beyond this machine,
    else loopback. Raises LaunchError, with the interfaces that exist.
    """
    return choose_interface(wanted, interfaces(), default_routes())


def choose_interface(wanted: str, there: list[Interface], routes: list[str]) -> tuple[str, str]:
    """The same for given interfaces and default routes.

    routes: interface names of the default routes, best first
    """
    by_name = {one.name: one for one in there}
    if wanted:
        if wanted not in by_name:
            known = ", ".join(f"{one.name} ({one.address})" for one in there) or "none"
            raise LaunchError(
                f"network.interface = {wanted}: {socket.gethostname()} has no such interface that is up and has an address; "
                f"it has {known}"
            )
        return wanted, by_name[wanted].address
    outward = [one for one in there if not one.loopback and not one.name.startswith(_VIRTUAL_PREFIXES)]
    best = [by_name[name] for name in routes if name in by_name]
    kept = [*best, *outward, *(one for one in there if one.loopback)]
    if not kept:
        raise LaunchError(f"{socket.gethostname()} has no network interface with an address, not even loopback")
    return kept[0].name, kept[0].address


def interfaces() -> list[Interface]:
    """The interfaces that are up and have an address, in the kernel's order."""
    states = psutil.net_if_stats()
    found = []
    for name, addresses in psutil.net_if_addrs().items():
        state = states.get(name)
        if state is None or not state.isup:
            continue
        v4 = [one.address for one in addresses if one.family == socket.AF_INET]
        # A link-local address needs an interface name after %, which is invalid on other nodes.
        v6 = [one.address for one in addresses if one.family == socket.AF_INET6 and not one.address.startswith("fe80")]
        if v4 or v6:
            loopback = "loopback" in state.flags.split(",") or name == "lo"
            found.append(Interface(name, (v4 or v6)[0], loopback, state.speed))
    return found


def default_routes(proc: Path = Path("/proc/net")) -> list[str]:
    """Names of the interfaces with a default route, lowest metric first, IPv4 before IPv6."""
    return [*_routes(proc / "route", _ipv4), *_routes(proc / "ipv6_route", _ipv6)]


def _routes(table: Path, parse: Callable[[list[str]], tuple[int, str] | None]) -> list[str]:
    try:
        lines = table.read_text(encoding="ascii").splitlines()
    except OSError:
        return []
    found = [route for line in lines if (route := parse(line.split())) is not None]
    return [name for _, name in sorted(found, key=lambda route: route[0])]


def _ipv4(fields: list[str]) -> tuple[int, str] | None:
    """Iface Destination Gateway Flags RefCnt Use Metric Mask ..., numbers in hex but for the metric."""
    if len(fields) < 8 or fields[0] == "Iface":
        return None
    up = int(fields[3], 16) & _UP
    return (int(fields[6]), fields[0]) if up and fields[1] == fields[7] == "00000000" else None


def _ipv6(fields: list[str]) -> tuple[int, str] | None:
    """Destination prefix source prefix next-hop metric refs use flags interface, numbers in hex."""
    if len(fields) < 10:
        return None
    flags = int(fields[8], 16)
    default = set(fields[0]) == {"0"} and fields[1] == "00" and flags & _UP and flags & _GATEWAY
    return (int(fields[5], 16), fields[9]) if default else None
