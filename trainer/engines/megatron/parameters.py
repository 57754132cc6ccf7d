"""Megatron's parameters under canonical names: its state becomes tensors sharded as the native engine shards them, and is
loaded from them, one parameter at a time.

Experts in its layers are our own modules with our names and stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

from mikoshi.parallel.mesh import Groups
from mikoshi.parallel.sharding import like, local, local_region
from mikoshi.trainer.config.run import RunConfig
from mikoshi.trainer.engines.megatron.model import MegatronStage
from mikoshi.trainer.engines.megatron.names import RowRun, cut_of, rows_of
from mikoshi.trainer.engines.parameters import FillWeights
from mikoshi.trainer.errors import CheckpointError
from mikoshi.trainer.model.config import ModelConfig
from mikoshi.trainer.model.init import Region

_CANONICAL = "blocks."
"""Prefix of our own parameters in Megatron's layers; none of Megatron's begins with it."""


@dataclass(frozen=True)
class Fused:
    """One of Megatron's parameters on this rank.

    rows: the rows of ours that it has on this tensor-parallel rank, in its order.
    first, count: the range of those rows that this rank holds.
    columns: the columns of ours, if tensor parallelism splits those; None means all.
    """

    name: str
    rows: tuple[RowRun, ...]
    first: int
    count: int
    columns: slice | None

    def pieces(self) -> Iterator[tuple[int, RowRun]]:
        """Yields, for each run that this rank holds, where it begins in the parameter and which rows of ours it is."""
        at = 0
        for run in self.rows:
            begin, end = max(at, self.first), min(at + run.count, self.first + self.count)
            if begin < end:
                yield begin - self.first, RowRun(run.name, run.first + begin - at, end - begin)
            at += run.count


class MegatronParameters:
    """`ParameterMap` for Megatron's stages.

    reference: our own parameters on the meta device, sharded as the native engine would.
    """

    def __init__(
        self, stages: Sequence[MegatronStage], model: ModelConfig, groups: Groups, tp: int, sequence_cut: bool
    ) -> None:
        self.model, self.tp_group = model, groups.tp
        self.tp, self.tp_rank = tp, 0 if groups.tp is None else dist.get_rank(groups.tp)
        self.mesh: DeviceMesh = groups.dense["replica", "shard", "tp"]
        self.named: list[tuple[str, nn.Parameter]] = []
        self.reference: dict[str, nn.Parameter] = {}
        for stage in stages:
            self.named += [(_global_name(name, stage, model), p) for name, p in stage.inner.named_parameters()]
            self.reference = dict(stage.reference[0].named_parameters()) | self.reference
        self.name_of = {p: name for name, p in self.named}
        self.fused = {name: self._fused(name, p) for name, p in self.named if not name.startswith(_CANONICAL)}
        self.partial = [p for name, p in self.named if name in self.fused and self._partial(name, sequence_cut)]

    def _fused(self, name: str, p: nn.Parameter) -> Fused:
        offset, shape = local_region(p)
        dim = cut_of(name)
        columns = slice(self.tp_rank * p.shape[1], (self.tp_rank + 1) * p.shape[1]) if dim == 1 else None
        return Fused(name, rows_of(name, self.model, self.tp, self.tp_rank), offset[0], shape[0], columns)

    def _partial(self, name: str, sequence_cut: bool) -> bool:
        """Whether tensor-parallel ranks hold the same parameter but parts of its gradient.

        That is so for norms of heads, of which each rank has others, and for all that sees only a rank's part of the
        sequence.
        """
        if self.tp_group is None or cut_of(name) is not None:
            return False
        return name.endswith(("q_layernorm.weight", "k_layernorm.weight")) or (sequence_cut and "position" not in name)

    def fill(self, fill_weights: FillWeights, config: RunConfig, device: torch.device) -> None:
        """See `ParameterMap.fill`."""
        for name, p in self.named:
            if name not in self.fused:
                fill_weights(name, p, config, device)
                continue
            fused = self.fused[name]
            for at, rows in fused.pieces():
                whole = tuple(self.reference[rows.name].shape)
                values = local(p)[at : at + rows.count]
                first = (rows.first, *([fused.columns.start] if fused.columns else [0] * (len(whole) - 1)))
                region = Region(first, tuple(values.shape), whole)
                fill_weights(rows.name, values, config, device, region)

    def as_sharded(self, p: nn.Parameter, values: Tensor) -> Tensor:
        """See `ParameterMap.as_sharded`."""
        name = self.name_of[p]
        return self._as_dtensor(name, local(values), p) if name in self.fused else values

    def _as_dtensor(self, name: str, values: Tensor, p: nn.Parameter) -> DTensor:
        """Returns `values` sharded by ZeRO and tensor parallelism.

        The placements say exactly which ranks hold the same piece. They do not say where in the whole a piece begins, as
        Megatron's whole has its own order.
        """
        dim = cut_of(name)
        placements: tuple[Placement, ...] = (Replicate(), Shard(0), Replicate() if dim is None else Shard(dim))
        shape = [size * (self.tp if d == dim else 1) for d, size in enumerate(p.shape)]
        meta = TensorMeta(torch.Size(shape), torch.empty(shape, device="meta").stride(), values.dtype)
        return DTensor(values, DTensorSpec(self.mesh, placements, tensor_meta=meta), requires_grad=False)

    @torch.no_grad()
    def sum_partial_gradients(self) -> None:
        """See `ParameterMap.sum_partial_gradients`."""
        for p in self.partial:
            if p.grad is not None:
                dist.all_reduce(local(p.grad), group=self.tp_group)

    @torch.no_grad()
    def canonical_state(self, engine_state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `ParameterMap.canonical_state`."""
        out: dict[str, Tensor] = {}
        for key, tensor in engine_state.items():
            prefix, name, moment = _split_key(key)
            if name not in self.fused:
                out[key] = tensor
                continue
            if tensor.ndim == 0:  # a count of steps, the same for all that was fused
                for ours in dict.fromkeys(rows.name for rows in self.fused[name].rows):
                    out[prefix + ours + moment] = tensor
                continue
            whole, at = _full(tensor, self.mesh.device_type), 0
            for rows in self.fused[name].rows:
                target = out.setdefault(prefix + rows.name + moment, self._empty(rows.name, tensor))
                (first, *_), (count, *_) = local_region(target)
                begin, end = max(rows.first, first), min(rows.first + rows.count, first + count)
                if begin < end:
                    skip = at + begin - rows.first
                    local(target)[begin - first : end - first] = whole[skip : skip + end - begin]
                at += rows.count
        return out

    def _empty(self, name: str, values: Tensor) -> Tensor:
        """Returns an empty tensor in host memory: a device has no room for its state twice."""
        reference = self.reference[name]
        return like(torch.empty(local_region(reference)[1], dtype=values.dtype), reference)

    @torch.no_grad()
    def load_canonical(self, state: Mapping[str, Tensor], engine_state: Mapping[str, Tensor]) -> None:
        """See `ParameterMap.load_canonical`.

        Raises CheckpointError if parameters that Megatron fuses into one have taken different numbers of steps.
        """
        for key, tensor in engine_state.items():
            prefix, name, moment = _split_key(key)
            if name not in self.fused:
                if key in state and local(tensor).data_ptr() != local(state[key]).data_ptr():
                    tensor.copy_(state[key])
                continue
            fused = self.fused[name]
            names = [prefix + ours + moment for ours in dict.fromkeys(rows.name for rows in fused.rows)]
            if any(ours not in state for ours in names):
                continue
            if tensor.ndim == 0:
                steps = {ours: float(state[ours]) for ours in names}
                if len(set(steps.values())) > 1:
                    counts = ", ".join(f"{ours} is {step:g}" for ours, step in steps.items())
                    raise CheckpointError(f"{counts}: Megatron's {name} is all of these in one, of one number of steps")
                tensor.fill_(steps[names[0]])
                continue
            wholes = {ours: _full(state[ours], self.mesh.device_type) for ours in names}
            for at, rows in fused.pieces():
                values = wholes[prefix + rows.name + moment][rows.first : rows.first + rows.count]
                local(tensor)[at : at + rows.count] = values if fused.columns is None else values[:, fused.columns]

    def comparable_state(self, engine_state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `ParameterMap.comparable_state`."""
        live = dict(reversed(self.named))
        out: dict[str, Tensor] = {}
        for key, tensor in engine_state.items():
            prefix, name, moment = _split_key(key)
            if name not in self.fused:
                out[key] = tensor
                continue
            rows = self.fused[name].rows
            shown = prefix + (rows[0].name if len(rows) == 1 else name) + moment
            out[shown] = tensor if tensor.ndim == 0 else self._as_dtensor(name, local(tensor), live[name])
        return out


def _split_key(key: str) -> tuple[str, str, str]:
    """Splits "optim.decoder.x.weight.exp_avg" into "optim.", "decoder.x.weight" and ".exp_avg", which is empty for
    "model.…".
    """
    kind, _, rest = key.partition(".")
    if kind == "model":
        return "model.", rest, ""
    name, _, moment = rest.rpartition(".")
    return f"{kind}.", name, f".{moment}"


def _full(tensor: Tensor, device_type: str) -> Tensor:
    """Returns all of a tensor: of one sharded by ZeRO this tensor-parallel rank's part, of a canonical one the whole.
    Collective.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    piece = local(tensor).to(device_type)  # where collectives are fast
    return DTensor(piece, tensor._spec, requires_grad=False).full_tensor()


def _global_name(name: str, stage: MegatronStage, model: ModelConfig) -> str:
    """Returns a parameter's name with its layer counted from the first of the whole model.

    A tied head has the embedding's name, and a mixture of experts ours.
    """
    if name == "output_layer.weight" and model.tied:
        return "embedding.word_embeddings.weight"
    prefix = "decoder.layers."
    if not name.startswith(prefix):
        return name
    number, _, rest = name.removeprefix(prefix).partition(".")
    if rest.startswith("mlp.moe."):
        return f"{_CANONICAL}{stage.part.layers[int(number)]}.{rest.replace('mlp.moe.', 'mlp.', 1)}"
    return f"{prefix}{stage.part.layers[int(number)]}.{rest}"
