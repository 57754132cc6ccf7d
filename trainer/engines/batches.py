"""What a rank feeds its model: its columns of its rows, cut into micro-batches, as arguments of the model's forward."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from mikoshi.data.dataset.rows import Batch, ranges
from mikoshi.parallel.context import tokens_of
from mikoshi.parallel.layout import Coordinates, Layout
from mikoshi.parallel.pipeline import Inputs
from mikoshi.trainer.model.config import ModelConfig
from mikoshi.trainer.model.moe import MoE

Index = npt.NDArray[np.int64]
"""Positions in a row."""


def columns(layout: Layout, here: Coordinates, context: int) -> Index | None:
    """The positions of a row of `context` tokens that a rank holds; None: all."""
    return tokens_of(here.cp, layout.cp, context, layout.context_kind) if layout.cp > 1 else None


def own(rows: Batch, index: Index | None) -> Batch:
    """The columns of whole rows that a rank holds."""
    return rows if index is None else rows.columns(ranges(index))


def micro_batches(rows: Batch, layout: Layout, index: Index | None, context: int, device: torch.device) -> list[Inputs]:
    """Every micro-batch of a rank's rows, as arguments of the model's forward."""
    rest: dict[str, Any] = {"length": context}
    if index is not None and layout.context_kind == "all-gather":
        rest["queries_T"] = to(index, device)
    size = min(layout.micro_rows, len(rows.tokens))
    out: list[Inputs] = []
    for start in range(0, len(rows.tokens), size):
        micro = rows.rows(start, start + size)
        arrays = {
            "x": micro.tokens, "labels_BT": micro.labels, "docs_BS": micro.docs, "positions_BT": micro.positions,
            "padding_BT": micro.padding,
        }  # fmt: skip
        out.append({key: None if a is None else to(a, device) for key, a in arrays.items()} | rest)
    return out


def weigh_balance(experts: Iterable[MoE], model: ModelConfig, rows: Batch, alike: int, device: torch.device) -> None:
    """Have the experts' balance losses, which are of all tokens that are no padding, stand beside the mean loss over the
    predicted ones: what they add to the summed loss is their mean times the number of predicted tokens. Of the whole batch,
    of which `alike` ranks each know the same tokens. Collective where the model has such losses."""
    moe = model.moe
    if moe is None or not (moe.aux_loss or moe.z_loss):
        return
    padding = 0 if rows.padding is None else int(rows.padding.sum())
    counts = np.array([(rows.labels >= 0).sum(), rows.labels.size - padding], dtype=np.float64)
    both = to(counts / alike, device)
    dist.all_reduce(both)
    share = (both[0] / both[1].clamp(min=1)).float()
    for layer in experts:
        layer.balance_share = share


def one_row(ids: Sequence[int], context: int) -> Batch:
    """A row of `context` tokens that begins with `ids`: what follows the last of them is not seen by it."""
    tokens = np.zeros((1, context), dtype=np.int64)
    tokens[0, : len(ids)] = ids
    return Batch(tokens, tokens, None, None)


def to(array: Any, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
