"""How fast nodes talk: all-reduce between two of them at a time and over all, by real ranks with the run's own backend."""

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

from mikoshi.launch.agent.answers import leave
from mikoshi.launch.agent.pairs import MOST, tournament
from mikoshi.parallel.process.gloo import one_worker
from mikoshi.parallel.process.process_group import World, meet, pick_device, world_from
from mikoshi.parallel.process.process_group import leave as leave_group
from mikoshi.trainer.exit_codes import DONE

SMALL, LARGE = 8, {"cpu": 16 << 20, "cuda": 256 << 20}
"""Bytes: of a message that takes as long as the latency, and of one that takes as long as the bandwidth."""
_MOST, _BUDGET, _LONG = 15, 1.0, 1.5


@dataclass(frozen=True)
class Plan:
    """What to measure. nodes: their names in rank order, each with `per_node` ranks; cut: pairs that cannot reach each other
    and are left out; patience: seconds that a pair may take to meet."""

    nodes: tuple[str, ...]
    per_node: int
    device: str
    cut: frozenset[frozenset[str]]
    small: int
    large: int
    patience: float

    @staticmethod
    def of(arguments: Mapping[str, Any], device: str) -> Plan:
        return Plan(
            nodes=tuple(arguments["nodes"]),
            per_node=int(arguments["per_node"]),
            device=device,
            cut=frozenset(frozenset(pair) for pair in arguments.get("cut", [])),
            small=int(arguments.get("small", SMALL)),
            large=int(arguments.get("large") or LARGE[device]),
            patience=float(arguments.get("patience", 20.0)),
        )


def measure(arguments: dict[str, Any]) -> int:
    """The part of one rank, whose place is in the environment; its exit code.

    Its answer: {"node", "backend", "pairs": {other node: speed}, "all": speed}, a speed being {"latency_us", "bus_gb_s",
    "ranks"}, or {"error"}. Bus bandwidth is that of nccl-tests, size / time x 2 (n - 1) / n, which does not depend on the
    number of ranks (https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md).
    """
    world = world_from(os.environ)
    assert world is not None, "started by a node agent"
    device = pick_device(str(arguments.get("device", "auto")), world)
    plan = Plan.of(arguments, device.type)
    store = meet(world, timedelta(seconds=plan.patience * 3))
    here = world.rank // plan.per_node
    pairs: dict[str, dict[str, Any]] = {}
    for number, pairing in enumerate(tournament(len(plan.nodes), MOST)):
        _together(store, f"round {number}", world, plan)
        for pair in pairing:
            if here in pair:
                other = plan.nodes[pair[0] if pair[1] == here else pair[1]]
                pairs[other] = _pair(pair, world, plan, store, device)
    _together(store, "pairs", world, plan)
    apart = bool(plan.cut) or _any_wrong(store, pairs, world, plan)
    whole = {"error": "not measured: some nodes cannot reach each other"} if apart else _whole(world, plan, store, device)
    leave({"node": plan.nodes[here], "backend": _backend(device), "pairs": pairs, "all": whole})
    with contextlib.suppress(RuntimeError):  # whoever keeps the store may be gone already
        _together(store, "done", world, plan)
    return DONE


def _pair(pair: tuple[int, int], world: World, plan: Plan, store: Store, device: torch.device) -> dict[str, Any]:
    """The speed between two nodes, all ranks of both at once: a node may have a network adapter for every GPU."""
    names = [plan.nodes[one] for one in pair]
    if frozenset(names) in plan.cut:
        return {"error": "cannot reach each other"}
    ranks = [one * plan.per_node + local for one in pair for local in range(plan.per_node)]
    return _speed(f"pair {pair[0]} {pair[1]}", ranks, world, plan, store, device)


def _whole(world: World, plan: Plan, store: Store, device: torch.device) -> dict[str, Any]:
    if world.size == 1:
        return {"error": "one rank: nothing to measure"}
    return _speed("all", list(range(world.size)), world, plan, store, device)


def _speed(name: str, ranks: list[int], world: World, plan: Plan, store: Store, device: torch.device) -> dict[str, Any]:
    try:
        with _group(name, ranks, world, plan, store, device):
            latency = _median(plan.small, device)
            size, seconds = _bulk(plan.large, device)
    except (RuntimeError, ValueError) as error:  # torch's own are of these kinds
        return {"error": str(error).splitlines()[0][:200]}
    share = 2 * (len(ranks) - 1) / len(ranks)
    return {"latency_us": latency * 1e6, "bus_gb_s": size / seconds * share / 1e9, "ranks": len(ranks)}


@contextlib.contextmanager
def _group(name: str, ranks: list[int], world: World, plan: Plan, store: Store, device: torch.device) -> Iterator[None]:
    """A process group of these ranks alone: one of all would be stopped by a single pair that cannot meet."""
    timeout = timedelta(seconds=plan.patience)
    place = ranks.index(world.rank)
    own = device if device.type == "cuda" else None
    one_worker()
    dist.init_process_group(
        _backend(device), store=PrefixStore(name, store), rank=place, world_size=len(ranks), timeout=timeout, device_id=own
    )
    try:
        yield
    finally:
        leave_group()


def _bulk(size: int, device: torch.device) -> tuple[int, float]:
    """Bytes and seconds of a large all-reduce; of a smaller one where a slow link would take all day."""
    part = max(1, size // 16)
    seconds = _median(part, device)
    if seconds * size / part > _LONG:
        return part, seconds
    return size, _median(size, device)


def _median(size: int, device: torch.device) -> float:
    """Seconds of an all-reduce of `size` bytes of fp32, as its slowest rank sees it."""
    tensor = torch.ones(max(1, size // 4), device=device)
    run = _timed(tensor, device)
    run()
    first = torch.tensor([run()], device=device)
    dist.all_reduce(first, op=dist.ReduceOp.MAX)  # for all ranks must do as many
    times = torch.tensor([run() for _ in range(max(1, min(_MOST, int(_BUDGET / max(first.item(), 1e-9)))))], device=device)
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


def _any_wrong(store: Store, pairs: dict[str, dict[str, Any]], world: World, plan: Plan) -> bool:
    """Whether any rank's pair failed."""
    store.add("wrong", sum("error" in speed for speed in pairs.values()))
    _together(store, "told", world, plan)
    return store.add("wrong", 0) > 0


def _together(store: Store, name: str, world: World, plan: Plan) -> None:
    """Wait for all ranks, by the store alone: they may not reach each other."""
    if store.add(f"{name} came", 1) == world.size:
        store.set(f"{name} all", "")
    store.wait([f"{name} all"], timedelta(seconds=plan.patience * 3))


def _backend(device: torch.device) -> str:
    return "nccl" if device.type == "cuda" else "gloo"
