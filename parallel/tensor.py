"""Tensor and sequence parallelism: parameters are DTensors cut as the sharding table says, and the modules that own them
compute on this rank's piece, with one gather before and one reduce-scatter after each pair of matrices.

Between the pairs activations are cut along the sequence (Korthikanti et al. 2022, arXiv:2205.05198): a module that is
given [B, T/tp, C] returns [B, T/tp, C].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate

from mikoshi.parallel.collectives import all_reduce, gather, reduce_scatter
from mikoshi.parallel.sharding import axes_of, placements

_SEQUENCE = -2


@dataclass(frozen=True)
class Vocabulary:
    """This rank's rows of the vocabulary, from `first` on, and how to put all ranks' together."""

    first: int
    group: ProcessGroup

    def largest(self, x: Tensor) -> Tensor:
        """The maximum of all ranks' `x`."""
        return all_reduce(x, self.group, "max")

    def total(self, x: Tensor) -> Tensor:
        """The sum of all ranks' `x`."""
        return all_reduce(x, self.group)


def distribute(model: nn.Module, dense: DeviceMesh | None, experts: DeviceMesh | None, few_kv_heads: bool) -> None:
    """Make the parameters of a model on the meta device DTensors, cut by the table: over `tp` of the dense mesh, or
    `ep` x `expert_tp` of the experts' mesh. A mesh of None leaves its parameters as they are."""
    for prefix, module in model.named_modules():
        for leaf, p in list(module._parameters.items()):
            name = f"{prefix}.{leaf}" if prefix else leaf
            cut = axes_of(name, few_kv_heads)
            mesh, dims = (dense, {"tp": cut.tp}) if cut.ep is None else (experts, {"ep": cut.ep, "expert_tp": cut.expert_tp})
            if p is not None and mesh is not None:
                module._parameters[leaf] = nn.Parameter(_cut(p, mesh, dims), requires_grad=p.requires_grad)


def _cut(p: Tensor, mesh: DeviceMesh, dims: dict[str, int | None]) -> DTensor:
    shape = list(p.shape)
    for axis, dim in dims.items():
        if dim is not None:
            shape[dim] //= mesh[axis].size()
    piece = torch.empty(shape, dtype=p.dtype, device=p.device)
    return DTensor.from_local(piece, mesh, placements(dims, mesh), run_check=False, shape=p.shape, stride=p.stride())


def own(p: Tensor | None) -> Any:
    """This rank's piece of a parameter, for computing. Where several ranks hold the same piece and see different tokens
    or heads, their gradients are parts of a sum."""
    if not isinstance(p, DTensor):
        return p
    parts = [Partial() if isinstance(cut, Replicate) else cut for cut in p.placements]
    return p.to_local(grad_placements=parts)


def tensor_parallel(model: nn.Module, group: ProcessGroup, kv_heads: int) -> None:
    """Let every module of the GPT compute on its own piece, after `distribute`. `model.forward` then takes and returns
    what it always did, but its hidden states are cut along the sequence."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    for name, module in model.named_modules():
        leaf = name.rpartition(".")[2]
        change: Callable[..., Any] | None = None
        if isinstance(module, nn.Linear):
            if leaf in ("out", "down"):
                change = _inputs_cut(module, group)
            elif leaf in ("k", "v") and kv_heads < size:
                change = _one_head(module, rank * kv_heads // size, kv_heads)
            elif leaf != "head":
                change = _outputs_cut(module)
        elif isinstance(module, nn.Embedding):
            change = _vocabulary_cut(module, group) if leaf == "embed" else _positions(module, rank, size)
        elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            change = _norm(module)
        elif leaf == "router":
            change = _router(module)
        elif leaf == "attn" or (leaf in ("mlp", "shared") and isinstance(getattr(module, "down", None), nn.Linear)):
            change = _gathered_first(module.forward, group)
        if change is not None:
            module.forward = change


def _gathered_first(forward: Callable[..., Tensor], group: ProcessGroup) -> Callable[..., Tensor]:
    return lambda x, *rest: forward(gather(x, _SEQUENCE, group), *rest)


def _outputs_cut(module: nn.Linear) -> Callable[[Tensor], Tensor]:
    return lambda x: F.linear(x, own(module.weight), own(module.bias))


def _one_head(module: nn.Linear, head: int, heads: int) -> Callable[[Tensor], Tensor]:
    """Keys or values of the one head that this rank's queries read; the other rows of the weight get no gradient here."""
    rows = module.out_features // heads

    def forward(x: Tensor) -> Tensor:
        weight, bias = own(module.weight), own(module.bias)
        mine = slice(head * rows, (head + 1) * rows)
        return F.linear(x, weight[mine], None if bias is None else bias[mine])

    return forward


def _inputs_cut(module: nn.Linear, group: ProcessGroup) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        y = reduce_scatter(F.linear(x, own(module.weight)), _SEQUENCE, group)
        return y if module.bias is None else torch.add(y, own(module.bias))

    return forward


def _norm(module: nn.LayerNorm | nn.RMSNorm) -> Callable[[Tensor], Tensor]:
    shape = list(module.normalized_shape)
    if isinstance(module, nn.LayerNorm):
        return lambda x: F.layer_norm(x, shape, own(module.weight), own(module.bias), module.eps)
    return lambda x: F.rms_norm(x, shape, own(module.weight), module.eps)


def _router(module: Any) -> Callable[[Tensor], Any]:
    """Each rank routes the tokens of its part of the sequence."""
    return lambda x: module.route(x, own(module.weight), own(module.bias))


def _vocabulary_cut(module: nn.Embedding, group: ProcessGroup) -> Callable[[Tensor], Tensor]:
    def forward(tokens: Tensor) -> Tensor:
        weight = own(module.weight)
        row = tokens - dist.get_rank(group) * weight.shape[0]
        here = (row >= 0) & (row < weight.shape[0])
        found = F.embedding(row.clamp(0, weight.shape[0] - 1), weight) * here[..., None]
        return reduce_scatter(found, _SEQUENCE, group)

    return forward


def _positions(module: nn.Embedding, rank: int, size: int) -> Callable[[Tensor], Tensor]:
    return lambda positions: F.embedding(positions.chunk(size, -1)[rank], own(module.weight))


def vocabulary_parallel(loss: Callable[..., Tensor], group: ProcessGroup) -> Callable[..., Tensor]:
    """The next-token loss over a head whose vocabulary is cut: `loss` of the whole sequence on this rank's rows."""

    def predict(x: Tensor, weight: Tensor, labels: Tensor, scale: float, known: int | None = None) -> Tensor:
        rows = own(weight)
        mine = Vocabulary(dist.get_rank(group) * rows.shape[0], group)
        return loss(gather(x, _SEQUENCE, group), rows, labels, scale, mine, known)

    return predict


def whole_logits(group: ProcessGroup) -> Callable[[Tensor, Tensor, float], Tensor]:
    """Logits of the whole sequence and vocabulary on every rank, from pieces of both."""

    def logits(x: Tensor, weight: Tensor, scale: float) -> Tensor:
        return gather(F.linear(gather(x, _SEQUENCE, group), own(weight)), -1, group) * scale

    return logits


def overlap_collectives(group: ProcessGroup) -> None:
    """Async tensor parallelism: have torch.compile break a gather and the product after it, or a product and the
    reduce-scatter after it, into pieces that overlap (CUDA with symmetric memory only)."""
    import torch._inductor.config as inductor
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    enable_symm_mem_for_group(group.group_name)
    inductor._micro_pipeline_tp = True
