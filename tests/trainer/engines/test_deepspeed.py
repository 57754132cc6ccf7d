"""The DeepSpeed engine computes what the native engine does: initial bits, losses, gradient norms, weights."""

import hashlib
import math
from unittest import mock

import pytest
import torch

from engines import released
from layouts import BASE, MODELS
from mikoshi.parallel.sharding import local
from mikoshi.trainer.engines.base import StepLimits
from runs import engine_and_rows, held_out_of, run_config, whole_state

pytest.importorskip("deepspeed")

CPU = torch.device("cpu")
DEEPSPEED = {"kind": "deepspeed"}
SMALL = {"layers": 2, "width": 32, "mlp_width": 48}


def digests(state):
    return {name: hashlib.sha256(t.contiguous().numpy().tobytes()).hexdigest() for name, t in state.items()}


def course(config, steps):
    """Initial bits, figures of the steps, state after them, an evaluation, logits, and what differs between ranks."""
    import torch.distributed as dist

    engine, loader = engine_and_rows(config)
    before = digests(whole_state(engine.state()))
    results = [engine.step(loader.batch(step), 1e-3) for step in range(steps)]
    assert all(r.applied for r in results)
    held_out = held_out_of(config, engine.layout, dist.get_rank())
    evaluation = engine.evaluate(held_out)
    again = engine.step(loader.batch(steps), 1e-3)
    figures = [(r.loss, r.grad_norm, r.tokens) for r in [*results, again]]
    assert all(r.more.keys() == again.more.keys() for r in results)
    return before, figures, whole_state(engine.state()), evaluation, engine.next_logits([1, 2, 3]), engine.replica_differences()


def config_of(dataset, folder, model, small=True, **sections):
    shape = BASE | (SMALL if small else {}) | MODELS[model]
    plain = {"model": shape, "train": {"micro_batch": 1}, "optim": {"clip": 0.2}}
    plain["model"] = {"kv_heads": None} | shape
    for name, values in sections.items():
        plain[name] = {**plain.get(name, {}), **values}
    return run_config(dataset, folder, **released(plain))


_native = {}


def native(ranks, config, steps, world=1):
    key = config.model_dump_json(exclude={"run": {"folder"}}), steps, world
    if key not in _native:
        _native[key] = ranks.run(course, config, steps, world=world)[0]
    return _native[key]


def assert_same_course(found, reference, rel=1e-5, atol=2e-5):
    assert found[0] == reference[0], "initial state, to the bit"
    for (loss, norm, tokens), (loss1, norm1, tokens1) in zip(found[1], reference[1], strict=True):
        assert tokens == tokens1
        assert loss == pytest.approx(loss1, rel=rel)
        assert norm == pytest.approx(norm1, rel=rel)
    assert max(norm for _, norm, _ in reference[1]) > 0.2, "clipping was at work"
    assert found[2].keys() == reference[2].keys()
    for name, tensor in found[2].items():
        torch.testing.assert_close(
            tensor, reference[2][name], atol=atol, rtol=1e-4, msg=lambda message, n=name: f"{n}: {message}"
        )
    assert found[3] == pytest.approx(reference[3], rel=rel)
    torch.testing.assert_close(found[4], reference[4], atol=2e-4, rtol=1e-4)
    assert found[5] == []


FAST = [("gpt2", 0, 2), ("llama", 1, 2), ("gpt2", 2, 2), ("llama", 3, 2)]
ALL = [(model, zero, world) for model in ("gpt2", "llama") for zero in range(4) for world in (1, 2, 4)]


@pytest.mark.parametrize(("model", "zero", "world"), FAST)
def test_it_computes_the_native_run(ranks, dataset, tmp_path, model, zero, world):
    config = config_of(dataset, tmp_path, model)
    reference = native(ranks, config, 4)
    mine = config_of(dataset, tmp_path, model, engine=DEEPSPEED, parallel={"zero": zero})
    for found in ranks.run(course, mine, 4, world=world):
        assert_same_course(found, reference)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "zero", "world"), ALL)
def test_it_computes_the_native_run_at_every_stage_and_world_size(ranks, dataset, tmp_path, model, zero, world):
    train = {"micro_batch": 1, "steps": 12}
    reference = native(ranks, config_of(dataset, tmp_path, model, small=False, train=train), 9)
    mine = config_of(dataset, tmp_path, model, small=False, train=train, engine=DEEPSPEED, parallel={"zero": zero})
    for found in ranks.run(course, mine, 9, world=world):
        assert_same_course(found, reference)


MIXTURES = [
    (2, 2, ""),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in [(3, 2, ""), (0, 2, "ulysses"), (1, 4, "ulysses")]),
]


@pytest.mark.parametrize(("zero", "world", "kind"), MIXTURES)
def test_a_mixture_of_experts(ranks, dataset, tmp_path, zero, world, kind):
    reference = native(ranks, config_of(dataset, tmp_path, "mixtral"), 3)
    parallel = {"zero": zero} | ({"cp": 2, "context_kind": kind} if kind else {})
    mine = config_of(dataset, tmp_path, "mixtral", engine=DEEPSPEED, parallel=parallel)
    for found in ranks.run(course, mine, 3, world=world):
        assert_same_course(found, reference)


def test_rows_that_do_not_come_out_even(ranks, dataset, tmp_path):
    train = {"global_batch": 5, "micro_batch": None}
    reference = native(ranks, config_of(dataset, tmp_path, "llama", train=train), 3)
    mine = config_of(dataset, tmp_path, "llama", train=train, engine=DEEPSPEED, parallel={"zero": 2})
    for found in ranks.run(course, mine, 3, world=2):
        assert_same_course(found, reference)


@pytest.mark.parametrize("model", ["llama", pytest.param("bloom", marks=pytest.mark.slow)])
def test_ulysses_sees_whole_rows(ranks, dataset, tmp_path, model):
    reference = native(ranks, config_of(dataset, tmp_path, model), 3)
    parallel = {"zero": 2, "cp": 2, "context_kind": "ulysses"}
    mine = config_of(dataset, tmp_path, model, engine=DEEPSPEED, parallel=parallel)
    for found in ranks.run(course, mine, 3, world=2):
        assert_same_course(found, reference)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 1, 3])
@pytest.mark.parametrize("model", ["gpt2", "palm"])
def test_ulysses_goes_with_data_ranks(ranks, dataset, tmp_path, model, zero):
    reference = native(ranks, config_of(dataset, tmp_path, model), 3)
    parallel = {"zero": zero, "cp": 2, "context_kind": "ulysses"}
    mine = config_of(dataset, tmp_path, model, engine=DEEPSPEED, parallel=parallel)
    for found in ranks.run(course, mine, 3, world=4):
        assert_same_course(found, reference)


OFFLOADS = [(1, {"offload_optimizer": "cpu"}), (3, {"offload_optimizer": "cpu", "offload_parameters": "cpu"})]


@pytest.mark.parametrize(("zero", "where"), OFFLOADS)
def test_offload_to_the_host(ranks, dataset, tmp_path, zero, where):
    reference = native(ranks, config_of(dataset, tmp_path, "llama"), 3)
    engine = DEEPSPEED | {"deepspeed": where}
    mine = config_of(dataset, tmp_path, "llama", engine=engine, parallel={"zero": zero})
    for found in ranks.run(course, mine, 3, world=2):
        assert_same_course(found, reference)


def test_the_runs_own_offload_is_deepspeeds(ranks, dataset, tmp_path):
    reference = native(ranks, config_of(dataset, tmp_path, "gpt2"), 3)
    mine = config_of(dataset, tmp_path, "gpt2", engine=DEEPSPEED, parallel={"zero": 2, "offload": "optimizer"})
    for found in ranks.run(course, mine, 3, world=2):
        assert_same_course(found, reference)


@pytest.mark.slow
def test_secondary_copies_of_parameters(ranks, dataset, tmp_path):
    reference = native(ranks, config_of(dataset, tmp_path, "llama"), 3)
    mine = config_of(dataset, tmp_path, "llama", engine=DEEPSPEED | {"deepspeed": {"hpz": 2}}, parallel={"zero": 3})
    for found in ranks.run(course, mine, 3, world=4):
        assert_same_course(found, reference)


def with_no_program_at_hand(config):
    engine, loader = engine_and_rows(config)
    with mock.patch("subprocess.Popen", side_effect=AssertionError("a step starts a program")) as started:
        return [engine.step(loader.batch(step), 1e-3).applied for step in range(2)], started.call_count


@pytest.mark.parametrize("zero", [*(pytest.param(zero, marks=pytest.mark.slow) for zero in (0, 1, 2)), 3])
def test_a_step_starts_no_program(ranks, dataset, tmp_path, zero):
    config = config_of(dataset, tmp_path, "llama", parallel={"zero": zero}, engine=DEEPSPEED)
    assert ranks.run(with_no_program_at_hand, config, world=2) == [([True, True], 0)] * 2


@pytest.mark.parametrize("zero", [pytest.param(2, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("recompute", ["selective", pytest.param("full", marks=pytest.mark.slow)])
def test_recompute_changes_nothing(ranks, dataset, tmp_path, zero, recompute):
    reference = native(ranks, config_of(dataset, tmp_path, "llama"), 3)
    engine = DEEPSPEED | {"recompute": recompute}
    mine = config_of(dataset, tmp_path, "llama", engine=engine, parallel={"zero": zero})
    for found in ranks.run(course, mine, 3, world=2):
        assert_same_course(found, reference)


@pytest.mark.parametrize("zero", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def test_bf16_starts_at_the_same_bits_and_stays_as_near_as_bf16_is(ranks, dataset, tmp_path, zero):
    reference = native(ranks, config_of(dataset, tmp_path, "llama", engine={"precision": "bf16"}), 4)
    mine = config_of(dataset, tmp_path, "llama", engine=DEEPSPEED | {"precision": "bf16"}, parallel={"zero": zero})
    for found in ranks.run(course, mine, 4, world=2):
        assert found[0] == reference[0]
        assert all(t.dtype == torch.float32 for t in found[2].values())
        assert found[1][0][0] == pytest.approx(reference[1][0][0], rel=1e-5), "the first loss sees equal bf16 weights and rows"
        for (loss, norm, _), (loss1, norm1, _) in zip(found[1], reference[1], strict=True):
            assert loss == pytest.approx(loss1, rel=2e-3)
            assert norm == pytest.approx(norm1, rel=1e-2)


def refused_steps(config):
    """What steps whose figures are not below their limits leave, and the one that follows; and one that was never refused."""
    import torch.distributed as dist

    engine, loader = engine_and_rows(config)
    first = engine.step(loader.batch(0), 1e-3)
    live = [local(p).detach().clone() for p in engine.parameters]
    before = digests(whole_state(engine.state()))
    batch, results = loader.batch(1), []
    norm_forward = engine.model.norm.forward

    def unchanged():
        same = all(torch.equal(local(p), old) for p, old in zip(engine.parameters, live, strict=True))
        return same and digests(whole_state(engine.state())) == before

    for limits in (StepLimits(loss=first.loss / 2), StepLimits(norm=first.grad_norm / 100), StepLimits(loss=float("nan"))):
        r = engine.step(batch, 1e-3, limits)
        results.append((r.applied, r.loss, r.grad_norm, unchanged()))
    if dist.get_rank() == 0:
        engine.model.norm.forward = lambda x: norm_forward(x) * float("nan")
    r = engine.step(batch, 1e-3)
    engine.model.norm.forward = norm_forward
    results.append((r.applied, r.loss, r.grad_norm, unchanged()))
    r = engine.step(batch, 1e-3)
    return results, (r.applied, r.loss, r.grad_norm)


@pytest.mark.parametrize("zero", [*(pytest.param(zero, marks=pytest.mark.slow) for zero in (0, 1)), 2, 3])
def test_a_step_beyond_its_limits_changes_nothing_and_can_be_tried_again(ranks, dataset, tmp_path, zero):
    _, figures, *_ = native(ranks, config_of(dataset, tmp_path, "llama"), 4)
    mine = config_of(dataset, tmp_path, "llama", engine=DEEPSPEED, parallel={"zero": zero})
    everyone = ranks.run(refused_steps, mine, world=2)
    for (*refused, nan), last in everyone:
        for applied, loss, norm, same in refused:
            assert not applied
            assert same
            assert (loss, norm) == pytest.approx(figures[1][:2], rel=1e-5), "the figures are true ones"
        assert not nan[0]
        assert nan[3]
        assert math.isnan(nan[1])
        assert not math.isfinite(nan[2])
        assert last[0]
        assert last[1:] == pytest.approx(figures[1][:2], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 2, 3])
@pytest.mark.parametrize("how", [{"precision": "bf16"}, {"deepspeed": {"offload_optimizer": "cpu"}}], ids=["bf16", "offload"])
def test_so_it_is_in_bf16_and_with_offload(ranks, dataset, tmp_path, zero, how):
    mine = config_of(dataset, tmp_path, "llama", engine=DEEPSPEED | how, parallel={"zero": zero})
    for message, last in ranks.run(refused_steps, mine, world=2):
        assert [(applied, same) for applied, _, _, same in message] == [(False, True)] * 4
        assert last[0]


def corrupted(config):
    import torch.distributed as dist

    engine, loader = engine_and_rows(config)
    engine.step(loader.batch(0), 1e-3)
    before = engine.replica_differences()
    if dist.get_rank() == 1:
        engine.parameters[3].data.view(-1)[5] += 1e-4
    return before, engine.replica_differences(), engine.named[3][0]


@pytest.mark.parametrize("zero", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_replica_that_has_come_apart_is_seen(ranks, dataset, tmp_path, zero):
    mine = config_of(dataset, tmp_path, "llama", engine=DEEPSPEED, parallel={"zero": zero})
    everyone = ranks.run(corrupted, mine, world=4)
    for before, after, name in everyone:
        assert before == []
        assert [(d.name, d.ranks) for d in after] == [(f"model.{name}", (1,))]


@pytest.mark.slow
def test_compiled_blocks(ranks, dataset, tmp_path):
    reference = native(ranks, config_of(dataset, tmp_path, "llama"), 2)
    mine = config_of(dataset, tmp_path, "llama", engine=DEEPSPEED | {"compile": "on"}, parallel={"zero": 2})
    for found in ranks.run(course, mine, 2, world=2, timeout=300):
        assert_same_course(found, reference)
