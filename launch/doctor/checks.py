"""Judges a cluster by what its nodes report. Every finding names the node and what to do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median_high
from typing import Any, Literal

Facts = Mapping[str, Mapping[str, Any]]
"""The answer of host.probe, by node."""

GiB = 1 << 30
HOT, LATE, SLOW = 87, 1.0, 0.7
"""Temperature in Celsius at which data-centre GPUs throttle, seconds that clocks may differ by, and the share of the other
nodes' bandwidth below which a node is slow."""
_MIN_FREE = {"workdir": 10 * GiB, "tmp": GiB, "shm": GiB}
_MIN_FILES = 4096


@dataclass(frozen=True)
class Check:
    """One row of the report.

    found: what was found
    todo: what to do, a line each; empty if ok
    """

    name: str
    verdict: Literal["ok", "note", "bad", "skipped"]
    found: str
    todo: tuple[str, ...] = ()


def verdict(name: str, found: str, bad: list[str], notes: list[str] | None = None) -> Check:
    """Make a check: bad if `bad` has a line, else a note if `notes` has one, else ok."""
    kind: Literal["ok", "note", "bad"] = "bad" if bad else "note" if notes else "ok"
    return Check(name, kind, found, (*bad, *(notes or ())))


def check_up(names: list[str], missing: Mapping[str, str]) -> Check:
    """Check that all nodes came up. missing: the others, with the reason."""
    bad = [f"{node}: did not come up: {why or 'it said nothing'}" for node, why in missing.items()]
    return verdict("nodes up", f"{len(names)} of {len(names) + len(missing)}", bad)


def check_answers(facts: Facts, failed: Mapping[str, str]) -> Check:
    """Check that all nodes have answered. failed: the others, with the error."""
    return verdict("nodes answer", f"{len(facts)} of {len(facts) + len(failed)}", [f"{n}: {why}" for n, why in failed.items()])


def check_versions(facts: Facts) -> Check:
    """Check that packages are equal. Different drivers and kernels are noted."""
    bad, notes = [], []
    for key in ("mikoshi", "python", "torch", "cuda", "nccl"):
        bad += _outliers(facts, key, _version(key), "install the same everywhere")
    for key in ("driver", "kernel"):
        notes += _outliers(facts, key, _version(key), "")
    usual = _most_common([fact["versions"] for fact in facts.values()])
    found = ", ".join(
        f"{key} {usual[key]}" for key in ("mikoshi", "python", "torch", "cuda", "nccl", "driver") if usual.get(key)
    )
    return verdict("versions", found, bad, notes)


def _version(key: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda fact: str(fact["versions"].get(key, ""))


def check_gpus(facts: Facts, wanted: int) -> Check:
    """Check that every node has the configured number of GPUs, of one kind, seen by the driver and by torch."""
    bad = [
        f"{node}: {fact['error']}: drain the node; a GPU may have fallen off its bus"
        for node, fact in facts.items()
        if fact.get("error")
    ]
    for node, fact in facts.items():
        count, torch = len(fact["gpus"]), int(fact["torch_gpus"])
        if torch < wanted:
            why = f"the driver has {count}, torch sees {torch}"
            bad.append(f"{node}: gpus_per_node = {wanted}, and {why}: check driver, torch's build, and what was asked for")
    bad += _outliers(facts, "GPUs", _kinds, "ask for one kind (gpu_type, constraint, node_selector)")
    counts = Counter(_kinds(fact) for fact in facts.values())
    found = counts.most_common(1)[0][0] if counts else ""
    return verdict("GPUs", found or "none", bad)


def _kinds(fact: Mapping[str, Any]) -> str:
    kinds = Counter(f"{gpu['name']} {round((gpu['memory_mib'] or 0) / 1024)} GiB" for gpu in fact["gpus"])
    return ", ".join(f"{count} x {kind}" for kind, count in sorted(kinds.items()))


def check_health(facts: Facts) -> Check:
    """Check heat, memory errors, faults in the kernel log, and processes on the GPUs."""
    bad, notes, count = [], [], 0
    for node, fact in facts.items():
        for gpu in fact["gpus"]:
            count += 1
            where = f"{node} GPU {gpu['index']}"
            if gpu["ecc"]:
                bad.append(
                    f"{where}: {gpu['ecc']} uncorrected memory errors: have it reset or replaced; exclude the node until then"
                )
            if gpu["celsius"] is not None and gpu["celsius"] >= HOT:
                bad.append(f"{where}: {gpu['celsius']} C: it slows down; check the cooling")
            if gpu["pids"]:
                bad.append(f"{where}: in use by process {', '.join(map(str, gpu['pids']))}: end it, or exclude the node")
            elif (gpu["used_mib"] or 0) > 0.1 * (gpu["memory_mib"] or 1):
                notes.append(f"{where}: {gpu['used_mib']} MiB in use by a process that cannot be seen from here")
        if fact.get("xid"):
            notes.append(f"{node}: the kernel has logged a fault of a GPU: {fact['xid']}")
    if not count:
        return Check("GPU health", "skipped", "no GPU")
    return verdict("GPU health", f"{count} looked at", bad, notes)


def check_clock(offsets: Mapping[str, tuple[float, float]]) -> Check:
    """Check clocks. offsets: seconds that each node is ahead of this machine, and the error of that."""
    bad = [
        f"{node}: its clock is {abs(ahead):.1f} s {'ahead' if ahead > 0 else 'behind'}: have it synchronised (chrony, ntpd)"
        for node, (ahead, within) in offsets.items()
        if abs(ahead) - within > LATE
    ]
    most = max((max(0.0, abs(ahead) - within) for ahead, within in offsets.values()), default=0.0)
    return verdict("clocks", f"within {max(most, 0.001):.3f} s", bad)


def check_disks(facts: Facts, workdir: str) -> Check:
    """Check that the folders exist and have free space."""
    bad, notes = [], []
    names = {"workdir": workdir, "tmp": "the temporary folder", "shm": "/dev/shm"}
    for node, fact in facts.items():
        for key, path in names.items():
            free = fact["disk"].get(key)
            if free is None:
                bad.append(f"{node}: {path}: not there: make it, or set workdir")
            elif free < _MIN_FREE[key]:
                more = "; in a container, give it more (shared_memory, --shm-size)" if key == "shm" else ""
                notes.append(f"{node}: {path}: {free / GiB:.1f} GiB free, {_MIN_FREE[key] // GiB} wanted{more}")
    least = min((fact["disk"]["workdir"] for fact in facts.values() if fact["disk"].get("workdir") is not None), default=0)
    return verdict("disks", f"{least / GiB:.0f} GiB free in the work folder", bad, notes)


def check_machine(facts: Facts) -> Check:
    """Check cores, memory and limits."""
    bad = []
    notes = _outliers(facts, "cores", lambda fact: str(fact["cores"]), "")
    notes += _outliers(facts, "memory", lambda fact: f"{round(fact['memory'] / GiB)} GiB", "")
    for node, fact in facts.items():
        files, locked = fact["limits"]["nofile"], fact["limits"]["memlock"]
        if 0 <= files < _MIN_FILES:
            bad.append(f"{node}: {files} open files allowed, {_MIN_FILES} wanted: raise `ulimit -n` there")
        if fact["network"]["infiniband"] and locked >= 0:
            bad.append(f"{node}: {locked >> 10} KiB of locked memory allowed: InfiniBand wants `ulimit -l unlimited` there")
    cores = Counter(fact["cores"] for fact in facts.values()).most_common(1)
    memory = Counter(round(fact["memory"] / GiB) for fact in facts.values()).most_common(1)
    found = f"{cores[0][0]} cores, {memory[0][0]} GiB" if cores else ""
    return verdict("machines", found, bad, notes)


def check_shared(folder: str, wrong: Mapping[str, str], kinds: Mapping[str, str]) -> Check:
    """Check that the folder is shared.

    wrong: nodes that do not share it, with the reason
    kinds: file system of each node
    """
    todo = "mount one and the same file system there, on every node (NFS, Lustre, a ReadWriteMany claim), or set workdir"
    bad = [f"{node}: {folder} is not shared ({kinds.get(node) or 'unknown'}): {why}: {todo}" for node, why in wrong.items()]
    found = ", ".join(sorted({kind for node, kind in kinds.items() if kind and node not in wrong}))
    return verdict("shared folder", f"{folder} ({found})" if found else folder, bad)


def check_ports(reached: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> tuple[Check, list[tuple[str, str]]]:
    """Check connections. Also returns the pairs that cannot connect, each once.

    reached: from each node to each other, the answer of host.probe.connect
    """
    todo = "open all TCP ports between the nodes, or set network.interface"
    bad, cut, count = [], set(), 0
    for node, to in reached.items():
        for other, how in to.items():
            count += 1
            if "error" in how:
                cut.add((min(node, other), max(node, other)))
                bad.append(f"{node} cannot connect to {other}: {how['error']}: {todo}")
    return verdict("ports", f"{count - len(bad)} of {count} connections", bad), sorted(cut)


def check_network(facts: Facts) -> Check:
    """Check the interface, its speed, and the InfiniBand ports."""
    notes = _outliers(
        facts, "speed of the interface", lambda fact: _speed(fact["network"]["mbit"]), "check cable and switch port"
    )
    notes += _outliers(facts, "InfiniBand ports", lambda fact: str(len(fact["network"]["infiniband"])), "")
    bad = [
        f"{node}: InfiniBand {port} is {state}: check cable and subnet manager, or leave it out with network.hca"
        for node, fact in facts.items()
        for port, state in fact["network"]["infiniband"].items()
        if not state.startswith("ACTIVE")
    ]
    seen = Counter((fact["network"]["interface"], _speed(fact["network"]["mbit"])) for fact in facts.values())
    found = ", ".join(f"{name} {speed}".strip() for (name, speed), _ in seen.most_common())
    return verdict("network", found, bad, notes)


def _speed(mbit: int) -> str:
    return f"{mbit / 1000:g} Gbit/s" if mbit > 0 else ""


def check_pairs(pairs: Mapping[tuple[str, str], Mapping[str, Any]], nodes: list[str]) -> Check:
    """Check the speed between nodes. pairs: for every two nodes, what agent.bandwidth measured."""
    bad = [f"{a} and {b}: no all-reduce between them: {how['error']}" for (a, b), how in pairs.items() if "error" in how]
    speeds = speeds_of(pairs)
    for node, (own, others) in slow_nodes(speeds, nodes).items():
        bad.append(f"{node}: slow: {own:.2f} GB/s to the others, which have {others:.2f}: check its link, or exclude the node")
    if not speeds:
        return verdict("between nodes", "nothing measured", bad) if bad else Check("between nodes", "skipped", "one node")
    slowest = min(speeds, key=lambda pair: speeds[pair])
    latency = median_high([float(how["latency_us"]) for how in pairs.values() if "error" not in how])
    found = f"{median_high(list(speeds.values())):.2f} GB/s, {latency:.0f} us"
    if len(speeds) > 1:
        found += f" (slowest: {speeds[slowest]:.2f} GB/s, {slowest[0]} and {slowest[1]})"
    every = len(nodes) * (len(nodes) - 1) // 2
    if len(pairs) < every:
        found += f", a sample: {len(pairs)} of {every} pairs"
    return verdict("between nodes", found, bad)


def speeds_of(pairs: Mapping[tuple[str, str], Mapping[str, Any]]) -> dict[tuple[str, str], float]:
    """GB/s of the pairs that could be measured."""
    return {pair: float(how["bus_gb_s"]) for pair, how in pairs.items() if "error" not in how}


def slow_nodes(speeds: Mapping[tuple[str, str], float], nodes: list[str]) -> dict[str, tuple[float, float]]:
    """Nodes whose pairs have a median below SLOW of the median of the pairs without them, with both numbers in GB/s.

    It needs three nodes. The higher of two middle values is taken, so that one slow link does not make both of its ends
    slow.
    """
    ordered = sorted((speed, pair) for pair, speed in speeds.items())
    places: dict[str, list[int]] = {}  # for each node, the positions of its pairs in that order
    for place, (_, pair) in enumerate(ordered):
        for node in pair:
            places.setdefault(node, []).append(place)
    found = {}
    for node in nodes:
        own = places.get(node, [])
        if not own or len(own) == len(ordered):
            continue
        middle = (len(ordered) - len(own)) // 2  # median of the others, the higher of two
        for place in own:
            middle += place <= middle
        mine, others = ordered[own[len(own) // 2]][0], ordered[middle][0]
        if mine < SLOW * others:
            found[node] = (mine, others)
    return found


def check_all_ranks(how: Mapping[str, Any], backend: str) -> Check:
    """Check the all-reduce over all ranks."""
    if "error" in how:
        lone = "nothing to measure" in str(how["error"])
        return Check(
            "over all ranks", "skipped" if lone else "bad", str(how["error"]), () if lone else ("mend the rows above",)
        )
    found = f"{how['bus_gb_s']:.2f} GB/s, {how['latency_us']:.0f} us, {how['ranks']} ranks, {backend}"
    return Check("over all ranks", "ok", found)


def _outliers(facts: Facts, what: str, of: Callable[[Mapping[str, Any]], str], todo: str) -> list[str]:
    """A line for each node that differs from most."""
    values = {node: of(fact) for node, fact in facts.items()}
    usual, most = Counter(values.values()).most_common(1)[0] if values else ("", 0)
    more = f": {todo}" if todo else ""
    return [
        f"{node}: {what} {value or 'none'}, {most} of {len(values)} have {usual or 'none'}{more}"
        for node, value in values.items()
        if value != usual
    ]


def _most_common(records: list[Mapping[str, str]]) -> dict[str, str]:
    keys = {key for record in records for key in record}
    return {key: Counter(record.get(key, "") for record in records).most_common(1)[0][0] for key in keys}
