"""What `accelerate launch` tells the processes that it starts, and whether it started fewer than it was asked for."""

from __future__ import annotations

from collections.abc import Mapping

_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def ranks_told(env: Mapping[str, str]) -> int | None:
    """Processes in all, as the launcher says; None where it says nothing."""
    return next((int(env[name]) for name in _SIZES if env.get(name, "").isdigit()), None)


def lone_of_several(env: Mapping[str, str]) -> str | None:
    """Why this process should not train alone: `accelerate launch` was asked for several and started one. It does so with
    --cpu, and with a file of distributed_type NO or MULTI_CPU. None where that is not so.

    By MASTER_ADDR, which it sets for several processes only, without the rank that torchrun or MPI give each of them.
    """
    if "ACCELERATE_MIXED_PRECISION" not in env or "MASTER_ADDR" not in env or "RANK" in env:
        return None
    return (
        "accelerate launch: several processes were asked for, and this is the only one (--cpu and distributed_type: MULTI_CPU "
        "start no more): use `accelerate launch --multi_gpu --num_processes N`, which does on CPUs too, or `mikoshi train "
        "--ranks N`; if one is meant, unset MASTER_ADDR"
    )
