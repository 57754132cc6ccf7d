"""Silent divergence is detected: ranks with the same piece of a tensor compare it bit by bit, and the deviating ranks are
named.

Every tensor becomes one 64-bit digest, computed on its device in one pass. Ranks compare, in existing groups, one number for
all tensors with the same holders; only if two differ does every rank send its digests.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Replicate

from mikoshi.parallel.mesh import Groups
from mikoshi.parallel.sharding import local, local_region

Axis = tuple[str, str]
"""A mesh, dense or experts, and one of its dimensions; or ("ends", ""): first and last stage, of a tied embedding."""

_DENSE: tuple[Axis, ...] = (("dense", "replica"), ("dense", "shard"), ("dense", "tp"))
_EXPERTS: tuple[Axis, ...] = tuple(("experts", name) for name in ("replica", "shard", "ep", "expert_tp"))
_AXES: tuple[Axis, ...] = (*_DENSE, *_EXPERTS, ("ends", ""))
"""All in the order in which every rank takes them: a rank waits for the others of one group at a time."""

_TIED = re.compile(r"(model|optim)\.embed\.weight(\..+)?")
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = {"cpu": 1 << 20, "cuda": 1 << 24}
"""Words taken at once: what lies in between is as large."""

_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio
_MOST_REPORTED = 16


@dataclass(frozen=True)
class Difference:
    """A tensor that is not equal on all `holders` of one piece of it.

    ranks: those that differ from the majority; without a majority all of them, and `certain` is False.
    """

    name: str
    ranks: tuple[int, ...]
    holders: tuple[int, ...]
    certain: bool

    def __str__(self) -> str:
        odd = f"rank{'s' * (len(self.ranks) > 1)} {', '.join(map(str, self.ranks))}"
        if self.certain:
            others = ", ".join(str(rank) for rank in self.holders if rank not in self.ranks)
            return f"{self.name} on {odd} is not what it is on {others}"
        return f"{self.name} is not the same on {odd}, and which of them is wrong cannot be told"


def find_differences(named: Iterable[tuple[str, Tensor]], groups: Groups) -> list[Difference]:
    """The tensors that differ between ranks that should hold the same, at most 16, sorted by name.

    Collective over all ranks of the layout, with the same result on each. A plain tensor is held by all ranks of a stage.
    Pieces with a single holder are not compared.
    """
    shared: dict[tuple[Axis, ...], list[tuple[str, Tensor]]] = {}
    for name, tensor in sorted(named, key=lambda pair: pair[0]):
        if axes := _shared_along(name, tensor, groups):
            shared.setdefault(axes, []).append((name, tensor))
    home = torch.device(groups.dense.device_type)
    digests = {axes: torch.stack([digest(t).to(home) for _, t in tensors]) for axes, tensors in shared.items()}
    odd = _compare({axes: _joined(each) for axes, each in digests.items()}, groups)
    anywhere = torch.stack([torch.zeros((), dtype=torch.int64, device=home), *odd.values()]).amax()
    dist.all_reduce(anywhere, dist.ReduceOp.MAX)
    if not anywhere.item():
        return []
    own = [
        (name, local_region(tensor), value)
        for axes, tensors in shared.items() if odd[axes].item()
        for (name, tensor), value in zip(tensors, digests[axes].tolist(), strict=True)
    ]  # fmt: skip
    all_digests: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(all_digests, own)
    return differences(all_digests)[:_MOST_REPORTED]


def differences(reported: Sequence[Sequence[tuple[str, Any, int]]]) -> list[Difference]:
    """The differences between what ranks reported: for each rank its (name, region of the piece, digest)."""
    holders_of: dict[tuple[str, Any], dict[int, int]] = {}
    for rank, pieces in enumerate(reported):
        for name, where, value in pieces:
            holders_of.setdefault((name, where), {})[rank] = value
    out = []
    for (name, _), values in sorted(holders_of.items()):
        counts = Counter(values.values()).most_common(2)
        if len(counts) > 1:
            certain = counts[0][1] > counts[1][1]
            odd = tuple(rank for rank, value in values.items() if not certain or value != counts[0][0])
            out.append(Difference(name, odd, tuple(values), certain))
    return out


def digest(tensor: Tensor) -> Tensor:
    """64 bits of this rank's piece of a tensor, on its device: a sum of its words, as integers that wrap around, each times
    an odd number that belongs to its place. A word that changes, in however many bits, changes the digest."""
    values = local(tensor).detach().contiguous().view(-1)
    size, per_word = values.element_size(), 8 // values.element_size()
    factors = _factors(values.device)
    whole = len(values) // per_word * per_word
    parts = []
    for start in range(0, whole, len(factors) * per_word):
        chunk = values[start : min(start + len(factors) * per_word, whole)]
        if chunk.storage_offset() % per_word:  # eight bytes are read as one word from a multiple of eight on alone
            chunk = chunk.clone()
        words = chunk.view(torch.int64)
        parts.append((words * factors[: len(words)]).sum())
    if whole < len(values):
        rest = values[whole:].view(_WORDS[size])
        parts.append((rest * factors[: len(rest)]).sum())
    return _joined(torch.stack(parts)) if parts else torch.zeros((), dtype=torch.int64, device=values.device)


def _joined(numbers: Tensor) -> Tensor:
    """One number for several, which changes if any one of them does."""
    return (numbers * _factors(numbers.device)[: len(numbers)]).sum()


@lru_cache(maxsize=8)
def _factors(device: torch.device) -> Tensor:
    """Odd numbers without a pattern (Steele et al. 2014, "Fast splittable pseudorandom number generators": its mixing of
    a Weyl sequence). An odd factor loses nothing of what it multiplies, modulo 2^64."""
    x = torch.arange(1, _CHUNK.get(device.type, 1 << 20) + 1, dtype=torch.int64, device=device) * _signed(_GOLDEN)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * _signed(factor)
    return x | 1


def _signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number


def _shared_along(name: str, tensor: Tensor, groups: Groups) -> tuple[Axis, ...]:
    """The axes along which other ranks hold the same piece."""
    if isinstance(tensor, DTensor):
        mesh = tensor.device_mesh
        names = mesh.mesh_dim_names or ()
        kind = "experts" if "ep" in names else "dense"
        found = {(kind, names[i]) for i, cut in enumerate(tensor.placements) if isinstance(cut, Replicate) and mesh.size(i) > 1}
    else:
        found = {axis for axis in _DENSE if _group(axis, groups).size() > 1}
    if groups.ends is not None and _TIED.fullmatch(name):
        found.add(("ends", ""))
    return tuple(axis for axis in _AXES if axis in found)


def _group(axis: Axis, groups: Groups) -> ProcessGroup:
    kind, name = axis
    if kind == "ends":
        assert groups.ends is not None
        return groups.ends
    mesh = groups.dense if kind == "dense" else groups.experts
    assert mesh is not None
    return mesh.get_group(name)


def _compare(numbers: Mapping[tuple[Axis, ...], Tensor], groups: Groups) -> dict[tuple[Axis, ...], Tensor]:
    """For each number whether its holders have different ones, 1 or 0: along one axis after the other the largest is found,
    and the largest complement, which is that of the smallest."""
    found = {axes: torch.stack((number, ~number)) for axes, number in numbers.items()}
    for axis in _AXES:
        along = sorted(axes for axes in found if axis in axes)
        if along:
            largest = torch.stack([found[axes] for axes in along])
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=_group(axis, groups))
            found.update(zip(along, largest, strict=True))
    return {axes: (most != ~least).long() for axes, (most, least) in found.items()}
