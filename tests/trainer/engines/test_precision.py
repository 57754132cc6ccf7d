"""Where a config leaves the precision open, it is decided by what the devices have, once, and said."""

import pytest

from layouts import BASE, MODELS
from mikoshi.trainer.config.run import RunConfig, load_config, to_toml
from mikoshi.trainer.engines.layout import layout_of
from mikoshi.trainer.engines.limits import refuse
from mikoshi.trainer.engines.precision import choose_precision, has_bf16
from mikoshi.trainer.errors import ConfigError
from mikoshi.trainer.record.run_folder import RunFolder
from mikoshi.trainer.train.preflight import foresee
from runs import run_config

RING = {"parallel": {"cp": 2, "context_kind": "ring"}, "data": {"document_mask": False}}


def config(**sections):
    return run_config(".", ".", **{"engine": {"precision": "auto"}, "model": BASE, **sections})


def chosen(run, device, bf16_everywhere, world=1, begun=None):
    settled, notice = choose_precision(run, layout_of(run, world), device, bf16_everywhere, begun)
    return settled.engine.precision, notice


@pytest.mark.parametrize(
    ("device", "capability", "hip", "has"),
    [
        ("cpu", (0, 0), False, False), ("cuda", (7, 0), False, False), ("cuda", (7, 5), False, False),
        ("cuda", (8, 0), False, True),
        ("cuda", (8, 9), False, True), ("cuda", (9, 0), False, True), ("cuda", (10, 0), False, True),
        ("cuda", (12, 0), False, True),
        ("cuda", (9, 4), True, True),
    ],
)  # fmt: skip
def test_which_devices_have_bf16(device, capability, hip, has):
    assert has_bf16(device, capability, hip) is has


def test_gpus_that_have_bf16_compute_in_it_and_say_so():
    precision, notice = chosen(config(), "cuda", bf16_everywhere=True)
    assert precision == "bf16"
    assert notice.startswith("precision: bf16")
    precision, notice = chosen(config(), "cuda", bf16_everywhere=False)
    assert precision == "fp32"
    assert "without TF32" in notice


def test_a_cpu_stays_in_fp32():
    assert chosen(config(), "cpu", bf16_everywhere=False) == ("fp32", "")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("device", "bf16_everywhere"), [("cpu", False), ("cuda", True), ("cuda", False)])
def test_what_is_given_is_taken(precision, device, bf16_everywhere):
    assert chosen(config(engine={"precision": precision}), device, bf16_everywhere) == (precision, "")


def test_a_run_keeps_the_precision_that_it_was_begun_with():
    precision, notice = chosen(config(), "cuda", bf16_everywhere=True, begun="fp32")
    assert precision == "fp32"
    assert "as the run was begun" in notice


@pytest.mark.parametrize(
    ("sections", "precision"),
    [
        ({"parallel": {"zero": 0}}, "fp32"),
        ({"parallel": {"zero": 1}, "model": BASE | MODELS["mixtral"]}, "fp32"),
        ({"parallel": {"zero": 1}}, "bf16"),
    ],
)
def test_an_engine_that_cannot_have_bf16_goes_on_as_before(sections, precision):
    found, notice = chosen(
        config(**{**sections, "engine": {"kind": "deepspeed", "precision": "auto"}}), "cuda", bf16_everywhere=True
    )
    assert found == precision
    assert ("deepspeed cannot have bf16" in notice) == (precision == "fp32")


@pytest.mark.parametrize("kind", ["native", "megatron"])
def test_the_ring_in_fp32_is_refused_on_gpus_alone(kind):
    def requested(precision, cuda, **more):
        run = config(**RING, engine={"kind": kind, "precision": precision, **more})
        refuse(run, layout_of(run, 2), cuda, on_this_machine=False)

    with pytest.raises(ConfigError, match=r"context_kind = .ring. with engine.precision = .fp32. on CUDA: its flash kernel"):
        requested("fp32", True)
    with pytest.raises(ConfigError, match="half precision"):
        requested("fp32", None, device="cuda")
    for precision, cuda in [("fp32", False), ("fp32", None), ("bf16", True), ("auto", True)]:
        requested(precision, cuda)
    assert (
        chosen(config(**RING, engine={"kind": kind, "precision": "auto"}), "cuda", bf16_everywhere=True, world=2)[0] == "bf16"
    )


def test_the_ring_is_refused_before_any_rank_starts():
    run = config(**RING, engine={"precision": "fp32", "device": "cuda"})
    with pytest.raises(ConfigError, match="half precision"):
        foresee(run, 2)


def test_dynamic_rope_over_packed_documents_is_refused_before_any_rank_starts():
    model = BASE | {"rope": {"scaling": "dynamic", "factor": 2.0, "original_context": 32}}
    with pytest.raises(ConfigError, match="documents in one row cannot have"):
        foresee(config(model=model), 1)


def test_the_schema_names_the_three():
    (union,) = [RunConfig.model_json_schema()["$defs"]["EngineSection"]["properties"]["precision"]]
    assert union["enum"] == ["auto", "fp32", "bf16"]
    assert union["default"] == "auto"


def test_the_run_folder_and_its_checkpoints_have_what_was_decided(dataset, tmp_path, mikoshi):
    run = run_config(
        dataset, tmp_path / "runs", engine={"precision": "auto"}, train={"steps": 2}, recovery={"restarts": 0},
        log={"tensorboard": False},
    )  # fmt: skip
    (tmp_path / "run.toml").write_text(to_toml(run))
    assert mikoshi("train", "run.toml", "run.name=test")[0] == 0
    assert load_config(RunFolder(tmp_path / "runs/test").path).engine.precision == "fp32"
    code, out, _ = mikoshi("train", "run.toml", "run.name=test", "train.steps=3", "engine.precision=bf16")
    assert code == 0
    assert "changed since step 2: engine.precision: fp32 -> bf16" in out
    code, out, _ = mikoshi("train", "run.toml", "run.name=test", "train.steps=4")
    assert code == 0
    assert 'precision: bf16, as the run was begun (engine.precision = "auto")' in out
    assert "engine.precision:" not in out
