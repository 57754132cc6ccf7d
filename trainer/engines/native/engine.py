"""The native engine: the plain GPT carried by any layout, with torch's own optimizers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mikoshi.data.dataset.rows import Batch
from mikoshi.parallel.layout import Layout
from mikoshi.parallel.mesh import Groups
from mikoshi.parallel.pipeline import Inputs, Pipeline
from mikoshi.parallel.process.heartbeat import beat
from mikoshi.parallel.replicas import Difference, check
from mikoshi.parallel.sharding import local, place, sum_of_squares
from mikoshi.parallel.zero import reduction
from mikoshi.trainer.config.run import RunConfig
from mikoshi.trainer.engines.base import NO_LIMITS, Limits, StepResult, gradient_factor, step_result
from mikoshi.trainer.engines.batches import columns, micro_batches, one_row, own, weigh_balance
from mikoshi.trainer.engines.optim import Optimizers
from mikoshi.trainer.engines.parameters import FillWeights, Held, Plain
from mikoshi.trainer.engines.parts import compute_dtype, cores_per_rank
from mikoshi.trainer.model.gpt import GPT
from mikoshi.trainer.model.init import Region, fill, initial
from mikoshi.trainer.model.moe import MoE

Loads = npt.NDArray[np.float64]
"""Rows that went to each expert in a step, [layers, experts]; no rows for a dense model."""


class NativeEngine:
    """`Engine` on FSDP2, DTensor and pipeline schedules. Builds collectively: every rank makes its own piece of every
    parameter, and no more."""

    def __init__(
        self,
        config: RunConfig,
        layout: Layout,
        device: torch.device,
        groups: Groups,
        parts: dict[int, GPT],
        fill_weights: FillWeights,
        read: Callable[[Tensor], list[float]] = Tensor.tolist,
        hold: Callable[[Sequence[nn.Module]], Held] = Plain,
        sequence_cut: bool = True,
    ) -> None:
        """`groups`: what make_groups makes of the layout; `parts`: what build_parts does, or modules that are called alike,
        on the meta device.

        `fill_weights` writes a parameter's initial values and `read` brings a step's figures to
        the host: a dry run, whose tensors hold nothing, gives others. `hold`: how the parts hold their parameters.
        `sequence_cut`: whether tensor-parallel ranks share out what passes between stages.
        """
        self.config, self.layout, self.device, self.read = config, layout, device, read
        self.here = layout.coordinates(dist.get_rank())
        self.groups = groups
        self.alike = layout.world // layout.data_ranks // layout.cp  # ranks that know the same tokens
        home = torch.device("cpu") if config.parallel.offload == "optimizer" else device
        self.parts = {stage: part.to_empty(device=home) for stage, part in parts.items()}
        self.held = hold(list(self.parts.values()))
        self.named = self.held.named
        self.parameters = [p for _, p in self.named]
        self.held.fill(fill_weights, config, device)
        self.optimizers = Optimizers(self.named, config.optim)
        # A tied embedding is with the first and with the last stage; it counts once, as the first stage's.
        ends = [
            cast(nn.Parameter, part.embed.weight)
            for part in self.parts.values()
            if part.embed is not None and layout.stages > 1
        ]
        self.tied = ends if config.model.tied else []
        copies = [part.embed for part in self.parts.values() if part.embed is not None and not part.part.first]
        self.counted = [p for p in self.parameters if all(p is not copy.weight for copy in copies)]
        self.index = columns(layout, self.here, config.train.context)
        self.experts = [
            (int(name), block.mlp)
            for part in self.parts.values() for name, block in part.blocks.items() if isinstance(block.mlp, MoE)
        ]  # fmt: skip
        sequence = config.train.context // (layout.cp * (layout.tp if sequence_cut else 1))
        hidden = (sequence, config.model.width)
        self.pipeline = Pipeline(
            self.parts, layout, self.here.pp, groups.pp, reduction(layout), hidden, compute_dtype(config), device
        )

    def step(self, rows: Batch, lr: float, limits: Limits = NO_LIMITS) -> StepResult:
        weigh_balance([layer for _, layer in self.experts], self.config.model, rows, self.alike, self.device)
        loss = self.pipeline.step(self._micro_batches(rows))
        beat("reduce")
        self.held.join_gradients()
        self._join_ends()
        gradients = [self.held.cut(p, p.grad) for p in self.counted if p.grad is not None]
        squares = sum_of_squares(gradients, self.layout.stage_ranks)
        loss_sum, tokens, squares_sum, loads = self._sums(loss, rows, squares)
        result = step_result(loss_sum, tokens, squares_sum**0.5, limits, expert_metrics(loads))
        factor = gradient_factor(result, self.config.optim.clip)
        if factor is not None:
            beat("update")
            torch._foreach_mul_([local(p.grad) for p in self.parameters if p.grad is not None], factor)
            self.optimizers.step(lr)
            self._balance_experts(loads)
        for p in self.parameters:
            p.grad = None
        return result

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch], known: int | None = None) -> float | None:
        for part in self.parts.values():
            part.known = known
        loss_sum, tokens = 0.0, 0
        for rows in batches:
            losses = self.pipeline.forward(self._micro_batches(rows))
            loss = torch.stack(losses).double().sum() if losses else torch.zeros((), dtype=torch.float64, device=self.device)
            batch_loss, batch_tokens, _, _ = self._sums(loss, rows, torch.zeros_like(loss))
            loss_sum, tokens = loss_sum + batch_loss, tokens + batch_tokens
        return loss_sum / tokens if tokens else None

    @torch.no_grad()
    def next_logits(self, ids: Sequence[int]) -> Tensor:
        context, here = self.config.train.context, self.here
        ids = ids[-context:]
        (micro,) = self._micro_batches(self.own(one_row(ids, context)))
        outputs = self.pipeline.forward([{key: value for key, value in micro.items() if key != "labels_BT"}])
        told = torch.zeros(self.config.model.vocab, device=self.device)
        held = np.arange(context) if self.index is None else self.index
        mine = np.flatnonzero(held == len(ids) - 1)
        if outputs and len(mine) and here.tp == 0 and here.data == 0:
            told += outputs[0][0, mine[0]].float()
        dist.all_reduce(told)
        return told

    def state(self) -> dict[str, Tensor]:
        return self.held.told(self._own_state())

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.held.take(state, self._own_state())
        if len(self.tied) == 2:  # both ends are on this rank, and the state names one
            first, last = self.tied
            for source, target in [(first.detach(), last.detach()), *self.optimizers.pairs(first, last)]:
                local(target).copy_(local(source))

    def differing(self) -> list[Difference]:
        return check(self.held.compared(self._own_state()).items(), self.groups)

    def close(self) -> None:
        """It keeps nothing outside of memory."""

    def _own_state(self) -> dict[str, Tensor]:
        weights = {f"model.{name}": p.detach() for name, p in reversed(self.named)}  # of a tied pair, the first stage's
        return weights | dict(reversed(list(self.optimizers.state())))

    def own(self, rows: Batch) -> Batch:
        """The columns of whole rows that this rank holds."""
        return own(rows, self.index)

    def _micro_batches(self, rows: Batch) -> list[Inputs]:
        return micro_batches(rows, self.layout, self.index, self.config.train.context, self.device)

    def _join_ends(self) -> None:
        """A tied embedding's gradient is the sum of the first stage's and the last's."""
        gradients = [local(p.grad) for p in self.tied if p.grad is not None]
        if self.groups.ends is not None:
            for gradient in gradients:
                dist.all_reduce(gradient, group=self.groups.ends)
        elif len(gradients) == 2:
            gradients[0].add_(gradients[1])
            gradients[1].copy_(gradients[0])

    def _sums(self, loss: Tensor, rows: Batch, squares: Tensor) -> tuple[float, int, float, Loads]:
        """Loss, predicted tokens, squared gradient norm and every expert's rows, over all ranks: the step's one
        collective of its own. Ranks that know the same of these each give an equal share."""
        layout, moe = self.layout, self.config.model.moe
        counted = float((rows.labels >= 0).sum()) / self.alike
        figures = [loss / layout.tp, torch.tensor(counted, dtype=torch.float64), squares]
        loads = torch.zeros(0 if moe is None else self.config.model.layers, 0 if moe is None else moe.experts)
        loads = loads.to(self.device, torch.float64)
        for layer, module in self.experts:
            loads[layer] = module.take_load()
        mine = torch.cat((torch.stack([figure.to(loss) for figure in figures]), loads.flatten()))
        dist.all_reduce(mine)
        loss_sum, tokens, squares_sum, *told = self.read(mine)
        return loss_sum, round(tokens), squares_sum, np.reshape(told, loads.shape)

    @torch.no_grad()
    def _balance_experts(self, loads: Loads) -> None:
        """Move the bias of experts that had too much to do down and of the others up (DeepSeek-AI 2024, arXiv:2412.19437,
        section 2.1.2)."""
        for layer, module in self.experts:
            bias, rate = module.router.bias, module.moe.bias_rate
            if bias is not None and rate:
                (first,), (count,) = place(bias)
                way = np.sign(loads[layer].mean() - loads[layer])[first : first + count]
                local(bias).add_(torch.from_numpy(way).to(local(bias)), alpha=rate)


def fill_initial(name: str, p: Tensor, config: RunConfig, device: torch.device, region: Region | None = None) -> None:
    """Write the initial values of this rank's piece of a parameter, or of `region` of it."""
    region = Region(*place(p), tuple(p.shape)) if region is None else region
    fill(local(p), name, region, initial(name, config.model), config.run.seed, cores_per_rank(device))


def expert_metrics(loads: Loads) -> dict[str, float]:
    """How evenly the experts were used in a step: the busiest one's rows over the mean, worst layer and mean of layers,
    and the number of experts that had nothing to do. Empty for a dense model."""
    used = loads[loads.sum(1) > 0]
    if not used.size:
        return {}
    busiest = used.max(1) / used.mean(1)
    idle = float((used == 0).sum())
    return {"expert_load_worst": float(busiest.max()), "expert_load_mean": float(busiest.mean()), "experts_idle": idle}
