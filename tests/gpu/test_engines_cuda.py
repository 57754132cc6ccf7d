"""What only a GPU can show of the other engines: the native one's bits and losses in fp32 and bf16, Transformer Engine, FP8."""

import pytest
import torch
from torch.distributed.tensor import DTensor

from mikoshi.parallel.process.process_group import World, join, leave
from mikoshi.trainer.engines.build import build_engine
from mikoshi.trainer.engines.limit import installed
from mikoshi.trainer.engines.limits import refuse
from mikoshi.trainer.errors import ConfigError
from runs import GPT2_MODEL, TINY_MODEL, data_layout, loader_of, run_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
PACKAGES = {"deepspeed": "deepspeed", "megatron": "megatron.core"}
STEPS, ZERO = 10, 1
# FlexAttention wants heads of at least 16 elements; FP8 wants sizes that 16 divides.
LLAMA = {**TINY_MODEL, "width": 64, "mlp_width": 128}
MODELS = {"llama": LLAMA, "gpt2": {**GPT2_MODEL, "width": 64}}


@pytest.fixture(scope="module")
def group():
    """One for all: DeepSpeed remembers the first that it saw."""
    join(World(), CUDA)
    yield
    leave()


@pytest.fixture(autouse=True)
def exact_products():
    """No TF32, which would round the products of one engine and not of another."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def config_of(dataset, folder, kind, model, **engine):
    """A config that the engine can carry here; skipped, with its own reason, where it cannot."""
    plain = {"kind": kind, "compile": "off", **engine}
    # No document mask: Transformer Engine's attention has none.
    config = run_config(dataset, folder, model=model, engine=plain, data={"document_mask": False})
    if kind != "native":
        if not installed(PACKAGES[kind]):
            pytest.skip(f"{kind} is not installed")
        try:
            refuse(config, data_layout(config, 1, ZERO), True)
        except ConfigError as error:
            pytest.skip(str(error))
    return config


def steps(config):
    """Initial weights by name, and the figures of the first steps, on one GPU."""
    layout = data_layout(config, 1, ZERO)
    loader, engine = loader_of(config, layout, 0), build_engine(config, layout, CUDA)
    state = {name: value for name, value in engine.state().items() if name.startswith("model.")}
    first = {
        name: (v.full_tensor() if isinstance(v, DTensor) else v).detach().float().cpu().clone() for name, v in state.items()
    }
    return first, [engine.step(loader.batch(step), 1e-3) for step in range(STEPS)]


def assert_near(found, exact, loss, norm):
    for ours, theirs in zip(found, exact, strict=True):
        assert ours.applied and theirs.applied
        assert ours.tokens == theirs.tokens
        assert ours.loss == pytest.approx(theirs.loss, rel=loss)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=norm)


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("model", list(MODELS))
@pytest.mark.parametrize("kind", list(PACKAGES))
def test_fp32_is_the_native_engines_run(dataset, tmp_path, kind, model):
    # Its own kernels round otherwise: the same layers as on a CPU.
    other = config_of(dataset, tmp_path, kind, MODELS[model], megatron={"transformer_engine": "off"})
    first, exact = steps(config_of(dataset, tmp_path, "native", MODELS[model]))
    weights, found = steps(other)
    assert weights.keys() == first.keys()
    assert all(torch.equal(weights[name], first[name]) for name in first), "initial weights, to the bit"
    assert_near(found, exact, 1e-5, 1e-4)


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("model", list(MODELS))
@pytest.mark.parametrize("kind", list(PACKAGES))
def test_bf16_follows_the_native_engines_fp32(dataset, tmp_path, kind, model):
    other = config_of(dataset, tmp_path, kind, MODELS[model], precision="bf16", megatron={"transformer_engine": "off"})
    first, exact = steps(config_of(dataset, tmp_path, "native", MODELS[model]))
    weights, found = steps(other)
    assert all(torch.equal(weights[name], first[name]) for name in first), "master weights begin as the same bits"
    assert_near(found, exact, 5e-3, 5e-2)


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("model", list(MODELS))
@pytest.mark.skipif(not installed("transformer_engine"), reason="Transformer Engine is not installed")
def test_transformer_engines_layers_train_the_same_run(dataset, tmp_path, model):
    other = config_of(
        dataset, tmp_path, "megatron", MODELS[model], precision="bf16", megatron={"transformer_engine": "on"}
    )  # fmt: skip
    _, exact = steps(config_of(dataset, tmp_path, "native", MODELS[model]))
    assert_near(steps(other)[1], exact, 5e-3, 5e-2)


@pytest.mark.usefixtures("group")
@pytest.mark.skipif(not installed("transformer_engine"), reason="Transformer Engine is not installed")
def test_fp8_learns_what_bf16_learns(dataset, tmp_path):
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no FP8")
    eighth = config_of(
        dataset, tmp_path, "megatron", LLAMA, precision="bf16", megatron={"transformer_engine": "on", "fp8": True}
    )  # fmt: skip
    _, exact = steps(config_of(dataset, tmp_path, "native", LLAMA, precision="bf16"))
    assert_near(steps(eighth)[1], exact, 2e-2, 2e-1)


def test_engines_are_compared_on_a_gpu(dataset, tmp_path, mikoshi):
    """Each that is installed runs; MFU is not known in fp32, memory is the allocator's."""
    import json

    from mikoshi.trainer.config.run import to_toml

    config = run_config(dataset, tmp_path / "runs", model=LLAMA, engine={"compile": "off"}, data={"document_mask": False})
    (tmp_path / "run.toml").write_text(to_toml(config))
    code, out, errors = mikoshi(
        "compare", "run.toml", "--engines", "native,deepspeed,megatron", "--ranks", 1, "--steps", 5, "--rounds", 2, "--json"
    )  # fmt: skip
    assert (code, errors) == (0, [])
    for one in json.loads(out)["contestants"]:
        if one["engine"] != "native" and not installed(PACKAGES[one["engine"]]):
            assert one["refused"]
            continue
        assert one["figures"]["loss"]["relative"] < 1e-3, one["refused"]
        assert one["figures"]["reserved"][0] >= one["figures"]["memory"][0] > 0
