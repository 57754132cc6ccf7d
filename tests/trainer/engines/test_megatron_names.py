"""The name table against Megatron-core's own GPTModel: every parameter of both is the other's, once, in every layout."""

import pytest
import torch

from megatron_gpt import gpt_model, on_cpu
from mikoshi.trainer.engines.megatron.names import cut_of, names_of, rows_of
from mikoshi.trainer.model.config import ModelConfig
from mikoshi.trainer.model.gpt import GPT
from runs import GPT2_MODEL, TINY_MODEL

pytest.importorskip("megatron.core")

MODELS = {
    "gpt2": GPT2_MODEL,
    "llama": TINY_MODEL,
    "qwen3": {**TINY_MODEL, "qk_norm": True},
    "qwen2": {**TINY_MODEL, "qkv_bias": True, "tied": True},
}


def parameters(shape, tp):
    """Of this rank: name -> shape, and as its checkpoint has them: name -> layers."""
    model = ModelConfig.model_validate(shape)
    with on_cpu(tp):
        built = gpt_model(model, tp)
        stored = [t.key for t in built.sharded_state_dict(metadata={"non_homogeneous_layers": True}).values()]
        return {name: tuple(p.shape) for name, p in built.named_parameters()}, stored


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("shape", MODELS.values(), ids=MODELS)
def test_each_parameter_is_the_others_once(ranks, shape, tp):
    model = ModelConfig.model_validate(shape)
    with torch.device("meta"):
        ours = {name: tuple(p.shape) for name, p in GPT(model).named_parameters()}
    seen = {name: torch.zeros(shape[0], dtype=torch.int64) for name, shape in ours.items()}
    for rank, (theirs, _) in enumerate(ranks.run(parameters, shape, tp, world=tp)):
        for name, size in theirs.items():
            rows = rows_of(name, model, tp, rank)
            columns = tuple(n // tp if cut_of(name) == 1 else n for n in ours[rows[0].name][1:])
            assert size == (sum(run.count for run in rows), *columns), name
            for run in rows:
                assert ours[run.name][1:] == ours[rows[0].name][1:], name
                if rank == 0 or cut_of(name) == 0:
                    seen[run.name][run.first : run.first + run.count] += 1
    assert all((rows == 1).all() for rows in seen.values()), [name for name, rows in seen.items() if (rows != 1).any()]


@pytest.mark.parametrize("shape", MODELS.values(), ids=MODELS)
def test_the_names_on_disk_are_those_of_its_own_checkpoints(ranks, shape):
    ((_, stored),) = ranks.run(parameters, shape, 1, world=1)
    model = ModelConfig.model_validate(shape)
    assert sorted(names_of(model)) == sorted({name for name in stored if "_extra_state" not in name})


def test_a_name_that_is_none_of_a_dense_gpt_is_no_parameter():
    model = ModelConfig.model_validate(TINY_MODEL)
    for name in (
        "decoder.layers.0.mlp.router.weight",
        "decoder.layers.0.linear_qkv",
        "x",
        "decoder.layers.x.input_layernorm.weight",
    ):
        with pytest.raises(KeyError):
            rows_of(name, model)
