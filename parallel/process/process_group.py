"""Which rank this process is, according to its launcher, and how it joins the process group."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._redistribute import _gen_transform_infos

from mikoshi.parallel.errors import LayoutError
from mikoshi.parallel.process.gloo import use_one_worker
from mikoshi.parallel.process.nodelist import expand_nodelist

# From malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


_MPI = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", ("OMPI_COMM_WORLD_LOCAL_RANK",), ("OMPI_COMM_WORLD_LOCAL_SIZE",)),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", ("MV2_COMM_WORLD_LOCAL_RANK",), ("MV2_COMM_WORLD_LOCAL_SIZE",)),
    ("PMI_RANK", "PMI_SIZE", ("PMI_LOCAL_RANK", "MPI_LOCALRANKID"), ("PMI_LOCAL_SIZE", "MPI_LOCALNRANKS")),
)
"""Rank, world size, local rank and local size as Open MPI, MVAPICH and MPICH (Intel MPI, Cray MPICH) set them."""

_PORT = 29_500  # torchrun's
_ANSWER_TIMEOUT = 30.0  # seconds in which a store has answered, however busy its machine is

_joined = False


@dataclass(frozen=True)
class World:
    """This process among the ranks of one run.

    local_rank: its number on its node; None if the launcher does not tell.
    master: host and port where the ranks meet; None for a process that nobody launched.
    source: the variables that this is from.
    same_gpus: whether all ranks of a node see the same GPUs, as under torchrun.
    """

    rank: int = 0
    size: int = 1
    local_rank: int | None = None
    master: tuple[str, int] | None = None
    source: str = field(default="", compare=False)
    same_gpus: bool = field(default=False, compare=False)


def world_from(env: Mapping[str, str]) -> World | None:
    """This process's place according to its launcher; None if nobody launched it, or it alone.

    Reads the variables of torchrun (RANK, WORLD_SIZE, ...), then those of mpirun, then those that srun sets for each task.
    Raises LayoutError if they are inconsistent, since a process with a wrong place would train beside the others in one folder.
    """
    if "RANK" in env and "WORLD_SIZE" in env:
        return _of_torchrun(env)
    place = _of_mpi(env) or _of_srun(env)
    if place is not None:
        return place
    if "RANK" in env or env.get("WORLD_SIZE", "1") != "1":
        there, missing = ("RANK", "WORLD_SIZE") if "RANK" in env else ("WORLD_SIZE", "RANK")
        raise LayoutError(f"{there}={env[there]} is set and {missing} is not: set both, or unset {there}")
    if env.get("PMIX_RANK", "0") != "0":
        raise LayoutError(
            f"PMIX_RANK={env['PMIX_RANK']}: this launcher does not say how many ranks there are: set RANK, WORLD_SIZE and "
            "MASTER_ADDR for each process, or start them with mpirun, srun or torchrun"
        )
    return None


def _of_torchrun(env: Mapping[str, str]) -> World:
    rank, size = _place(env, "RANK", "WORLD_SIZE")
    local_rank = None
    if "LOCAL_RANK" in env:
        local_rank, _ = _place(env, "LOCAL_RANK", "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in env else "WORLD_SIZE")
    source = f"RANK={rank} WORLD_SIZE={size}"
    return World(rank, size, local_rank, _master(env, "127.0.0.1", _PORT), source, "TORCHELASTIC_RUN_ID" in env)


def _of_mpi(env: Mapping[str, str]) -> World | None:
    """mpirun's ranks. Where Slurm's srun starts tasks by MPI's interface, they are srun's, which also says where rank 0 is."""
    for ranks, sizes, local_ranks, local_sizes in _MPI:
        if (ranks in env) != (sizes in env):
            there, missing = (ranks, sizes) if ranks in env else (sizes, ranks)
            raise LayoutError(f"{there}={env[there]} is set and {missing} is not: mpirun sets both: unset {there}")
        if ranks not in env:
            continue
        rank, size = _place(env, ranks, sizes)
        if size == 1 or (env.get("SLURM_PROCID"), env.get("SLURM_STEP_NUM_TASKS")) == (env[ranks], env[sizes]):
            continue
        local = next((_number(env, name) for name in local_ranks if name in env), None)
        here = next((_number(env, name, 1) for name in local_sizes if name in env), None)
        master = _master(env, "127.0.0.1" if here == size else "", _PORT)
        if here != size and master[0] in ("", "localhost", "127.0.0.1", "::1"):
            raise LayoutError(
                f"{sizes}={size}: mpirun does not say where rank 0 is: pass MASTER_ADDR with the name of its host "
                "(Open MPI: -x MASTER_ADDR=HOST, MPICH: -genv MASTER_ADDR HOST), or use srun, torchrun or `mikoshi submit`"
            )
        return World(rank, size, local, master, f"{ranks}={rank} {sizes}={size}")
    return None


def _of_srun(env: Mapping[str, str]) -> World | None:
    # SLURM_STEP_NUM_TASKS, unlike SLURM_NTASKS, is there only under srun and not in the batch script itself.
    if "SLURM_STEP_NUM_TASKS" not in env or "SLURM_PROCID" not in env or _number(env, "SLURM_STEP_NUM_TASKS", 1) == 1:
        return None
    rank, size = _place(env, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
    nodes = env.get("SLURM_STEP_NODELIST", "")
    first = next(iter(expand_nodelist(nodes)), "")
    if "MASTER_ADDR" not in env and (not first or set(first) & set("[], ")):
        raise LayoutError(f"SLURM_STEP_NODELIST={nodes!r}: no list of nodes: set MASTER_ADDR to the name of rank 0's")
    # The same port on every rank, another for another step of the same or another job.
    job, step = (_number(env, name) if name in env else 0 for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    local = _number(env, "SLURM_LOCALID") if "SLURM_LOCALID" in env else 0
    master = _master(env, first, 20_000 + (job * 31 + step) % 12_000)
    return World(rank, size, local, master, f"SLURM_PROCID={rank} SLURM_STEP_NUM_TASKS={size}")


def _place(env: Mapping[str, str], rank: str, size: str) -> tuple[int, int]:
    number, count = _number(env, rank), _number(env, size, 1)
    if number >= count:
        raise LayoutError(f"{rank}={number} and {size}={count}: ranks are numbered from 0 to {count - 1}: mend the launcher")
    return number, count


def _number(env: Mapping[str, str], name: str, least: int = 0) -> int:
    text = env[name].strip()
    if not re.fullmatch("[0-9]{1,18}", text) or int(text) < least:
        setting = f"{name}={text}" if text else f"{name} is empty"
        raise LayoutError(f"{setting}: a launcher sets a whole number of {least} or more there: unset it, or mend the launcher")
    return int(text)


def _master(env: Mapping[str, str], host: str, port: int) -> tuple[str, int]:
    """Where rank 0 waits for the others; host and port: where the launcher did not say."""
    if "MASTER_ADDR" in env:
        host = env["MASTER_ADDR"].strip()
        if not host or re.search(r"\s", host):
            raise LayoutError(f"MASTER_ADDR={host!r}: the name or address of rank 0's host is wanted there")
    if "MASTER_PORT" in env:
        port = _number(env, "MASTER_PORT", 1)
        if port > 65_535:
            raise LayoutError(f"MASTER_PORT={port}: a port is at most 65535")
    return host, port


def check_device(wanted: str) -> None:
    """Raises LayoutError if CUDA is requested and absent."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise LayoutError('device "cuda" (engine.device): torch sees no GPU here; use "auto" or "cpu"')


def pick_device(wanted: str, place: World) -> torch.device:
    """This rank's device; "auto" is its GPU if there is one. Raises LayoutError if CUDA is requested and absent."""
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    check_device(wanted)
    count = torch.cuda.device_count()
    number = place.rank % count if place.local_rank is None else place.local_rank
    if number >= count == 1 and not place.same_gpus:
        number = 0  # a task sees its own GPU alone (srun --gpus-per-task=1); join() finds out where several see one
    if number >= count:
        raise LayoutError(f"local rank {number} has no GPU: this process sees {count}; start fewer ranks a node")
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    return device


def join(world: World, device: torch.device, timeout: timedelta = timedelta(minutes=10)) -> None:
    """Make the process group: NCCL for CUDA tensors and gloo for CPU tensors, in one group. A single rank opens no port."""
    global _joined
    _joined = True
    if device.type == "cpu":
        keep_freed_memory()
    use_one_worker()
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store = rendezvous(world, timeout)
    if device.type == "cuda" and world.size > 1:
        gpu = getattr(torch.cuda.get_device_properties(device), "uuid", world.rank)
        one_gpu_each(store, world, str(gpu), timeout)
    dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=timeout)


def one_gpu_each(store: Store, world: World, gpu: str, timeout: timedelta) -> None:
    """Raise LayoutError on every rank if two ranks share a GPU, so that none waits for the others. Collective.

    gpu: identifies this rank's GPU among all.
    """
    first = store.compare_set(f"gpu {gpu}", "", str(world.rank)).decode()
    if first != str(world.rank):
        remedy = "start one rank for each GPU, and have each see its own (srun --gpus-per-task=1) or all of its node"
        store.set("gpu shared", f"ranks {first} and {world.rank}: both have the GPU {gpu}: {remedy}")
    if store.add("gpus told", 1) == world.size:
        store.set("all gpus told", "")
    store.wait(["all gpus told"], timeout)
    if store.check(["gpu shared"]):
        raise LayoutError(store.get("gpu shared").decode())


def has_joined() -> bool:
    """Whether this process has ever been a rank."""
    return _joined


def rendezvous(world: World, timeout: timedelta) -> Store:
    """The store through which the ranks find each other. Raises LayoutError if another program uses rank 0's port."""
    if world.master is None or world.size == 1:
        return HashStore()
    host, port = world.master
    # Under torchrun its agent keeps the store; any other launcher leaves that to rank 0.
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store = TCPStore(host, port, world.size, is_master=False, timeout=timeout)
    else:
        store = (
            _host_store(host, port, world.size, timeout)
            if world.rank == 0
            else _connect_to_store(host, port, world.size, timeout)
        )
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    # What the ranks tell each other there is found by who knows the run's id alone, which their launcher gave them.
    return PrefixStore(f"mikoshi/{os.environ.get('TORCHELASTIC_RUN_ID', '')}/{attempt}", store)


def _host_store(host: str, port: int, size: int, timeout: timedelta) -> TCPStore:
    """The store of rank 0, once all ranks are connected."""
    try:
        return TCPStore(host, port, size, is_master=True, timeout=timeout)
    except dist.DistNetworkError as error:
        _, failed, why = str(error).partition("failed to listen")
        if not failed:
            raise
        why = why.rpartition("message: ")[2].splitlines()[0].strip()
        raise LayoutError(f"MASTER_PORT={port}: rank 0 cannot listen there: {why}: set another for all ranks") from None


def _connect_to_store(host: str, port: int, size: int, timeout: timedelta) -> TCPStore:
    """Rank 0's store, from another rank. torch would wait forever for the answer of a program that is no store."""
    until = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < until:
        with contextlib.suppress(OSError):
            socket.create_connection((host, port), timeout=5.0).close()
            break
        time.sleep(0.2)
    found: list[TCPStore | Exception] = []

    def reach() -> None:
        try:
            left = timedelta(seconds=max(1.0, until - time.monotonic()))
            found.append(TCPStore(host, port, size, is_master=False, timeout=left))
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=reach, daemon=True)
    thread.start()
    thread.join(_ANSWER_TIMEOUT)
    if not found:
        raise LayoutError(
            f"MASTER_ADDR={host} MASTER_PORT={port}: what answers there is not rank 0: set another MASTER_PORT for all ranks"
        )
    if isinstance(found[0], Exception):
        raise found[0]
    found[0].set_timeout(timeout)
    return found[0]


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
    """Wait until every rank is here, at most `patience`: a rank that exits closes connections on which another may still read.

    It uses the store, which needs no connection between ranks. Errors are ignored, since the work is done.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    store = dist.distributed_c10d._get_default_store()
    with contextlib.suppress(RuntimeError):
        if store.add("ended", 1) == dist.get_world_size():
            store.set("all ended", "")
        store.wait(["all ended"], patience)


def leave() -> None:
    """Leave the process group, if there is one, so that this process can join another."""
    if dist.is_initialized():
        dist.destroy_process_group()
        # DTensor caches its plans by the value of a mesh: an equal one of the next world has other groups.
        # As torch.distributed.tensor.debug does, which would bring in Dynamo: over a second at the end of every rank.
        _gen_transform_infos.cache_clear()
        DTensor._op_dispatcher.sharding_propagator.propagate_op_sharding.cache_clear()
        torch._C._clear_DTensor_sharding_propagator_cache()
