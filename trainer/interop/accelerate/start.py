"""What `accelerate launch` tells the processes that it starts, and whether it started fewer than requested."""

from __future__ import annotations

from collections.abc import Mapping

_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def launched_ranks(env: Mapping[str, str]) -> int | None:
    """Returns the number of processes that the launcher reports, or None if it reports none."""
    return next((int(env[name]) for name in _SIZES if env.get(name, "").isdigit()), None)


def lone_process_reason(env: Mapping[str, str]) -> str | None:
    """Returns why this process should not train alone, or None.

    `accelerate launch` may be asked for several processes and start one: with --cpu, and with a file of distributed_type NO
    or MULTI_CPU. It then sets MASTER_ADDR, but not the rank that torchrun or MPI give each process.
    """
    if "ACCELERATE_MIXED_PRECISION" not in env or "MASTER_ADDR" not in env or "RANK" in env:
        return None
    return (
        "accelerate launch: several processes were asked for, and this is the only one (--cpu and distributed_type: MULTI_CPU "
        "start no more): use `accelerate launch --multi_gpu --num_processes N`, which does on CPUs too, or `mikoshi train "
        "--ranks N`; if one is meant, unset MASTER_ADDR"
    )
