"""AdamW that DeepSpeed calls at every step of a run, and that updates weights only if the run applies the step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from mikoshi.trainer.config.run import OptimSection

MOMENTS = ("exp_avg", "exp_avg_sq")


def _no_step() -> None:
    return None


class GatedAdamW(AdamW):
    """torch's AdamW with weight decay on matrices only, whose step first calls `factor`.

    If `factor` returns None, weights and moments stay as they are, to the bit, and only missing moments are made. If it
    returns a number, gradients are multiplied by it first. DeepSpeed passes flat pieces in place of parameters, and may call
    `step` several times in one step of the run, with different pieces.

    steps_taken: steps that the run has applied before this one.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], config: OptimSection) -> None:
        trained = [p for _, p in named if p.requires_grad]
        groups = [
            {"params": [p for p in trained if _dimensions(p) >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in trained if _dimensions(p) < 2], "weight_decay": 0.0},
        ]
        options: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps, "fused": True}
        super().__init__([group for group in groups if group["params"]], **options)
        self.factor: Callable[[], float | None] = _no_step
        self.steps_taken = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the pieces that DeepSpeed has put into the parameter groups, unless `factor` returns None."""
        pieces = self.make_moments()
        factor = self.factor()
        if factor is None:
            return
        for p in pieces:
            self.state[p]["step"].fill_(self.steps_taken)
        gradients = [p.grad for p in pieces if p.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, factor)
        super().step(closure)

    def make_moments(self) -> list[Tensor]:
        """Make the missing moments; returns the pieces in the parameter groups."""
        pieces = [p for group in self.param_groups for p in group["params"]]
        for p in pieces:
            if not self.state[p]:
                self.state[p]["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                self.state[p] |= {key: torch.zeros_like(p, requires_grad=False) for key in MOMENTS}
        return pieces


def _dimensions(p: nn.Parameter) -> int:
    """Returns the number of dimensions of the whole parameter; with ZeRO 3 a rank's own tensor is flat and empty."""
    return len(getattr(p, "ds_shape", p.shape))
