"""The `Engine` protocol: what the training loop asks of every engine, so that engines of other makers fit behind it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn

from mikoshi.data.dataset.rows import Batch
from mikoshi.parallel.replicas import Difference


@dataclass(frozen=True)
class StepLimits:
    """What a step's loss and gradient norm must stay below for any rank to change its weights. NaN is below nothing.

    loss: nats a predicted token.
    norm: gradient norm before clipping.
    """

    loss: float = math.inf
    norm: float = math.inf


NO_STEP_LIMITS = StepLimits()


@dataclass(frozen=True)
class StepResult:
    """The result of one training step, the same on every rank.

    loss: nats a predicted token, over the global batch; None if no token is predicted.
    tokens: predicted tokens of the global batch.
    grad_norm: norm before clipping; None if no token is predicted.
    applied: False if a figure was not below its limit, or nothing was predicted; then no rank changed anything.
    more: further metrics, by name.
    """

    loss: float | None
    tokens: int
    grad_norm: float | None
    applied: bool
    more: dict[str, float] = field(default_factory=dict)


def step_result(loss: float, tokens: int, norm: float, limits: StepLimits, more: dict[str, float]) -> StepResult:
    """Returns the result of a step from sums over all ranks.

    loss: summed loss in nats.
    tokens: number of predicted tokens.
    norm: norm of the gradients of the summed loss.
    limits: what the mean loss and the norm a token must stay below.
    more: further metrics.
    """
    if not tokens:
        return StepResult(None, 0, None, applied=False)
    mean, norm = loss / tokens, norm / tokens
    return StepResult(mean, tokens, norm, norm < limits.norm and mean < limits.loss, more)  # NaN is below nothing


def gradient_factor(result: StepResult, clip: float) -> float | None:
    """Returns what the gradients of the summed loss are multiplied by, or None if the step must not be applied.

    The factor turns them into gradients of the mean loss and clips their norm.

    clip: largest norm; 0 means that norms are not clipped.
    """
    if not result.applied or result.grad_norm is None:
        return None
    return (min(1.0, clip / max(result.grad_norm, 1e-12)) if clip else 1.0) / result.tokens


class Engine(Protocol):
    """One model being trained, on this rank and its peers. Every method is collective: all ranks call it together."""

    parameters: list[nn.Parameter]
    """The live parameters of this rank, tensors or DTensors."""

    def step(self, rows: Batch, lr: float, limits: StepLimits = ...) -> StepResult:
        """Train on this rank's rows of a global batch, in as many micro-batches as the config says.

        No rank changes anything if a figure is not below its limit, so the same step can be tried again, or if the global
        batch predicts no token.

        rows: this rank's rows, of which it has the positions that context parallelism gives it.
        lr: learning rate of the step.
        limits: what loss and gradient norm must stay below.
        """
        ...

    def evaluate(self, batches: Iterable[Batch], known: int | None = None) -> float | None:
        """Returns the loss in nats a token over the batches of all ranks, or None if they predict no token. Changes nothing.

        batches: this rank's batches.
        known: number of tokens in the vocabulary; the softmax leaves out the model's rows beyond it.
        """
        ...

    def next_logits(self, ids: Sequence[int]) -> Tensor:
        """Returns the logits [V] of the token that follows `ids`, on every rank.

        ids: token ids; only the last ones, as many as the training context, are read.
        """
        ...

    def state(self) -> dict[str, Tensor]:
        """Returns everything that a resumed run needs, as tensors or DTensors that a restore fills in place.

        The names are canonical: `model.<parameter>` and `optim.<parameter>.<moment>`.
        """
        ...

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from `state`, which has the names and shapes of `state()` or is a part of it."""
        ...

    def replica_differences(self) -> list[Difference]:
        """Returns every piece of the state that should be the same on several ranks and is not, compared bit by bit.

        All ranks get the same list.
        """
        ...

    def close(self) -> None:
        """Remove what this rank's engine keeps outside of memory. Call it last. Not collective."""
        ...
