"""A split of a dataset as rows of T tokens: shards are opened when first read, and rows are found at once."""

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
from mikoshi.data.dataset.packing import FitPlan, cut_counts, plan_name, read_plan, write_plan
from mikoshi.data.dataset.rows import Where
from mikoshi.data.dataset.shards import DatasetInfo, Shard, ShardInfo
from mikoshi.data.errors import DataError, reading
from mikoshi.data.io.atomic import alone_in

Ids = npt.NDArray[np.int64]
Packing = Literal["cut", "fit"]

_MAPPED = min(8192, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)
"""Shards that stay mapped: a map holds its file open."""


@dataclass(frozen=True)
class Corpus:
    """One split of one dataset in rows of `context` tokens; `counts` are the rows of each shard. `plan`: of rows fitted
    to documents; None where a shard's tokens are cut one row after another."""

    name: str
    dataset: Dataset
    shards: Sequence[ShardInfo]
    context: int
    counts: Ids
    plan: FitPlan | None = None
    _open: OrderedDict[int, Shard] = field(default_factory=OrderedDict, compare=False, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, compare=False, repr=False)

    @property
    def samples(self) -> int:
        return int(self.counts.sum())

    @property
    def info(self) -> DatasetInfo:
        return self.dataset.info

    def where(self, shard: int, row: int) -> Where:
        """The place of a row. Thread-safe. Raises DataError if its shard is not as listed or cannot be fetched."""
        opened = self._open.get(shard)
        if opened is None:
            opened = self.dataset.shard(self.shards[shard])
            with self._lock:
                self._open[shard] = opened
                while len(self._open) > _MAPPED:
                    self._open.popitem(last=False)
        if self.plan is None:
            return Where(opened, row * self.context)
        return Where(opened, 0, self.plan.row(shard, row))

    def ahead(self, shards: Sequence[int]) -> None:
        """Say which shards will be wanted soon; without effect where they are at hand."""
        if self.dataset.ahead is not None:
            self.dataset.ahead([self.shards[n] for n in shards if n not in self._open])


def open_corpus(dataset: Dataset, split: str, context: int, packing: Packing = "cut", name: str = "") -> Corpus:
    """Rows of `context` tokens of a dataset's split. Raises DataError if there is not one whole row.

    Rows fitted to documents need a plan, which is made beside the shards where there is none.
    """
    shards = dataset.shards(split)
    if dataset.info.report.get("stream") and not shards:
        raise DataError(
            f"data.path: {dataset.place} was set apart for a stream and has no training text: set data.stream = true, or "
            "prepare the data under another path"
        )
    if packing == "fit":
        plan = _plan(dataset, split, context)
        counts = plan.counts
    else:
        plan, counts = None, cut_counts(np.array([s.tokens for s in shards], dtype=np.int64), context)
    if not counts.sum():
        raise DataError(
            f"data.path: the {split} split of {dataset.place} has {dataset.info.tokens(split)} tokens, less than one row of "
            f"{context} + 1"
        )
    return Corpus(name, dataset, shards, context, counts, plan)


def _have_plan(dataset: Dataset, folder: Path, split: str, context: int, name: str) -> None:
    if (folder / name).exists():
        return
    with alone_in(folder):
        if not (folder / name).exists():  # another process may just have made it
            write_plan(folder, dataset.info, split, context, (dataset.shard(shard) for shard in dataset.shards(split)))


def _plan(dataset: Dataset, split: str, context: int) -> FitPlan:
    name = f"{plan_name(split, context)}.json"
    if dataset.folder is not None:
        with reading(dataset.folder / name):
            _have_plan(dataset, dataset.folder, split, context, name)
    try:
        content = dataset.read(name)
    except DataError as error:
        raise DataError(
            f'data.packing = "fit": {dataset.place} has no plan of rows of {context} tokens ({error}): prepare the data with '
            "this setting in a folder, and put what it wrote there"
        ) from None
    return read_plan(content, f"{dataset.place}/{name}", dataset.info, split, context, dataset.mapped)
