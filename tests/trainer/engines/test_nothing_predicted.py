"""A step that predicts nothing changes nothing, under every engine and in any layout, and what nothing predicts has no loss."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from engines import engine_config
from mikoshi.data.dataset.rows import IGNORED, Batch
from runs import engine_and_rows, held_out_of, whole_state


def masked(rows):
    return Batch(rows.tokens, np.full_like(rows.labels, IGNORED), rows.docs, rows.positions)


def one_step_of_nothing(config):
    """A step, one of nothing (or none), and a step: what the second said, the state around it, the figures of the last; then
    held-out losses, of nothing and of text."""
    engine, loader = engine_and_rows(config)
    engine.step(loader.batch(0), 1e-2)
    before = whole_state(engine.state())
    nothing = engine.step(masked(loader.batch(1)), 1e-2)
    after = whole_state(engine.state())
    held_out = list(held_out_of(config, engine.layout, dist.get_rank()))
    evaluations = [engine.evaluate(map(masked, held_out)), engine.evaluate(held_out)]
    last = engine.step(loader.batch(1), 1e-2)
    return nothing, before, after, (last.loss, last.grad_norm), evaluations


def without(config):
    engine, loader = engine_and_rows(config)
    engine.step(loader.batch(0), 1e-2)
    last = engine.step(loader.batch(1), 1e-2)
    return last.loss, last.grad_norm


CASES = [
    ("native", "deepseek", 1, ""), ("native", "mixtral", 2, "ep=2"), ("native", "llama", 4, "tp=2 pp=2"),
    ("native", "llama", 2, "cp=2"), ("native", "gpt2", 3, "zero=3"), ("deepspeed", "mixtral", 2, "zero=1"),
    ("deepspeed", "llama", 2, "zero=3"), ("deepspeed", "gpt2", 1, "zero=0"), ("deepspeed", "gpt2", 2, "pp=2 zero=1"),
    ("megatron", "mixtral", 2, "tp=2"), ("megatron", "gpt2", 2, "pp=2 schedule=zbv"),
]  # fmt: skip
FAST = {("native", "deepseek", 1), ("deepspeed", "mixtral", 2)}


@pytest.mark.parametrize(
    ("kind", "model", "world", "layout"),
    [pytest.param(*case, marks=[] if case[:3] in FAST else [pytest.mark.slow]) for case in CASES],
)
def test_nothing_changes(ranks, dataset, tmp_path, kind, model, world, layout):
    if kind != "native":
        pytest.importorskip({"deepspeed": "deepspeed", "megatron": "megatron.core"}[kind])
    config = engine_config(dataset, tmp_path, model, kind, layout, optim={"weight_decay": 0.5})
    for nothing, before, after, last, (none, some) in ranks.run(one_step_of_nothing, config, world=world):
        assert (nothing.loss, nothing.grad_norm, nothing.tokens, nothing.applied) == (None, None, 0, False)
        assert before.keys() == after.keys()
        assert any(name.endswith(".step") and value for name, value in before.items())
        for name, tensor in before.items():
            assert torch.equal(tensor, after[name]), name
        assert last == pytest.approx(ranks.run(without, config, world=world)[0], rel=1e-6)
        assert none is None
        assert some > 1
