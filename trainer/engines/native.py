"""The native engine: the plain GPT carried by FSDP2, with torch's own optimizers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from data.loader import Batch
from parallel.layout import Layout, micro_rows
from parallel.sharding import local, place, sum_of_squares
from parallel.zero import set_gradient_sync, shard_model
from trainer.config import RunConfig
from trainer.engines.base import StepResult
from trainer.model.gpt import GPT, Block
from trainer.model.init import Region, fill, initial
from trainer.optim import build_optimizers, optimizer_state, set_learning_rate

_KEPT_OPS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.higher_order.flex_attention,
}


class NativeEngine:
    """`Engine` on FSDP2. Builds collectively: every rank makes its own piece of every parameter, and no more."""

    def __init__(self, config: RunConfig, layout: Layout, device: torch.device) -> None:
        """Needs the process group of `layout.world` ranks. Raises LayoutError if the batch cannot be shared."""
        self.config, self.layout, self.device = config, layout, device
        self.micro_rows = micro_rows(layout.rows_per_rank(config.train.global_batch), config.train.micro_batch)
        with torch.device("meta"):
            self.model = GPT(config.model)
        blocks = [block for block in self.model.blocks.values() if isinstance(block, Block)]
        _wrap_forwards(blocks, config.engine.recompute, compiles(config, device))
        dtype = torch.bfloat16 if config.engine.precision == "bf16" else torch.float32
        shard_model(self.model, blocks, layout, layout.mesh(device.type), dtype)
        self.model.to_empty(device=device)
        self.named = list(self.model.named_parameters())
        self.parameters = [p for _, p in self.named]
        threads = torch.get_num_threads() if device.type == "cpu" else _cores_per_rank()
        for name, p in self.named:
            region = Region(*place(p), tuple(p.shape))
            fill(local(p), name, region, initial(name, config.model), config.run.seed, threads)
        self.optimizers = build_optimizers(self.named, config.optim)

    def step(self, rows: Batch, lr: float) -> StepResult:
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        starts = range(0, len(rows.tokens), self.micro_rows)
        for start in starts:
            set_gradient_sync(self.model, self.layout, last=start == starts[-1])
            micro_loss = self._loss(rows.rows(start, start + self.micro_rows))
            micro_loss.backward()
            loss += micro_loss.detach()
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        loss_sum, tokens, squares = self._sums(loss, rows, sum_of_squares(gradients, self.layout.world))
        norm = float(squares**0.5 / max(tokens, 1))
        applied = norm < float("inf")  # false for NaN too
        if applied:
            # The gradients are of the summed loss: to the mean and to the clipped length in one product.
            shrink = min(1.0, self.config.optim.clip / max(norm, 1e-12)) if self.config.optim.clip else 1.0
            torch._foreach_mul_([local(g) for g in gradients], shrink / max(tokens, 1))
            set_learning_rate(self.optimizers, lr)
            for optimizer in self.optimizers:
                optimizer.step()
        for p in self.parameters:
            p.grad = None
        return StepResult(loss_sum / max(tokens, 1), int(tokens), norm, applied)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> float:
        loss_sum = tokens = 0.0
        for rows in batches:
            loss = torch.zeros((), dtype=torch.float64, device=self.device)
            for start in range(0, len(rows.tokens), self.micro_rows):
                loss += self._loss(rows.rows(start, start + self.micro_rows))
            batch_loss, batch_tokens, _ = self._sums(loss, rows, torch.zeros_like(loss))
            loss_sum, tokens = loss_sum + batch_loss, tokens + batch_tokens
        return loss_sum / max(tokens, 1)

    def state(self) -> dict[str, Tensor]:
        weights = {f"model.{name}": p.detach() for name, p in self.named}
        return weights | dict(optimizer_state(self.named, self.optimizers))

    def load_state(self, state: dict[str, Tensor]) -> None:
        for name, tensor in self.state().items():
            if local(tensor).data_ptr() != local(state[name]).data_ptr():
                tensor.copy_(state[name])

    def _loss(self, rows: Batch) -> Tensor:
        """Summed loss of some rows on this rank."""
        inputs = (None if a is None else _to(a, self.device) for a in (rows.tokens, rows.labels, rows.docs, rows.positions))
        loss: Tensor = self.model(*inputs)
        return loss

    def _sums(self, loss: Tensor, rows: Batch, squares: Tensor) -> list[float]:
        """Loss, predicted tokens and squared gradient norm over all ranks: the step's one extra collective."""
        mine = torch.stack([loss, torch.tensor(float((rows.labels >= 0).sum()), dtype=torch.float64).to(loss), squares])
        dist.all_reduce(mine)
        sums: list[float] = mine.tolist()
        return sums


def compiles(config: RunConfig, device: torch.device) -> bool:
    return config.engine.compile == "on" or (config.engine.compile == "auto" and device.type == "cuda")


def _to(array: Any, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def _wrap_forwards(blocks: list[Block], recompute: str, compiled: bool) -> None:
    """Recompute and compile a block inside its `forward`: parameter names and FSDP's hooks, outside, see neither."""
    for block in blocks:
        forward: Callable[..., Any] = block.forward
        if recompute != "none":
            context: dict[str, Any] = {} if recompute == "full" else {"context_fn": _keep_products}
            forward = partial(checkpoint, forward, use_reentrant=False, **context)
        if compiled:
            forward = torch.compile(forward)
        block.forward = forward  # type: ignore[method-assign]


def _keep_products() -> Any:
    """Selective recompute: what took matrix products or attention is kept, the cheap rest is made again."""

    def policy(_context: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in _KEPT_OPS else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def _cores_per_rank() -> int:
    return max(1, (os.cpu_count() or 1) // max(1, torch.cuda.device_count()))
