"""Which rank this process is, as its launcher says, and how it joins the others."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore
from torch.distributed.tensor._redistribute import _gen_transform_infos
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

from parallel.errors import LayoutError
from parallel.gloo import one_worker

# From malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


@dataclass(frozen=True)
class World:
    """This process among the ranks of one run. `local_rank` is its number on its node, None where the launcher did not
    say; `master` is where the ranks meet, None for a rank that nobody launched."""

    rank: int = 0
    size: int = 1
    local_rank: int | None = None
    master: tuple[str, int] | None = None


def world_from(env: Mapping[str, str]) -> World | None:
    """The place that a launcher has given this process, or None when nobody launched it.

    Reads torchrun's variables (RANK, WORLD_SIZE, ...), and those that srun sets for each task of a job step.
    """
    if "RANK" in env and "WORLD_SIZE" in env:
        local_rank = int(env["LOCAL_RANK"]) if "LOCAL_RANK" in env else None
        master = (env.get("MASTER_ADDR", "127.0.0.1"), int(env.get("MASTER_PORT", "29500")))
        return World(int(env["RANK"]), int(env["WORLD_SIZE"]), local_rank, master)
    # SLURM_STEP_NUM_TASKS, unlike SLURM_NTASKS, is there only under srun and not in the batch script itself.
    if int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and "SLURM_PROCID" in env:
        size = int(env["SLURM_STEP_NUM_TASKS"])
        first = first_host(env.get("SLURM_STEP_NODELIST", "127.0.0.1"))
        # The same port on every rank, another for another step of the same or another job.
        step = int(env.get("SLURM_JOB_ID", "0")) * 31 + int(env.get("SLURM_STEP_ID", "0"))
        master = (env.get("MASTER_ADDR", first), int(env.get("MASTER_PORT", 20_000 + step % 12_000)))
        return World(int(env["SLURM_PROCID"]), size, int(env.get("SLURM_LOCALID", "0")), master)
    return None


def first_host(nodelist: str) -> str:
    """The first name of Slurm's compressed list: `gpu[07-09,12],x1` begins with gpu07."""
    found = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\])?([^,]*)", nodelist)
    return "".join(part or "" for part in found.groups()) if found else nodelist


def check_device(wanted: str) -> None:
    """Raises LayoutError when CUDA is asked for and absent."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise LayoutError('device "cuda" (engine.device): torch sees no GPU here; use "auto" or "cpu"')


def pick_device(wanted: str, place: World) -> torch.device:
    """`auto` is this rank's GPU if there is one. Raises LayoutError when CUDA is asked for and absent."""
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    check_device(wanted)
    count = torch.cuda.device_count()
    number = place.rank % count if place.local_rank is None else place.local_rank
    if number >= count:
        raise LayoutError(f"local rank {number} has no GPU: this node has {count}; start fewer ranks a node")
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    return device


def join(world: World, device: torch.device, timeout: timedelta = timedelta(minutes=10)) -> None:
    """Make the process group: NCCL for CUDA tensors, gloo for CPU tensors, in one group. A lone rank opens no port."""
    if device.type == "cpu":
        keep_freed_memory()
    one_worker()
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store = meet(world, timeout)
    dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=timeout)


def meet(world: World, timeout: timedelta) -> Store:
    """The store by which the ranks find each other, which needs no connection between them."""
    if world.master is None:
        return HashStore()
    host, port = world.master
    # Under torchrun its agent keeps the store; any other launcher leaves that to rank 0.
    kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = TCPStore(host, port, world.size, is_master=world.rank == 0 and not kept, timeout=timeout)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    # What the ranks tell each other there is found by who knows the run's id alone, which their launcher gave them.
    return PrefixStore(f"mikoshi/{os.environ.get('TORCHELASTIC_RUN_ID', '')}/{attempt}", store)


def keep_freed_memory() -> None:
    """Have glibc keep freed blocks of up to 32 MiB instead of returning them to the kernel.

    A training step frees and takes the same large tensors again and again; by default each of them is unmapped and
    paged in anew, which was a fifth of a CPU step. Does nothing where the C library has no mallopt.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the most that glibc allows
        mallopt(_M_TRIM_THRESHOLD, 512 << 20)


def wait_for_all(patience: timedelta = timedelta(minutes=1)) -> None:
    """Until every rank has come here, or for as long as `patience`: one that ends closes connections on which another may
    still read. By the store, which needs no connection between ranks; what goes wrong with it is no loss at the end."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    store = dist.distributed_c10d._get_default_store()
    with contextlib.suppress(RuntimeError):
        if store.add("ended", 1) == dist.get_world_size():
            store.set("all ended", "")
        store.wait(["all ended"], patience)


def leave() -> None:
    """Leave the process group, if there is one, so that this process may join another."""
    if dist.is_initialized():
        dist.destroy_process_group()
        # DTensor caches its plans by the value of a mesh: an equal one of the next world has other groups.
        _gen_transform_infos.cache_clear()
        _clear_sharding_prop_cache()
