"""How an engine holds its parameters, and what they are under the run's own names: one place that other makers' layers, with
names and shapes of their own, differ in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from mikoshi.parallel.sharding import local
from mikoshi.trainer.config.run import RunConfig

FillWeights = Callable[..., None]
"""Called with a canonical name, a tensor, the config, a device and, where the tensor is not itself the piece of the
parameter, the region that it is."""


class Held(Protocol):
    """The parameters of a rank's parts. `named`: under the names that its layers know them by, each name once a stage."""

    named: list[tuple[str, nn.Parameter]]

    def fill(self, fill_weights: FillWeights, config: RunConfig, device: torch.device) -> None:
        """Write initial values into all of them."""
        ...

    def cut(self, p: nn.Parameter, values: Tensor) -> Tensor:
        """`values`, this rank's piece of a parameter or of its gradient, as a tensor that says who else holds it."""
        ...

    def join_gradients(self) -> None:
        """Sum the gradients of which tensor-parallel ranks hold parts. Collective."""
        ...

    def told(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state under this holder's names, `model.<name>` and `optim.<name>.<moment>`, under canonical ones. Collective."""
        ...

    def take(self, state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
        """The way back, in place: what `state`, canonical, has of `own`. Collective."""
        ...

    def compared(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state as the ranks that hold the same of it compare it."""
        ...


class Plain:
    """The plain GPT's: its names are the canonical ones, and its tensors say themselves how they are cut."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        self.named = [pair for part in parts for pair in part.named_parameters()]

    def fill(self, fill_weights: FillWeights, config: RunConfig, device: torch.device) -> None:
        for name, p in self.named:
            fill_weights(name, p, config, device)

    def cut(self, p: nn.Parameter, values: Tensor) -> Tensor:
        return values

    def join_gradients(self) -> None:
        pass

    def told(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(own)

    def take(self, state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
        for name, tensor in own.items():
            if name in state and local(tensor).data_ptr() != local(state[name]).data_ptr():
                tensor.copy_(state[name])

    def compared(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(own)
