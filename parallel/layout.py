"""A layout: how many ranks each dimension of parallelism gets, validated against the model before any rank starts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from mikoshi.parallel.errors import LayoutError
from mikoshi.parallel.schedule import Schedule, orders, rank_of, virtual_stages

ZeroStage = Literal[0, 1, 2, 3]
ContextKind = Literal["all-gather", "ring", "ulysses"]


@dataclass(frozen=True)
class ModelFacts:
    """The numbers of a model that a layout must divide. `experts` is 0 for a dense model."""

    layers: int
    heads: int
    kv_heads: int
    vocab: int
    mlp: int
    experts: int = 0
    expert_mlp: int = 0
    shared_mlp: int = 0


@dataclass(frozen=True)
class BatchShape:
    """The numbers of a step that a layout must know.

    rows: of a global batch.
    micro_batch: the most rows at once; None: the layout may choose.
    context: tokens of a row.
    plain: a row is one document, and attention has no window and no bias.
    """

    rows: int
    micro_batch: int | None
    context: int
    plain: bool = False


@dataclass(frozen=True)
class RequestedLayout:
    """The degrees of parallelism as a user gives them; None: the default."""

    zero: ZeroStage = 2
    replicas: int | None = None
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    expert_tp: int | None = None
    virtual_stages: int | None = None
    schedule: Schedule = "1f1b"
    context_kind: ContextKind = "all-gather"


@dataclass(frozen=True)
class Coordinates:
    """Where a rank stands in the layout, one number an axis. `data` counts the ranks that read different rows."""

    pp: int
    replica: int
    shard: int
    cp: int
    tp: int
    data: int


@dataclass(frozen=True)
class Layout:
    """Degrees of parallelism; their product is the world size. Make one with `resolve_layout`, which validates it.

    replicas x shards: the ranks that read different rows; the state is cut over `shards` (times cp) as `zero` says
    (Rajbhandari et al. 2020, arXiv:1910.02054): 0 nothing; 1 the optimizer's state; 2 gradients too; 3 parameters too.
    tp: tensor and sequence parallel. cp: context parallel. pp: pipeline, `virtual` stages a rank. ep: expert parallel,
    over ranks that the other axes use for data; expert_tp: tensor parallel inside an expert, 1 or tp.
    micro_batches of micro_rows rows go through a data rank in a step.
    """

    replicas: int = 1
    shards: int = 1
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    expert_tp: int = 1
    virtual: int = 1
    schedule: Schedule = "1f1b"
    zero: ZeroStage = 2
    context_kind: ContextKind = "all-gather"
    micro_batches: int = 1
    micro_rows: int = 1

    @property
    def world(self) -> int:
        """The number of ranks."""
        return self.pp * self.stage_ranks

    @property
    def stage_ranks(self) -> int:
        """Ranks that carry the same layers."""
        return self.data_ranks * self.cp * self.tp

    @property
    def data_ranks(self) -> int:
        """Parts that the rows of a step are shared out in."""
        return self.replicas * self.shards

    @property
    def stages(self) -> int:
        """The number of pipeline stages."""
        return self.pp * self.virtual

    @property
    def state_grid(self) -> tuple[int, int]:
        """Replicas and shards of the state of all parameters but experts. Context-parallel ranks, which read different
        tokens, share it too."""
        return (self.replicas * self.cp, 1) if self.zero == 0 else (self.replicas, self.shards * self.cp)

    @property
    def expert_grid(self) -> tuple[int, int]:
        """The same of an expert's state, over the ranks of a stage that ep and expert_tp leave over."""
        over = self.stage_ranks // (self.ep * self.expert_tp)
        shards = max(1, self.state_grid[1] * self.tp // (self.ep * self.expert_tp)) if self.zero else 1
        return over // shards, shards

    def coordinates(self, rank: int) -> Coordinates:
        """Tensor parallelism is innermost, inside the node; then context, shard, replica, and pipeline outermost."""
        rest, tp = divmod(rank, self.tp)
        rest, cp = divmod(rest, self.cp)
        rest, shard = divmod(rest, self.shards)
        pp, replica = divmod(rest, self.replicas)
        return Coordinates(pp, replica, shard, cp, tp, replica * self.shards + shard)

    def stages_of(self, pp_rank: int) -> list[int]:
        """The stages of a pipeline rank, first to last."""
        return [s for s in range(self.stages) if rank_of(s, self.pp, self.schedule) == pp_rank]


def resolve_layout(
    requested: RequestedLayout,
    world: int,
    facts: ModelFacts,
    batch: BatchShape,
    supported: Callable[[Layout], bool] = lambda _: True,
) -> Layout:
    """The layout of `world` ranks for the requested degrees.

    supported: whether the engine supports a layout; only such layouts are suggested.

    Raises LayoutError with the reason and the nearest layouts that work.
    """
    try:
        return _plan(requested, world, facts, batch)
    except LayoutError as error:
        alternatives = nearest_layouts(requested, world, facts, batch, supported)
        hint = f"; nearest that work: {' | '.join(alternatives)}" if alternatives else ""
        raise LayoutError(f"{error}{hint}") from None


def _plan(requested: RequestedLayout, world: int, facts: ModelFacts, batch: BatchShape) -> Layout:
    inner = requested.tp * requested.pp * requested.cp
    if world % inner:
        degrees = f"tp {requested.tp} x pp {requested.pp} x cp {requested.cp} = {inner}"
        raise LayoutError(f"{world} ranks cannot be laid out: {degrees} does not divide them")
    data = world // inner
    replicas = (data if requested.zero == 0 else 1) if requested.replicas is None else requested.replicas
    if data % replicas:
        raise LayoutError(f"parallel.replicas {replicas} does not divide the {data} data ranks of {world} ranks / {inner}")
    if requested.zero == 0 and replicas != data:
        raise LayoutError(f"parallel.replicas {replicas}: zero 0 shares nothing out, so all {data} data ranks are replicas")
    layout = Layout(
        replicas=replicas,
        shards=data // replicas,
        tp=requested.tp,
        pp=requested.pp,
        cp=requested.cp,
        ep=requested.ep,
        expert_tp=_expert_tp(requested, facts),
        virtual=virtual_stages(requested.schedule, requested.virtual_stages) if requested.pp > 1 else 1,
        schedule=requested.schedule if requested.pp > 1 else "1f1b",
        zero=requested.zero,
        context_kind=requested.context_kind,
    )
    for problem in _problems(layout, facts, batch):
        raise LayoutError(problem)
    return _with_micro_batches(layout, batch)


def _expert_tp(requested: RequestedLayout, facts: ModelFacts) -> int:
    if requested.expert_tp is not None:
        return requested.expert_tp
    return requested.tp if facts.experts and facts.expert_mlp % requested.tp == 0 else 1


def _problems(layout: Layout, facts: ModelFacts, batch: BatchShape) -> Iterator[str]:
    """Why a layout cannot carry a model, one reason at a time."""
    tp, cp = layout.tp, layout.cp
    for what, size in (("heads", facts.heads), ("mlp_width", facts.mlp), ("moe.shared x width", facts.shared_mlp)):
        if size % tp:
            yield f"parallel.tp {tp} does not divide model.{what} {size}"
    if facts.kv_heads % tp and tp % facts.kv_heads:
        yield f"parallel.tp {tp}: model.kv_heads {facts.kv_heads} is neither a multiple nor a divisor of it"
    if facts.vocab % tp:
        up = math.ceil(facts.vocab / tp) * tp
        yield f"parallel.tp {tp} does not divide model.vocab {facts.vocab}: use model.vocab={up} (the extra rows stay unused)"
    if layout.stages > facts.layers:
        yield f"pp {layout.pp} x {layout.virtual} virtual stage(s) are more stages than model.layers {facts.layers}"
    if cp > 1:
        balanced = layout.context_kind != "ulysses"
        parts = cp * (2 if balanced else 1) * tp
        rule = "2 x cp x tp" if balanced else "cp x tp"
        if layout.context_kind == "ring" and not batch.plain:
            yield (
                f'parallel.context_kind "ring" (parallel.cp {cp}) does plain causal attention only: set '
                'data.document_mask=false and use no windows or ALiBi, or context_kind "all-gather" or "ulysses"'
            )
        if batch.context % parts:
            yield f"train.context {batch.context} is not divisible by {rule} = {parts} (parallel.cp {cp}, parallel.tp {tp})"
        if not balanced and facts.heads // tp % cp:
            yield f"parallel.cp {cp} does not divide the {facts.heads // tp} heads of a tensor-parallel rank (ulysses)"
    if batch.context % tp:
        yield f"train.context {batch.context} is not divisible by parallel.tp {tp} (sequence parallel)"
    if not facts.experts:
        if layout.ep > 1:
            yield f"parallel.ep {layout.ep}: the model has no experts (model.moe)"
        if layout.expert_tp > 1:
            yield f"parallel.expert_tp {layout.expert_tp}: the model has no experts (model.moe)"
    else:
        if facts.experts % layout.ep:
            yield f"parallel.ep {layout.ep} does not divide model.moe.experts {facts.experts}"
        if layout.expert_tp not in (1, tp):
            yield f"parallel.expert_tp {layout.expert_tp} is neither 1 nor parallel.tp {tp}"
        elif facts.expert_mlp % layout.expert_tp:
            yield f"parallel.expert_tp {layout.expert_tp} does not divide the experts' width {facts.expert_mlp}"
        over, used = layout.stage_ranks // layout.expert_tp, "" if layout.expert_tp == 1 else " / expert_tp"
        if over % layout.ep:
            yield f"parallel.ep {layout.ep} does not divide the {over} ranks of a stage (data x cp x tp{used})"
        elif math.prod(layout.expert_grid) * layout.ep != over:
            yield f"parallel.ep {layout.ep} does not come out even with {layout.replicas} replicas of {layout.shards} shards"
    if batch.rows % layout.data_ranks and facts.experts:
        yield from _uneven_rows(layout, batch)


def _uneven_rows(layout: Layout, batch: BatchShape) -> Iterator[str]:
    inner = layout.world // layout.data_ranks
    fit = sorted((n for n in range(1, batch.rows + 1) if batch.rows % n == 0), key=lambda n: abs(n - layout.data_ranks))[:3]
    up = -(-batch.rows // layout.data_ranks) * layout.data_ranks
    *most, last = (str(n * inner) for n in sorted(fit))
    start = f"{', '.join(most)} or {last}" if most else last
    yield (
        f"train.global_batch {batch.rows} cannot be shared evenly by {layout.data_ranks} data ranks, and rows of padding "
        f"would be computed by the experts in vain: start {start} ranks, or use train.global_batch={up}"
    )


def _with_micro_batches(layout: Layout, batch: BatchShape) -> Layout:
    """The micro-batches of a step: as large as allowed, and as many as the schedule needs. Raises LayoutError."""
    rows = -(-batch.rows // layout.data_ranks)  # where it does not come out even, the last ranks have rows of padding
    sizes = [n for n in range(min(rows, batch.micro_batch or rows), 0, -1) if rows % n == 0]
    if layout.pp > 1 and batch.micro_batch is None:
        # Twice the stages of a rank's pipeline keep the bubble small; fewer only where there are no more rows.
        sizes = [n for n in sizes if rows // n >= 2 * layout.pp] or sizes[-1:]
    refused: LayoutError | None = None
    for size in sizes:
        try:
            orders(layout.schedule, layout.pp, layout.virtual, rows // size)
        except LayoutError as error:
            refused = refused or error
            continue
        return replace(layout, micro_batches=rows // size, micro_rows=size)
    raise LayoutError(f"{refused} (train.global_batch {batch.rows}: {rows} row(s) on each of {layout.data_ranks} data ranks)")


def nearest_layouts(
    requested: RequestedLayout,
    world: int,
    facts: ModelFacts,
    batch: BatchShape,
    supported: Callable[[Layout], bool],
    count: int = 3,
) -> list[str]:
    """The nearest layouts of the same world size that work and are `supported`, as overrides of the config, closest first."""
    divisors = [n for n in range(1, min(world, 4096) + 1) if world % n == 0]
    schedules = dict.fromkeys((requested.schedule, "1f1b" if requested.virtual_stages in (None, 1) else "interleaved"))
    replicas = requested.replicas
    found: list[tuple[float, str]] = []
    for tp, pp, cp in itertools.product(divisors, repeat=3):
        if world % (tp * pp * cp) or tp > facts.heads or pp > facts.layers:
            continue
        for ep in [n for n in divisors if facts.experts and facts.experts % n == 0] or [1]:
            for schedule, virtual in itertools.product(schedules, dict.fromkeys((requested.virtual_stages, None))):
                candidate = replace(
                    requested, tp=tp, pp=pp, cp=cp, ep=ep, schedule=schedule, virtual_stages=virtual,
                    replicas=replicas if replicas and world // (tp * pp * cp) % replicas == 0 else None,
                    expert_tp=None if requested.expert_tp != 1 else 1,
                )  # fmt: skip
                distance = _distance(requested, candidate)
                if len(found) >= count and distance >= found[-1][0]:
                    continue
                try:
                    layout = _plan(candidate, world, facts, batch)
                except LayoutError:
                    continue
                if not supported(layout):
                    continue
                found = sorted({*found, (distance, _difference(requested, candidate))})[:count]
    return [text for _, text in found]


def _distance(requested: RequestedLayout, other: RequestedLayout) -> float:
    degrees = sum(abs(math.log2(getattr(requested, a)) - math.log2(getattr(other, a))) for a in ("tp", "pp", "cp", "ep"))
    return degrees + 0.5 * (requested.schedule != other.schedule) + 0.25 * (requested.virtual_stages != other.virtual_stages)


def _difference(requested: RequestedLayout, other: RequestedLayout) -> str:
    keys = ("tp", "pp", "cp", "ep", "schedule", "replicas", "expert_tp", "virtual_stages")
    changed = {key: getattr(other, key) for key in keys if getattr(requested, key) != getattr(other, key)}
    text = [f"parallel.{key}={value}" for key, value in changed.items() if value is not None]
    gone = [f"parallel.{key}" for key, value in changed.items() if value is None]
    return " ".join([*text, *([f"(remove {', '.join(gone)})"] if gone else [])])
