"""The canonical names of an engine's parameters: the one place in which layers of other makers, with their own names and
shapes, differ from the plain GPT.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from mikoshi.parallel.sharding import local
from mikoshi.trainer.config.run import RunConfig

FillWeights = Callable[..., None]
"""Writes initial values. It is called with a canonical name, a tensor, the config and a device, and with the tensor's region
of the parameter if the tensor does not know it."""


class ParameterMap(Protocol):
    """The parameters of a rank's stages and how they map to canonical names.

    named: each parameter under the name that its layers use, each name once a stage.
    """

    named: list[tuple[str, nn.Parameter]]

    def fill(self, fill_weights: FillWeights, config: RunConfig, device: torch.device) -> None:
        """Write the initial values of all parameters with `fill_weights`."""
        ...

    def as_sharded(self, p: nn.Parameter, values: Tensor) -> Tensor:
        """Returns `values` as a tensor that says which ranks hold the same piece.

        values: this rank's piece of the parameter `p` or of its gradient.
        """
        ...

    def sum_partial_gradients(self) -> None:
        """Sum the gradients of which tensor-parallel ranks hold parts. Collective."""
        ...

    def canonical_state(self, engine_state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns a state under canonical names. Collective.

        engine_state: the state under the engine's own names, `model.<name>` and `optim.<name>.<moment>`.
        """
        ...

    def load_canonical(self, state: Mapping[str, Tensor], engine_state: Mapping[str, Tensor]) -> None:
        """Copy what the canonical `state` has of `engine_state` into it, in place. Collective."""
        ...

    def comparable_state(self, engine_state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the state in the form in which ranks that hold the same piece compare it."""
        ...


class PlainParameters:
    """The parameters of the plain GPT: their names are canonical, and their tensors know how they are sharded."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        self.named = [pair for part in parts for pair in part.named_parameters()]

    def fill(self, fill_weights: FillWeights, config: RunConfig, device: torch.device) -> None:
        """See `ParameterMap.fill`."""
        for name, p in self.named:
            fill_weights(name, p, config, device)

    def as_sharded(self, p: nn.Parameter, values: Tensor) -> Tensor:
        """Returns `values`, which already say how they are sharded."""
        return values

    def sum_partial_gradients(self) -> None:
        """Does nothing: no rank holds a part of a gradient."""

    def canonical_state(self, engine_state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the state as it is."""
        return dict(engine_state)

    def load_canonical(self, state: Mapping[str, Tensor], engine_state: Mapping[str, Tensor]) -> None:
        """See `ParameterMap.load_canonical`."""
        for name, tensor in engine_state.items():
            if name in state and local(tensor).data_ptr() != local(state[name]).data_ptr():
                tensor.copy_(state[name])

    def comparable_state(self, engine_state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the state as it is."""
        return dict(engine_state)
