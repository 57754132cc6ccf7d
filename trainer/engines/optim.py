"""Optimizers and schedules. The learning rate is a function of the step, and weight decay touches matrices only."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer

from mikoshi.parallel.sharding import like, local, local_region, whole_but_first
from mikoshi.trainer.config.run import OptimSection, ScheduleSection


def learning_rate(peak: float, schedule: ScheduleSection, step: int, steps: int) -> float:
    """Returns the learning rate of a step.

    All kinds rise linearly over `warmup` steps. cosine (Loshchilov and Hutter 2017, arXiv:1608.03983) and linear then fall to
    final x peak at the last step. wsd (Hu et al. 2024, arXiv:2404.06395) stays at the peak and falls over the last `decay`
    steps. constant stays at the peak. After its last step a schedule stays where it ended.

    peak: highest learning rate.
    step: step number, from 0.
    steps: steps of the run, which is the schedule's length unless it has its own.
    """
    steps = schedule.steps or steps
    if step < schedule.warmup:
        return peak * (step + 1) / schedule.warmup
    if schedule.kind == "constant":
        return peak
    begin = steps - schedule.decay if schedule.kind == "wsd" else schedule.warmup
    if step < begin:
        return peak
    done = min(1.0, (step - begin + 1) / max(1, steps - begin))
    fall = 0.5 * (1 + math.cos(math.pi * done)) if schedule.kind == "cosine" else 1 - done
    return peak * (schedule.final + (1 - schedule.final) * fall)


@dataclass(frozen=True)
class Treatment:
    """How the optimizer updates one parameter.

    kind: "muon", "adamw", or "bias" for a router's bias, which model.moe.bias_rate moves.
    weight_decay: decay a step, times the learning rate.
    """

    kind: Literal["muon", "adamw", "bias"]
    weight_decay: float


def treatment(name: str, dimensions: int, config: OptimSection, trained: bool = True) -> Treatment:
    """Returns how the parameter called `name` is updated.

    Muon is for the matrices inside the blocks; a stack of experts [E, out, in] counts as E matrices. Embeddings, positions
    and the head are lookups or predictions, and a router has one vector an expert: they get AdamW, as vectors do. Weight
    decay touches matrices only.

    dimensions: number of dimensions of the parameter.
    trained: whether it has a gradient.
    """
    if not trained:
        return Treatment("bias", 0.0)
    hidden = name.startswith("blocks.") and not name.endswith(".router.weight") and dimensions >= 2
    decay = config.weight_decay if dimensions >= 2 else 0.0
    return Treatment("muon" if hidden and config.kind == "muon" else "adamw", decay)


class Muon(Optimizer):
    """Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) for matrices, and stacks of them, cut over any
    ranks.

    torch.optim.Muon multiplies the shards of a distributed gradient in bf16, so its result depends on how they are
    cut, and it takes no stacks. Here the momentum stays sharded, the matrices to orthogonalise are gathered, each by
    itself, and every rank takes its own piece of the same result: the update does not depend on the layout. The step size
    is matched to AdamW's (Liu et al. 2025, arXiv:2502.16982), so one learning rate serves both. On CPU the iteration runs
    in fp32, on CUDA in bf16.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient. Collective over the ranks that share a parameter."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                buffer = self.state[p]["momentum_buffer"]
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(buffer, group["momentum"])
                offset, shape = local_region(p)
                if p.ndim == 2:
                    whole = update.full_tensor() if isinstance(update, DTensor) else update
                else:
                    whole, offset = whole_but_first(update), (0, *offset[1:])
                direction = orthogonalise(whole)
                mine = direction[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]
                local(p).mul_(1 - group["lr"] * group["weight_decay"])
                local(p).add_(mine.to(local(p)), alpha=-group["lr"] * muon_scale(p.shape))


def muon_scale(shape: Sequence[int]) -> float:
    """Returns what Muon's directions are multiplied by beside the learning rate, so that updates match AdamW's
    (arXiv:2502.16982).
    """
    return 0.2 * math.sqrt(max(shape[-2:]))


def orthogonalise(matrix: Tensor) -> Tensor:
    """Returns an approximation of the nearest semi-orthogonal matrix, by five Newton-Schulz steps with Jordan's coefficients.

    matrix: [out, in], or a stack [..., out, in] of which each matrix is treated alone.
    """
    x = matrix.bfloat16() if matrix.is_cuda else matrix.float()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    out: Tensor = (x.mT if tall else x).to(matrix.dtype)
    return out


class Optimizers:
    """The optimizers of a rank's parameters. Their state exists from the start, so that it can be saved and restored.

    AdamW works element by element and gets this rank's plain pieces. Muon needs whole matrices. A parameter without a
    gradient, such as a router's bias, is updated elsewhere and has no state.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], config: OptimSection) -> None:
        self.named = [(name, p) for name, p in named if p.requires_grad]
        treated = {p: treatment(name, p.ndim, config) for name, p in self.named}
        muon = [p for p, how in treated.items() if how.kind == "muon"]
        self.leaves = {p: local(p).detach() for p, how in treated.items() if how.kind == "adamw"}
        groups = [
            {"params": [leaf for p, leaf in self.leaves.items() if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [leaf for p, leaf in self.leaves.items() if p.ndim < 2], "weight_decay": 0.0},
        ]
        options: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps, "fused": True}
        self.optimizers: list[Optimizer] = [AdamW([g], **options) for g in groups if g["params"]]
        self.moments: dict[nn.Parameter, dict[str, Tensor]] = {}
        for p, leaf in self.leaves.items():
            self.moments[p] = {
                "step": torch.zeros((), dtype=torch.float32, device=leaf.device),
                "exp_avg": torch.zeros_like(leaf),
                "exp_avg_sq": torch.zeros_like(leaf),
            }
        for p in muon:
            self.moments[p] = {"momentum_buffer": torch.zeros_like(p, requires_grad=False)}
        if muon:
            self.optimizers.append(Muon(muon, config.lr, config.momentum, config.weight_decay))
        owner = {id(leaf): p for p, leaf in self.leaves.items()}
        for optimizer in self.optimizers:
            for q in optimizer.param_groups[0]["params"]:
                optimizer.state[q] = self.moments[owner.get(id(q), q)]

    def step(self, lr: float) -> None:
        """Update every parameter that has a gradient, at learning rate `lr`."""
        for p, leaf in self.leaves.items():
            leaf.data = local(p).detach()  # FSDP2 may have moved it since
            leaf.grad = None if p.grad is None else local(p.grad)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        for leaf in self.leaves.values():
            leaf.grad = None

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Yields the live state tensors under canonical names, sharded as their parameters are.

        The names are `optim.<parameter>.<moment>`.
        """
        for name, p in self.named:
            for key, value in self.moments[p].items():
                cut = key != "step" and p in self.leaves
                yield f"optim.{name}.{key}", like(value, p) if cut else value

    def pairs(self, first: nn.Parameter, second: nn.Parameter) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the matching moments of two parameters that are to stay the same."""
        for key, value in self.moments[first].items():
            yield value, self.moments[second][key]
