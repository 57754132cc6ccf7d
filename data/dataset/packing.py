"""How documents become rows of T tokens.

"cut": a shard's tokens one after another, cut every T. "fit": whole documents, combined so that the least room stays unused
(only documents longer than a row are cut); unused places are never predicted. A plan of fitted rows is made once and mapped
from disk, so that any row is found at once.

A document of n tokens takes n - 1 places, since its last token is predicted and need not be read.
"""

from __future__ import annotations

import bisect
import json
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mikoshi.data.dataset.shards import DatasetInfo, Shard
from mikoshi.data.errors import DataError, storage_error
from mikoshi.data.io.atomic import replaced_file, write_file

Ids = npt.NDArray[np.int64]

_RECORD = np.dtype([("first", "<u8"), ("length", "<u4"), ("row", "<u4")])
"""A piece of a document: where in its shard's tokens it begins, how many places it takes, and its row in the shard."""
_KINDS = ("pieces", "starts")


def row_counts(tokens: Ids, context: int) -> Ids:
    """Rows of `context` tokens in shards of so many tokens. A row reads one token more than its own, as the last label."""
    return np.maximum(0, (tokens - 1) // context)


def best_fit_decreasing(lengths: Ids, capacity: int) -> Ids:
    """The row of each piece, by best-fit decreasing: the longest first, each into the row with the least room that still holds
    it (Johnson 1974, "Fast algorithms for bin packing"; for training data Ding et al. 2024, arXiv:2404.10830).

    lengths: of the pieces, each in 1..capacity.
    capacity: places of a row.

    Rows are numbered from 0 without gaps. Pieces of equal length are placed together, which gives the same rows in a time that
    grows with the number of distinct lengths rather than of pieces.
    """
    rows = np.empty(len(lengths), dtype=np.int64)
    if not len(lengths):
        return rows
    order = np.argsort(-lengths, kind="stable")
    sizes, starts = np.unique(-lengths[order], return_index=True)
    groups = np.split(order, starts[1:])
    room: list[int] = []  # the amounts of room there are, ascending
    open_rows: dict[int, list[Ids]] = {}
    made = 0

    def leave(amount: int, which: Ids) -> None:
        if amount and len(which):
            if amount not in open_rows:
                bisect.insort(room, amount)
                open_rows[amount] = []
            open_rows[amount].append(which)

    for size, waiting in zip((-sizes).tolist(), groups, strict=True):
        while len(waiting):
            at = bisect.bisect_left(room, size)
            if at == len(room):
                count = -(-len(waiting) // (capacity // size))
                amount, which = capacity, np.arange(made, made + count)
                made += count
            else:
                amount = room.pop(at)
                which = np.concatenate(open_rows.pop(amount))
            each = amount // size
            used = -(-min(len(waiting), each * len(which)) // each)
            placed, waiting = waiting[: each * used], waiting[each * used :]
            rows[placed] = np.repeat(which[:used], each)[: len(placed)]
            last = len(placed) - each * (used - 1)
            leave(amount - each * size, which[: used - 1])
            leave(amount - last * size, which[used - 1 : used])
            leave(amount, which[used:])
    return rows


def _pieces(ends: Ids, context: int) -> tuple[Ids, Ids]:
    """First token and places of every piece of a shard's documents; a document of one token has none."""
    starts = np.concatenate(([0], ends[:-1]))
    places = ends - starts - 1
    count = -(-places // context)
    owner = np.repeat(np.arange(len(ends)), count)
    within = np.arange(len(owner)) - np.repeat(np.cumsum(count) - count, count)
    first = starts[owner] + within * context
    return first, np.minimum(context, places[owner] - within * context)


def fit_shard(ends: Ids, context: int) -> npt.NDArray[np.void]:
    """The plan of one shard: its pieces, row after row."""
    first, length = _pieces(ends.astype(np.int64), context)
    row = best_fit_decreasing(length, context)
    order = np.lexsort((first, row))
    plan = np.empty(len(order), dtype=_RECORD)
    plan["first"], plan["length"], plan["row"] = first[order], length[order], row[order]
    return plan


@dataclass(frozen=True)
class PackingPlan:
    """Fitted rows of a split.

    context: places of a row.
    counts: rows of each shard.
    pieces: of all shards, mapped from disk.
    starts: the first piece of every row, and at the end the number of pieces.
    before: rows before each shard.
    """

    context: int
    counts: Ids
    pieces: npt.NDArray[np.void]
    starts: npt.NDArray[np.uint64]
    before: Ids

    def row(self, shard: int, index: int) -> tuple[list[int], list[int]]:
        """First tokens and lengths of the pieces of a row."""
        at = int(self.before[shard]) + index
        pieces = self.pieces[int(self.starts[at]) : int(self.starts[at + 1])]
        return pieces["first"].tolist(), pieces["length"].tolist()

    @property
    def used(self) -> float:
        """Share of the places of all rows that hold a token."""
        capacity = int(self.counts.sum()) * self.context
        return float(self.pieces["length"].sum(dtype=np.int64)) / capacity if capacity else 0.0


def plan_name(split: str, context: int) -> str:
    """The name of a plan's files, without their suffixes."""
    return f"fit-{context}-{split}"


def write_plan(
    folder: Path,
    info: DatasetInfo,
    split: str,
    context: int,
    shards: Iterable[Shard],
    show: Callable[[int], None] = lambda _: None,
) -> None:
    """Write the plan of a split's rows of `context` tokens beside the shards: two files of numbers, then `fit-T-split.json`,
    which lists them.

    show: called with the number of shards done.

    Raises DataError if it cannot be written.
    """
    name = plan_name(split, context)
    counts: list[int] = []
    digests, sizes = {kind: sha256() for kind in _KINDS}, dict.fromkeys(_KINDS, 0)
    paths = {kind: folder / f"{name}.{kind}" for kind in _KINDS}
    try:
        with ExitStack() as stack:
            outputs = {kind: stack.enter_context(replaced_file(path)) for kind, path in paths.items()}

            def put(kind: str, array: npt.NDArray[Any]) -> None:
                outputs[kind].write(array.tobytes())
                digests[kind].update(array.tobytes())
                sizes[kind] += array.nbytes

            for number, shard in enumerate(shards, 1):
                plan = fit_shard(shard.ends, context)
                heads = np.flatnonzero(np.diff(plan["row"].astype(np.int64), prepend=-1))
                counts.append(len(heads))
                put("starts", (heads + sizes["pieces"] // _RECORD.itemsize).astype("<u8"))
                put("pieces", plan)
                show(number)
            put("starts", np.array([sizes["pieces"] // _RECORD.itemsize], dtype="<u8"))
        files = {kind: {"bytes": sizes[kind], "sha256": digests[kind].hexdigest()} for kind in _KINDS}
        plan_record = {"dataset": info.fingerprint, "context": context, "counts": counts, "files": files}
        write_file(folder / f"{name}.json", (json.dumps(plan_record) + "\n").encode())
    except OSError as error:
        what = f'data.packing = "fit": cannot write the plan of rows to {folder}: {error.strerror}'
        raise storage_error(error, what, "prepare the data with this setting where it can be written") from None


def read_plan(
    content: bytes, name: str, info: DatasetInfo, split: str, context: int,
    mapped: Callable[[str, int, str], npt.NDArray[np.uint8]],
) -> PackingPlan:  # fmt: skip
    """Open a split's plan.

    content: of its JSON file, called `name`.
    mapped: mapped(file, bytes, sha256) gives the bytes of a file beside it.

    Raises DataError if the plan belongs to other data or is damaged.
    """
    try:
        raw = json.loads(content)
        counts = np.array(raw["counts"], dtype=np.int64)
        if raw["dataset"] != info.fingerprint or raw["context"] != context or len(counts) != len(info.splits[split]):
            raise DataError(f"{name}: the plan of rows is of other data: remove it, and prepare again")
        stem = name.rpartition("/")[2].removesuffix(".json")
        found = {
            kind: mapped(f"{stem}.{kind}", int(raw["files"][kind]["bytes"]), str(raw["files"][kind]["sha256"]))
            for kind in _KINDS
        }
        pieces, starts = found["pieces"].view(_RECORD), found["starts"].view("<u8")
        if counts.min(initial=0) < 0 or len(starts) != counts.sum() + 1 or starts[-1] != len(pieces):
            raise DataError(f"{name}: the plan of rows is not whole: remove it, and prepare again")
    except DataError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{name}: the plan of rows is damaged ({error}): remove it, and prepare again") from None
    return PackingPlan(context, counts, pieces, starts, np.cumsum(counts) - counts)


def verify_plan(content: bytes, name: str, mapped: Callable[[str, int, str], npt.NDArray[np.uint8]]) -> None:
    """Read a plan's files in full. Raises DataError if a bit differs."""
    stem = name.rpartition("/")[2].removesuffix(".json")
    for kind, file in json.loads(content)["files"].items():
        if sha256(mapped(f"{stem}.{kind}", file["bytes"], file["sha256"]).data).hexdigest() != file["sha256"]:
            raise DataError(f"{stem}.{kind}: the plan of rows does not match its digest: remove it, and prepare again")
