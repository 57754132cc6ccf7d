"""The layout is not the run: the same initial bits, losses and weights at every world size and ZeRO stage."""

import hashlib
import itertools
import math

import pytest
import torch

from mikoshi.parallel.sharding import local
from mikoshi.trainer.engines.build import build_engine
from mikoshi.trainer.engines.optim import learning_rate
from mikoshi.trainer.model import init
from runs import GPT2_MODEL, data_layout, held_out_of, loader_of, run_config

CPU = torch.device("cpu")


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def digests(state):
    return {name: hashlib.sha256(whole(t).contiguous().numpy().tobytes()).hexdigest() for name, t in state.items()}


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """The most elements of any tensor that an operation made in memory."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                self.elements = max(self.elements, local(tensor).numel())
        return out


def initial_bits(config, zero):
    """Digests of the whole initial weights, how many elements the rank holds, and the most that the generator and that
    any tensor had while they were made."""
    import torch.distributed as dist

    largest = 0

    def watched(region, start, stop):
        nonlocal largest
        largest = max(largest, stop - start)
        return indices(region, start, stop)

    indices, init._indices = init._indices, watched
    try:
        with Largest() as tensors:
            engine = build_engine(config, data_layout(config, dist.get_world_size(), zero), CPU)
    finally:
        init._indices = indices
    kept = sum(local(p).numel() for p in engine.parameters)
    return digests({name: p.detach() for name, p in engine.named}), kept, largest, tensors.elements


def train(config, zero):
    import torch.distributed as dist

    rank, world = dist.get_rank(), dist.get_world_size()
    layout = data_layout(config, world, zero)
    loader, engine = loader_of(config, layout, rank), build_engine(config, layout, CPU)
    steps = config.train.steps
    results = []
    for step in range(steps):
        lr = learning_rate(config.optim.lr, config.optim.schedule, step, steps)
        r = engine.step(loader.batch(step), lr)
        assert r.applied
        results.append((r.loss, r.grad_norm, r.tokens))
    evaluation = engine.evaluate(held_out_of(config, layout, rank))
    return results, evaluation, {k: whole(v).clone() for k, v in engine.state().items()}


@pytest.mark.parametrize("model", [{}, GPT2_MODEL], ids=["llama", "gpt2"])
def test_initial_weights_are_the_same_bits(ranks, dataset, tmp_path, model):
    config = run_config(dataset, tmp_path, model={**model, "width": 64, "vocab": 4001})
    ((reference, total, _, _),) = ranks.run(initial_bits, config, 0, world=1)
    for world, zero in [(2, 0), (2, 3), (4, 1), (4, 3)]:
        for found, kept, largest, tensor in ranks.run(initial_bits, config, zero, world=world):
            assert found == reference
            assert 0 < largest <= init.BLOCK
            if zero:
                embedding = math.ceil(4001 / world) * 64
                assert tensor <= max(embedding, init.BLOCK) < 4001 * 64, "no whole parameter, not for a moment"
                assert kept <= math.ceil(total / world) + 64 * 64 * world, "a rank holds its own shard and no more"


def assert_same_run(found, reference):
    for (loss, norm, tokens), (loss1, norm1, tokens1) in zip(found[0], reference[0], strict=True):
        assert tokens == tokens1
        assert loss == pytest.approx(loss1, rel=1e-5)
        assert norm == pytest.approx(norm1, rel=1e-5)
    assert found[1] == pytest.approx(reference[1], rel=1e-5)


_reference = {}


def reference_run(ranks, config, key):
    if key not in _reference:
        (_reference[key],) = ranks.run(train, config, 0, world=1)
    return _reference[key]


LAYOUTS = [(2, 0), (2, 1), (2, 2), (2, 3), (4, 0), (4, 1), (4, 2), (4, 3)]


@pytest.mark.parametrize(("world", "zero"), LAYOUTS)
@pytest.mark.parametrize("micro", [None, 1], ids=["whole", "accumulated"])
def test_every_layout_computes_the_same_run(ranks, dataset, tmp_path, world, zero, micro):
    plain = run_config(dataset, tmp_path, model=GPT2_MODEL)
    config = run_config(dataset, tmp_path, model=GPT2_MODEL, train={"micro_batch": micro})
    reference = reference_run(ranks, plain, "adamw")
    for found in ranks.run(train, config, zero, world=world):
        assert_same_run(found, reference)
        for name, tensor in found[2].items():
            if name.startswith("model."):
                torch.testing.assert_close(tensor, reference[2][name], atol=2e-5, rtol=0, msg=name)


@pytest.mark.parametrize(("world", "zero"), [(2, 0), (2, 2), (4, 3)])
def test_muon_does_not_depend_on_the_layout(ranks, dataset, tmp_path, world, zero):
    config = run_config(dataset, tmp_path, optim={"kind": "muon", "lr": 1e-3})
    reference = reference_run(ranks, config, "muon")
    for found in ranks.run(train, config, zero, world=world):
        assert_same_run(found, reference)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recompute_changes_nothing(ranks, dataset, tmp_path, recompute):
    plain = run_config(dataset, tmp_path, model=GPT2_MODEL)
    config = run_config(dataset, tmp_path, model=GPT2_MODEL, engine={"recompute": recompute})
    for found in ranks.run(train, config, 3, world=2):
        assert_same_run(found, reference_run(ranks, plain, "adamw"))


def test_bf16_follows_fp32_closely_and_is_layout_free_in_its_own_precision(ranks, dataset, tmp_path):
    config = run_config(dataset, tmp_path, engine={"precision": "bf16"}, optim={"lr": 1e-3})
    exact = run_config(dataset, tmp_path, optim={"lr": 1e-3})
    (one,), (fp32,) = ranks.run(train, config, 0, world=1), ranks.run(train, exact, 0, world=1)
    runs = {layout: ranks.run(train, config, layout[1], world=layout[0])[0] for layout in [(2, 0), (2, 2), (4, 3)]}
    for run in [one, *runs.values()]:
        for (loss, norm, _), (loss32, norm32, _) in zip(run[0], fp32[0], strict=True):
            assert loss == pytest.approx(loss32, rel=2e-3)
            assert norm == pytest.approx(norm32, rel=3e-2)
    assert all(t.dtype == torch.float32 for t in one[2].values()), "master weights and moments stay fp32"
    for a, b in itertools.combinations([one, *runs.values()], 2):
        assert a[0][0][0] == pytest.approx(b[0][0][0], rel=1e-5), "the first loss sees equal bf16 weights and rows"


def non_finite(config, zero):
    import torch.distributed as dist

    layout = data_layout(config, dist.get_world_size(), zero)
    engine = build_engine(config, layout, CPU)
    before = digests(engine.state())
    batch = loader_of(config, layout, dist.get_rank()).batch(0)
    if dist.get_rank() == 1:
        forward = engine.parts[0].norm.forward
        engine.parts[0].norm.forward = lambda x: forward(x) * float("nan")
    result = engine.step(batch, 1e-3)
    return result.applied, digests(engine.state()) == before


def test_a_nan_on_one_rank_stops_the_update_on_all(ranks, dataset, tmp_path):
    for applied, unchanged in ranks.run(non_finite, run_config(dataset, tmp_path), 2, world=2):
        assert not applied
        assert unchanged
