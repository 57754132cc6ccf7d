"""Layouts: what cannot be is refused with what can; schedules and stages are what they must be."""

import itertools
import math
from dataclasses import replace
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mikoshi.parallel.errors import LayoutError
from mikoshi.parallel.layout import BatchShape, ModelFacts, RequestedLayout, resolve_layout
from mikoshi.parallel.pipeline import split_layers
from mikoshi.parallel.schedule import Schedule, bubble, forward_programs, programs, rank_of, virtual_stages

DENSE = ModelFacts(layers=8, heads=8, kv_heads=2, vocab=512, mlp=256)
MOE = replace(DENSE, experts=8, expert_mlp=64)
BATCH = BatchShape(rows=32, micro_batch=None, context=128)

REFUSED = [
    (RequestedLayout(tp=3), 6, DENSE, BATCH, "parallel.tp 3 does not divide model.heads 8"),
    (RequestedLayout(tp=2), 5, DENSE, BATCH, "5 ranks cannot be laid out: tp 2 x pp 1 x cp 1 = 2 does not divide them"),
    (RequestedLayout(tp=8), 8, replace(DENSE, kv_heads=3, heads=24), BATCH,
     "model.kv_heads 3 is neither a multiple nor a divisor"),
    (RequestedLayout(tp=2), 2, replace(DENSE, vocab=511), BATCH, "does not divide model.vocab 511: use model.vocab=512"),
    (RequestedLayout(tp=2), 2, replace(DENSE, mlp=255), BATCH, "parallel.tp 2 does not divide model.mlp_width 255"),
    (RequestedLayout(pp=16), 16, DENSE, BATCH, "pp 16 x 1 virtual stage(s) are more stages than model.layers 8"),
    (RequestedLayout(pp=8, schedule="zbv"), 8, DENSE, BATCH, "pp 8 x 2 virtual stage(s) are more stages than model.layers 8"),
    (RequestedLayout(pp=2, virtual_stages=3), 2, DENSE, BATCH, 'virtual_stages 3: schedule "1f1b" has 1 stage(s) a rank'),
    (RequestedLayout(pp=2, schedule="interleaved", virtual_stages=1), 2, DENSE, BATCH, "needs at least 2"),
    (RequestedLayout(ep=3), 6, MOE, BATCH, "parallel.ep 3 does not divide model.moe.experts 8"),
    (RequestedLayout(ep=2), 2, DENSE, BATCH, "parallel.ep 2: the model has no experts"),
    (RequestedLayout(ep=8), 4, MOE, BATCH, "parallel.ep 8 does not divide the 4 ranks of a stage"),
    (RequestedLayout(tp=4, expert_tp=2), 4, MOE, BATCH, "parallel.expert_tp 2 is neither 1 nor parallel.tp 4"),
    (RequestedLayout(tp=2, expert_tp=2), 2, replace(MOE, expert_mlp=63), BATCH, "does not divide the experts' width 63"),
    (RequestedLayout(cp=2), 2, DENSE, replace(BATCH, context=130), "train.context 130 is not divisible by 2 x cp x tp = 4"),
    (RequestedLayout(cp=8, tp=2, context_kind="ulysses"), 16, DENSE, BATCH,
     "does not divide the 4 heads of a tensor-parallel rank"),
    (RequestedLayout(cp=2, context_kind="ring"), 2, DENSE, BATCH,
     'context_kind "ring" (parallel.cp 2) does plain causal attention'),
    (RequestedLayout(tp=8), 8, DENSE, replace(BATCH, context=100), "train.context 100 is not divisible by parallel.tp 8"),
    (RequestedLayout(), 5, MOE, BATCH, "train.global_batch 32 cannot be shared evenly by 5 data ranks, and rows of padding"),
    (RequestedLayout(pp=4, schedule="dualpipev"), 4, replace(DENSE, layers=16), replace(BATCH, rows=4),
     "requires at least as many"),
    (RequestedLayout(replicas=3), 8, DENSE, BATCH, "parallel.replicas 3 does not divide the 8 data ranks"),
    (RequestedLayout(zero=0, replicas=2), 8, DENSE, BATCH, "zero 0 shares nothing out"),
]  # fmt: skip


@pytest.mark.parametrize(("asked", "world", "facts", "batch", "why"), REFUSED, ids=[r[-1][:40] for r in REFUSED])
def test_refused_with_the_reason_and_what_works(asked, world, facts, batch, why):
    with pytest.raises(LayoutError) as refused:
        resolve_layout(asked, world, facts, batch)
    reason, _, near = str(refused.value).partition("; nearest that work: ")
    assert why in reason
    assert "\n" not in reason
    for text in filter(None, near.split(" | ")):
        pairs = dict(p.removeprefix("parallel.").split("=") for p in text.partition("(")[0].split())
        changes = {k: int(v) if v.isdigit() else v for k, v in pairs.items()}
        dropped = {k: None for k in text.partition("(remove ")[2].rstrip(")").replace("parallel.", "").split(", ") if k}
        assert resolve_layout(replace(asked, **changes, **dropped), world, facts, batch).world == world


def test_a_dense_model_takes_any_number_of_data_ranks():
    layout = resolve_layout(RequestedLayout(), 5, DENSE, BATCH)
    assert (layout.data_ranks, layout.micro_rows * layout.micro_batches) == (5, 7)


def test_most_refusals_name_a_way_out():
    named = 0
    for asked, world, facts, batch, _ in REFUSED:
        try:
            resolve_layout(asked, world, facts, batch)
        except LayoutError as error:
            named += "nearest that work" in str(error)
    assert named >= len(REFUSED) - 4  # where no layout of that many ranks exists at all


@given(
    st.sampled_from([1, 2, 4, 6, 8, 16, 64]), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2]),
    st.sampled_from([1, 2, 4, 8]), st.sampled_from([0, 1, 2, 3]), st.sampled_from(get_args(Schedule)),
)  # fmt: skip
@settings(deadline=None, max_examples=150)
def test_what_is_accepted_uses_every_rank_once(world, tp, pp, cp, ep, zero, schedule):
    try:
        layout = resolve_layout(RequestedLayout(zero=zero, tp=tp, pp=pp, cp=cp, ep=ep, schedule=schedule), world, MOE, BATCH)
    except LayoutError:
        return
    assert layout.world == world == layout.replicas * layout.shards * layout.tp * layout.pp * layout.cp
    places = [layout.coordinates(rank) for rank in range(world)]
    assert len({(p.pp, p.replica, p.shard, p.cp, p.tp) for p in places}) == world
    assert {p.data for p in places} == set(range(layout.data_ranks))
    assert math.prod(layout.state_grid) * layout.tp == layout.stage_ranks
    assert math.prod(layout.expert_grid) * layout.ep * layout.expert_tp == layout.stage_ranks
    assert layout.micro_batches * layout.micro_rows * layout.data_ranks == BATCH.rows
    held = [s for pp_rank in range(layout.pp) for s in layout.stages_of(pp_rank)]
    assert sorted(held) == list(range(layout.stages))


@pytest.mark.parametrize("kind", get_args(Schedule))
@pytest.mark.parametrize(("pp", "micro"), [(2, 4), (4, 8), (3, 6)])
def test_programs_compute_everything_once_and_their_transfers_match(kind, pp, micro):
    virtual = virtual_stages(kind, None)
    for make in (programs, forward_programs):
        ranks = make(kind, pp, virtual, micro)
        everything = [a for rank in ranks for a in rank]
        assert len(everything) == len(set(everything))
        stages = pp * virtual
        forward = {(a.stage, a.micro) for a in everything if a.kind == "forward"}
        assert forward == set(itertools.product(range(stages), range(micro)))
        if make is programs:
            whole = {(a.stage, a.micro) for a in everything if a.kind == "backward"}
            halves = [{(a.stage, a.micro) for a in everything if a.kind == f"backward-{h}"} for h in ("input", "weight")]
            assert halves[0] == halves[1]
            assert whole | halves[0] == forward
            assert not whole & halves[0]
        for a, b in itertools.permutations(range(pp), 2):
            sent = [("forward", x.stage + 1, x.micro) if x.kind == "send-forward" else ("backward", x.stage - 1, x.micro)
                    for x in ranks[a] if x.kind.startswith("send")
                    and rank_of(x.stage + (1 if x.kind == "send-forward" else -1), pp, kind) == b]  # fmt: skip
            received = [(x.kind.removeprefix("receive-"), x.stage, x.micro) for x in ranks[b] if x.kind.startswith("receive")
                        and rank_of(x.stage - (1 if x.kind == "receive-forward" else -1), pp, kind) == a]  # fmt: skip
            assert sent == received, "in the same order on both sides"


def test_bubbles_are_the_papers():
    for pp, m in [(2, 4), (4, 8), (8, 32)]:
        assert bubble("gpipe", pp, 1, m) == pytest.approx((pp - 1) / (m + pp - 1))
        assert bubble("1f1b", pp, 1, m) == pytest.approx((pp - 1) / (m + pp - 1))
        assert bubble("interleaved", pp, 2, m) == pytest.approx((pp - 1) / (2 * m + pp - 1))
        assert bubble("zbv", pp, 2, m) < bubble("interleaved", pp, 2, m) < bubble("1f1b", pp, 1, m)


@given(st.lists(st.integers(1, 9), min_size=2, max_size=8), st.integers(0, 9), st.integers(0, 20), st.data())
@settings(deadline=None)
def test_stages_are_cut_as_well_as_can_be(costs, before, after, data):
    stages = data.draw(st.integers(1, len(costs)))
    found = split_layers(costs, before, after, stages)
    assert [layer for part in found for layer in part] == list(range(len(costs)))
    assert all(len(part) for part in found)

    def worst(parts):
        sums = [sum(costs[i] for i in part) for part in parts]
        sums[0] += before
        sums[-1] += after
        return max(sums)

    cuts = itertools.combinations(range(1, len(costs)), stages - 1)
    best = min(worst([range(a, b) for a, b in itertools.pairwise((0, *cut, len(costs)))]) for cut in cuts)
    assert worst(found) == best
