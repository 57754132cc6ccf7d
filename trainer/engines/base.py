"""The engine: what turns a batch into an updated model. Small, so that engines of other makers fit behind it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn

from data.rows import Batch
from parallel.replicas import Difference


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
    grad_norm: before clipping. applied: False if a figure was beyond its limit and no rank changed anything.
    more: further figures for the metrics, by name.
    """

    loss: float
    tokens: int
    grad_norm: float
    applied: bool
    more: dict[str, float] = field(default_factory=dict)


class Engine(Protocol):
    """One model being trained, on this rank and its peers. Every method is collective: all ranks call it together."""

    parameters: list[nn.Parameter]
    """The live parameters of this rank, tensors or DTensors."""

    def step(self, rows: Batch, lr: float, limits: Limits = ...) -> StepResult:
        """Train on this rank's rows of a global batch, and its columns of them, in as many micro-batches as the config says.

        Where a figure is not below its limit, no rank changes anything: the same step can be tried again."""
        ...

    def evaluate(self, batches: Iterable[Batch], known: int | None = None) -> float:
        """Loss in nats a token over this rank's batches and its peers'; changes nothing. `known`: the tokens that there are,
        over which it is, where the model's vocabulary has more rows."""
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
