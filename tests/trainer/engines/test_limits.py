"""The documentation prints the table of what engines cannot do, and every row of it can be met."""

from pathlib import Path

import pytest

from layouts import BASE, MODELS
from mikoshi.parallel.errors import LayoutError
from mikoshi.trainer.config.run import RunConfig
from mikoshi.trainer.config.toml import override
from mikoshi.trainer.engines.layout import layout_of
from mikoshi.trainer.engines.limit import Case
from mikoshi.trainer.engines.limits import LIMITS, markdown, refuse
from mikoshi.trainer.engines.megatron import limits as megatron_limits
from mikoshi.trainer.errors import ConfigError
from mikoshi.trainer.train.preflight import preflight
from runs import run_config

DOCS = Path(__file__).parents[3] / "docs" / "engines.md"


def test_the_documentation_prints_the_table():
    """After a change: python -c 'from mikoshi.trainer.engines.limits import markdown; print(markdown())'."""
    assert markdown() in DOCS.read_text()


def test_every_row_says_what_why_and_what_instead():
    for limit in LIMITS:
        assert limit.what
        assert limit.why
        assert limit.instead
        assert "|" not in limit.what + limit.why + limit.instead, "a table's cells"
    assert len({(limit.engine, limit.what) for limit in LIMITS}) == len(LIMITS)


TE = "engine.megatron.transformer_engine"
FP8 = "engine.megatron.fp8"


def fused(folder, *changes, **model):
    """A config that asks Megatron for what Transformer Engine has; by default nothing of it goes against that."""
    plain = run_config("nowhere", folder, model=BASE | model, data={"document_mask": False}, train={"context": 32})
    values = plain.model_dump(mode="json", exclude_none=True)
    override(RunConfig, values, {}, ["engine.kind=megatron", "engine.precision=bf16", *changes])
    return type(plain).model_validate(values)


def message(config, cuda, on_this_machine=True):
    """The rows of Transformer Engine that a config meets."""
    case = Case(config, layout_of(config, 1), cuda, on_this_machine)
    rows = [row.what for row in megatron_limits.MEGATRON if row.applies(case)]
    return [what for what in rows if "ransformer" in what or "fp8" in what]


@pytest.mark.parametrize(
    ("requested", "why"),
    [
        ([f"{FP8}=true"], f"{FP8} = true without Transformer Engine on CUDA"),
        ([f"{TE}=on"], f'{TE} = "on" without Transformer Engine on CUDA'),
        ([f"{FP8}=true", f"{TE}=off"], f"{FP8} = true without Transformer Engine on CUDA"),
    ],
)
def test_without_cuda_that_alone_is_the_reason(tmp_path, requested, why):
    """Whatever else of the run Transformer Engine could not do."""
    wrong = ["data.document_mask=true", "engine.precision=fp32", "engine.recompute=full"]
    assert message(fused(tmp_path, *requested, *wrong, width=24, heads=2, kv_heads=2), cuda=False) == [why]


def test_a_run_on_this_machine_is_told_what_this_machine_lacks(tmp_path, monkeypatch):
    """With engine.device = "auto", of which a submitting machine knows nothing."""
    pytest.importorskip("megatron.core")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError) as refusal:
        preflight(fused(tmp_path, f"{FP8}=true", "data.document_mask=true"), 1)
    assert f"{FP8} = true without Transformer Engine on CUDA" in str(refusal.value)
    assert "document_mask" not in str(refusal.value)


@pytest.mark.parametrize(
    ("changes", "model", "why"),
    [
        (["data.document_mask=true"], {}, ["Transformer Engine with data.document_mask = true"]),
        ([], {"windows": [8]}, ["Transformer Engine with model.windows other than 0"]),
        ([], {"position": "alibi"}, ['Transformer Engine with model.position = "alibi"']),
        ([], {"moe": MODELS["mixtral"]["moe"]}, ["Transformer Engine with model.moe"]),
        (["engine.recompute=full"], {}, ['Transformer Engine with engine.recompute other than "none"']),
        (["engine.precision=fp32"], {}, ['Transformer Engine with engine.precision = "fp32"']),
        ([f"{TE}=off"], {}, [f'{FP8} = true with {TE} = "off"']),
    ],
)
def test_on_gpus_each_reason_is_a_row_and_its_ways_out_work(tmp_path, changes, model, why):
    config = fused(tmp_path, f"{FP8}=true", *changes, **model)
    assert message(config, cuda=None, on_this_machine=False) == why
    (row,) = [row for row in LIMITS if row.what == why[0]]
    for way in row.instead.split(", or "):
        after = fused(tmp_path, f"{FP8}=true", *changes, *way.split(), **({} if "windows" in way else model))
        assert message(after, cuda=None, on_this_machine=False) == []


def test_what_transformer_engine_serves_is_not_refused(tmp_path):
    config = fused(tmp_path, f"{FP8}=true", f"{TE}=on")
    assert not megatron_limits.unsupported_by_transformer_engine(config, layout_of(config, 1))
    refuse(config, layout_of(config, 1), cuda=None, on_this_machine=False)


@pytest.mark.parametrize(("kind", "message"), [("native", {"tp=2", "tp=1", "tp=1 cp=2"}), ("deepspeed", {"tp=1"})])
def test_layouts_that_are_suggested_are_those_the_engine_can_have(tmp_path, kind, message):
    changes = {"parallel": {"tp": 3}, "engine": {"kind": kind}}
    with pytest.raises(LayoutError) as error:
        layout_of(run_config("nowhere", tmp_path, model=BASE, **changes), 2)
    ways = str(error.value).partition("nearest that work: ")[2].replace("parallel.", "").split(" | ")
    assert set(ways) == message
    for way in ways:
        degrees = {key: int(value) for key, _, value in (word.partition("=") for word in way.split())}
        config = run_config("nowhere", tmp_path, model=BASE, **changes | {"parallel": degrees})
        refuse(config, layout_of(config, 2), cuda=None, on_this_machine=False)
