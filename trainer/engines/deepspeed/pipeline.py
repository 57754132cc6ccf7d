"""The DeepSpeed engine over pipeline stages: DeepSpeed's own 1F1B schedule, one stage a rank, with ZeRO 0 or 1.

All ranks of a pipeline read the same rows, so only hidden states pass between stages.
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
from mikoshi.parallel.process.heartbeat import send_heartbeat
from mikoshi.trainer.engines.base import NO_STEP_LIMITS, StepLimits, StepResult, gradient_factor, step_result
from mikoshi.trainer.engines.batches import micro_batches
from mikoshi.trainer.engines.deepspeed.engine import DeepSpeedEngine
from mikoshi.trainer.engines.deepspeed.model import build_model
from mikoshi.trainer.engines.native.engine import expert_metrics
from mikoshi.trainer.engines.parts import stage_layers
from mikoshi.trainer.model.gpt import GPT, Part


class DeepSpeedStage(nn.Module):
    """A part of the model as DeepSpeed calls it: with the output of the stage before and nothing else.

    pending: the other arguments, one entry a call, in the order in which DeepSpeed takes micro-batches.
    outputs: what the last stage returned for each micro-batch.
    """

    def __init__(self, part: GPT, micro_batches: int) -> None:
        super().__init__()
        self.part, self.micro_batches = part, micro_batches
        self.pending: deque[Inputs] = deque()
        self.outputs: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        """Returns hidden states [B, T, C], or on the last stage the loss as DeepSpeed expects it.

        x: token ids on the first stage, else hidden states.
        """
        if self.training:
            send_heartbeat("forward")
        out: Tensor = self.part(x, **{key: value for key, value in self.pending.popleft().items() if key != "x"})
        if self.training:
            out.register_hook(lambda _: send_heartbeat("backward"))
        if not self.part.part.last:
            return out
        self.outputs.append(out.detach())
        # DeepSpeed divides the loss by the number of micro-batches. Balance losses of experts bypass that division.
        return out * self.micro_batches if self.training else out.new_zeros(())


class DeepSpeedPipeline(DeepSpeedEngine):
    """`Engine` on DeepSpeed's PipelineModule. Builds collectively."""

    stage: DeepSpeedStage

    def step(self, rows: Batch, lr: float, limits: StepLimits = NO_STEP_LIMITS) -> StepResult:
        """See `Engine.step`."""
        results: list[tuple[StepResult, float | None]] = []

        def factor() -> float | None:
            """Of DeepSpeed's gradients. All ranks ask for it at once, at ZeRO 1 for one group of parameters after another:
            the first time tells the figures of the step to all."""
            if not results:
                results.append(self._step_result(rows, limits))
                send_heartbeat("update")
            return results[0][1]

        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.factor = factor
        self._weigh_balance(rows)
        self._train(self._micro_batches(rows))
        if not results:  # DeepSpeed does not call the optimizer if a gradient is not finite
            results.append(self._step_result(rows, limits))
        result, _ = results[0]
        self.optimizer.steps_taken += result.applied
        return result

    def _build(self, deepspeed: Any, ds_config: dict[str, Any]) -> tuple[GPT, nn.Module]:
        from deepspeed.pipe import PipelineModule

        config, layout, coordinates = self.config, self.layout, self.coordinates
        ends = (0, layout.pp - 1)
        layers = stage_layers(config.model, config.train.context, layout.pp)[coordinates.pp]
        part = Part(layers, first=coordinates.pp == 0, last=coordinates.pp == layout.pp - 1)
        model = build_model(deepspeed, config, layout, self.groups, coordinates, self.device, ds_config, part)
        self.stage, self.rows = DeepSpeedStage(model, layout.micro_batches), 0
        with redirect_stdout(io.StringIO()):  # it prints its layers
            # One layer a stage, of which DeepSpeed keeps this rank's.
            module = PipelineModule([self.stage] * layout.pp, num_stages=layout.pp, partition_method="uniform")
        if config.model.tied:
            self.tied_group = dist.new_group([rank for rank in range(layout.world) if layout.coordinates(rank).pp in ends])
        if config.model.tied and model.embed is not None:
            module.get_tied_weights_and_groups = self._sum_tied_gradients
            # DeepSpeed's norm must count one of the two copies: the first stage's.
            model.embed.weight.ds_pipe_replicated = not part.first  # type: ignore[attr-defined]
        return model, module

    def _sum_tied_gradients(self) -> list[Any]:
        """Sum a tied embedding's gradient over the first and the last stage. Returns no weights.

        DeepSpeed calls this for the weights whose gradients it should sum before it averages over data ranks. Summing the
        copies separately would make them differ in their last bits. So all ranks that hold a copy sum at once, and all but
        one then contribute zeros to DeepSpeed's average.
        """
        assert self.model.embed is not None
        weight = self.model.embed.weight
        # In bf16 DeepSpeed accumulates gradients in tensors of its own, under another name with offload.
        candidates = (getattr(weight, name, None) for name in ("_hp_grad", "grad", "grad_accum"))
        gradient = next(tensor for tensor in candidates if tensor is not None)
        dist.all_reduce(gradient, group=self.tied_group)
        if self.coordinates.data:
            gradient.zero_()
        return []

    def _train(self, micros: Sequence[Inputs]) -> None:
        """Run forward and backward of all micro-batches and the optimizer's step."""
        self.deepspeed.train_batch(self._feed(micros))

    def _predict(self, micros: Sequence[Inputs]) -> list[Tensor]:
        count = {"num_micro_batches": len(micros), "compute_loss": False, "reduce_output": None, "bcast_loss": False}
        self.deepspeed.eval_batch(self._feed(micros), **count)
        self.deepspeed.train()
        return self._take_outputs()

    def _feed(self, micros: Sequence[Inputs]) -> Iterator[tuple[Tensor, Tensor]]:
        """Returns the micro-batches as pairs of inputs and labels, as DeepSpeed takes them on the first and the last stage."""
        rows = len(micros[0]["x"])
        if rows != self.rows:  # it sends the shape of hidden states to the next stage only once
            self.deepspeed.reset_activation_shape()
            self.rows = rows
        self.stage.pending.extend(micros)
        return iter([(micro["x"], micro["x"]) for micro in micros])

    def _take_outputs(self) -> list[Tensor]:
        outputs, self.stage.outputs = self.stage.outputs, []
        return outputs

    def _step_result(self, rows: Batch, limits: StepLimits) -> tuple[StepResult, float | None]:
        """Returns a step's result and the factor for DeepSpeed's gradients, or None if the step must not be applied.

        DeepSpeed's gradients are the mean over data ranks of those of the summed loss.
        """
        ranks = self.layout.stage_ranks
        loss, squares = torch.zeros(2, dtype=torch.float64, device=self.device)
        for micro in self._take_outputs():
            loss += micro
        gradients = [p.grad for _, p in self.named if p.grad is not None and not getattr(p, "ds_pipe_replicated", False)]
        if self.layout.zero == 0:
            squares = torch.stack(torch._foreach_norm(gradients, 2, torch.float64)).square().sum() / ranks
        loss_sum, tokens, squares_sum, loads = self._sums(loss, rows, squares)
        result = step_result(loss_sum, tokens, self._norm(squares_sum) * ranks, limits, expert_metrics(loads))
        factor = gradient_factor(result, self.config.optim.clip)
        return result, None if factor is None else factor * ranks

    def _run_empty_step(self, micros: Sequence[Inputs]) -> None:
        self._train([*micros] * self.layout.micro_batches)
        self._take_outputs()

    def _micro_batches(self, rows: Batch) -> list[Inputs]:
        return micro_batches(rows, self.layout, self.index, self.config.train.context, self.device)
