"""A dry run tells what the real ranks then use: memory within 2%, the same collectives, the FLOPs of the formula.

Not covered: micro-batches so small that the state leads the peak. There gloo ranks under ZeRO 2 hold the buffers of a
reduce-scatter into the next micro-batch, and the dry run, whose ranks answer at once, tells up to a fifth less.
"""

import pytest

from mikoshi.parallel.errors import LayoutError
from mikoshi.trainer.estimate.dryrun import axis_names, dry_run, kinds_of
from mikoshi.trainer.estimate.ledger import Ledger
from mikoshi.trainer.record.metrics import flops_per_token
from runs import engine_and_rows, run_config

BASE = {"vocab": 1024, "context": 64, "layers": 4, "width": 64, "heads": 4, "kv_heads": 2}
MOE = {"moe": {"experts": 4, "top_k": 4, "width": 64, "aux_loss": 0.01}}  # every expert for every token: no luck of routing
LAYOUTS = [
    (1, {}, {}), (2, {}, {"zero": 0}), (2, {}, {"zero": 2}), (4, {}, {"zero": 3}), (2, {"tied": True}, {"tp": 2}),
    (4, {}, {"tp": 2, "zero": 1}), (2, {}, {"pp": 2}), (4, {"tied": True}, {"pp": 2, "schedule": "zbv"}),
    (2, {}, {"pp": 2, "schedule": "gpipe"}), (2, {}, {"cp": 2}), (2, MOE, {"ep": 2}), (4, MOE, {"tp": 2, "ep": 2}),
    (4, {}, {"tp": 2, "pp": 2}),
]  # fmt: skip
FAST = [(1, {}, {}), (2, {}, {"zero": 2}), (2, MOE, {"ep": 2}), (4, {}, {"tp": 2, "pp": 2})]


def measured(config):
    """The second step of every rank, counted on real tensors."""
    engine, loader = engine_and_rows(config)
    engine.step(loader.batch(0), 1e-4)
    with Ledger(kinds_of(engine)) as ledger:
        engine.step(loader.batch(1), 1e-4)
    axes = axis_names(engine)
    traffic = {(axes.get(g, g), name): (t.calls, t.bytes) for (g, name), t in ledger.traffic.items()}
    return ledger.peak, ledger.by_kind(), ledger.flops, traffic


@pytest.mark.parametrize(
    ("world", "model", "layout"),
    [pytest.param(*case, id=str(case), marks=[] if case in FAST else [pytest.mark.slow]) for case in LAYOUTS],
)
def test_it_tells_what_real_ranks_use(ranks, dataset, tmp_path, world, model, layout):
    config = run_config(
        dataset, tmp_path, model=BASE | model, parallel=layout, train={"global_batch": 16, "micro_batch": 4},
        data={"document_mask": False}, engine={"device": "cpu"},
    )  # fmt: skip
    found = ranks.run(measured, config, world=world)
    for rank in {0, world - 1}:
        peak, kinds, flops, traffic = found[rank]
        dry = dry_run(config, world, rank)
        assert dry.peak == pytest.approx(peak, rel=0.02)
        for kind in ("parameters", "optimizer"):
            assert dry.memory[kind] == pytest.approx(kinds[kind], rel=0.02)
        assert sum(dry.memory.values()) == dry.peak
        assert dry.flops == pytest.approx(flops, rel=1e-3)
        assert {(c.axis, c.name): (c.calls, c.bytes) for c in dry.collectives} == traffic


@pytest.mark.parametrize(("model", "layout"), [({}, {"tp": 2}), (MOE, {"tp": 2, "ep": 2})], ids=["dense", "experts"])
def test_muon_keeps_one_moment_of_what_it_moves(dataset, tmp_path, model, layout):
    def optimizer(kind):
        config = run_config(dataset, tmp_path, model=BASE | model, parallel=layout, optim={"kind": kind})
        return dry_run(config, 4, 0).memory["optimizer"]

    assert optimizer("muon") < 0.9 * optimizer("adamw")


def test_flops_are_the_formulas(dataset, tmp_path):
    config = run_config(dataset, tmp_path, model=BASE)
    tokens = config.train.global_batch * config.train.context
    # The formula counts whole squares of attention as it is usual; so does the ledger.
    assert dry_run(config, 1, 0).flops == pytest.approx(flops_per_token(config.model, 64) * tokens, rel=0.05)


def test_it_refuses_what_cannot_be(dataset, tmp_path):
    with pytest.raises(LayoutError, match=r"parallel\.tp 3 does not divide model\.heads 4"):
        dry_run(run_config(dataset, tmp_path, model=BASE, parallel={"tp": 3}), 3, 0)
