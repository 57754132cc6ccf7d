"""Measures all-reduce between every two nodes and over all of them, by real ranks with the run's own backend."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

from mikoshi.launch.agent.answers import write_answer
from mikoshi.launch.agent.pairs import MAX_ROUNDS, round_robin
from mikoshi.parallel.process.gloo import use_one_worker
from mikoshi.parallel.process.process_group import World, pick_device, rendezvous, world_from
from mikoshi.parallel.process.process_group import leave as leave_group
from mikoshi.trainer.exit_codes import DONE

SMALL, LARGE = 8, {"cpu": 16 << 20, "cuda": 256 << 20}
"""Message sizes in bytes: one whose time is the latency, and one whose time is the bandwidth's."""
_MAX_REPEATS, _TIME_BUDGET, _MAX_SECONDS = 15, 1.0, 1.5


@dataclass(frozen=True)
class BandwidthPlan:
    """What to measure.

    nodes: names in rank order, with `per_node` ranks each
    device: cpu or cuda
    cut: pairs that cannot reach each other and are left out
    small, large: message sizes in bytes, for latency and for bandwidth
    patience: seconds that a pair may take to meet
    """

    nodes: tuple[str, ...]
    per_node: int
    device: str
    cut: frozenset[frozenset[str]]
    small: int
    large: int
    patience: float

    @staticmethod
    def of(arguments: Mapping[str, Any], device: str) -> BandwidthPlan:
        """Build the plan from a task's arguments."""
        return BandwidthPlan(
            nodes=tuple(arguments["nodes"]),
            per_node=int(arguments["per_node"]),
            device=device,
            cut=frozenset(frozenset(pair) for pair in arguments.get("cut", [])),
            small=int(arguments.get("small", SMALL)),
            large=int(arguments.get("large") or LARGE[device]),
            patience=float(arguments.get("patience", 20.0)),
        )


def measure(arguments: dict[str, Any]) -> int:
    """Measure in one rank, whose place is in the environment, and return the exit code.

    The answer is {"node", "backend", "pairs": {other node: speed}, "all": speed}. A speed is {"latency_us", "bus_gb_s",
    "ranks"} or {"error"}. Bus bandwidth is that of nccl-tests, size / time x 2 (n - 1) / n, which does not depend on the
    number of ranks (https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md).
    """
    world = world_from(os.environ)
    assert world is not None, "the worker group sets the rank's place"
    device = pick_device(str(arguments.get("device", "auto")), world)
    plan = BandwidthPlan.of(arguments, device.type)
    store = rendezvous(world, timedelta(seconds=plan.patience * 3))
    here = world.rank // plan.per_node
    pairs: dict[str, dict[str, Any]] = {}
    for number, pairing in enumerate(round_robin(len(plan.nodes), MAX_ROUNDS)):
        _barrier(store, f"round {number}", world, plan)
        for pair in pairing:
            if here in pair:
                other = plan.nodes[pair[0] if pair[1] == here else pair[1]]
                pairs[other] = _pair(pair, world, plan, store, device)
    _barrier(store, "pairs", world, plan)
    apart = bool(plan.cut) or _any_failed(store, pairs, world, plan)
    whole = {"error": "not measured: some nodes cannot reach each other"} if apart else _all_ranks(world, plan, store, device)
    write_answer({"node": plan.nodes[here], "backend": _backend(device), "pairs": pairs, "all": whole})
    with contextlib.suppress(RuntimeError):  # the rank that hosts the store may have exited
        _barrier(store, "done", world, plan)
    return DONE


def _pair(pair: tuple[int, int], world: World, plan: BandwidthPlan, store: Store, device: torch.device) -> dict[str, Any]:
    """The speed between two nodes, with all ranks of both at once, since a node may have a network adapter for every GPU."""
    names = [plan.nodes[one] for one in pair]
    if frozenset(names) in plan.cut:
        return {"error": "cannot reach each other"}
    ranks = [one * plan.per_node + local for one in pair for local in range(plan.per_node)]
    return _speed(f"pair {pair[0]} {pair[1]}", ranks, world, plan, store, device)


def _all_ranks(world: World, plan: BandwidthPlan, store: Store, device: torch.device) -> dict[str, Any]:
    if world.size == 1:
        return {"error": "one rank: nothing to measure"}
    return _speed("all", list(range(world.size)), world, plan, store, device)


def _speed(
    name: str, ranks: list[int], world: World, plan: BandwidthPlan, store: Store, device: torch.device
) -> dict[str, Any]:
    try:
        with _group(name, ranks, world, plan, store, device):
            latency = _median(plan.small, device)
            size, seconds = _large_message(plan.large, device)
    except (RuntimeError, ValueError) as error:  # torch's errors are of these types
        return {"error": str(error).splitlines()[0][:200]}
    share = 2 * (len(ranks) - 1) / len(ranks)
    return {"latency_us": latency * 1e6, "bus_gb_s": size / seconds * share / 1e9, "ranks": len(ranks)}


@contextlib.contextmanager
def _group(
    name: str, ranks: list[int], world: World, plan: BandwidthPlan, store: Store, device: torch.device
) -> Iterator[None]:
    """A process group of these ranks alone. One group of all ranks would fail with a single pair that cannot meet."""
    timeout = timedelta(seconds=plan.patience)
    place = ranks.index(world.rank)
    own = device if device.type == "cuda" else None
    use_one_worker()
    dist.init_process_group(
        _backend(device), store=PrefixStore(name, store), rank=place, world_size=len(ranks), timeout=timeout, device_id=own
    )
    try:
        yield
    finally:
        leave_group()


def _large_message(size: int, device: torch.device) -> tuple[int, float]:
    """Bytes and seconds of a large all-reduce, or of a smaller one where the link is too slow."""
    part = max(1, size // 16)
    seconds = _median(part, device)
    if seconds * size / part > _MAX_SECONDS:
        return part, seconds
    return size, _median(size, device)


def _median(size: int, device: torch.device) -> float:
    """Median seconds of an all-reduce of `size` bytes of fp32, by the slowest rank."""
    tensor = torch.ones(max(1, size // 4), device=device)
    run = _timed(tensor, device)
    run()
    first = torch.tensor([run()], device=device)
    dist.all_reduce(first, op=dist.ReduceOp.MAX)  # all ranks must repeat equally often
    times = torch.tensor(
        [run() for _ in range(max(1, min(_MAX_REPEATS, int(_TIME_BUDGET / max(first.item(), 1e-9)))))], device=device
    )
    dist.all_reduce(times, op=dist.ReduceOp.MAX)
    seconds: list[float] = times.tolist()
    return statistics.median(seconds)


def _timed(tensor: torch.Tensor, device: torch.device) -> Callable[[], float]:
    def run() -> float:
        tensor.fill_(1.0)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        dist.all_reduce(tensor)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    return run


def _any_failed(store: Store, pairs: dict[str, dict[str, Any]], world: World, plan: BandwidthPlan) -> bool:
    """Whether a pair of any rank failed."""
    store.add("wrong", sum("error" in speed for speed in pairs.values()))
    _barrier(store, "told", world, plan)
    return store.add("wrong", 0) > 0


def _barrier(store: Store, name: str, world: World, plan: BandwidthPlan) -> None:
    """Wait for all ranks through the store, since they may not reach each other."""
    if store.add(f"{name} came", 1) == world.size:
        store.set(f"{name} all", "")
    store.wait([f"{name} all"], timedelta(seconds=plan.patience * 3))


def _backend(device: torch.device) -> str:
    return "nccl" if device.type == "cuda" else "gloo"
