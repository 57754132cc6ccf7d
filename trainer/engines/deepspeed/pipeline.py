"""The DeepSpeed engine over pipeline stages: the same run by DeepSpeed's own 1F1B, a stage a rank, with ZeRO 0 or 1.

All ranks of a pipeline read the same rows, so that hidden states are all that passes between stages.
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mikoshi.data.dataset.rows import Batch
from mikoshi.parallel.pipeline import Inputs
from mikoshi.parallel.process.heartbeat import beat
from mikoshi.trainer.engines.base import NO_LIMITS, Limits, StepResult, gradient_factor, step_result
from mikoshi.trainer.engines.batches import micro_batches
from mikoshi.trainer.engines.deepspeed.engine import DeepSpeedEngine
from mikoshi.trainer.engines.deepspeed.model import build_model
from mikoshi.trainer.engines.native.engine import expert_metrics
from mikoshi.trainer.engines.parts import stage_layers
from mikoshi.trainer.model.gpt import GPT, Part


class Stage(nn.Module):
    """A part of the model as DeepSpeed calls it: with what the stage before returned, and nothing else. The other arguments
    are of `waiting`, a micro-batch a call, as DeepSpeed takes them in order. `told`: what the last stage made of each.
    """

    def __init__(self, part: GPT, micro_batches: int) -> None:
        super().__init__()
        self.part, self.micro_batches = part, micro_batches
        self.waiting: deque[Inputs] = deque()
        self.told: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            beat("forward")
        out: Tensor = self.part(x, **{key: value for key, value in self.waiting.popleft().items() if key != "x"})
        if self.training:
            out.register_hook(lambda _: beat("backward"))
        if not self.part.part.last:
            return out
        self.told.append(out.detach())
        # DeepSpeed divides the loss by the number of micro-batches; experts add gradients of losses that it does not see.
        return out * self.micro_batches if self.training else out.new_zeros(())


class DeepSpeedPipeline(DeepSpeedEngine):
    """`Engine` on DeepSpeed's PipelineModule. Builds collectively."""

    stage: Stage

    def step(self, rows: Batch, lr: float, limits: Limits = NO_LIMITS) -> StepResult:
        found: list[tuple[StepResult, float | None]] = []

        def factor() -> float | None:
            """Of DeepSpeed's gradients. All ranks ask for it at once, at ZeRO 1 for one group of parameters after another:
            the first time tells the figures of the step to all."""
            if not found:
                found.append(self._settle(rows, limits))
                beat("update")
            return found[0][1]

        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.factor = factor
        self._weigh_balance(rows)
        self._train(self._micro_batches(rows))
        if not found:  # of a gradient that is not finite DeepSpeed does not take the step as far as the optimizer
            found.append(self._settle(rows, limits))
        result, _ = found[0]
        self.optimizer.taken += result.applied
        return result

    def _build(self, deepspeed: Any, said: dict[str, Any]) -> tuple[GPT, nn.Module]:
        from deepspeed.pipe import PipelineModule

        config, layout, here = self.config, self.layout, self.here
        ends = (0, layout.pp - 1)
        layers = stage_layers(config.model, config.train.context, layout.pp)[here.pp]
        part = Part(layers, first=here.pp == 0, last=here.pp == layout.pp - 1)
        model = build_model(deepspeed, config, layout, self.groups, here, self.device, said, part)
        self.stage, self.rows = Stage(model, layout.micro_batches), 0
        with redirect_stdout(io.StringIO()):  # it prints what it has been given
            # Of these layers, one a stage, it takes that of its own stage alone.
            module = PipelineModule([self.stage] * layout.pp, num_stages=layout.pp, partition_method="uniform")
        if config.model.tied:
            self.holders = dist.new_group([rank for rank in range(layout.world) if layout.coordinates(rank).pp in ends])
        if config.model.tied and model.embed is not None:
            module.get_tied_weights_and_groups = self._join_ends
            # Of the two copies its norm counts the first stage's.
            model.embed.weight.ds_pipe_replicated = not part.first  # type: ignore[attr-defined]
        return model, module

    def _join_ends(self) -> list[Any]:
        """A tied embedding's gradient is the sum of the first stage's and the last's. DeepSpeed asks here for weights that it
        shall sum, before it averages over data ranks: none. Copies that are averaged apart from each other would differ in
        their last bits, so all that hold one sum at once, and what is left to average is that of one rank and zeros."""
        assert self.model.embed is not None
        weight = self.model.embed.weight
        # In bf16 it adds gradients up in tensors of its own, under another name where it offloads.
        kept = (getattr(weight, name, None) for name in ("_hp_grad", "grad", "grad_accum"))
        gradient = next(tensor for tensor in kept if tensor is not None)
        dist.all_reduce(gradient, group=self.holders)
        if self.here.data:
            gradient.zero_()
        return []

    def _train(self, micros: Sequence[Inputs]) -> None:
        """Forward and backward of all micro-batches, and the optimizer's step."""
        self.deepspeed.train_batch(self._feed(micros))

    def _predict(self, micros: Sequence[Inputs]) -> list[Tensor]:
        count = {"num_micro_batches": len(micros), "compute_loss": False, "reduce_output": None, "bcast_loss": False}
        self.deepspeed.eval_batch(self._feed(micros), **count)
        self.deepspeed.train()
        return self._told()

    def _feed(self, micros: Sequence[Inputs]) -> Iterator[tuple[Tensor, Tensor]]:
        """The micro-batches as DeepSpeed takes them, inputs and labels, on the first stage and the last."""
        rows = len(micros[0]["x"])
        if rows != self.rows:  # it tells the next stage the shape of hidden states once
            self.deepspeed.reset_activation_shape()
            self.rows = rows
        self.stage.waiting.extend(micros)
        return iter([(micro["x"], micro["x"]) for micro in micros])

    def _told(self) -> list[Tensor]:
        told, self.stage.told = self.stage.told, []
        return told

    def _settle(self, rows: Batch, limits: Limits) -> tuple[StepResult, float | None]:
        """A step's figures, and what DeepSpeed's gradients, the mean over data ranks of those of the summed loss, are to be
        multiplied by; None where the step is not to be applied."""
        ranks = self.layout.stage_ranks
        loss, squares = torch.zeros(2, dtype=torch.float64, device=self.device)
        for micro in self._told():
            loss += micro
        gradients = [p.grad for _, p in self.named if p.grad is not None and not getattr(p, "ds_pipe_replicated", False)]
        if self.layout.zero == 0:
            squares = torch.stack(torch._foreach_norm(gradients, 2, torch.float64)).square().sum() / ranks
        loss_sum, tokens, squares_sum, loads = self._sums(loss, rows, squares)
        result = step_result(loss_sum, tokens, self._norm(squares_sum) * ranks, limits, expert_metrics(loads))
        factor = gradient_factor(result, self.config.optim.clip)
        return result, None if factor is None else factor * ranks

    def _rehearse(self, micros: Sequence[Inputs]) -> None:
        self._train([*micros] * self.layout.micro_batches)
        self._told()

    def _micro_batches(self, rows: Batch) -> list[Inputs]:
        return micro_batches(rows, self.layout, self.index, self.config.train.context, self.device)
