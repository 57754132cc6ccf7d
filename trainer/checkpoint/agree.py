"""Ranks act on what one of them finds out: an action of rank 0 ends on every rank with its result or its error.

What the ranks exchange is JSON in byte tensors on the CPU and never a pickle, so nothing that arrives is executed. An error
of a type that the other ranks cannot build arrives as a RuntimeError with its text.
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

_SHARED_ERRORS: Mapping[str, type[Exception]] = {
    kind.__name__: kind
    for kind in (*USER_ERRORS, *vars(builtins).values())
    if isinstance(kind, type) and issubclass(kind, (*USER_ERRORS, OSError))
}
"""Errors that other ranks raise with their own type; any other becomes a RuntimeError there."""


def rank_and_world() -> tuple[int, int]:
    """Returns this process's rank and the number of ranks; without a process group, (0, 1)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def on_first_rank(action: Callable[[], Any]) -> Any:
    """Run `action` on rank 0 and return its result on all ranks: plain JSON, with tuples as lists. Collective.

    An error is raised on all ranks: on rank 0 as it is, elsewhere users' errors and OSErrors with their own type and others
      as RuntimeError.
    """
    payload, error = _encoded(action) if rank_and_world()[0] == 0 else (b"", None)
    if rank_and_world()[1] > 1:
        payload = _broadcast_bytes(payload)
    if error is not None:
        raise error
    return _decoded(payload)


def all_gather_json(value: Any) -> list[Any]:
    """Returns every rank's value, by rank. Collective.

    Raises an error on all ranks if a value is not plain JSON.
    """
    payload, error = _encoded(lambda: value)
    payloads = [payload]
    if rank_and_world()[1] > 1:
        lengths = _lengths(payload)
        rows = [torch.empty(max(lengths), dtype=torch.uint8) for _ in lengths]
        dist.all_gather(rows, _padded(payload, max(lengths)))
        payloads = [_bytes(row, length) for row, length in zip(rows, lengths, strict=True)]
    if error is not None:
        raise error
    return [_decoded(payload) for payload in payloads]


def gather_json(value: Any) -> list[Any] | None:
    """Returns every rank's value, by rank, on rank 0 and None elsewhere. Collective.

    Raises an error on all ranks if a value is not plain JSON.
    """
    rank, world = rank_and_world()
    payload, error = _encoded(lambda: value)
    payloads = [payload]
    if world > 1:
        lengths = _lengths(payload if error is None else b"")
        if 0 in lengths:
            raise error or RuntimeError(f"what rank {lengths.index(0)} has to say is not JSON serializable")
        rows = [torch.empty(max(lengths), dtype=torch.uint8) for _ in lengths] if rank == 0 else None
        dist.gather(_padded(payload, max(lengths)), rows, dst=0)
        payloads = [_bytes(row, length) for row, length in zip(rows or [], lengths, strict=False)]
    if error is not None:
        raise error
    return [_decoded(payload) for payload in payloads] if rank == 0 else None


def scatter_json(action: Callable[[], Sequence[Any]]) -> Any:
    """Run `action` on rank 0 and return to each rank its entry of the list of plain JSON that it returns. Collective.

    An error is raised on all ranks, as by `on_first_rank`.
    """
    rank, world = rank_and_world()
    payloads, error = [b""] * world, None
    if rank == 0:
        encoded, error = _encoded(action)
        payloads = (
            [encoded] * world if error is not None else [json.dumps({"done": item}).encode() for item in _decoded(encoded)]
        )
    own = payloads[0]
    if world > 1:
        lengths = torch.tensor([len(item) for item in payloads])
        dist.broadcast(lengths, src=0)
        longest = int(lengths.max())
        row = torch.empty(longest, dtype=torch.uint8)
        dist.scatter(row, [_padded(item, longest) for item in payloads] if rank == 0 else None, src=0)
        own = _bytes(row, int(lengths[rank]))
    if error is not None:
        raise error
    return _decoded(own)


def cause(error: BaseException) -> str:
    """Returns the one line of an error that matters, taken out of DCP's collection of every rank's errors."""
    if isinstance(error, CheckpointException):
        rank, (inner, _) = min(error.failures.items(), key=lambda item: item[0])
        return f"rank {rank}: {cause(inner)}"
    if isinstance(error, OSError):
        return error.strerror or str(error) or type(error).__name__
    message, kind = str(error).partition("\n")[0], type(error).__name__
    return message if message and isinstance(error, ValueError) else f"{kind}: {message}".removesuffix(": ")


def _encoded(action: Callable[[], Any]) -> tuple[bytes, BaseException | None]:
    """Returns the action's result or error as a message for other ranks, and the error itself."""
    try:
        return json.dumps({"done": action()}).encode(), None
    except BaseException as error:  # even SystemExit: the other ranks must not wait
        kind = next((kind.__name__ for kind in type(error).__mro__ if _SHARED_ERRORS.get(kind.__name__) is kind), "")
        text = str(error) if kind else f"{type(error).__name__}: {error}".removesuffix(": ")
        message: dict[str, Any] = {"kind": kind, "text": text}
        if isinstance(error, OSError) and type(error.errno) is int:
            message["os"] = [error.errno, error.strerror, None if error.filename is None else str(error.filename)]
        return json.dumps(message).encode(), error


def _decoded(payload: bytes) -> Any:
    """Returns or raises what the message holds."""
    message = json.loads(payload)
    if "done" in message:
        return message["done"]
    kind = _SHARED_ERRORS.get(message["kind"], RuntimeError)
    raise OSError(*message["os"]) if "os" in message else kind(message["text"])


def _broadcast_bytes(payload: bytes) -> bytes:
    length = torch.tensor([len(payload)])
    dist.broadcast(length, src=0)
    row = _padded(payload, int(length))
    dist.broadcast(row, src=0)
    return _bytes(row, int(length))


def _lengths(payload: bytes) -> list[int]:
    """Returns the length of every rank's message."""
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(rank_and_world()[1])]
    dist.all_gather(lengths, torch.tensor([len(payload)]))
    return [int(length) for length in lengths]


def _padded(payload: bytes, length: int) -> Tensor:
    row = torch.zeros(length, dtype=torch.uint8)
    row[: len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8) if payload else row[:0]
    return row


def _bytes(row: Tensor, length: int) -> bytes:
    return row[:length].numpy().tobytes()
