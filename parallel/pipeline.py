"""The pipeline: a step's micro-batches go through the stages in the order that the schedule's program says.

A model that is not cut into stages is the pipeline of one stage, and its program is forward, backward, forward, ...
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, _engine_run_backward, get_gradient_edge
from torch.distributed import ProcessGroup
from torch.torch_version import TorchVersion

from mikoshi.parallel.layout import Layout
from mikoshi.parallel.process.heartbeat import send_heartbeat
from mikoshi.parallel.schedule import Action, forward_programs, programs, rank_of
from mikoshi.parallel.zero import Reduction

# Before torch 2.13 the node of a custom function does not outlive the graph that stage_backward_input lets go of.
_NODES_DIE = TorchVersion(torch.__version__) < "2.13"

Inputs = Mapping[str, Any]
"""What a micro-batch gives a stage: `x`, the tokens, used by the first stage alone, and the other arguments of forward."""


@dataclass(frozen=True)
class Pipeline:
    """The stages of pipeline rank `rank`, and its way to the neighbours.

    hidden: the shape of a row of what passes between stages, [T here, C].

    A stage called with a micro-batch's inputs returns hidden states, and the last one the micro-batch's loss (a scalar).
    """

    stages: Mapping[int, nn.Module]
    layout: Layout
    rank: int
    group: ProcessGroup | None
    reduction: Reduction
    hidden: tuple[int, int]
    dtype: torch.dtype
    device: torch.device

    def step(self, micro_batches: Sequence[Inputs]) -> Tensor:
        """Forward and backward of all micro-batches; gradients are left in the parameters, summed over the data ranks.
        Returns the summed loss where the last stage is, else 0: fp64 scalar."""
        layout, run = self.layout, _Run(self, micro_batches)
        for stage in self.stages.values():
            self.reduction.begin(stage)
        self._run(programs(layout.schedule, layout.pp, layout.virtual, len(micro_batches)), run)
        for stage in self.stages.values():
            self.reduction.end(stage)
        return run.loss

    @torch.no_grad()
    def forward(self, micro_batches: Sequence[Inputs]) -> list[Tensor]:
        """What the last stage returns for each micro-batch; an empty list where the last stage is not."""
        layout, run = self.layout, _Run(self, micro_batches)
        self._run(forward_programs(layout.schedule, layout.pp, layout.virtual, len(micro_batches)), run)
        last = layout.stages - 1
        return [run.outputs[last, m] for m in range(len(micro_batches))] if last in self.stages else []

    def _run(self, program: Sequence[Sequence[Action]], run: _Run) -> None:
        for action in program[self.rank]:
            run.do(action)
        for work, _ in run.sending:
            work.wait()


@dataclass
class _Run:
    """One pass of a program: what is computed and under way, under (stage, micro-batch)."""

    pipeline: Pipeline
    micro_batches: Sequence[Inputs]
    loss: Tensor = field(init=False)
    inputs: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    outputs: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    gradients: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    coming: dict[tuple[str, int, int], tuple[Any, Tensor]] = field(default_factory=dict)
    sending: list[tuple[Any, Tensor]] = field(default_factory=list)
    deferred: dict[tuple[int, int], Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.loss = torch.zeros((), dtype=torch.float64, device=self.pipeline.device)
        self.last = self.pipeline.layout.stages - 1

    def do(self, action: Action) -> None:
        stage, micro = action.stage, action.micro
        if action.kind.startswith(("forward", "backward")) and torch.is_grad_enabled():
            send_heartbeat(action.kind.partition("-")[0])
        match action.kind:
            case "forward":
                self._forward(stage, micro)
            case "backward":
                self._backward(stage, micro)
            case "backward-input":
                self._backward_input(stage, micro)
            case "backward-weight":
                self._backward_weight(stage, micro)
            case "send-forward":
                self._send("forward", stage + 1, micro, self._output(stage, micro).detach())
            case "send-backward":
                self._send("backward", stage - 1, micro, self.gradients.pop((stage, micro)))
            case "receive-forward":
                self._receive("forward", stage - 1, stage, micro)
            case "receive-backward":
                self._receive("backward", stage + 1, stage, micro)

    def _forward(self, stage: int, micro: int) -> None:
        x, rest = self._input(stage, micro), {k: v for k, v in self.micro_batches[micro].items() if k != "x"}
        self.outputs[stage, micro] = out = self.pipeline.stages[stage](x, **rest)
        if torch.is_grad_enabled():
            self.inputs[stage, micro] = x
        if stage == self.last and out.ndim == 0:
            self.loss += out.detach()

    def _input(self, stage: int, micro: int) -> Tensor:
        if stage == 0:
            tokens: Tensor = self.micro_batches[micro]["x"]
            return tokens
        x = self._arrived("forward", stage, micro)
        if x is None:  # the stage before is on this rank too
            x = self._output(stage - 1, micro).detach()
        return x.requires_grad_(torch.is_grad_enabled())

    def _output(self, stage: int, micro: int) -> Tensor:
        """Kept for the backward pass where there will be one."""
        return self.outputs[stage, micro] if torch.is_grad_enabled() else self.outputs.pop((stage, micro))

    def _upstream(self, stage: int, micro: int) -> Tensor | None:
        if stage == self.last:
            return None
        gradient = self._arrived("backward", stage, micro)
        return self.gradients.pop((stage + 1, micro)) if gradient is None else gradient

    def _backward(self, stage: int, micro: int) -> None:
        out, x = self.outputs.pop((stage, micro)), self.inputs.pop((stage, micro))
        self.pipeline.reduction.before_backward(self.pipeline.stages[stage], micro == len(self.micro_batches) - 1)
        torch.autograd.backward(out, self._upstream(stage, micro))
        self._keep(stage, micro, x.grad)

    def _backward_input(self, stage: int, micro: int) -> None:
        out, x = self.outputs.pop((stage, micro)), self.inputs.pop((stage, micro))
        upstream = self._upstream(stage, micro)
        if stage == 0:  # there is no input to differentiate: all of it waits
            self.deferred[stage, micro] = (out, upstream)
            return
        graph = out.view_as(out) if _NODES_DIE else None
        parameters = self.pipeline.stages[stage].parameters()
        into = [torch.ones_like(out) if upstream is None else upstream]
        from torch.distributed.pipelining._backward import stage_backward_input  # brings in Dynamo: over a second

        (gradient,), groups = stage_backward_input([out], into, [x], parameters)
        self.deferred[stage, micro] = (groups, graph)
        self._keep(stage, micro, gradient)

    def _backward_weight(self, stage: int, micro: int) -> None:
        if stage == 0:
            torch.autograd.backward(*self.deferred.pop((stage, micro)))
        else:
            groups, _graph = self.deferred.pop((stage, micro))
            _weight_gradients(self.pipeline.stages[stage].parameters(), groups)

    def _keep(self, stage: int, micro: int, gradient: Tensor | None) -> None:
        if stage:
            assert gradient is not None
            self.gradients[stage, micro] = gradient

    def _peer(self, stage: int) -> int:
        return rank_of(stage, self.pipeline.layout.pp, self.pipeline.layout.schedule)

    def _tag(self, direction: str, stage: int, micro: int) -> int:
        return (micro * (self.last + 1) + stage) * 2 + (direction == "backward")

    def _send(self, direction: str, to: int, micro: int, values: Tensor) -> None:
        values = values.contiguous()
        work = dist.isend(values, group=self.pipeline.group, group_dst=self._peer(to), tag=self._tag(direction, to, micro))
        self.sending = [(w, t) for w, t in self.sending if not w.is_completed()] + [(work, values)]

    def _receive(self, direction: str, source: int, stage: int, micro: int) -> None:
        pipeline, rows = self.pipeline, len(self.micro_batches[micro]["x"])
        values = torch.empty((rows, *pipeline.hidden), dtype=pipeline.dtype, device=pipeline.device)
        tag = self._tag(direction, stage, micro)
        work = dist.irecv(values, group=pipeline.group, group_src=self._peer(source), tag=tag)
        self.coming[direction, stage, micro] = (work, values)

    def _arrived(self, direction: str, stage: int, micro: int) -> Tensor | None:
        if (direction, stage, micro) not in self.coming:
            return None
        work, values = self.coming.pop((direction, stage, micro))
        work.wait()
        return values


def _weight_gradients(parameters: Iterable[nn.Parameter], groups: list[dict[str, Any]]) -> None:
    """The second half of a split backward pass: from the gradients that stage_backward_input kept at the nodes where the
    ways to the weights part from the way to the input (Qi et al. 2023, arXiv:2401.10241).

    Not torch's own second half: that of torch 2.11 knows no custom functions at those nodes, and counts twice where one
    of them lies behind another.
    """
    owner = {get_gradient_edge(p).node: p for p in parameters if p.requires_grad}
    for group in groups:
        kept = list(zip(group.pop("intermediates"), group.pop("grads"), strict=True))
        # What a node was given in the first half is all it gets, whatever another one sends it now.
        handles = [node.register_prehook(lambda _, given=given: given) for node, given in kept] if len(kept) > 1 else []
        edges = [(GradientEdge(node, i), g) for node, given in kept for i, g in enumerate(given) if g is not None]
        weights = list(group["params"])
        if edges:
            starts, gradients = zip(*edges, strict=True)
            ends = tuple(GradientEdge(node, 0) for node in weights)
            found = _engine_run_backward(starts, gradients, False, False, ends, allow_unreachable=True, accumulate_grad=False)
            for node, gradient in zip(weights, found, strict=True):
                p = owner[node]
                if gradient is not None:
                    p.grad = gradient if p.grad is None else p.grad + gradient
        for handle in handles:
            handle.remove()


def split_layers(costs: Sequence[float], before: float, after: float, stages: int) -> list[range]:
    """Layers of each stage, so that the costliest stage costs as little as can be; every stage has at least one layer.

    `costs` of each layer; `before` is the first stage's embedding, `after` the last stage's head. Where several cuts are
    as good, the sum of squared stage costs decides.
    """
    layers, infinite = len(costs), (float("inf"), float("inf"))
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)

    def cost_of(stage: int, start: int, stop: int) -> float:
        return sums[stop] - sums[start] + before * (stage == 0) + after * (stage == stages - 1)

    # best[stage][stop]: (largest, sum of squares) of the stages so far, and where the last of them begins.
    best: list[dict[int, tuple[tuple[float, float], int]]] = [{0: ((0.0, 0.0), 0)}]
    for stage in range(stages):
        row: dict[int, tuple[tuple[float, float], int]] = {}
        for stop in range(stage + 1, layers - (stages - stage - 1) + 1):
            choices = []
            for start, ((largest, squares), _) in best[stage].items():
                if start < stop:
                    cost = cost_of(stage, start, stop)
                    choices.append(((max(largest, cost), squares + cost * cost), start))
            row[stop] = min(choices, default=(infinite, 0))
        best.append(row)
    ends, stop = [layers], layers
    for stage in range(stages, 0, -1):
        stop = best[stage][stop][1]
        ends.append(stop)
    ends.reverse()
    return [range(a, b) for a, b in itertools.pairwise(ends)]
