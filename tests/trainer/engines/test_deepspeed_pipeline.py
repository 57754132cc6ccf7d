"""DeepSpeed's pipeline computes what the native engine does: initial bits, losses, gradient norms, weights, checkpoints."""

import math

import pytest
import torch
import torch.distributed as dist

from engines import assert_as_near, engine_config, go_on, save_after, train
from mikoshi.trainer.engines.base import StepLimits
from runs import engine_and_rows, whole_state

pytest.importorskip("deepspeed")

_native = {}


def native(ranks, function, config):
    key = function.__name__, config.model_dump_json(exclude={"run": {"folder"}})
    if key not in _native:
        _native[key] = ranks.run(function, config, world=1, timeout=300)[0]
    return _native[key]


def assert_same_steps(found, reference):
    for (loss, norm, tokens, applied), (loss1, norm1, tokens1, applied1) in zip(found, reference, strict=True):
        assert (tokens, applied) == (tokens1, applied1)
        assert loss == pytest.approx(loss1, rel=1e-5)
        assert norm == pytest.approx(norm1, rel=1e-5)


def assert_same_run(ranks, dataset, folder, model, layout, world, engine=None, **sections):
    """The whole course of a run, on every rank. Compiled blocks are compared with compiled ones, which round otherwise."""
    alike = {"compile": (engine or {}).get("compile", "auto")}
    reference = native(ranks, train, engine_config(dataset, folder, model, engine=alike, **sections))
    mine = engine_config(dataset, folder, model, "deepspeed", layout, engine={"kind": "deepspeed"} | (engine or {}), **sections)
    assert max(norm for _, norm, _, _ in reference[1]) > mine.optim.clip > 0, "clipping was at work"
    for digests, steps, evaluation, _, state, differing in ranks.run(train, mine, world=world, timeout=300):
        assert digests == reference[0], "initial weights, to the bit"
        assert_same_steps(steps, reference[1])
        assert evaluation == pytest.approx(reference[2], rel=1e-5)
        assert state.keys() == reference[4].keys()
        for name, tensor in state.items():
            torch.testing.assert_close(
                tensor, reference[4][name], atol=2e-5, rtol=1e-4, msg=lambda message, n=name: f"{n}: {message}"
            )
        assert differing == []


FAST = [("llama", "pp=2 zero=0", 2)]
SLOW = [
    (model, f"pp={pp} zero={zero}", world)
    for model in ("llama", "gpt2") for zero in (0, 1) for pp, world in ((2, 2), (2, 4), (3, 3), (4, 4), (2, 8), (4, 8))
]  # fmt: skip
OTHERS = [(model, "pp=2 zero=1", 4) for model in ("mixtral", "mistral", "bloom", "palm", "gpt1")]


@pytest.mark.parametrize(("model", "layout", "world"), FAST)
def test_it_computes_the_native_run(ranks, dataset, tmp_path, model, layout, world):
    assert_same_run(ranks, dataset, tmp_path, model, layout, world)


def marked(case):
    model, _, world = case
    return pytest.param(*case, marks=pytest.mark.soak if world == 8 or (model == "llama" and world == 3) else pytest.mark.slow)


@pytest.mark.parametrize(("model", "layout", "world"), [marked(case) for case in SLOW + OTHERS if case not in FAST])
def test_it_computes_the_native_run_in_every_layout(ranks, dataset, tmp_path, model, layout, world):
    assert_same_run(ranks, dataset, tmp_path, model, layout, world)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 1])
def test_copies_of_a_tied_embedding_stay_alike_over_many_data_ranks(ranks, dataset, tmp_path, zero):
    """Over three and more ranks a sum depends on its order."""
    train = {"steps": 4, "global_batch": 12, "micro_batch": 1}
    assert_same_run(ranks, dataset, tmp_path, "gpt2", f"pp=2 zero={zero}", 6, train=train)


@pytest.mark.slow
def test_experts(ranks, dataset, tmp_path):
    assert_same_run(ranks, dataset, tmp_path, "mixtral", "pp=2 zero=1", 2, train={"steps": 4})


@pytest.mark.slow
def test_rows_that_do_not_come_out_even(ranks, dataset, tmp_path):
    train = {"steps": 4, "global_batch": 13, "micro_batch": 1}
    assert_same_run(ranks, dataset, tmp_path, "llama", "pp=2 zero=1", 4, train=train)


HOW = [
    ("gpt2", {"deepspeed": {"offload_optimizer": "cpu"}}),
    pytest.param("llama", {"recompute": "full"}, marks=pytest.mark.slow),
    pytest.param("llama", {"compile": "on"}, marks=pytest.mark.slow),
]
BF16 = {"kind": "deepspeed", "precision": "bf16"}


@pytest.mark.parametrize(("model", "engine"), HOW, ids=["offload", "recompute", "compile"])
def test_it_goes_with(ranks, dataset, tmp_path, model, engine):
    assert_same_run(ranks, dataset, tmp_path, model, "pp=2 zero=1", 2, engine, train={"steps": 4})


@pytest.mark.slow
@pytest.mark.parametrize("offload", ["none", "cpu"])
@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_in_bf16_it_is_as_near_as_without_a_pipeline(ranks, dataset, tmp_path, model, offload):
    precision = {**BF16, "deepspeed": {"offload_optimizer": offload}}
    exact = ranks.run(train, engine_config(dataset, tmp_path, model), world=1)[0]
    one = ranks.run(train, engine_config(dataset, tmp_path, model, "deepspeed", "zero=1", engine=precision), world=2)[0]
    mine = engine_config(dataset, tmp_path, model, "deepspeed", "pp=2 zero=1", engine=precision)
    for digests, steps, _, _, state, differing in ranks.run(train, mine, world=4):
        assert digests == one[0]
        assert_as_near(steps, one[1], exact[1])
        assert all(t.dtype == torch.float32 for t in state.values())
        assert differing == []


def odd_rows(config):
    """What passes between stages changes its shape: logits of one row, and a step after them."""
    engine, loader = engine_and_rows(config)
    results = []
    for ids in ([5, 6, 7], [1]):
        results.append(engine.next_logits(ids))
        results.append(torch.tensor(engine.step(loader.batch(len(results)), 1e-3).loss))
    return results


@pytest.mark.parametrize("layout", ["pp=2 zero=1", pytest.param("pp=3 zero=0", marks=pytest.mark.slow)])
def test_logits_of_a_next_token_between_steps(ranks, dataset, tmp_path, layout):
    reference = native(ranks, odd_rows, engine_config(dataset, tmp_path, "llama"))
    config = engine_config(dataset, tmp_path, "llama", "deepspeed", layout)
    for found in ranks.run(odd_rows, config, world=int(layout[3]) * 2):
        for one, other in zip(found, reference, strict=True):
            torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-5)


def refused_steps(config):
    """Figures of a step, of steps beyond their limits and whether each left all as it was, and of the step tried again."""
    engine, loader = engine_and_rows(config)
    first = engine.step(loader.batch(0), 1e-3)
    live, before, batch = [p.detach().clone() for p in engine.parameters], whole_state(engine.state()), loader.batch(1)
    norm_forward, results = engine.model.norm and engine.model.norm.forward, []

    def tried(limits):
        r = engine.step(batch, 1e-3, limits)
        state = whole_state(engine.state())
        same = all(torch.equal(p, old) for p, old in zip(engine.parameters, live, strict=True))
        results.append(
            (r.applied, r.loss, r.grad_norm, same and all(torch.equal(state[name], before[name]) for name in before))
        )

    for limits in (StepLimits(loss=first.loss / 2), StepLimits(norm=first.grad_norm / 100), StepLimits(loss=math.nan)):
        tried(limits)
    if norm_forward and engine.coordinates.data == 0:  # one rank of the last stage; the others learn of it
        engine.model.norm.forward = lambda x: norm_forward(x) * math.nan
    tried(StepLimits())
    if norm_forward:
        engine.model.norm.forward = norm_forward
    again = engine.step(batch, 1e-3)
    return results, (again.applied, again.loss, again.grad_norm), dist.get_rank()


@pytest.mark.parametrize(("zero", "model"), [(0, "gpt2"), (1, "llama")])
@pytest.mark.slow
def test_a_step_beyond_its_limits_changes_nothing_and_can_be_tried_again(ranks, dataset, tmp_path, zero, model):
    reference = native(ranks, train, engine_config(dataset, tmp_path, model))[1][1]
    config = engine_config(dataset, tmp_path, model, "deepspeed", f"pp=2 zero={zero}")
    for (*refused, nan), last, rank in ranks.run(refused_steps, config, world=4):
        for applied, loss, norm, same in refused:
            assert (applied, same) == (False, True), rank
            assert (loss, norm) == pytest.approx(reference[:2], rel=1e-5), "the figures are true ones"
        assert (nan[0], nan[3]) == (False, True), rank
        assert math.isnan(nan[1])
        assert not math.isfinite(nan[2])
        assert last[0]
        assert last[1:] == pytest.approx(reference[:2], rel=1e-5)


def corrupted(config):
    engine, loader = engine_and_rows(config)
    engine.step(loader.batch(0), 1e-3)
    before = engine.replica_differences()
    if dist.get_rank() == 3:
        engine.model.norm.weight.data[5] += 1e-4
    return before, engine.replica_differences()


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 1])
def test_a_replica_that_has_come_apart_is_seen(ranks, dataset, tmp_path, zero):
    for before, after in ranks.run(
        corrupted, engine_config(dataset, tmp_path, "gpt2", "deepspeed", f"pp=2 zero={zero}"), world=4
    ):
        assert before == []
        assert [(d.name, d.holders) for d in after] == [("model.norm.weight", (2, 3))]


CHAINS = [
    ("llama", "pp=2 zero=1", 2, "pp=2"), pytest.param("gpt2", "pp=2 zero=0", 4, "zero=3", marks=pytest.mark.slow),
]  # fmt: skip
LONG = [
    (model, f"pp={pp} zero={zero}", world, last)
    for model in ("llama", "gpt2") for zero in (0, 1) for pp, world in ((2, 2), (2, 4), (3, 3)) for last in ("", "tp=2")
]  # fmt: skip


@pytest.mark.parametrize(
    ("model", "layout", "world", "last"),
    [*CHAINS, *(pytest.param(*c, marks=pytest.mark.soak if c[0] == "llama" else pytest.mark.slow) for c in LONG)],
)
def test_native_to_deepspeeds_pipeline_to_native(ranks, dataset, tmp_path, model, layout, world, last):
    saved = engine_config(dataset, tmp_path, model)
    (state, after), *_ = ranks.run(save_after, saved, tmp_path / "saved", 3, world=1)
    mine = engine_config(dataset, tmp_path, model, "deepspeed", layout)
    back = engine_config(dataset, tmp_path, model, "native", last)
    for config, size in ((mine, world), (back, 2 if last else 1)):
        for found, then in ranks.run(go_on, config, tmp_path / "saved", world=size):
            assert found.keys() == state.keys()
            assert all(torch.equal(found[name], state[name]) for name in state), "the same state, to the bit"
            assert_same_steps(then, after)


def kept(config):
    engine, _ = engine_and_rows(config)
    return {name.removeprefix("model.") for name in engine.state() if name.startswith("model.")}


def test_a_rank_holds_and_saves_its_own_stage_alone(ranks, dataset, tmp_path):
    first, last = ranks.run(kept, engine_config(dataset, tmp_path, "gpt2", "deepspeed", "pp=2 zero=1"), world=2)
    assert first & last == {"embed.weight"}
    assert "position.weight" in first - last
    assert "norm.weight" in last - first
    assert {name.split(".")[1] for name in first | last if name.startswith("blocks.")} == {"0", "1", "2", "3"}
