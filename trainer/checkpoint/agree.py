"""What one rank finds out, all act on: an action of rank 0 ends on every rank, with its result or with its error.

What the ranks tell each other here is JSON in tensors of bytes on the CPU, never a pickle: nothing that arrives is run, and
an error that no other rank could build is told in words instead.
"""

from __future__ import annotations

import builtins
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from mikoshi.trainer.errors import USER_ERRORS

_KNOWN: Mapping[str, type[Exception]] = {
    kind.__name__: kind
    for kind in (*USER_ERRORS, *vars(builtins).values())
    if isinstance(kind, type) and issubclass(kind, (*USER_ERRORS, OSError))
}
"""What is raised on the other ranks as what it is; anything else is a RuntimeError there."""


def place() -> tuple[int, int]:
    """This process's rank and the number of ranks; without a process group, 0 of 1."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def on_first_rank(action: Callable[[], Any]) -> Any:
    """Run `action` on rank 0 and return its result on all: plain JSON, tuples as lists. Collective.

    Whatever it raises ends it on all ranks: there as it was, elsewhere users' errors and OSErrors as themselves and
    others as RuntimeError.
    """
    said, error = _said(action) if place()[0] == 0 else (b"", None)
    if place()[1] > 1:
        said = _from_first(said)
    if error is not None:
        raise error
    return _heard(said)


def of_all_ranks(mine: Any) -> list[Any]:
    """Every rank's value, plain JSON, by rank. Collective. What is no JSON on one rank is an error on all."""
    said, error = _said(lambda: mine)
    everyone = [said]
    if place()[1] > 1:
        lengths = _lengths(said)
        rows = [torch.empty(max(lengths), dtype=torch.uint8) for _ in lengths]
        dist.all_gather(rows, _padded(said, max(lengths)))
        everyone = [_bytes(row, length) for row, length in zip(rows, lengths, strict=True)]
    if error is not None:
        raise error
    return [_heard(said) for said in everyone]


def to_first_rank(mine: Any) -> list[Any] | None:
    """Every rank's value, plain JSON, by rank, on rank 0; None elsewhere. Collective. What is no JSON on one rank is an error
    on all."""
    rank, world = place()
    said, error = _said(lambda: mine)
    everyone = [said]
    if world > 1:
        lengths = _lengths(said if error is None else b"")
        if 0 in lengths:
            raise error or RuntimeError(f"what rank {lengths.index(0)} has to say is not JSON serializable")
        rows = [torch.empty(max(lengths), dtype=torch.uint8) for _ in lengths] if rank == 0 else None
        dist.gather(_padded(said, max(lengths)), rows, dst=0)
        everyone = [_bytes(row, length) for row, length in zip(rows or [], lengths, strict=False)]
    if error is not None:
        raise error
    return [_heard(said) for said in everyone] if rank == 0 else None


def from_first_rank(action: Callable[[], Sequence[Any]]) -> Any:
    """Run `action` on rank 0; of the list that it returns, plain JSON, every rank gets its own. Collective. What it raises
    is raised on all, as by `on_first_rank`."""
    rank, world = place()
    said, error = [b""] * world, None
    if rank == 0:
        whole, error = _said(action)
        said = [whole] * world if error is not None else [json.dumps({"done": one}).encode() for one in _heard(whole)]
    mine = said[0]
    if world > 1:
        lengths = torch.tensor([len(one) for one in said])
        dist.broadcast(lengths, src=0)
        longest = int(lengths.max())
        row = torch.empty(longest, dtype=torch.uint8)
        dist.scatter(row, [_padded(one, longest) for one in said] if rank == 0 else None, src=0)
        mine = _bytes(row, int(lengths[rank]))
    if error is not None:
        raise error
    return _heard(mine)


def cause(error: BaseException) -> str:
    """The one line that matters of an error, dug out of DCP's collection of every rank's."""
    if isinstance(error, CheckpointException):
        rank, (inner, _) = min(error.failures.items(), key=lambda item: item[0])
        return f"rank {rank}: {cause(inner)}"
    if isinstance(error, OSError):
        return error.strerror or str(error) or type(error).__name__
    told, kind = str(error).partition("\n")[0], type(error).__name__
    return told if told and isinstance(error, ValueError) else f"{kind}: {told}".removesuffix(": ")


def _said(action: Callable[[], Any]) -> tuple[bytes, BaseException | None]:
    """The action's result for other ranks to hear, or its error, and that itself."""
    try:
        return json.dumps({"done": action()}).encode(), None
    except BaseException as error:  # even what ends this process: the others must not wait for it
        kind = next((kind.__name__ for kind in type(error).__mro__ if _KNOWN.get(kind.__name__) is kind), "")
        text = str(error) if kind else f"{type(error).__name__}: {error}".removesuffix(": ")
        told: dict[str, Any] = {"kind": kind, "text": text}
        if isinstance(error, OSError) and type(error.errno) is int:
            told["os"] = [error.errno, error.strerror, None if error.filename is None else str(error.filename)]
        return json.dumps(told).encode(), error


def _heard(said: bytes) -> Any:
    """Returns or raises what was said."""
    told = json.loads(said)
    if "done" in told:
        return told["done"]
    kind = _KNOWN.get(told["kind"], RuntimeError)
    raise OSError(*told["os"]) if "os" in told else kind(told["text"])


def _from_first(said: bytes) -> bytes:
    length = torch.tensor([len(said)])
    dist.broadcast(length, src=0)
    row = _padded(said, int(length))
    dist.broadcast(row, src=0)
    return _bytes(row, int(length))


def _lengths(said: bytes) -> list[int]:
    """Of what every rank has to say."""
    found = [torch.zeros(1, dtype=torch.int64) for _ in range(place()[1])]
    dist.all_gather(found, torch.tensor([len(said)]))
    return [int(length) for length in found]


def _padded(said: bytes, length: int) -> Tensor:
    row = torch.zeros(length, dtype=torch.uint8)
    row[: len(said)] = torch.frombuffer(bytearray(said), dtype=torch.uint8) if said else row[:0]
    return row


def _bytes(row: Tensor, length: int) -> bytes:
    return row[:length].numpy().tobytes()
