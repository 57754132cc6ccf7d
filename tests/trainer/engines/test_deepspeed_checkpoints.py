"""A run goes from DeepSpeed to the native engine and back, in any layout: the same state, and the same next losses."""

import pytest
import torch

from layouts import BASE, MODELS, degrees
from mikoshi.parallel.sharding import local
from mikoshi.trainer.checkpoint.restore import load, newest_valid
from mikoshi.trainer.checkpoint.saver import save
from mikoshi.trainer.errors import CheckpointError
from runs import engine_and_rows, run_config, whole_state

pytest.importorskip("deepspeed")

SMALL = BASE | {"width": 32, "mlp_width": 48}


def steps(engine, loader, numbers):
    return [(r.loss, r.grad_norm) for r in (engine.step(loader.batch(n), 1e-3) for n in numbers)]


def begin(config, folder):
    """Two steps, saved, and five more."""
    engine, loader = engine_and_rows(config)
    steps(engine, loader, range(2))
    save(folder, 2, engine.state(), {"config": "", "fingerprint": "f", "samples": 32}, keep=3)
    return whole_state(engine.state()), steps(engine, loader, range(2, 7))


def hand_on(config, here, there):
    """The state as it was loaded, saved again elsewhere, and the next five steps. What was trained before is forgotten."""
    engine, loader = engine_and_rows(config)
    steps(engine, loader, range(1))
    path, manifest, _ = newest_valid(here)
    state = engine.state()
    load(path, manifest, state)
    engine.load_state(state)
    loaded = whole_state(engine.state())
    save(there, 2, engine.state(), {"config": "", "fingerprint": "f", "samples": 32}, keep=3)
    return loaded, steps(engine, loader, range(2, 7))


def config_of(dataset, folder, model, layout, engine=None):
    shape = {"kv_heads": None} | SMALL | MODELS[model]
    kind = {"kind": "deepspeed"} if engine is None else engine
    return run_config(
        dataset, folder, model=shape, parallel=degrees(layout), train={"global_batch": 8, "micro_batch": 2, "steps": 9},
        engine=kind, optim={"clip": 0.3},
    )  # fmt: skip


NATIVE = {"kind": "native"}
CHAINS = [
    ("llama", [(2, "zero=3", None), (2, "tp=2", NATIVE), (1, "zero=1", None)]),
    ("gpt2", [(2, "zero=2", None), (2, "pp=2", NATIVE), (4, "zero=3", None)]),
]
LONG = [
    (model, [(2, f"zero={first}", None), (3, "zero=3", NATIVE), (4, f"zero={then}", None), (1, "zero=0", NATIVE)])
    for model in ("gpt2", "llama") for first in range(4) for then in range(4)
]  # fmt: skip


def marked(case):
    """Of the long ones four go with the slow tests, in which each stage is left once and come to once."""
    return pytest.param(*case, marks=pytest.mark.slow if LONG.index(case) in (1, 6, 11, 12) else pytest.mark.soak)


@pytest.mark.parametrize(("model", "chain"), [CHAINS[0], pytest.param(*CHAINS[1], marks=pytest.mark.slow), *map(marked, LONG)])
def test_every_engine_goes_on_with_every_others_checkpoint(ranks, dataset, tmp_path, model, chain):
    (world, layout, engine), *rest = chain
    (state, after), *_ = ranks.run(begin, config_of(dataset, tmp_path, model, layout, engine), tmp_path / "0", world=world)
    for number, (world, layout, engine) in enumerate(rest):
        config = config_of(dataset, tmp_path, model, layout, engine)
        for found, then in ranks.run(hand_on, config, tmp_path / str(number), tmp_path / str(number + 1), world=world):
            assert found.keys() == state.keys()
            assert all(torch.equal(found[name], state[name]) for name in state), "the same state, to the bit"
            assert then == [pytest.approx(pair, rel=1e-5) for pair in after]


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 3])
def test_bf16_goes_on_as_if_it_had_never_stopped(ranks, dataset, tmp_path, zero):
    engine = {"kind": "deepspeed", "precision": "bf16"}
    config = config_of(dataset, tmp_path, "llama", f"zero={zero}", engine)
    (state, after), *_ = ranks.run(begin, config, tmp_path / "0", world=2)
    (found, then), *_ = ranks.run(hand_on, config, tmp_path / "0", tmp_path / "1", world=2)
    assert all(torch.equal(found[name], state[name]) for name in state)
    assert then == after, "the weights that it computes with, too, are what they were"


def partly(config):
    engine, loader = engine_and_rows(config)
    before = whole_state(engine.state())
    steps(engine, loader, range(1))
    kept = sum(local(t).numel() for t in engine.state().values())
    moved = whole_state(engine.state())
    state = engine.state()
    for tensor in state.values():
        local(tensor).mul_(2.0)
    engine.load_state({name: t for name, t in state.items() if name.startswith("model.")})
    return before, moved, whole_state(engine.state()), kept


@pytest.mark.parametrize("zero", [3, *(pytest.param(zero, marks=pytest.mark.slow) for zero in (0, 1, 2))])
def test_a_part_of_a_state_is_taken_and_a_rank_holds_a_part_of_it(ranks, dataset, tmp_path, zero):
    for before, moved, now, kept in ranks.run(partly, config_of(dataset, tmp_path, "llama", f"zero={zero}"), world=2):
        assert all(not t.any() for name, t in before.items() if name.startswith("optim."))
        assert {float(t) for name, t in moved.items() if name.endswith(".step")} == {1.0}
        for name, tensor in moved.items():
            assert torch.equal(now[name], tensor * 2 if name.startswith("model.") else tensor), name
        elements = sum(t.numel() for t in moved.values())
        assert kept < 0.52 * elements, "half of it, and the steps"


def uneven(config):
    engine, _ = engine_and_rows(config)
    state = engine.state()
    state["optim.head.weight.step"].fill_(7.0)
    try:
        engine.load_state(state)
    except CheckpointError as error:
        return str(error)
    return None


def test_parameters_of_different_ages_are_refused(ranks, dataset, tmp_path):
    for message in ranks.run(uneven, config_of(dataset, tmp_path, "llama", "zero=2"), world=2):
        assert "different numbers of steps, from 0 to 7" in message
        assert 'engine.kind="native"' in message
