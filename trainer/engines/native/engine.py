"""The native engine: the plain GPT in any layout, on FSDP2, our collectives and pipeline, with torch's own optimizers."""

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
from mikoshi.parallel.process.heartbeat import send_heartbeat
from mikoshi.parallel.replicas import Difference, find_differences
from mikoshi.parallel.sharding import local, local_region, sum_of_squares
from mikoshi.parallel.zero import reduction
from mikoshi.trainer.config.run import RunConfig
from mikoshi.trainer.engines.base import NO_STEP_LIMITS, StepLimits, StepResult, gradient_factor, step_result
from mikoshi.trainer.engines.batches import local_positions, micro_batches, scale_balance_losses, select_positions, single_row
from mikoshi.trainer.engines.optim import Optimizers
from mikoshi.trainer.engines.parameters import FillWeights, ParameterMap, PlainParameters
from mikoshi.trainer.engines.parts import compute_dtype, cores_per_rank
from mikoshi.trainer.model.gpt import GPT
from mikoshi.trainer.model.init import Region, fill, initial
from mikoshi.trainer.model.moe import MoE

Loads = npt.NDArray[np.float64]
"""Rows that went to each expert in a step, [layers, experts]; no rows for a dense model."""


class NativeEngine:
    """`Engine` on FSDP2, DTensor and pipeline schedules.

    It builds collectively, and each rank makes only its own piece of every parameter.
    """

    def __init__(
        self,
        config: RunConfig,
        layout: Layout,
        device: torch.device,
        groups: Groups,
        parts: dict[int, GPT],
        fill_weights: FillWeights,
        read: Callable[[Tensor], list[float]] = Tensor.tolist,
        map_parameters: Callable[[Sequence[nn.Module]], ParameterMap] = PlainParameters,
        sequence_cut: bool = True,
    ) -> None:
        """Build the engine. Collective.

        groups: the result of make_groups for the layout.
        parts: the result of build_parts, or modules with the same interface, on the meta device.
        fill_weights: writes a parameter's initial values; a dry run, whose tensors hold nothing, gives another.
        read: copies a step's figures to the host; a dry run gives another.
        map_parameters: makes the map from the parts' parameters to canonical names.
        sequence_cut: whether tensor-parallel ranks split the sequence of what passes between stages.
        """
        self.config, self.layout, self.device, self.read = config, layout, device, read
        self.coordinates = layout.coordinates(dist.get_rank())
        self.groups = groups
        self.same_token_ranks = layout.world // layout.data_ranks // layout.cp  # ranks that count the same tokens
        home = torch.device("cpu") if config.parallel.offload == "optimizer" else device
        self.parts = {stage: part.to_empty(device=home) for stage, part in parts.items()}
        self.parameter_map = map_parameters(list(self.parts.values()))
        self.named = self.parameter_map.named
        self.parameters = [p for _, p in self.named]
        self.parameter_map.fill(fill_weights, config, device)
        self.optimizers = Optimizers(self.named, config.optim)
        # The first and the last stage each hold a tied embedding; the norm counts the first stage's.
        tied_weights = [
            cast(nn.Parameter, part.embed.weight)
            for part in self.parts.values()
            if part.embed is not None and layout.stages > 1
        ]
        self.tied = tied_weights if config.model.tied else []
        copies = [part.embed for part in self.parts.values() if part.embed is not None and not part.part.first]
        self.norm_parameters = [p for p in self.parameters if all(p is not copy.weight for copy in copies)]
        self.index = local_positions(layout, self.coordinates, config.train.context)
        self.experts = [
            (int(name), block.mlp)
            for part in self.parts.values() for name, block in part.blocks.items() if isinstance(block.mlp, MoE)
        ]  # fmt: skip
        sequence = config.train.context // (layout.cp * (layout.tp if sequence_cut else 1))
        hidden = (sequence, config.model.width)
        self.pipeline = Pipeline(
            self.parts, layout, self.coordinates.pp, groups.pp, reduction(layout), hidden, compute_dtype(config), device
        )

    def step(self, rows: Batch, lr: float, limits: StepLimits = NO_STEP_LIMITS) -> StepResult:
        """See `Engine.step`."""
        scale_balance_losses([layer for _, layer in self.experts], self.config.model, rows, self.same_token_ranks, self.device)
        loss = self.pipeline.step(self._micro_batches(rows))
        send_heartbeat("reduce")
        self.parameter_map.sum_partial_gradients()
        self._sum_tied_gradients()
        gradients = [self.parameter_map.as_sharded(p, p.grad) for p in self.norm_parameters if p.grad is not None]
        squares = sum_of_squares(gradients, self.layout.stage_ranks)
        loss_sum, tokens, squares_sum, loads = self._sums(loss, rows, squares)
        result = step_result(loss_sum, tokens, squares_sum**0.5, limits, expert_metrics(loads))
        factor = gradient_factor(result, self.config.optim.clip)
        if factor is not None:
            send_heartbeat("update")
            torch._foreach_mul_([local(p.grad) for p in self.parameters if p.grad is not None], factor)
            self.optimizers.step(lr)
            self._balance_experts(loads)
        for p in self.parameters:
            p.grad = None
        return result

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch], known: int | None = None) -> float | None:
        """See `Engine.evaluate`."""
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
        """See `Engine.next_logits`."""
        context, coordinates = self.config.train.context, self.coordinates
        ids = ids[-context:]
        (micro,) = self._micro_batches(self.own_positions(single_row(ids, context)))
        outputs = self.pipeline.forward([{key: value for key, value in micro.items() if key != "labels_BT"}])
        logits_V = torch.zeros(self.config.model.vocab, device=self.device)
        positions = np.arange(context) if self.index is None else self.index
        found = np.flatnonzero(positions == len(ids) - 1)
        if outputs and len(found) and coordinates.tp == 0 and coordinates.data == 0:
            logits_V += outputs[0][0, found[0]].float()
        dist.all_reduce(logits_V)
        return logits_V

    def state(self) -> dict[str, Tensor]:
        """See `Engine.state`."""
        return self.parameter_map.canonical_state(self._engine_state())

    def load_state(self, state: dict[str, Tensor]) -> None:
        """See `Engine.load_state`."""
        self.parameter_map.load_canonical(state, self._engine_state())
        if len(self.tied) == 2:  # both copies are on this rank, and the state has one
            first, last = self.tied
            for source, target in [(first.detach(), last.detach()), *self.optimizers.pairs(first, last)]:
                local(target).copy_(local(source))

    def replica_differences(self) -> list[Difference]:
        """See `Engine.replica_differences`."""
        return find_differences(self.parameter_map.comparable_state(self._engine_state()).items(), self.groups)

    def close(self) -> None:
        """Does nothing: this engine keeps nothing outside of memory."""

    def _engine_state(self) -> dict[str, Tensor]:
        weights = {f"model.{name}": p.detach() for name, p in reversed(self.named)}  # of a tied pair, the first stage's
        return weights | dict(reversed(list(self.optimizers.state())))

    def own_positions(self, rows: Batch) -> Batch:
        """Returns whole rows reduced to the positions that this rank holds."""
        return select_positions(rows, self.index)

    def _micro_batches(self, rows: Batch) -> list[Inputs]:
        return micro_batches(rows, self.layout, self.index, self.config.train.context, self.device)

    def _sum_tied_gradients(self) -> None:
        """A tied embedding's gradient is the sum of the first stage's and the last stage's."""
        gradients = [local(p.grad) for p in self.tied if p.grad is not None]
        if self.groups.ends is not None:
            for gradient in gradients:
                dist.all_reduce(gradient, group=self.groups.ends)
        elif len(gradients) == 2:
            gradients[0].add_(gradients[1])
            gradients[1].copy_(gradients[0])

    def _sums(self, loss: Tensor, rows: Batch, squares: Tensor) -> tuple[float, int, float, Loads]:
        """Returns summed loss, predicted tokens, squared gradient norm and each expert's rows over all ranks, in one
        all-reduce.

        Ranks that know the same of these each contribute an equal share.
        """
        layout, moe = self.layout, self.config.model.moe
        tokens_share = float((rows.labels >= 0).sum()) / self.same_token_ranks
        figures = [loss / layout.tp, torch.tensor(tokens_share, dtype=torch.float64), squares]
        loads = torch.zeros(0 if moe is None else self.config.model.layers, 0 if moe is None else moe.experts)
        loads = loads.to(self.device, torch.float64)
        for layer, module in self.experts:
            loads[layer] = module.take_load()
        figures_and_loads = torch.cat((torch.stack([figure.to(loss) for figure in figures]), loads.flatten()))
        dist.all_reduce(figures_and_loads)
        loss_sum, tokens, squares_sum, *summed_loads = self.read(figures_and_loads)
        return loss_sum, round(tokens), squares_sum, np.reshape(summed_loads, loads.shape)

    @torch.no_grad()
    def _balance_experts(self, loads: Loads) -> None:
        """Lower the bias of experts with too many rows and raise that of the others.

        DeepSeek-AI 2024, arXiv:2412.19437, section 2.1.2.
        """
        for layer, module in self.experts:
            bias, rate = module.router.bias, module.moe.bias_rate
            if bias is not None and rate:
                (first,), (count,) = local_region(bias)
                direction = np.sign(loads[layer].mean() - loads[layer])[first : first + count]
                local(bias).add_(torch.from_numpy(direction).to(local(bias)), alpha=rate)


def fill_initial(name: str, p: Tensor, config: RunConfig, device: torch.device, region: Region | None = None) -> None:
    """Write the initial values of this rank's piece of a parameter.

    name: canonical name of the parameter.
    region: the box that `p` is, if `p` is not the piece itself.
    """
    region = Region(*local_region(p), tuple(p.shape)) if region is None else region
    fill(local(p), name, region, initial(name, config.model), config.run.seed, cores_per_rank(device))


def expert_metrics(loads: Loads) -> dict[str, float]:
    """Returns metrics of how evenly a step used the experts; empty for a dense model.

    expert_load_worst and expert_load_mean: rows of the busiest expert over the mean, in the worst layer and on average.
    experts_idle: number of experts without a row.
    """
    used = loads[loads.sum(1) > 0]
    if not used.size:
        return {}
    busiest = used.max(1) / used.mean(1)
    idle = float((used == 0).sum())
    return {"expert_load_worst": float(busiest.max()), "expert_load_mean": float(busiest.mean()), "experts_idle": idle}
