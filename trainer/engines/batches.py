"""From a rank's rows to the inputs of its model: the positions that the rank holds, cut into micro-batches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from mikoshi.data.dataset.rows import Batch, column_ranges
from mikoshi.parallel.context import token_positions
from mikoshi.parallel.layout import Coordinates, Layout
from mikoshi.parallel.pipeline import Inputs
from mikoshi.trainer.model.config import ModelConfig
from mikoshi.trainer.model.moe import MoE

Index = npt.NDArray[np.int64]
"""Positions in a row."""


def local_positions(layout: Layout, coordinates: Coordinates, context: int) -> Index | None:
    """Returns the positions of a row that this rank holds under context parallelism, or None if it holds all.

    context: tokens in a row.
    """
    return token_positions(coordinates.cp, layout.cp, context, layout.context_kind) if layout.cp > 1 else None


def select_positions(rows: Batch, index: Index | None) -> Batch:
    """Returns a batch of whole rows reduced to the positions in `index`; None keeps all."""
    return rows if index is None else rows.select_columns(column_ranges(index))


def micro_batches(rows: Batch, layout: Layout, index: Index | None, context: int, device: torch.device) -> list[Inputs]:
    """Returns the arguments of the model's forward for every micro-batch of a rank's rows.

    rows: this rank's rows, reduced to its positions.
    index: those positions; None means all.
    context: tokens in a whole row.
    device: where the tensors are put.
    """
    rest: dict[str, Any] = {"length": context}
    if index is not None and layout.context_kind == "all-gather":
        rest["queries_T"] = to_device(index, device)
    size = min(layout.micro_rows, len(rows.tokens))
    out: list[Inputs] = []
    for start in range(0, len(rows.tokens), size):
        micro = rows.slice_rows(start, start + size)
        arrays = {
            "x": micro.tokens, "labels_BT": micro.labels, "docs_BS": micro.docs, "positions_BT": micro.positions,
            "padding_BT": micro.padding,
        }  # fmt: skip
        out.append({key: None if a is None else to_device(a, device) for key, a in arrays.items()} | rest)
    return out


def scale_balance_losses(
    experts: Iterable[MoE], model: ModelConfig, rows: Batch, same_token_ranks: int, device: torch.device
) -> None:
    """Set how much the experts' balance losses add to the summed loss. Collective if the model has such losses.

    A balance loss is a mean over all tokens that are not padding. Multiplied by the number of predicted tokens in the whole
    batch, it stands beside the summed loss as it would beside the mean loss.

    experts: the mixture-of-experts layers of this rank.
    same_token_ranks: how many ranks count the same tokens as this one.
    """
    moe = model.moe
    if moe is None or not (moe.aux_loss or moe.z_loss):
        return
    padding = 0 if rows.padding is None else int(rows.padding.sum())
    counts = np.array([(rows.labels >= 0).sum(), rows.labels.size - padding], dtype=np.float64)
    both = to_device(counts / same_token_ranks, device)
    dist.all_reduce(both)
    share = (both[0] / both[1].clamp(min=1)).float()
    for layer in experts:
        layer.balance_share = share


def single_row(ids: Sequence[int], context: int) -> Batch:
    """Returns a batch of one row of `context` tokens that begins with `ids` and is padded with zeros.

    Causal attention keeps the padding from what precedes it.
    """
    tokens = np.zeros((1, context), dtype=np.int64)
    tokens[0, : len(ids)] = ids
    return Batch(tokens, tokens, None, None)


def to_device(array: Any, device: torch.device) -> Tensor:
    """Returns an array as a tensor on `device`. A copy to a GPU goes through pinned memory and does not block."""
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
