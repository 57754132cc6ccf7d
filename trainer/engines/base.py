"""The engine: what turns a batch into an updated model. Small, so that engines of other makers fit behind it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn

from mikoshi.data.dataset.rows import Batch
from mikoshi.parallel.replicas import Difference


@dataclass(frozen=True)
class Limits:
    """What a step's loss and gradient norm must stay below for any rank to change its weights; NaN never does."""

    loss: float = math.inf
    norm: float = math.inf


NO_LIMITS = Limits()


@dataclass(frozen=True)
class StepResult:
    """One step, the same numbers on every rank.

    loss: nats a predicted token, over the global batch. tokens: predicted tokens of the global batch.
    grad_norm: before clipping. applied: False if a figure was beyond its limit, or nothing was predicted, and no rank
    changed anything. more: further figures for the metrics, by name.

    Of a batch in which no token is predicted there is neither a loss nor a gradient: both are None.
    """

    loss: float | None
    tokens: int
    grad_norm: float | None
    applied: bool
    more: dict[str, float] = field(default_factory=dict)


def step_result(loss: float, tokens: int, norm: float, limits: Limits, more: dict[str, float]) -> StepResult:
    """Of a step whose summed loss is `loss`, with gradients of length `norm`."""
    if not tokens:
        return StepResult(None, 0, None, applied=False)
    mean, norm = loss / tokens, norm / tokens
    return StepResult(mean, tokens, norm, norm < limits.norm and mean < limits.loss, more)  # NaN is below nothing


def gradient_factor(result: StepResult, clip: float) -> float | None:
    """What the gradients of the summed loss are multiplied by: to those of the mean, and to the clipped length (0: any).
    None where the step is not to be applied."""
    if not result.applied or result.grad_norm is None:
        return None
    return (min(1.0, clip / max(result.grad_norm, 1e-12)) if clip else 1.0) / result.tokens


class Engine(Protocol):
    """One model being trained, on this rank and its peers. Every method is collective: all ranks call it together."""

    parameters: list[nn.Parameter]
    """The live parameters of this rank, tensors or DTensors."""

    def step(self, rows: Batch, lr: float, limits: Limits = ...) -> StepResult:
        """Train on this rank's rows of a global batch, and its columns of them, in as many micro-batches as the config says.

        Where a figure is not below its limit, no rank changes anything: the same step can be tried again. Nor does any where
        no token of the global batch is predicted."""
        ...

    def evaluate(self, batches: Iterable[Batch], known: int | None = None) -> float | None:
        """Loss in nats a token over this rank's batches and its peers'; None where they predict none. Changes nothing.
        `known`: the tokens that there are, over which it is, where the model's vocabulary has more rows."""
        ...

    def next_logits(self, ids: Sequence[int]) -> Tensor:
        """Logits [V] of the token that follows `ids`, of which as many as the training context are read; on every rank."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs, under canonical names: `model.<parameter>` and
        `optim.<parameter>.<moment>`, tensors or DTensors; filled in place by a restore."""
        ...

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from `state`, a filled dict of `state()`'s shape or a part of it."""
        ...

    def differing(self) -> list[Difference]:
        """What the ranks that hold the same piece of the state do not hold alike, to the bit; the same list on all."""
        ...

    def close(self) -> None:
        """Remove what this rank's engine keeps outside of memory; the last that is asked of it. Not collective."""
        ...
