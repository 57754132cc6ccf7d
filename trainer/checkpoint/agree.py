"""What one rank finds out, all act on: an action of rank 0 ends on every rank as it ended there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from trainer.errors import USER_ERRORS


def place() -> tuple[int, int]:
    """This process's rank and the number of ranks; without a process group, 0 of 1."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def on_first_rank(action: Callable[[], Any]) -> Any:
    """Run `action` on rank 0 and return its (JSON-like) result on all; what it raises is raised on all. Collective."""
    if not dist.is_initialized():
        return action()
    answer: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            answer = [("done", action())]
        except (*USER_ERRORS, OSError) as error:
            answer = [("failed", error)]
    dist.broadcast_object_list(answer, src=0)
    outcome, value = answer[0]
    if outcome == "failed":
        raise value
    return value


def of_all_ranks(mine: Any) -> list[Any]:
    """Every rank's (JSON-like) value, by rank. Collective."""
    _, world = place()
    values: list[Any] = [mine] * world
    if world > 1:
        dist.all_gather_object(values, mine)
    return values


def cause(error: BaseException) -> str:
    """The one line that matters of an error, dug out of DCP's collection of every rank's."""
    if isinstance(error, CheckpointException):
        rank, (inner, _) = min(error.failures.items(), key=lambda item: item[0])
        return f"rank {rank}: {cause(inner)}"
    if isinstance(error, OSError):
        return error.strerror or str(error) or type(error).__name__
    told, kind = str(error).partition("\n")[0], type(error).__name__
    return told if told and isinstance(error, ValueError) else f"{kind}: {told}".removesuffix(": ")
