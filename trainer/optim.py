"""Optimizers and schedules. The learning rate is a function of the step; decay touches matrices only."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import AdamW, Optimizer

from trainer.config import OptimSection, ScheduleSection


def learning_rate(peak: float, schedule: ScheduleSection, step: int, steps: int) -> float:
    """Learning rate of step 0 <= step < steps.

    All kinds rise linearly over `warmup` steps. cosine (Loshchilov and Hutter 2017, arXiv:1608.03983) and linear then
    fall to final x peak at the last step; wsd (Hu et al. 2024, arXiv:2404.06395) stays, and falls over the last
    `decay` steps; constant stays.
    """
    if step < schedule.warmup:
        return peak * (step + 1) / schedule.warmup
    if schedule.kind == "constant":
        return peak
    begin = steps - schedule.decay if schedule.kind == "wsd" else schedule.warmup
    if step < begin:
        return peak
    done = (step - begin + 1) / max(1, steps - begin)
    fall = 0.5 * (1 + math.cos(math.pi * done)) if schedule.kind == "cosine" else 1 - done
    return peak * (schedule.final + (1 - schedule.final) * fall)


class Muon(Optimizer):
    """Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) for matrices cut over any ranks.

    torch.optim.Muon multiplies the shards of a distributed gradient in bf16, so its result depends on how they are
    cut. Here the momentum stays sharded, the matrix to orthogonalise is gathered, and every rank takes its own piece
    of the same result: the update does not depend on the layout. The step size is matched to AdamW's (Liu et al. 2025,
    arXiv:2502.16982), so one learning rate serves both. On CPU the iteration runs in fp32, on CUDA in bf16.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                buffer = self.state[p]["momentum_buffer"]
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(buffer, group["momentum"])
                whole = update.full_tensor() if isinstance(update, DTensor) else update
                direction = orthogonalise(whole)
                if isinstance(p, DTensor):
                    direction = distribute_tensor(direction, p.device_mesh, p.placements, src_data_rank=None)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(direction, alpha=-0.2 * group["lr"] * math.sqrt(max(p.shape)))


def orthogonalise(matrix: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly: five Newton-Schulz steps with Jordan's coefficients."""
    x = matrix.bfloat16() if matrix.is_cuda else matrix.float()
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    out: Tensor = (x.T if tall else x).to(matrix.dtype)
    return out


def build_optimizers(named: Iterable[tuple[str, nn.Parameter]], config: OptimSection) -> list[Optimizer]:
    """The optimizers of a model's parameters, with their state made at once so that it can be saved and restored."""
    named = list(named)
    for_muon = [p for name, p in named if config.kind == "muon" and p.ndim == 2 and name.startswith("blocks.")]
    chosen = {id(p) for p in for_muon}
    rest = [p for _, p in named if id(p) not in chosen]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    adamw = AdamW([g for g in groups if g["params"]], lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
    for p in rest:
        adamw.state[p] = {
            "step": torch.zeros((), dtype=torch.float32, device=p.device),
            "exp_avg": torch.zeros_like(p, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(p, requires_grad=False),
        }
    if not for_muon:
        return [adamw]
    muon = Muon(for_muon, config.lr, config.momentum, config.weight_decay)
    for p in for_muon:
        muon.state[p] = {"momentum_buffer": torch.zeros_like(p, requires_grad=False)}
    return [adamw, muon]


def optimizer_state(named: Iterable[tuple[str, nn.Parameter]], optimizers: list[Optimizer]) -> Iterator[tuple[str, Tensor]]:
    """The live state tensors under canonical names, `optim.<parameter>.<moment>`."""
    for name, p in named:
        for optimizer in optimizers:
            if p in optimizer.state:
                for key, value in optimizer.state[p].items():
                    yield f"optim.{name}.{key}", value


def set_learning_rate(optimizers: list[Optimizer], lr: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
