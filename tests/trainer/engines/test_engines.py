"""Any engine goes on from any other's checkpoint, under another layout: the same state, and the same next losses."""

import itertools

import pytest
import torch

from engines import engine_config, go_on, save_after

pytest.importorskip("megatron.core")
pytest.importorskip("deepspeed")

# Two layouts an engine: the one it saves under, and the one it goes on under.
PLACES = {
    "native": [(2, "tp=2"), (2, "zero=3")],
    "deepspeed": [(2, "zero=2"), (4, "zero=3")],
    "megatron": [(4, "tp=2 zero=3"), (4, "tp=2 pp=2")],
}
PAIRS = [*itertools.permutations(PLACES, 2), *((kind, kind) for kind in ("deepspeed", "megatron"))]


def assert_same(found, saved, before, after):
    """The state to the bit, and the losses to fp32 rounding."""
    assert found.keys() == saved.keys()
    for name, tensor in saved.items():
        assert torch.equal(found[name], tensor), name
    for (loss, norm, tokens, applied), one in zip(after, before, strict=True):
        assert (tokens, applied) == (one[2], True)
        assert (loss, norm) == pytest.approx(one[:2], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["gpt2", pytest.param("llama", marks=pytest.mark.soak)])
@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_gone_on_with_by_another_engine(ranks, dataset, tmp_path, model, one, other):
    (world, layout), (elsewhere, other_layout) = PLACES[one][0], PLACES[other][1]
    saved = engine_config(dataset, tmp_path, model, one, layout)
    (state, before), *_ = ranks.run(save_after, saved, tmp_path / "saved", 3, world=world)
    config = engine_config(dataset, tmp_path, model, other, other_layout)
    for found, after in ranks.run(go_on, config, tmp_path / "saved", world=elsewhere):
        assert_same(found, state, before, after)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["llama", pytest.param("gpt2", marks=pytest.mark.soak)])
def test_handed_round_all_engines(ranks, dataset, tmp_path, model):
    """native tp 2 -> deepspeed ZeRO 3 -> megatron tp 2 x pp 2 -> native: every state handed on is the first one."""

    def config(kind, layout):
        return engine_config(dataset, tmp_path, model, kind, layout)

    (state, before), *_ = ranks.run(save_after, config("native", "tp=2"), tmp_path / "saved", 3, world=2)
    for kind, world, layout in [("deepspeed", 4, "zero=3"), ("megatron", 4, "tp=2 pp=2"), ("native", 1, "")]:
        for found, after in ranks.run(go_on, config(kind, layout), tmp_path / "saved", world=world):
            assert_same(found, state, before, after)
