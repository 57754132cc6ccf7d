"""Megatron-core's layers are the same run: the same initial bits, losses, gradient norms and state as the native engine's."""

import contextlib
import json
import sys

import pytest
import torch

from engines import assert_as_near, engine_config, train
from layouts import MODELS
from mikoshi.trainer.config.run import RunConfig
from mikoshi.trainer.engines.limits import refuse
from mikoshi.trainer.errors import ConfigError

pytest.importorskip("megatron.core")

MATRIX = [
    (model, world, layout)
    for model in ("gpt2", "llama")
    for world, layout in [
        (1, ""), (2, "tp=2"), (2, "zero=3"), (2, "zero=1"), (2, "zero=0"), (4, "tp=2 zero=2"), (4, "tp=2 zero=3"),
        *((world, f"{rest}pp=2 schedule={schedule}")
          for world, rest in [(2, ""), (4, "tp=2 "), (4, "zero=3 "), (8, "tp=2 zero=3 ")]
          for schedule in ("gpipe", "1f1b", "interleaved", "interleaved-zb", "zbv", "dualpipev")),
    ]
]  # fmt: skip
MATRIX += [
    ("llama", 2, "cp=2"), ("mistral", 4, "cp=2 context_kind=ulysses"), ("qwen3", 2, "tp=2"), ("gpt2", 3, "zero=3"),
    ("gpt2", 4, "cp=2 tp=2 zero=3"), ("gpt2", 2, "zero=2 offload=optimizer"),
    ("mixtral", 1, ""), ("mixtral", 2, "tp=2"), ("mixtral", 4, "tp=2 ep=2 expert_tp=1"), ("mixtral", 4, "cp=2 ep=2"),
    ("deepseek", 2, "ep=2 zero=3"), ("deepseek", 4, "pp=2 ep=2 schedule=zbv"), ("deepseek", 4, "tp=2 pp=2"),
]  # fmt: skip
FAST = {("mixtral", 2, "tp=2")}
# Eight layers and clipping drive the native engine's own tp=2 and tp=1 apart by 2e-5 after eight steps.
STEPS = {"qwen3": 6}

_alone = {}


def config_of(dataset, folder, model, kind="native", layout=""):
    return engine_config(dataset, folder, model, kind, layout, train={"steps": STEPS.get(model, 10)})


def alone(ranks, dataset, folder, model):
    if model not in _alone:
        (_alone[model],) = ranks.run(train, config_of(dataset, folder, model), world=1)
    return _alone[model]


def marked(case):
    """Of the largest layouts, and of pipelines of the second model, some go with the slow tests and the rest with the soaks."""
    model, world, layout = case
    usual = layout.endswith(("1f1b", "zbv"))
    rare = "schedule" in layout and not usual and (world == 8 or model == "llama")
    mark = pytest.mark.soak if rare or (world == 8 and model == "llama") else pytest.mark.slow
    return pytest.param(*case, id="-".join(map(str, case)), marks=[] if case in FAST else [mark])


def assert_same_state(found, state):
    """Every weight and moment as a whole, but for biases of keys: a softmax does not feel them, so that their gradients are
    rounding, of which AdamW makes steps."""
    for name, tensor in found.items():
        apart = float((tensor - state[name]).norm())
        if name.endswith("attn.k.bias") or ".attn.k.bias." in name:
            assert apart < 1e-2 or name.endswith(".step"), name
        else:
            assert apart <= 1e-4 * float(state[name].norm()), name


@pytest.mark.parametrize(("model", "world", "layout"), [marked(case) for case in MATRIX])
def test_the_same_run(ranks, dataset, tmp_path, model, world, layout):
    initial, steps, evaluation, logits, state, _ = alone(ranks, dataset, tmp_path, model)
    for found in ranks.run(train, config_of(dataset, tmp_path, model, "megatron", layout), world=world):
        assert found[0] == initial, "the same initial bits"
        for (loss, norm, tokens, applied), one in zip(found[1], steps, strict=True):
            assert (tokens, applied) == (one[2], True)
            assert loss == pytest.approx(one[0], rel=1e-5)
            assert norm == pytest.approx(one[1], rel=1e-5)
        assert max(norm for _, norm, _, _ in steps) > 0.5, "clipping was felt"
        assert found[2] == pytest.approx(evaluation, rel=1e-5)
        if found[3] is not None:
            torch.testing.assert_close(found[3], logits, rtol=1e-3, atol=1e-4)
        assert found[4].keys() == state.keys()
        assert_same_state(found[4], state)
        assert found[5] == [], "replicas are the same to the bit"


@pytest.mark.slow
def test_keys_and_values_go_round_in_a_ring(ranks, dataset, tmp_path):
    """Which is of rows without the masks of documents."""
    sections = {"data": {"document_mask": False}, "train": {"steps": 4}}
    ((initial, steps, *_),) = ranks.run(train, engine_config(dataset, tmp_path, "llama", **sections), world=1)
    config = engine_config(dataset, tmp_path, "llama", "megatron", "cp=2 context_kind=ring", **sections)
    for found in ranks.run(train, config, world=2):
        assert found[0] == initial
        for (loss, norm, *_), (loss1, norm1, *_) in zip(found[1], steps, strict=True):
            assert (loss, norm) == pytest.approx((loss1, norm1), rel=1e-5)


@pytest.mark.slow
def test_bf16_is_the_same_run_to_its_own_rounding(ranks, dataset, tmp_path):
    bf16 = {"engine": {"precision": "bf16"}}
    ((_, native, *_),) = ranks.run(train, engine_config(dataset, tmp_path, "gpt2", **bf16), world=1)
    ((_, exact, *_),) = ranks.run(train, engine_config(dataset, tmp_path, "gpt2"), world=1)
    for layout in ("tp=2", "pp=2"):
        config = engine_config(dataset, tmp_path, "gpt2", "megatron", layout, **bf16)
        for _, steps, *_ in ranks.run(train, config, world=2):
            assert_as_near(steps, native, exact)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputed_activations_change_nothing(ranks, dataset, tmp_path, recompute):
    kept, again = (
        ranks.run(train, engine_config(dataset, tmp_path, "llama", "megatron", engine={"recompute": how}), world=1)[0]
        for how in ("none", recompute)
    )
    assert again[1] == kept[1]
    assert all(torch.equal(again[4][name], tensor) for name, tensor in kept[4].items())


def cut_sequence(config):
    """On CUDA its ranks share out the sequence between its layers; here, with the three calls that ask for CUDA answered."""
    from unittest import mock

    from megatron.core.tensor_parallel import random

    from mikoshi.trainer.engines.megatron import engine as megatron

    tracker = random.CudaRNGStatesTracker()
    tracker.fork = lambda *_: contextlib.nullcontext()
    with (
        mock.patch.object(torch.cuda, "current_device", lambda: "cpu"),
        mock.patch.object(megatron.tensor_parallel, "get_cuda_rng_tracker", lambda *_: tracker),
        mock.patch.object(megatron.tensor_parallel, "model_parallel_cuda_manual_seed", lambda *_: None),
        mock.patch.object(megatron, "sequence_parallel", lambda *_: True),
    ):
        return train(config)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["gpt2", "qwen3", "mixtral"])
def test_sequence_parallel_as_on_cuda(ranks, dataset, tmp_path, model):
    initial, steps, _, _, state, _ = alone(ranks, dataset, tmp_path, model)
    for found in ranks.run(cut_sequence, config_of(dataset, tmp_path, model, "megatron", "tp=2"), world=2):
        assert found[0] == initial
        for (loss, norm, *_), one in zip(found[1], steps, strict=True):
            assert (loss, norm) == pytest.approx(one[:2], rel=1e-5)
        assert_same_state(found[4], state)
        assert found[5] == []


def test_limits_leave_every_bit_as_it_was(ranks, dataset, tmp_path):
    for result in ranks.run(held_back, engine_config(dataset, tmp_path, "gpt2", "megatron", "tp=2"), world=2):
        assert result == (False, True)


def held_back(config):
    from mikoshi.trainer.engines.base import StepLimits
    from runs import engine_and_rows, whole_state

    engine, loader = engine_and_rows(config)
    engine.step(loader.batch(0), 1e-3)
    before = whole_state(engine.state())
    result = engine.step(loader.batch(1), 1e-3, StepLimits(norm=1e-9))
    after = whole_state(engine.state())
    return result.applied, all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_steps_that_differ_are_refused(ranks, dataset, tmp_path):
    (message,) = ranks.run(other_steps, engine_config(dataset, tmp_path, "llama", "megatron"), world=1)
    assert "optim.blocks.0.attn.k.weight.step is 9" in message


def other_steps(config):
    from mikoshi.trainer.errors import CheckpointError
    from runs import engine_and_rows

    engine, _ = engine_and_rows(config)
    state = {name: tensor.clone() for name, tensor in engine.state().items()}
    state["optim.blocks.0.attn.k.weight.step"] = torch.tensor(9.0)
    try:
        engine.load_state(state)
    except CheckpointError as error:
        return str(error)
    return ""


REFUSED = [
    ({"optim": {"kind": "muon"}}, "muon"),
    ({"model": MODELS["gpt1"]}, "norm_order"),
    ({"model": MODELS["palm"]}, 'model.block = "parallel"'),
    ({"model": MODELS["bloom"]}, "embedding_norm"),
    ({"model": {"logit_scale": 0.5}}, "logit_scale"),
    ({"model": MODELS["gpt2"] | {"qkv_bias": False}}, "qkv_bias"),
    ({"model": {"rope": {"scaling": "yarn", "factor": 4.0}}}, "yarn"),
    ({"model": {"kv_heads": 1}, "parallel": {"tp": 2}}, "kv_heads"),
    ({"engine": {"compile": "on"}}, "engine.compile"),
    ({"engine": {"megatron": {"transformer_engine": "on"}}}, "transformer_engine"),
    ({"engine": {"megatron": {"fp8": True}}}, "fp8"),
]


@pytest.mark.parametrize(("change", "named"), REFUSED, ids=[named for _, named in REFUSED])
def test_what_it_cannot_do_is_refused_with_the_way_out(dataset, tmp_path, change, named):
    from mikoshi.trainer.engines.layout import layout_of

    plain = engine_config(dataset, tmp_path, "llama", "megatron").model_dump(mode="json")
    for section, values in change.items():
        plain[section] = {**plain[section], **values}
    config = RunConfig.model_validate(plain)
    with pytest.raises(ConfigError, match=r'^engine\.kind = "megatron": ') as refusal:
        refuse(config, layout_of(config, 2), cuda=False)
    assert named in str(refusal.value)
    refuse(engine_config(dataset, tmp_path, "llama", "megatron"), layout_of(config, 2), cuda=False)


@pytest.mark.parametrize(
    ("found", "message"),
    [("0.15.3", "older than 0.16.1"), ("0.20.0", "older than 0.16.1, or 0.20"), (None, 'pip install "mikoshi[megatron]"')],
)
def test_another_version_is_refused(dataset, tmp_path, monkeypatch, found, message):
    import importlib.metadata

    from mikoshi.trainer.engines.layout import layout_of

    def version(name):
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    config = engine_config(dataset, tmp_path, "llama", "megatron")
    with pytest.raises(ConfigError) as refusal:
        refuse(config, layout_of(config, 1), cuda=False)
    assert message in str(refusal.value)


@pytest.mark.slow
def test_trained_by_the_command_and_gone_on_with_by_the_native_engine(mikoshi, dataset, tmp_path):
    from mikoshi.trainer.config.run import to_toml

    config = engine_config(dataset, tmp_path / "runs", "llama", "megatron", "tp=2", train={"steps": 4})
    (tmp_path / "run.toml").write_text(to_toml(config))
    code, out, errors = mikoshi("train", tmp_path / "run.toml", "--ranks", 2, "engine.device=cpu")
    assert (code, errors) == (0, []), out
    more = ("engine.kind=native", "parallel.tp=1", "train.steps=6", "engine.device=cpu")
    code, out, errors = mikoshi("train", tmp_path / "run.toml", "--ranks", 1, *more)
    assert (code, errors) == (0, []), out
    lines = (tmp_path / "runs" / "test" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if "loss" in json.loads(line)] == [1, 2, 3, 4, 5, 6]


def test_no_other_engine_imports_it():
    import subprocess

    found = "any(name.startswith(('megatron.core', 'deepspeed')) for name in sys.modules)"
    code = f"import sys, mikoshi.trainer.train.loop, mikoshi.trainer.train.preflight; sys.exit({found})"
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
