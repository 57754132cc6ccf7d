"""What a run is, whichever engine carries it: for the tests that compare engines. All are called on every rank."""

import hashlib

import pytest
import torch.distributed as dist

from layouts import BASE, MODELS, degrees
from mikoshi.trainer.checkpoint.restore import load, newest_valid
from mikoshi.trainer.checkpoint.saver import save as save_checkpoint
from runs import engine_and_rows, held_out_of, run_config, whole_state


def engine_config(dataset, folder, model, kind="native", layout="", /, **sections):
    """Packed documents, micro-batches smaller than a rank's rows, and a clip that is felt at every step."""
    plain = {
        "model": BASE | MODELS[model], "parallel": degrees(layout), "engine": {"kind": kind},
        "train": {"steps": 10, "global_batch": 16, "micro_batch": 2}, "optim": {"lr": 1e-3, "clip": 0.5},
        "eval": {"batches": 2},
    }  # fmt: skip
    for name, values in sections.items():
        plain[name] = {**plain.get(name, {}), **values}
    return run_config(dataset, folder, **released(plain))


def released(sections):
    """Under ZeRO 3 DeepSpeed would keep parameters as small as those of tests gathered for good: not these."""
    if sections.get("engine", {}).get("kind") != "deepspeed" or sections.get("parallel", {}).get("zero") != 3:
        return sections
    own = sections["engine"].get("deepspeed", {})
    zero = {"stage3_param_persistence_threshold": 0, **own.get("settings", {}).get("zero_optimization", {})}
    settings = {**own.get("settings", {}), "zero_optimization": zero}
    return {**sections, "engine": {**sections["engine"], "deepspeed": {**own, "settings": settings}}}


def figures(results):
    return [(r.loss, r.grad_norm, r.tokens, r.applied) for r in results]


def train(config):
    """Digests of the initial weights, the figures of every step, the evaluation, logits of a next token, the whole state at
    the end, and what of it the ranks do not hold alike."""
    engine, loader = engine_and_rows(config)
    initial = {name: t for name, t in whole_state(engine.state()).items() if name.startswith("model.")}
    digests = {name: hashlib.sha256(t.numpy().tobytes()).hexdigest() for name, t in initial.items()}
    steps = figures(engine.step(loader.batch(n), config.optim.lr) for n in range(config.train.steps))
    evaluation = engine.evaluate(held_out_of(config, engine.layout, dist.get_rank()))
    logits = engine.next_logits([5, 6, 7]) if engine.layout.data_ranks * engine.layout.cp == dist.get_world_size() else None
    return digests, steps, evaluation, logits, whole_state(engine.state()), engine.replica_differences()


def save_after(config, folder, steps):
    """Train some steps, save, and go on: the state saved, and the figures of the next five steps."""
    engine, loader = engine_and_rows(config)
    for n in range(steps):
        engine.step(loader.batch(n), config.optim.lr)
    save_checkpoint(folder, steps, engine.state(), {"config": "", "fingerprint": "f", "samples": 0}, keep=9)
    state = whole_state(engine.state())
    return state, figures(engine.step(loader.batch(n), config.optim.lr) for n in range(steps, steps + 5))


def go_on(config, folder, save=True):
    """Load the newest checkpoint, save what was loaded one step further, and train five steps: the state loaded, and their
    figures."""
    engine, loader = engine_and_rows(config)
    path, manifest, _ = newest_valid(folder)
    state = engine.state()
    load(path, manifest, state)
    engine.load_state(state)
    loaded, start = whole_state(engine.state()), manifest.step
    if save:
        save_checkpoint(folder, start + 1, engine.state(), manifest.record, keep=9)
    first = 3  # the batches that follow the first save, however often the state was handed on
    return loaded, figures(engine.step(loader.batch(n), config.optim.lr) for n in range(first, first + 5))


def assert_as_near(found, other, exact):
    """Two runs in bf16, which round otherwise here and there: each figure as near to the other's as that has ever been to the
    run's in fp32, and the first loss, of equal weights and rows, much nearer."""
    assert found[0][0] == pytest.approx(other[0][0], rel=1e-5)
    for which, name in enumerate(("loss", "norm")):
        drift = 0.0
        for step, (mine, theirs, true) in enumerate(zip(found, other, exact, strict=True)):
            drift = max(drift, abs(theirs[which] - true[which]))
            allowed = max(drift, 1e-4 * true[which])
            assert abs(mine[which] - theirs[which]) <= allowed, (name, step, mine, theirs, true)
