"""AdamW behind a gate: DeepSpeed takes a step with it at every step of a run, and it is one only if the run says so."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from mikoshi.trainer.config.run import OptimSection

MOMENTS = ("exp_avg", "exp_avg_sq")


def _closed() -> None:
    return None


class GatedAdamW(AdamW):
    """torch's AdamW, decay on matrices only. Its step asks `factor`: None leaves weights and moments as they are, to the
    bit, and only makes moments that are missing; a number is what gradients are multiplied by first.

    DeepSpeed gives it flat pieces of parameters in place of them, and may call its step several times in one of the run, for
    other pieces each. `taken`: steps of the run that were taken before, the same for all pieces.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], config: OptimSection) -> None:
        trained = [p for _, p in named if p.requires_grad]
        groups = [
            {"params": [p for p in trained if _dimensions(p) >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in trained if _dimensions(p) < 2], "weight_decay": 0.0},
        ]
        options: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps, "fused": True}
        super().__init__([group for group in groups if group["params"]], **options)
        self.factor: Callable[[], float | None] = _closed
        self.taken = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        pieces = self.make_moments()
        factor = self.factor()
        if factor is None:
            return
        for p in pieces:
            self.state[p]["step"].fill_(self.taken)
        gradients = [p.grad for p in pieces if p.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, factor)
        super().step(closure)

    def make_moments(self) -> list[Tensor]:
        """The pieces that it is given now, each with its moments."""
        pieces = [p for group in self.param_groups for p in group["params"]]
        for p in pieces:
            if not self.state[p]:
                self.state[p]["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                self.state[p] |= {key: torch.zeros_like(p, requires_grad=False) for key in MOMENTS}
        return pieces


def _dimensions(p: nn.Parameter) -> int:
    """Of the whole parameter: under ZeRO 3 a rank's own is flat and empty."""
    return len(getattr(p, "ds_shape", p.shape))
