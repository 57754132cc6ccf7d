"""Lists optimizer, weight decay and learning rate of every parameter, from the config alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from mikoshi.trainer.config.run import RunConfig
from mikoshi.trainer.engines.optim import muon_scale, treatment
from mikoshi.trainer.model.gpt import GPT


@dataclass(frozen=True)
class ParameterTreatment:
    """One parameter. optimizer: "muon", "adamw", or "bias" for a router's, which no gradient moves. rate: the peak learning
    rate, or the bias's step. scale: what Muon's direction, whose singular values are near 1, is multiplied by beside it."""

    name: str
    shape: tuple[int, ...]
    optimizer: str
    weight_decay: float
    rate: float
    scale: float

    @property
    def elements(self) -> int:
        """Number of elements of the parameter."""
        return torch.Size(self.shape).numel()


def parameter_treatments(config: RunConfig) -> list[ParameterTreatment]:
    """Every parameter of the whole model, in its order."""
    with torch.device("meta"):
        model = GPT(config.model)
    bias_rate = (config.model.moe.bias_rate if config.model.moe else None) or 0.0
    found = []
    for name, p in model.named_parameters():
        how = treatment(name, p.ndim, config.optim, p.requires_grad)
        rate = bias_rate if how.kind == "bias" else config.optim.lr
        scale = muon_scale(p.shape) if how.kind == "muon" else 1.0
        found.append(ParameterTreatment(name, tuple(p.shape), how.kind, how.weight_decay, rate, scale))
    return found


def optim_lines(config: RunConfig) -> Iterator[str]:
    """A line a parameter under a head, and what each kind has of the whole."""
    rows = parameter_treatments(config)
    name, shape = max(len(row.name) for row in rows), max(len(_shape(row)) for row in rows)
    yield f"{'parameter':<{name}}  {'shape':<{shape}}  optimizer  weight decay  learning rate  scale"
    for row in rows:
        scale = f"{row.scale:.4g}" if row.optimizer == "muon" else "-"
        yield (
            f"{row.name:<{name}}  {_shape(row):<{shape}}  {row.optimizer:<9}  {row.weight_decay:<12g}  {row.rate:<13g}  {scale}"
        )
    total = sum(row.elements for row in rows)
    for kind in sorted({row.optimizer for row in rows}):
        mine = [row for row in rows if row.optimizer == kind]
        size = sum(row.elements for row in mine)
        yield f"{kind}: {len(mine):,} parameters, {size:,} elements ({size / total:.1%})"
    yield "learning rate: at the peak of optim.schedule; of `bias`: model.moe.bias_rate, the step of a router's bias"
    if any(row.optimizer == "muon" for row in rows):
        yield "scale: 0.2 x sqrt(the longer side), which makes Muon's update as long as AdamW's; each expert has its own"


def _shape(row: ParameterTreatment) -> str:
    return "x".join(map(str, row.shape))
