"""Computes what each rank of a layout holds, from the config alone, without a GPU or data."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mikoshi.parallel.context import token_positions
from mikoshi.parallel.layout import Coordinates, Layout
from mikoshi.parallel.schedule import bubble, splits_backward
from mikoshi.parallel.sharding import axes_of
from mikoshi.trainer.config.run import RunConfig
from mikoshi.trainer.engines.layout import layout_of
from mikoshi.trainer.engines.parts import head_flops, layer_flops, stage_layers
from mikoshi.trainer.model.gpt import GPT, Part

NODE_RANKS = 8
_UNEVEN = 1.1


@dataclass(frozen=True)
class StageView:
    """One pipeline stage. flops: its share of the model's forward pass."""

    stage: int
    pp: int
    layers: range
    embedding: bool
    head: bool
    flops: float
    parameters: int


@dataclass(frozen=True)
class KeptElements:
    """Most elements of the model's state that a rank keeps between micro-batches.

    optimizer: elements of the master weights, and of each moment.
    """

    parameters: int
    gradients: int
    optimizer: int


@dataclass(frozen=True)
class RankView:
    """What one rank carries. heads: query heads that it attends with, kv_heads: those that they read; tokens: the positions
    of every row that attention asks for here; rows: of the global batch; experts: of each MoE layer, None without any."""

    rank: int
    node: int
    at: Coordinates
    stages: tuple[int, ...]
    heads: range
    kv_heads: range
    experts: range | None
    tokens: tuple[range, ...]
    rows: range
    kept: KeptElements


@dataclass(frozen=True)
class LayoutView:
    """A layout as a person wants to see it. `kv_sharers`: ranks that read the same key/value head."""

    name: str
    layout: Layout
    node_ranks: int
    context: int
    experts: int
    kv_sharers: int
    stages: tuple[StageView, ...]
    ranks: tuple[RankView, ...]


def layout_view(config: RunConfig, world: int, node_ranks: int = NODE_RANKS) -> LayoutView:
    """The layout of a run on `world` ranks, `node_ranks` a node. Raises LayoutError where there can be none."""
    layout, model = layout_of(config, world), config.model
    cut = stage_layers(model, config.train.context, layout.stages)
    parts = [_meta_part(config, layout, stage, layers) for stage, layers in enumerate(cut)]
    stages = tuple(_stage_views(config, layout, parts))
    moe_layers = {layer for layer in range(model.layers) if model.is_moe(layer)}
    kept = [_kept(layout, [parts[s] for s in layout.stages_of(pp)], model.n_kv) for pp in range(layout.pp)]
    routed = [any(moe_layers & {*stages[s].layers} for s in layout.stages_of(pp)) for pp in range(layout.pp)]
    ulysses = layout.cp if layout.context_kind == "ulysses" else 1
    positions = [_tokens(layout, cp, config.train.context) for cp in range(layout.cp)]
    batch = config.train.global_batch
    share = layout.micro_rows * layout.micro_batches
    ranks = []
    for rank in range(world):
        at = layout.coordinates(rank)
        part = at.tp * ulysses + (at.cp if ulysses > 1 else 0)
        heads = _part(model.heads, layout.tp * ulysses, part)
        group = model.heads // model.n_kv
        ranks.append(
            RankView(
                rank=rank,
                node=rank // node_ranks,
                at=at,
                stages=tuple(layout.stages_of(at.pp)),
                heads=heads,
                kv_heads=range(heads.start // group, (heads.stop - 1) // group + 1),
                experts=_experts(config, layout, rank) if routed[at.pp] else None,
                tokens=positions[at.cp],
                rows=range(min(at.data * share, batch), min((at.data + 1) * share, batch)),
                kept=kept[at.pp],
            )
        )
    experts = 0 if model.moe is None else model.moe.experts
    sharers = max(1, layout.tp * ulysses // model.n_kv)
    return LayoutView(config.run.name, layout, node_ranks, config.train.context, experts, sharers, stages, tuple(ranks))


def _part(size: int, parts: int, index: int) -> range:
    return range(index * (size // parts), (index + 1) * (size // parts))


def _experts(config: RunConfig, layout: Layout, rank: int) -> range:
    """Inside a stage, ranks count expert_tp innermost and ep around it (see parallel.mesh)."""
    assert config.model.moe is not None
    ep = rank % layout.stage_ranks // layout.expert_tp % layout.ep
    return _part(config.model.moe.experts, layout.ep, ep)


def _tokens(layout: Layout, cp: int, context: int) -> tuple[range, ...]:
    if layout.cp == 1:
        return (range(context),)
    positions = token_positions(cp, layout.cp, context, layout.context_kind)
    cuts = [0, *(np.flatnonzero(np.diff(positions) != 1) + 1).tolist(), len(positions)]
    return tuple(range(int(positions[a]), int(positions[b - 1]) + 1) for a, b in itertools.pairwise(cuts))


def _meta_part(config: RunConfig, layout: Layout, stage: int, layers: range) -> GPT:
    with torch.device("meta"):
        return GPT(config.model, Part(layers, first=stage == 0, last=stage == layout.stages - 1))


def _stage_views(config: RunConfig, layout: Layout, parts: list[GPT]) -> Iterable[StageView]:
    model, context = config.model, config.train.context
    costs = [1.0]
    if len(parts) > 1:
        costs = [sum(layer_flops(model, context, layer) for layer in part.part.layers) for part in parts]
        costs[-1] += head_flops(model, context)
    ranks = {stage: pp for pp in range(layout.pp) for stage in layout.stages_of(pp)}
    for stage, (part, cost) in enumerate(zip(parts, costs, strict=True)):
        size = sum(p.numel() for p in part.parameters())
        yield StageView(stage, ranks[stage], part.part.layers, part.part.first, part.part.last, cost / sum(costs), size)


def _kept(layout: Layout, parts: list[GPT], kv_heads: int) -> KeptElements:
    """By the sharding table for tp, ep and expert_tp, and by ZeRO for the shards of what these leave."""
    held = shared = 0
    for name, p in (named for part in parts for named in part.named_parameters()):
        by = axes_of(name, kv_heads < layout.tp)
        if by.ep is None:
            cuts, shards = layout.tp if by.tp is not None else 1, layout.state_grid[1]
        else:
            cuts, shards = layout.ep * layout.expert_tp, layout.expert_grid[1]
        held += p.numel() // cuts
        shared += -(-p.numel() // (cuts * shards))
    return KeptElements(
        parameters=shared if parameters_shared(layout) else held,
        gradients=shared if gradients_shared(layout) else held,
        optimizer=shared,
    )


def parameters_shared(layout: Layout) -> bool:
    """Whether a rank lets go of others' parameters between two micro-batches; the halves of a split backward pass need the
    same ones."""
    return layout.zero == 3 and not splits_backward(layout.schedule)


def gradients_shared(layout: Layout) -> bool:
    """The same of gradients; a pipeline adds up its micro-batches' whole."""
    return layout.zero >= 2 and layout.pp == 1


def span(numbers: range) -> str:
    """0-5, 3 alone, or - for none."""
    return f"{numbers.start}-{numbers.stop - 1}" if len(numbers) > 1 else str(numbers.start) if numbers else "-"


def spans(many: Iterable[range]) -> list[str]:
    """Each as `span`; what follows without a gap is one."""
    joined: list[range] = []
    for numbers in many:
        if joined and joined[-1].stop == numbers.start:
            joined[-1] = range(joined[-1].start, numbers.stop)
        else:
            joined.append(numbers)
    return [span(numbers) for numbers in joined]


def format_count(number: float) -> str:
    """1.8T, 62.2M, 950."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:#.3g}".rstrip(".") + unit if number < 999.5 * size else f"{number / size:,.0f}{unit}"
    return f"{number:.0f}"


def plural(number: int, noun: str) -> str:
    """A number and its noun, in the plural unless the number is 1."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def format_stage(stage: StageView) -> str:
    """Layers of a stage, with embedding and head if it has them."""
    more = (" + embedding" if stage.embedding else "") + (" + head" if stage.head else "")
    return span(stage.layers) + more


def bubble_of(layout: Layout) -> float:
    """Share of the ranks' time in which they wait; stages alike, transfers free."""
    return bubble(layout.schedule, layout.pp, layout.virtual, layout.micro_batches) if layout.pp > 1 else 0.0


def degrees(view: LayoutView) -> str:
    """The whole layout in one line."""
    at = view.layout
    cp = f" ({at.context_kind})" if at.cp > 1 else ""
    experts = f", ep {at.ep}, expert tp {at.expert_tp}" if view.experts else ""
    virtual = f" of {at.virtual} stages a rank" if at.virtual > 1 else ""
    schedule = f"schedule {at.schedule}{virtual}, " if at.pp > 1 else "no pipeline, "
    bubble_part = f", bubble {bubble_of(at):.1%}" if at.pp > 1 else ""
    return (
        f"{plural(at.world, 'rank')} = pp {at.pp} x replicas {at.replicas} x shards {at.shards} x cp {at.cp}{cp} x tp {at.tp}"
        f"{experts}; ZeRO {at.zero}; {schedule}{at.micro_batches} micro-batch{'' if at.micro_batches == 1 else 'es'} of "
        f"{plural(at.micro_rows, 'row')}{bubble_part}"
    )


def notes(view: LayoutView) -> list[str]:
    """What holds of all ranks and no table shows."""
    at = view.layout
    lines = [f"{plural(view.node_ranks, 'GPU')} a node, assumed"]
    padding = at.data_ranks * at.micro_rows * at.micro_batches - len({row for rank in view.ranks for row in rank.rows})
    if padding:
        lines.append(
            f"{at.data_ranks} data ranks do not share the batch out evenly: the last have {plural(padding, 'row')} of padding, "
            "which costs time and changes nothing"
        )
    if at.tp > 1:
        lines.append(
            f"between blocks a rank holds 1/{at.tp} of its tokens: the sequence is cut in {at.tp} (sequence parallel), "
            "and gathered for attention and MLP"
        )
    if at.world > 1:
        lines.append(_kept_shares(view))
    if view.kv_sharers > 1:
        lines.append(f"there are fewer key/value heads than ranks to share them: each is read by {view.kv_sharers} ranks")
    if view.experts:
        lines.append(f"of each MoE layer's {view.experts} experts a rank holds {view.experts // at.ep}" + (
            f", and of each of these 1/{at.expert_tp}" if at.expert_tp > 1 else ""
        ))  # fmt: skip
    if at.pp > 1:
        lines.append("bubble and timeline take stages as alike, transfers as free, and a backward pass as two forward ones")
        shares = [sum(s.flops for s in view.stages if s.pp == pp) * at.pp for pp in range(at.pp)]
        if max(shares) > _UNEVEN:
            lines.append(
                f"pipeline rank {shares.index(max(shares))} has {max(shares):.2f} times an even share of the FLOPs: the others "
                "wait for it, beyond the bubble"
            )
    return lines


def _kept_shares(view: LayoutView) -> str:
    at = view.layout
    dense, expert = (at.tp, at.tp * at.state_grid[1]), (at.ep * at.expert_tp, at.ep * at.expert_tp * at.expert_grid[1])

    def shares(which: int) -> str:
        return _one_in(dense[which]) + (f" (experts {_one_in(expert[which])})" if view.experts else "")

    parameters, gradients = parameters_shared(at), gradients_shared(at)
    return (
        f"of a stage's state a rank keeps {shares(parameters)} of the parameters, {shares(gradients)} of the gradients, "
        f"{shares(1)} of the optimizer's"
    )


def _one_in(parts: int) -> str:
    return "all" if parts == 1 else f"1/{parts}"


def carried(view: LayoutView, stages: Sequence[int]) -> str:
    """Layers of several stages, with embedding and head."""
    return ", ".join(format_stage(view.stages[s]) for s in stages)


def format_kept(kept: KeptElements) -> str:
    """Elements of parameters, gradients and optimizer, shortened."""
    return f"{format_count(kept.parameters)} / {format_count(kept.gradients)} / {format_count(kept.optimizer)}"
