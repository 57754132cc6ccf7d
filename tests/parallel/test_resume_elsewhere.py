"""A run saved under one layout goes on under any other: the same state to the bit, and the same next losses."""

import pytest
import torch

from layouts import BASE, MODELS, degrees
from mikoshi.trainer.checkpoint.restore import load, newest_valid
from mikoshi.trainer.checkpoint.saver import save
from runs import engine_and_rows, run_config, whole_state


def steps(engine, loader, numbers):
    return [(r.loss, r.grad_norm) for r in (engine.step(loader.batch(n), 1e-3) for n in numbers)]


def save_after_two(config, folder):
    engine, loader = engine_and_rows(config)
    steps(engine, loader, range(2))
    save(folder, 2, engine.state(), {"config": "", "fingerprint": "f", "samples": 32}, keep=3)
    return whole_state(engine.state()), steps(engine, loader, range(2, 4))


def go_on(config, folder):
    engine, loader = engine_and_rows(config)
    path, manifest, _ = newest_valid(folder)
    state = engine.state()
    load(path, manifest, state)
    engine.load_state(state)
    return whole_state(engine.state()), steps(engine, loader, range(2, 4))


@pytest.mark.parametrize(
    ("model", "saved", "elsewhere"),
    [
        ("gpt2", (4, "tp=2 pp=2 schedule=zbv"), [(1, ""), (4, "tp=2 cp=2"), (2, "pp=2"), (4, "pp=2 schedule=zbv zero=3")]),
        pytest.param("llama", (4, "tp=4"), [(2, "tp=2"), (4, "pp=4"), (4, "zero=3 replicas=2")], marks=pytest.mark.slow),
        pytest.param(
            "deepseek", (4, "ep=2 tp=2"), [(1, ""), (4, "ep=4"), (4, "pp=2 ep=2 schedule=interleaved")], marks=pytest.mark.slow
        ),
    ],
)
@pytest.mark.parametrize("optim", ["adamw", pytest.param("muon", marks=pytest.mark.slow)])
def test_saved_here_gone_on_there(ranks, dataset, tmp_path, model, saved, elsewhere, optim):
    def config(layout):
        return run_config(
            dataset, tmp_path, model=BASE | MODELS[model], parallel=degrees(layout), train={"global_batch": 16},
            optim={"kind": optim},
        )  # fmt: skip

    (state, after), *_ = ranks.run(save_after_two, config(saved[1]), tmp_path / "saved", world=saved[0])
    for world, layout in elsewhere:
        for found, then in ranks.run(go_on, config(layout), tmp_path / "saved", world=world):
            assert found.keys() == state.keys()
            assert all(torch.equal(found[name], state[name]) for name in state), "the same state, to the bit"
            assert then == [pytest.approx(pair, rel=1e-5) for pair in after]
