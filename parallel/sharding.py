"""ONE table: which dimension of which parameter each axis cuts. Tensor and expert parallelism, ZeRO, checkpoints and the
planner read it and nothing else; and which piece of a parameter, in the end, this rank holds."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard
from torch.utils._python_dispatch import _disable_current_modes

from mikoshi.parallel.collectives import gather


@dataclass(frozen=True)
class Axes:
    """The dimension of a parameter that an axis cuts; None: every rank of the axis holds it whole.

    tp: tensor parallel, inside the node. ep: expert parallel, over experts. expert_tp: tensor parallel inside an expert.
    ZeRO cuts dimension 0 of what these leave, or for experts the one that comes out even (see parallel.zero).
    """

    tp: int | None = None
    ep: int | None = None
    expert_tp: int | None = None


# Megatron's cuts (Shoeybi et al. 2019, arXiv:1909.08053): the first matrix of a pair by its outputs, the second by its
# inputs, so that one sum closes the pair. Rows of the vocabulary for embedding and head. The first match counts.
TABLE: tuple[tuple[str, Axes], ...] = (
    (r"(embed|head)\.weight", Axes(tp=0)),
    (r".*\.attn\.[qkv]\.(weight|bias)", Axes(tp=0)),
    (r".*\.attn\.out\.weight", Axes(tp=1)),
    (r".*\.experts\.(gate|up)", Axes(ep=0, expert_tp=1)),
    (r".*\.experts\.down", Axes(ep=0, expert_tp=2)),
    (r".*\.mlp\.(shared\.)?(gate|up)\.(weight|bias)", Axes(tp=0)),
    (r".*\.mlp\.(shared\.)?down\.weight", Axes(tp=1)),
    (r".*", Axes()),  # norms, learned positions, routers, and the biases that follow a sum
)


def axes_of(name: str, few_kv_heads: bool = False) -> Axes:
    """What cuts the parameter called `name`. `few_kv_heads`: there are fewer key/value heads than tensor-parallel ranks;
    then their projections are held whole and each rank uses the rows of its own head."""
    if few_kv_heads and re.fullmatch(r".*\.attn\.[kv]\.(weight|bias)", name):
        return Axes()
    return next(cut for pattern, cut in TABLE if re.fullmatch(pattern, name))


def placements(cuts: dict[str, int | None], mesh: DeviceMesh) -> list[Placement]:
    """DTensor placements over the dimensions of `mesh`, from mesh dimension name -> dimension of the tensor."""
    names = mesh.mesh_dim_names or ()
    return [Replicate() if cuts[name] is None else Shard(int(cuts[name] or 0)) for name in names]


def local(tensor: Tensor) -> Tensor:
    """The elements this rank holds, as a plain tensor that shares their memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(values: Tensor, parameter: Tensor) -> Tensor:
    """`values`, this rank's piece, as a tensor that is cut as `parameter` is. Shares memory with `values`."""
    if not isinstance(parameter, DTensor):
        return values
    # Not from_local: it would move what is kept in the host's memory to the mesh's devices.
    return DTensor(values, parameter._spec, requires_grad=False)


def local_region(tensor: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Offset and shape of this rank's piece in the global tensor."""
    if not isinstance(tensor, DTensor):
        return (0,) * tensor.ndim, tuple(tensor.shape)
    with _disable_current_modes():  # torch counts with tensors, whose values a dry run's would not have
        shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(offset), tuple(shape)


def whole_but_first(tensor: Tensor) -> Tensor:
    """What this rank holds along dimension 0, whole in the others: of a stack of matrices, its own matrices. Collective
    among the ranks that hold parts of the same ones, whose parts are even."""
    piece = local(tensor)
    if not isinstance(tensor, DTensor):
        return piece
    # ZeRO cuts what the axes right of it left over (a strided shard): its parts are joined first, then outwards.
    cuts = list(enumerate(tensor.placements))
    strided = [(i, cut.dim) for i, cut in cuts if isinstance(cut, _StridedShard)]
    plain = [(i, cut.dim) for i, cut in reversed(cuts) if isinstance(cut, Shard) and not isinstance(cut, _StridedShard)]
    for i, dim in strided + plain:
        if dim:
            piece = gather(piece, dim, tensor.device_mesh.get_group(i))
    return piece


def holders(tensor: Tensor, ranks: int) -> int:
    """How many of the `ranks` that carry this parameter hold the same piece as this one."""
    if not isinstance(tensor, DTensor):
        return ranks
    mesh = tensor.device_mesh
    cut = (Shard, _StridedShard)
    return ranks // math.prod(mesh.size(i) for i, p in enumerate(tensor.placements) if isinstance(p, cut))


def sum_of_squares(gradients: Sequence[Tensor], ranks: int) -> Tensor:
    """This rank's part of the global sum of squares, fp64: summed over the `ranks` that carry the same parameters it
    counts every element once."""
    by_holders: dict[int, list[Tensor]] = {}
    for gradient in gradients:
        by_holders.setdefault(holders(gradient, ranks), []).append(local(gradient))
    # Added up in fp64: in fp32 a CPU is off by 3e-5 over two million elements, and by something else over a shard of them.
    norms = {n: torch.stack(torch._foreach_norm(group, 2, torch.float64)) for n, group in by_holders.items()}
    parts = [norm.square().sum() / n for n, norm in norms.items()]
    return torch.stack(parts).sum() if parts else torch.zeros((), dtype=torch.float64)
