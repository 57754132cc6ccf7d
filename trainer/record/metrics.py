"""Throughput, MFU and memory of each step, and the logs that record them.

Speed goes by the tokens that are computed, every place of the global batch's rows: what is masked from the loss, a prompt or
the padding behind documents, costs as much as what is predicted.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping
from typing import Any

import torch

from mikoshi.data.io.json import dumps
from mikoshi.trainer.config.run import RunConfig
from mikoshi.trainer.hardware import gpu_named
from mikoshi.trainer.model.config import ModelConfig
from mikoshi.trainer.model.gpt import GPT
from mikoshi.trainer.record.run_folder import FULL, RunFolder, drop_after, read_jsonl, tolerate_full_disk
from mikoshi.trainer.record.wandb import WandbLog, history_segment


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Dense peak FLOP/s of one device for this precision, or None where it is not known."""
    if device.type != "cuda":
        return None
    gpu = gpu_named(torch.cuda.get_device_name(device))
    return None if gpu is None else gpu.peak.get(precision)


def flops_per_token(config: ModelConfig, context: int) -> float:
    """FLOPs of forward and backward for one token: 6 a matrix element, 12 x heads x head_dim x keys for attention
    (Chowdhery et al. 2022, arXiv:2204.02311, appendix B). `keys` is the context, or the window where it is shorter;
    causal masking is not subtracted, as is usual. Of routed experts only the top_k that a token is sent to count; recomputed
    activations do not."""
    with torch.device("meta"):
        model = GPT(config)
    looked_up = 0 if config.tied or model.embed is None else model.embed.weight.numel()
    positions = 0 if model.position is None else model.position.weight.numel()
    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2) - looked_up - positions
    if config.moe is not None:  # a layer's experts are stacked in three dimensions
        stacked = sum(p.numel() for p in model.parameters() if p.ndim == 3)
        matrices += stacked * config.moe.top_k // config.moe.experts
    keys = (min(context, config.window(i) or context) for i in range(config.layers))
    return 6.0 * matrices + sum(12.0 * config.heads * config.d_head * k for k in keys)


def memory_bytes(device: torch.device) -> int:
    """Most memory this rank has held so far: the allocator's peak on CUDA, else the process's peak resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class MetricLog:
    """Rank 0's record of a run: metrics.jsonl, TensorBoard and Weights & Biases, from the same dicts."""

    def __init__(self, folder: RunFolder, config: RunConfig, start: int) -> None:
        """Go on after step `start`: what a previous attempt recorded beyond it is dropped."""
        self._path = folder.metrics
        segment = None
        if config.log.wandb:
            last = max((record.get("step", 0) for record in read_jsonl(self._path)), default=0)
            segment = history_segment(folder, config, start, last)
        with tolerate_full_disk(self._path):
            drop_after(self._path, start)
        self._lines = folder.metrics.open("ab", buffering=0)
        self._waiting = bytearray()  # what found no room on the disk yet
        self._full = False
        self._board: Any = None
        self._wandb: WandbLog | None = None
        if config.log.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            with tolerate_full_disk(folder.tensorboard):
                self._board = SummaryWriter(folder.tensorboard, purge_step=start + 1)
        if segment is not None:
            self._wandb = WandbLog(folder, config, segment)

    def record(self, step: int, values: Mapping[str, Any]) -> None:
        """Write the metrics of a step. A value of None is null in the file, and no point in TensorBoard or W&B."""
        self._waiting += dumps({"step": step, "time": round(time.time(), 3), **values}).encode() + b"\n"
        self._write()
        known = {name: value for name, value in values.items() if value is not None}
        self._draw(step, known)
        if self._wandb is not None:
            self._wandb.record(step, known)

    def _write(self) -> None:
        try:
            while self._waiting:
                del self._waiting[: self._lines.write(self._waiting)]
            self._full = False
        except OSError as error:
            if error.errno not in FULL:
                raise
            if not self._full:
                print(f"warning: {self._path}: {error.strerror}: written once there is room", file=sys.stderr)
            self._full = True

    def _draw(self, step: int, values: dict[str, float]) -> None:
        if self._board is None:
            return
        try:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        except OSError as error:  # its own thread met a full disk, and has ended with it
            print(f"warning: TensorBoard's log cannot be written any more: {error.strerror}", file=sys.stderr)
            self._board = None

    def close(self) -> None:
        """Write what is still buffered and close all logs."""
        self._write()
        self._lines.close()
        if self._board is not None:
            with tolerate_full_disk(self._path.parent):
                self._board.close()
        if self._wandb is not None:
            self._wandb.close()
