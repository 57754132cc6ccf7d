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
    """What a layout must know of a model: the numbers that an axis has to divide. `experts` is 0 for a dense one."""

    layers: int
    heads: int
    kv_heads: int
    vocab: int
    mlp: int
    experts: int = 0
    expert_mlp: int = 0
    shared_mlp: int = 0


@dataclass(frozen=True)
class Batch:
    """What a layout must know of a step. `micro_batch`: rows at once, at most; None: the layout may choose. `plain`: a row
    is one document, and attention has no window and no bias."""

    rows: int
    micro_batch: int | None
    context: int
    plain: bool = False


@dataclass(frozen=True)
class Asked:
    """The degrees as a user gives them; None: the usual value."""

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
    """Degrees of parallelism; their product is the world size. Make one with `plan`, which validates it.

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


def plan(
    asked: Asked, world: int, facts: ModelFacts, batch: Batch, served: Callable[[Layout], bool] = lambda _: True
) -> Layout:
    """The layout of `world` ranks that was asked for. Raises LayoutError with the reason and the nearest ones that can be,
    of those that are `served` by what is to carry them."""
    try:
        return _plan(asked, world, facts, batch)
    except LayoutError as error:
        near = nearest(asked, world, facts, batch, served)
        hint = f"; nearest that work: {' | '.join(near)}" if near else ""
        raise LayoutError(f"{error}{hint}") from None


def _plan(asked: Asked, world: int, facts: ModelFacts, batch: Batch) -> Layout:
    inner = asked.tp * asked.pp * asked.cp
    if world % inner:
        degrees = f"tp {asked.tp} x pp {asked.pp} x cp {asked.cp} = {inner}"
        raise LayoutError(f"{world} ranks cannot be laid out: {degrees} does not divide them")
    data = world // inner
    replicas = (data if asked.zero == 0 else 1) if asked.replicas is None else asked.replicas
    if data % replicas:
        raise LayoutError(f"parallel.replicas {replicas} does not divide the {data} data ranks of {world} ranks / {inner}")
    if asked.zero == 0 and replicas != data:
        raise LayoutError(f"parallel.replicas {replicas}: zero 0 shares nothing out, so all {data} data ranks are replicas")
    layout = Layout(
        replicas=replicas,
        shards=data // replicas,
        tp=asked.tp,
        pp=asked.pp,
        cp=asked.cp,
        ep=asked.ep,
        expert_tp=_expert_tp(asked, facts),
        virtual=virtual_stages(asked.schedule, asked.virtual_stages) if asked.pp > 1 else 1,
        schedule=asked.schedule if asked.pp > 1 else "1f1b",
        zero=asked.zero,
        context_kind=asked.context_kind,
    )
    for problem in _problems(layout, facts, batch):
        raise LayoutError(problem)
    return _with_micro_batches(layout, batch)


def _expert_tp(asked: Asked, facts: ModelFacts) -> int:
    if asked.expert_tp is not None:
        return asked.expert_tp
    return asked.tp if facts.experts and facts.expert_mlp % asked.tp == 0 else 1


def _problems(layout: Layout, facts: ModelFacts, batch: Batch) -> Iterator[str]:
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


def _uneven_rows(layout: Layout, batch: Batch) -> Iterator[str]:
    inner = layout.world // layout.data_ranks
    fit = sorted((n for n in range(1, batch.rows + 1) if batch.rows % n == 0), key=lambda n: abs(n - layout.data_ranks))[:3]
    up = -(-batch.rows // layout.data_ranks) * layout.data_ranks
    *most, last = (str(n * inner) for n in sorted(fit))
    start = f"{', '.join(most)} or {last}" if most else last
    yield (
        f"train.global_batch {batch.rows} cannot be shared evenly by {layout.data_ranks} data ranks, and rows of padding "
        f"would be computed by the experts in vain: start {start} ranks, or use train.global_batch={up}"
    )


def _with_micro_batches(layout: Layout, batch: Batch) -> Layout:
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


def nearest(
    asked: Asked, world: int, facts: ModelFacts, batch: Batch, served: Callable[[Layout], bool], count: int = 3
) -> list[str]:
    """The nearest layouts of the same world size that work and are `served`, as overrides of the config, closest first."""
    divisors = [n for n in range(1, min(world, 4096) + 1) if world % n == 0]
    schedules = dict.fromkeys((asked.schedule, "1f1b" if asked.virtual_stages in (None, 1) else "interleaved"))
    found: list[tuple[float, str]] = []
    for tp, pp, cp in itertools.product(divisors, repeat=3):
        if world % (tp * pp * cp) or tp > facts.heads or pp > facts.layers:
            continue
        for ep in [n for n in divisors if facts.experts and facts.experts % n == 0] or [1]:
            for schedule, virtual in itertools.product(schedules, dict.fromkeys((asked.virtual_stages, None))):
                candidate = replace(
                    asked, tp=tp, pp=pp, cp=cp, ep=ep, schedule=schedule, virtual_stages=virtual,
                    replicas=asked.replicas if asked.replicas and world // (tp * pp * cp) % asked.replicas == 0 else None,
                    expert_tp=None if asked.expert_tp != 1 else 1,
                )  # fmt: skip
                distance = _distance(asked, candidate)
                if len(found) >= count and distance >= found[-1][0]:
                    continue
                try:
                    layout = _plan(candidate, world, facts, batch)
                except LayoutError:
                    continue
                if not served(layout):
                    continue
                found = sorted({*found, (distance, _difference(asked, candidate))})[:count]
    return [text for _, text in found]


def _distance(asked: Asked, other: Asked) -> float:
    degrees = sum(abs(math.log2(getattr(asked, a)) - math.log2(getattr(other, a))) for a in ("tp", "pp", "cp", "ep"))
    return degrees + 0.5 * (asked.schedule != other.schedule) + 0.25 * (asked.virtual_stages != other.virtual_stages)


def _difference(asked: Asked, other: Asked) -> str:
    keys = ("tp", "pp", "cp", "ep", "schedule", "replicas", "expert_tp", "virtual_stages")
    changed = {key: getattr(other, key) for key in keys if getattr(asked, key) != getattr(other, key)}
    text = [f"parallel.{key}={value}" for key, value in changed.items() if value is not None]
    gone = [f"parallel.{key}" for key, value in changed.items() if value is None]
    return " ".join([*text, *([f"(remove {', '.join(gone)})"] if gone else [])])
