"""Generation through any layout: the next token's logits are those of the plain model."""

import pytest
import torch

from layouts import BASE, MODELS, degrees
from mikoshi.trainer.engines.build import build_engine
from mikoshi.trainer.engines.layout import layout_of
from mikoshi.trainer.generation.generate import Sampling, generate, generate_together
from mikoshi.trainer.model.gpt import GPT
from runs import run_config

PROMPT = [5, 9, 200, 31, 8]


def told(config):
    import torch.distributed as dist

    engine = build_engine(config, layout_of(config, dist.get_world_size()), torch.device("cpu"))
    ids = list(generate_together(engine, PROMPT, 6, Sampling(temperature=0), end=-1))
    return engine.next_logits(PROMPT), engine.next_logits(PROMPT * 20), ids


def alone(config):
    """The plain model, with the weights of the same seed, no engine and no process group's help."""
    engine = build_engine(config, layout_of(config, 1), torch.device("cpu"))
    model = GPT(config.model)
    model.load_state_dict({name: p.detach() for name, p in engine.named})
    window = (PROMPT * 20)[-config.train.context :]
    with torch.no_grad():
        logits = [model(torch.tensor([ids]))[0, -1] for ids in (PROMPT, window)]
    return *logits, list(generate(model.eval(), PROMPT, 6, Sampling(temperature=0), end=-1))


@pytest.mark.parametrize(
    ("model", "world", "layout"),
    [
        ("llama", 1, ""), ("llama", 2, "zero=3"), ("gpt2", 4, "tp=2 pp=2 schedule=zbv"), ("llama", 4, "cp=2 tp=2"),
        ("bloom", 4, "cp=2 pp=2 context_kind=ulysses"), ("mixtral", 4, "ep=2 pp=2 schedule=interleaved"),
    ],
)  # fmt: skip
def test_next_logits_are_the_plain_models(ranks, dataset, tmp_path, model, world, layout):
    def config(layout):
        return run_config(
            dataset, tmp_path, model=BASE | MODELS[model], parallel=degrees(layout), train={"global_batch": 16}
        )  # fmt: skip

    ((short, long, ids),) = ranks.run(alone, config(""), world=1)
    for found_short, found_long, found_ids in ranks.run(told, config(layout), world=world):
        torch.testing.assert_close(found_short, short, atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(found_long, long, atol=2e-6, rtol=1e-5)
        assert found_ids == ids
