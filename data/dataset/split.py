"""A split of a dataset as rows of T tokens. Shards are opened when first read, and any row is found in constant time."""

from __future__ import annotations

import resource
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from mikoshi.data.dataset.dataset import Dataset
from mikoshi.data.dataset.packing import PackingPlan, plan_name, read_plan, row_counts, write_plan
from mikoshi.data.dataset.rows import RowLocation
from mikoshi.data.dataset.shards import DatasetInfo, Shard, ShardInfo
from mikoshi.data.errors import DataError, os_errors_named
from mikoshi.data.io.atomic import folder_lock

Ids = npt.NDArray[np.int64]
Packing = Literal["cut", "fit"]

_MAPPED = min(8192, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)
"""Shards that stay mapped: a map holds its file open."""


@dataclass(frozen=True)
class Corpus:
    """One split of one dataset in rows of `context` tokens.

    counts: rows of each shard.
    plan: of rows fitted to documents; None if each shard's tokens are cut into consecutive rows.
    """

    name: str
    dataset: Dataset
    shards: Sequence[ShardInfo]
    context: int
    counts: Ids
    plan: PackingPlan | None = None
    _open: OrderedDict[int, Shard] = field(default_factory=OrderedDict, compare=False, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, compare=False, repr=False)

    @property
    def samples(self) -> int:
        """The number of rows."""
        return int(self.counts.sum())

    @property
    def info(self) -> DatasetInfo:
        """The dataset's index."""
        return self.dataset.info

    def locate(self, shard: int, row: int) -> RowLocation:
        """Where a row is read from. Thread-safe. Raises DataError if its shard is not as listed or cannot be fetched."""
        opened = self._open.get(shard)
        if opened is None:
            opened = self.dataset.shard(self.shards[shard])
            with self._lock:
                self._open[shard] = opened
                while len(self._open) > _MAPPED:
                    self._open.popitem(last=False)
        if self.plan is None:
            return RowLocation(opened, row * self.context)
        return RowLocation(opened, 0, self.plan.row(shard, row))

    def prefetch(self, shards: Sequence[int]) -> None:
        """Announce which shards will be needed soon. Does nothing for local datasets."""
        if self.dataset.prefetch is not None:
            self.dataset.prefetch([self.shards[n] for n in shards if n not in self._open])


def open_corpus(dataset: Dataset, split: str, context: int, packing: Packing = "cut", name: str = "") -> Corpus:
    """Rows of `context` tokens of a dataset's split. Raises DataError if there is not one whole row.

    Rows fitted to documents need a plan, which is made beside the shards if it is missing.
    """
    shards = dataset.shards(split)
    if dataset.info.report.get("stream") and not shards:
        raise DataError(
            f"data.path: {dataset.place} was set apart for a stream and has no training text: set data.stream = true, or "
            "prepare the data under another path"
        )
    if packing == "fit":
        plan = _load_plan(dataset, split, context)
        counts = plan.counts
    else:
        plan, counts = None, row_counts(np.array([s.tokens for s in shards], dtype=np.int64), context)
    if not counts.sum():
        raise DataError(
            f"data.path: the {split} split of {dataset.place} has {dataset.info.tokens(split)} tokens, less than one row of "
            f"{context} + 1"
        )
    return Corpus(name, dataset, shards, context, counts, plan)


def _ensure_plan(dataset: Dataset, folder: Path, split: str, context: int, name: str) -> None:
    if (folder / name).exists():
        return
    with folder_lock(folder):
        if not (folder / name).exists():  # another process may just have made it
            write_plan(folder, dataset.info, split, context, (dataset.shard(shard) for shard in dataset.shards(split)))


def _load_plan(dataset: Dataset, split: str, context: int) -> PackingPlan:
    name = f"{plan_name(split, context)}.json"
    if dataset.folder is not None:
        with os_errors_named(dataset.folder / name):
            _ensure_plan(dataset, dataset.folder, split, context, name)
    try:
        content = dataset.read(name)
    except DataError as error:
        raise DataError(
            f'data.packing = "fit": {dataset.place} has no plan of rows of {context} tokens ({error}): prepare the data with '
            "this setting in a folder, and put what it wrote there"
        ) from None
    return read_plan(content, f"{dataset.place}/{name}", dataset.info, split, context, dataset.mapped)
