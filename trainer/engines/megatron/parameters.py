"""Megatron's parameters under the run's own names: its state becomes canonical tensors, cut as the native engine cuts them,
and comes back from them, a parameter at a time. Experts are ours, with our names, in its layers: they stay as they are."""

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
from mikoshi.parallel.sharding import like, local, place
from mikoshi.trainer.config.run import RunConfig
from mikoshi.trainer.engines.megatron.model import Stage
from mikoshi.trainer.engines.megatron.names import Rows, cut_of, rows_of
from mikoshi.trainer.engines.parameters import FillWeights
from mikoshi.trainer.errors import CheckpointError
from mikoshi.trainer.model.config import ModelConfig
from mikoshi.trainer.model.init import Region

_OURS = "blocks."
"""What our own parameters in Megatron's layers begin with, and none of its."""


@dataclass(frozen=True)
class Fused:
    """One of Megatron's parameters on this rank: the rows of ours it has on this tensor-parallel rank, in its order, of which
    it holds `count` from `first` on. columns: of ours, where tensor parallelism cuts those; None: all."""

    name: str
    rows: tuple[Rows, ...]
    first: int
    count: int
    columns: slice | None

    def pieces(self) -> Iterator[tuple[int, Rows]]:
        """What it holds, run after run: where each begins in it, and which rows of ours it is."""
        at = 0
        for run in self.rows:
            begin, end = max(at, self.first), min(at + run.count, self.first + self.count)
            if begin < end:
                yield begin - self.first, Rows(run.name, run.first + begin - at, end - begin)
            at += run.count


class FusedNames:
    """`Held` for Megatron's stages. shadow: our own parameters on the meta device, cut as the native engine would."""

    def __init__(self, stages: Sequence[Stage], model: ModelConfig, groups: Groups, tp: int, sequence_cut: bool) -> None:
        self.model, self.tp_group = model, groups.tp
        self.tp, self.tp_rank = tp, 0 if groups.tp is None else dist.get_rank(groups.tp)
        self.mesh: DeviceMesh = groups.dense["replica", "shard", "tp"]
        self.named: list[tuple[str, nn.Parameter]] = []
        self.shadow: dict[str, nn.Parameter] = {}
        for stage in stages:
            self.named += [(_global(name, stage, model), p) for name, p in stage.inner.named_parameters()]
            self.shadow = dict(stage.shadow[0].named_parameters()) | self.shadow
        self.name_of = {p: name for name, p in self.named}
        self.fused = {name: self._fused(name, p) for name, p in self.named if not name.startswith(_OURS)}
        self.partial = [p for name, p in self.named if name in self.fused and self._partial(name, sequence_cut)]

    def _fused(self, name: str, p: nn.Parameter) -> Fused:
        offset, shape = place(p)
        cut = cut_of(name)
        columns = slice(self.tp_rank * p.shape[1], (self.tp_rank + 1) * p.shape[1]) if cut == 1 else None
        return Fused(name, rows_of(name, self.model, self.tp, self.tp_rank), offset[0], shape[0], columns)

    def _partial(self, name: str, sequence_cut: bool) -> bool:
        """Whether tensor-parallel ranks, which hold the same, have parts of its gradient: norms of heads, of which each rank
        has others, and all that sees a rank's own part of the sequence."""
        if self.tp_group is None or cut_of(name) is not None:
            return False
        return name.endswith(("q_layernorm.weight", "k_layernorm.weight")) or (sequence_cut and "position" not in name)

    def fill(self, fill_weights: FillWeights, config: RunConfig, device: torch.device) -> None:
        for name, p in self.named:
            if name not in self.fused:
                fill_weights(name, p, config, device)
                continue
            fused = self.fused[name]
            for at, rows in fused.pieces():
                whole = tuple(self.shadow[rows.name].shape)
                values = local(p)[at : at + rows.count]
                first = (rows.first, *([fused.columns.start] if fused.columns else [0] * (len(whole) - 1)))
                region = Region(first, tuple(values.shape), whole)
                fill_weights(rows.name, values, config, device, region)

    def cut(self, p: nn.Parameter, values: Tensor) -> Tensor:
        name = self.name_of[p]
        return self._cut(name, local(values), p) if name in self.fused else values

    def _cut(self, name: str, values: Tensor, p: nn.Parameter) -> DTensor:
        """Cut by ZeRO and by tensor parallelism. Which ranks hold the same of it is told exactly; where in the whole a piece
        begins is not, as Megatron's whole has no order of its own."""
        dim = cut_of(name)
        placements: tuple[Placement, ...] = (Replicate(), Shard(0), Replicate() if dim is None else Shard(dim))
        shape = [size * (self.tp if d == dim else 1) for d, size in enumerate(p.shape)]
        meta = TensorMeta(torch.Size(shape), torch.empty(shape, device="meta").stride(), values.dtype)
        return DTensor(values, DTensorSpec(self.mesh, placements, tensor_meta=meta), requires_grad=False)

    @torch.no_grad()
    def join_gradients(self) -> None:
        for p in self.partial:
            if p.grad is not None:
                dist.all_reduce(local(p.grad), group=self.tp_group)

    @torch.no_grad()
    def told(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        for key, tensor in own.items():
            prefix, name, moment = _parts(key)
            if name not in self.fused:
                out[key] = tensor
                continue
            if tensor.ndim == 0:  # a count of steps, the same for all that was fused
                for ours in dict.fromkeys(rows.name for rows in self.fused[name].rows):
                    out[prefix + ours + moment] = tensor
                continue
            whole, at = _whole(tensor, self.mesh.device_type), 0
            for rows in self.fused[name].rows:
                target = out.setdefault(prefix + rows.name + moment, self._empty(rows.name, tensor))
                (first, *_), (count, *_) = place(target)
                begin, end = max(rows.first, first), min(rows.first + rows.count, first + count)
                if begin < end:
                    skip = at + begin - rows.first
                    local(target)[begin - first : end - first] = whole[skip : skip + end - begin]
                at += rows.count
        return out

    def _empty(self, name: str, values: Tensor) -> Tensor:
        """In the host's memory: a device has no room for its state twice."""
        shadow = self.shadow[name]
        return like(torch.empty(place(shadow)[1], dtype=values.dtype), shadow)

    @torch.no_grad()
    def take(self, state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
        for key, tensor in own.items():
            prefix, name, moment = _parts(key)
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
                    told = ", ".join(f"{ours} is {step:g}" for ours, step in steps.items())
                    raise CheckpointError(f"{told}: Megatron's {name} is all of these in one, of one number of steps")
                tensor.fill_(steps[names[0]])
                continue
            wholes = {ours: _whole(state[ours], self.mesh.device_type) for ours in names}
            for at, rows in fused.pieces():
                values = wholes[prefix + rows.name + moment][rows.first : rows.first + rows.count]
                local(tensor)[at : at + rows.count] = values if fused.columns is None else values[:, fused.columns]

    def compared(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        live = dict(reversed(self.named))
        out: dict[str, Tensor] = {}
        for key, tensor in own.items():
            prefix, name, moment = _parts(key)
            if name not in self.fused:
                out[key] = tensor
                continue
            rows = self.fused[name].rows
            told = prefix + (rows[0].name if len(rows) == 1 else name) + moment
            out[told] = tensor if tensor.ndim == 0 else self._cut(name, local(tensor), live[name])
        return out


def _parts(key: str) -> tuple[str, str, str]:
    """ "optim.decoder.x.weight.exp_avg" -> "optim.", "decoder.x.weight", ".exp_avg"; of "model.…" the last is empty."""
    kind, _, rest = key.partition(".")
    if kind == "model":
        return "model.", rest, ""
    name, _, moment = rest.rpartition(".")
    return f"{kind}.", name, f".{moment}"


def _whole(tensor: Tensor, device_type: str) -> Tensor:
    """Of a piece that ZeRO cuts, all of this tensor-parallel rank's; of a canonical one, all. Collective."""
    if not isinstance(tensor, DTensor):
        return tensor
    here = local(tensor).to(device_type)  # where the ranks' collectives are quick
    return DTensor(here, tensor._spec, requires_grad=False).full_tensor()


def _global(name: str, stage: Stage, model: ModelConfig) -> str:
    """A parameter's name with its layer counted from the first of the model; of a tied head, the embedding's; of a mixture of
    experts, ours."""
    if name == "output_layer.weight" and model.tied:
        return "embedding.word_embeddings.weight"
    prefix = "decoder.layers."
    if not name.startswith(prefix):
        return name
    number, _, rest = name.removeprefix(prefix).partition(".")
    if rest.startswith("mlp.moe."):
        return f"{_OURS}{stage.part.layers[int(number)]}.{rest.replace('mlp.moe.', 'mlp.', 1)}"
    return f"{prefix}{stage.part.layers[int(number)]}.{rest}"
