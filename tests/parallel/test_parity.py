"""The layout is not the run: every dimension of parallelism, alone and with others, computes what one rank computes.

Each case trains five steps on packed documents of unequal length and is compared with one rank: the same initial bits,
losses and gradient norms to a relative 1e-5, evaluation too, the same experts chosen, the same weights to rounding.
"""

import hashlib
import json
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy

from layouts import BASE, MODELS, degrees
from mikoshi.trainer.engines.batches import scale_balance_losses
from mikoshi.trainer.feed.feed import open_feed
from mikoshi.trainer.model.gpt import GPT
from runs import engine_and_rows, held_out_of, run_config, whole_state

# Model, ranks, layout. The data ranks are what the degrees leave over.
CASES = [
    # each dimension alone
    ("llama", 2, "zero=0"), ("llama", 2, "zero=1"), ("llama", 2, "zero=2"), ("llama", 2, "zero=3"),
    ("gpt2", 4, "zero=1"), ("gpt2", 8, "zero=3"), ("llama", 4, "zero=2 replicas=2"), ("gpt2", 8, "zero=3 replicas=2"),
    ("llama", 2, "tp=2"), ("qwen3", 4, "tp=4"), ("gpt2", 2, "tp=2"), ("gpt1", 2, "tp=2"), ("bloom", 4, "tp=4"),
    ("palm", 2, "tp=2"), ("mistral", 2, "tp=2"),
    ("llama", 2, "cp=2"), ("llama", 4, "cp=4"), ("mistral", 4, "cp=4"), ("bloom", 2, "cp=2"), ("gpt2", 2, "cp=2"),
    ("llama", 2, "cp=2 context_kind=ulysses"), ("llama", 4, "cp=4 context_kind=ulysses"),
    ("bloom", 4, "cp=4 context_kind=ulysses"), ("mistral", 2, "cp=2 context_kind=ulysses"),
    ("llama", 2, "pp=2 schedule=gpipe"), ("llama", 4, "pp=4"), ("gpt2", 2, "pp=2"),
    ("gpt2", 2, "pp=2 schedule=interleaved"),
    ("qwen3", 4, "pp=4 schedule=interleaved-zb"), ("gpt2", 2, "pp=2 schedule=interleaved-zb"),
    ("gpt2", 2, "pp=2 schedule=zbv"), ("qwen3", 4, "pp=4 schedule=zbv"), ("gpt2", 2, "pp=2 schedule=dualpipev"),
    ("qwen3", 4, "pp=4 schedule=dualpipev"), ("qwen3", 2, "pp=2 schedule=interleaved virtual_stages=4"),
    ("mixtral", 2, "ep=2"), ("mixtral", 4, "ep=4"), ("deepseek", 4, "ep=4"), ("deepseek", 4, "ep=2 zero=3"),
    # pairs
    ("llama", 4, "tp=2 zero=0"), ("llama", 4, "tp=2 zero=1"), ("gpt2", 4, "tp=2 zero=2"), ("qwen3", 8, "tp=4 zero=3"),
    ("llama", 4, "tp=2 cp=2"), ("bloom", 4, "tp=2 cp=2"), ("qwen3", 8, "tp=2 cp=4"),
    ("llama", 4, "tp=2 cp=2 context_kind=ulysses"),
    ("gpt2", 4, "tp=2 pp=2 schedule=gpipe"), ("llama", 4, "tp=2 pp=2"), ("gpt2", 4, "tp=2 pp=2 schedule=interleaved"),
    ("llama", 4, "tp=2 pp=2 schedule=interleaved-zb"), ("gpt2", 4, "tp=2 pp=2 schedule=zbv"),
    ("llama", 4, "tp=2 pp=2 schedule=dualpipev"), ("palm", 4, "tp=2 pp=2"),
    ("llama", 4, "cp=2 zero=0"), ("gpt2", 4, "cp=2 zero=3"), ("mistral", 4, "cp=2 pp=2"),
    ("gpt2", 4, "cp=2 pp=2 schedule=zbv"),
    ("gpt2", 4, "pp=2 zero=0"), ("llama", 4, "pp=2 zero=1"), ("gpt2", 4, "pp=2 zero=3"),
    ("llama", 4, "pp=2 schedule=zbv zero=3"),
    ("mixtral", 2, "tp=2"), ("mixtral", 2, "tp=2 ep=2 expert_tp=1"), ("mixtral", 4, "tp=2 ep=2"),
    ("deepseek", 4, "tp=2 ep=4 expert_tp=1"),
    ("mixtral", 4, "cp=2 ep=2"), ("mixtral", 4, "cp=2 ep=4"), ("mixtral", 4, "pp=2 ep=2"),
    ("deepseek", 4, "pp=2 ep=2 schedule=zbv"),
    ("mixtral", 4, "ep=2 zero=0"), ("deepseek", 8, "ep=2 zero=3 replicas=2"),
    # rows that do not come out even: the last ranks have padding
    ("llama", 3, "zero=0"), ("gpt2", 6, "tp=2 zero=3"), ("llama", 6, "pp=2"),
    # three and more
    ("llama", 8, "tp=2 pp=2 zero=2"), ("gpt2", 8, "tp=2 pp=2 zero=3"), ("gpt2", 8, "tp=2 pp=2 zero=1 schedule=zbv"),
    ("llama", 8, "cp=2 tp=2 zero=2"), ("bloom", 8, "cp=2 tp=2 zero=3 context_kind=ulysses"),
    ("mixtral", 8, "ep=2 tp=2 pp=2"), ("deepseek", 8, "ep=4 tp=2 pp=2 expert_tp=1 schedule=interleaved-zb"),
    ("gpt2", 8, "cp=2 tp=2 pp=2"), ("qwen3", 8, "tp=2 pp=2 replicas=2 schedule=dualpipev"),
    ("mixtral", 8, "ep=4 cp=2 zero=3"), ("mixtral", 8, "ep=2 tp=2 cp=2"),
]  # fmt: skip
FAST = {("qwen3", "tp=4"), ("llama", "cp=4")}
"""One of a kind: test_any_layout.py draws layouts of three axes, and the slow tests have all."""


def digest(tensor):
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()


def train(config):
    """Initial digests, the figures of every step, the evaluation and the final weights, as this rank sees them."""
    engine, loader = engine_and_rows(config)
    held_out = held_out_of(config, engine.layout, dist.get_rank())
    initial = {name: digest(t) for name, t in whole_state(dict(engine.named)).items()}
    gradients = first_gradients(engine, loader.batch(0))
    steps = [engine.step(loader.batch(step), config.optim.lr) for step in range(config.train.steps)]
    evaluation = engine.evaluate(held_out)
    return initial, steps, evaluation, whole_state(dict(engine.named)), gradients


def first_gradients(engine, batch):
    """The whole gradients of the summed loss, before any optimizer has a say."""
    engine.pipeline.step(engine._micro_batches(batch))
    engine._sum_tied_gradients()
    found = whole_state({name: p.grad for name, p in engine.named if p.grad is not None})
    for p in engine.parameters:
        p.grad = None
    for _, layer in engine.experts:
        layer.take_load()
    return found


def config_of(dataset, folder, model, layout="", mask=True):
    return run_config(
        dataset, folder, model=BASE | MODELS[model], parallel=degrees(layout), train={"global_batch": 16},
        optim={"lr": 1e-3}, data={"document_mask": mask}, eval={"batches": 2},
    )  # fmt: skip


_references = {}


def reference(ranks, config):
    key = json.dumps(config.model_dump(mode="json", include={"model", "train", "data", "optim"}), sort_keys=True)
    if key not in _references:
        (_references[key],) = ranks.run(train, config, world=1)
    return _references[key]


def assert_same_run(found, alone):
    """`found`: what every rank says; `alone`: what one rank says."""
    for initial, steps, evaluation, weights, gradients in found:
        assert initial == alone[0], "the same initial bits"
        for step, one in zip(steps, alone[1], strict=True):
            assert step.applied
            assert step.tokens == one.tokens
            assert step.loss == pytest.approx(one.loss, rel=1e-5)
            assert step.grad_norm == pytest.approx(one.grad_norm, rel=1e-5)
            assert step.more == pytest.approx(one.more, abs=1e-12)
        assert steps[0].loss == pytest.approx(alone[1][0].loss, rel=1e-6)
        assert evaluation == pytest.approx(alone[2], rel=1e-5)
        assert gradients.keys() == alone[4].keys()
        for name, gradient in gradients.items():
            assert (gradient - alone[4][name]).norm() <= 1e-5 * alone[4][name].norm() + 1e-6, name
        for name, weight in weights.items():
            # AdamW divides by the gradient's own size: where that is rounding, one step may differ by a part of lr.
            difference = (weight - alone[3][name]).abs()
            assert difference.max() <= 5e-4, name
            assert difference.mean() <= 2e-6, name


def case(model, world, layout):
    fast = (model, layout) in FAST
    return pytest.param(model, world, layout, id=f"{model}-{world}-{layout}", marks=[] if fast else [pytest.mark.slow])


@pytest.mark.parametrize(("model", "world", "layout"), [case(*c) for c in CASES])
def test_the_same_run(ranks, dataset, tmp_path, model, world, layout):
    alone = reference(ranks, config_of(dataset, tmp_path, model))
    assert_same_run(ranks.run(train, config_of(dataset, tmp_path, model, layout), world=world), alone)


@pytest.mark.parametrize(
    ("model", "world", "layout"),
    [
        ("llama", 4, "cp=2 zero=3"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("llama", 2, "tp=2"), ("gpt2", 2, "pp=2 schedule=zbv"), ("mixtral", 2, "ep=2"), ("deepseek", 4, "tp=2 ep=2"),
                ("gpt2", 4, "zero=2 replicas=2"),
            ]
        ),
    ],
)  # fmt: skip
def test_bf16_is_the_same_run_to_its_own_rounding(ranks, dataset, tmp_path, model, world, layout):
    def config(layout):
        config = config_of(dataset, tmp_path, model, layout)
        return config.model_copy(update={"engine": config.engine.model_copy(update={"precision": "bf16"})})

    ((_, steps1, evaluation1, *_),) = ranks.run(train, config(""), world=1)
    for _, steps, evaluation, *_ in ranks.run(train, config(layout), world=world):
        for step, one in zip(steps, steps1, strict=True):
            assert step.loss == pytest.approx(one.loss, rel=1e-3)
            assert step.grad_norm == pytest.approx(one.grad_norm, rel=2e-2)
        assert evaluation == pytest.approx(evaluation1, rel=1e-3)


@pytest.mark.parametrize(
    ("model", "world", "layout"),
    [
        *(
            pytest.param(model, 4, layout, marks=pytest.mark.slow)
            for model, layout in [
                ("mixtral", "ep=2 tp=2"), ("mixtral", "zero=3"),
                ("mixtral", "zero=0"), ("mixtral", "tp=2"), ("mixtral", "tp=4"), ("mixtral", "ep=4"),
                ("mixtral", "ep=4 tp=2 expert_tp=1"), ("deepseek", "tp=2 ep=2 zero=3"), ("deepseek", "pp=2 ep=2"),
                ("deepseek", "ep=2 zero=3"), ("deepseek", "ep=2 replicas=2"),
                ("mixtral", "cp=2 ep=2"), ("mixtral", "ep=2 offload=optimizer"),
            ]
        ),
        pytest.param("mixtral", 8, "zero=3", marks=pytest.mark.slow),  # more shards than experts
        pytest.param("mixtral", 8, "tp=2 zero=3", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_muon_moves_every_expert_as_on_one_rank(ranks, dataset, tmp_path, model, world, layout):
    def config(layout):
        config = config_of(dataset, tmp_path, model, layout)
        return config.model_copy(update={"optim": config.optim.model_copy(update={"kind": "muon"})})

    alone = reference(ranks, config(""))
    assert_same_run(ranks.run(train, config(layout), world=world), alone)


@pytest.mark.parametrize(
    ("world", "layout"), [(1, "zero=2"), (4, "tp=2 zero=3"), pytest.param(4, "pp=2 zero=2", marks=pytest.mark.slow)]
)
def test_optimizer_state_in_the_hosts_memory(ranks, dataset, tmp_path, world, layout):
    alone = reference(ranks, config_of(dataset, tmp_path, "gpt2"))
    config = config_of(dataset, tmp_path, "gpt2", f"{layout} offload=optimizer")
    assert_same_run(ranks.run(train, config, world=world), alone)


@pytest.mark.parametrize(
    "layout",
    [
        "cp=2 tp=2",
        "cp=4 context_kind=ulysses",
        "cp=4 context_kind=ring",
        *(pytest.param(layout, marks=pytest.mark.slow) for layout in ("pp=2 tp=2", "cp=2 tp=2 context_kind=ring")),
    ],
)
def test_rows_read_as_one_document(ranks, dataset, tmp_path, layout):
    alone = reference(ranks, config_of(dataset, tmp_path, "llama", mask=False))
    assert_same_run(ranks.run(train, config_of(dataset, tmp_path, "llama", layout, mask=False), world=4), alone)


def evaluations(config):
    """The loss over the tokenizer's ids, that over all rows of the head, and the same two by torch alone."""
    engine, _ = engine_and_rows(config)
    known = open_feed(config).tokenizer.vocab
    found = [engine.evaluate(held_out_of(config, engine.layout, dist.get_rank()), ids) for ids in (known, None)]
    weights = whole_state({name: p.detach() for name, p in engine.named})
    if engine.layout.world > 1:
        return found
    model = GPT(config.model)
    model.load_state_dict(weights)
    expected = []
    for ids in (known, config.model.vocab):
        losses = []
        for rows in held_out_of(config, engine.layout, 0):
            arrays = (rows.tokens, None, rows.docs, rows.positions)
            with torch.no_grad():
                logits = model(*(None if array is None else torch.from_numpy(array) for array in arrays))[..., :ids]
            labels = torch.from_numpy(rows.labels)
            losses.append(cross_entropy(logits[labels >= 0], labels[labels >= 0], reduction="none"))
        expected.append(float(torch.cat(losses).mean()))
    return found, expected


@pytest.mark.parametrize(
    ("world", "layout", "kind"),
    [(2, "zero=3", "native"), (4, "tp=4", "native"), (4, "tp=2 pp=2", "native"), (2, "cp=2", "native"),
     (2, "zero=1", "deepspeed"), pytest.param(2, "pp=2 zero=1", "deepspeed", marks=pytest.mark.slow),
     (2, "tp=2", "megatron"), pytest.param(4, "tp=4", "megatron", marks=pytest.mark.slow)],
)  # fmt: skip
def test_a_held_out_loss_leaves_out_rows_that_pad_the_vocabulary(ranks, dataset, tmp_path, world, layout, kind):
    """Of tp=4, two ranks hold nothing but such rows."""
    if kind != "native":
        pytest.importorskip({"deepspeed": "deepspeed", "megatron": "megatron.core"}[kind])

    def config(layout, kind="native"):
        return run_config(
            dataset, tmp_path, model=BASE | MODELS["llama"] | {"vocab": 1280, "kv_heads": 4}, parallel=degrees(layout),
            train={"global_batch": 16}, eval={"batches": 2}, engine={"kind": kind},
        )  # fmt: skip

    if "padded" not in _references:
        _references["padded"] = ranks.run(evaluations, config(""), world=1)[0]
    found, (known, every) = _references["padded"]
    assert found == pytest.approx([known, every], rel=1e-5)
    assert known < every - 0.5
    for mine in ranks.run(evaluations, config(layout, kind), world=world):
        assert mine == pytest.approx([known, every], rel=1e-5)


MASKED = [
    ("mixtral", 2, "ep=2 zero=3"), ("mixtral", 4, "cp=2 ep=2"), ("mixtral", 4, "cp=2 tp=2"), ("deepseek", 4, "tp=2 pp=2"),
    ("mixtral", 2, "cp=2 context_kind=ulysses"), ("deepseek", 4, "pp=2 ep=2 schedule=zbv"), ("mixtral", 2, "tp=2"),
]  # fmt: skip


def masked_config(dataset, folder, model, layout="", packing="fit", kind="native", **moe):
    """Prompts are masked and rows end in padding; the losses of balance weigh as much as that of the text."""
    shape = BASE | MODELS[model]
    shape = shape | {"moe": shape["moe"] | {"aux_loss": 0.5, "z_loss": 0.1} | moe}
    return run_config(
        dataset, folder, model=shape, parallel=degrees(layout), train={"global_batch": 8, "micro_batch": 1},
        optim={"lr": 1e-3}, data={"packing": packing}, engine={"kind": kind}, eval={"batches": 2},
    )  # fmt: skip


_balanced = {}


def balanced(config):
    """Figures of the steps, and of the routers the weights and biases."""
    engine, loader = engine_and_rows(config)
    steps = [engine.step(loader.batch(step), config.optim.lr) for step in range(3)]
    named = {name.removeprefix("model."): t for name, t in engine.state().items() if "router" in name and "optim" not in name}
    return [(r.loss, r.grad_norm, r.tokens, sorted(r.more.items())) for r in steps], whole_state(named)


@pytest.mark.parametrize(
    ("kind", "model", "world", "layout", "packing"),
    [
        *(pytest.param("native", *case, "fit", marks=[] if "zero" in case[2] else pytest.mark.slow) for case in MASKED),
        pytest.param("native", "mixtral", 4, "cp=2 tp=2", "cut", marks=pytest.mark.slow),
        pytest.param("deepspeed", "mixtral", 2, "zero=1", "fit"),
        pytest.param("deepspeed", "mixtral", 2, "cp=2 context_kind=ulysses zero=2", "fit", marks=pytest.mark.slow),
        pytest.param("deepspeed", "mixtral", 2, "pp=2 zero=1", "fit", marks=pytest.mark.slow),
        pytest.param("megatron", "mixtral", 2, "tp=2", "fit", marks=pytest.mark.slow),
        pytest.param("megatron", "mixtral", 4, "tp=2 pp=2", "fit", marks=pytest.mark.slow),
        pytest.param("megatron", "deepseek", 4, "cp=2 tp=2", "fit", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_the_same_balance_of_masked_and_padded_rows(ranks, conversations, tmp_path, kind, model, world, layout, packing):
    if kind != "native":
        pytest.importorskip({"deepspeed": "deepspeed", "megatron": "megatron.core"}[kind])
    (alone,) = ranks.run(balanced, masked_config(conversations, tmp_path, model, packing=packing), world=1)
    for steps, routers in ranks.run(
        balanced, masked_config(conversations, tmp_path, model, layout, packing, kind), world=world
    ):
        for step, one in zip(steps, alone[0], strict=True):
            assert step[:2] == pytest.approx(one[:2], rel=2e-5)
            assert step[2] == one[2]
            assert dict(step[3]) == pytest.approx(dict(one[3]), abs=1e-12)
        assert routers.keys() == alone[1].keys()
        for name, weight in routers.items():
            assert (weight - alone[1][name]).abs().mean() <= 1e-5, name


def balance_alone(config, kept):
    """What the losses of balance add to the gradients of the mean loss, where one in `kept` of the predicted tokens is."""
    import numpy as np

    engine, loader = engine_and_rows(config)
    rows = loader.batch(0)
    left = np.cumsum(rows.labels.ravel() >= 0).reshape(rows.labels.shape) % kept == 0
    rows = replace(rows, labels=np.where(left, rows.labels, -100))
    scale_balance_losses([layer for _, layer in engine.experts], config.model, rows, engine.same_token_ranks, engine.device)
    found = []
    for plain in (False, True):
        for _, layer in engine.experts:
            layer.balance_share = 0.0 if plain else layer.balance_share
        engine.pipeline.step(engine._micro_batches(rows))
        found.append({name: p.grad / (rows.labels >= 0).sum() for name, p in engine.named if p.grad is not None})
        for p in engine.parameters:
            p.grad = None
    return {name: gradient - found[1][name] for name, gradient in found[0].items() if "router" in name}


def test_losses_of_balance_weigh_the_same_however_much_is_masked(ranks, conversations, tmp_path):
    config = masked_config(conversations, tmp_path, "mixtral")
    (all_of_it,), (little,) = (ranks.run(balance_alone, config, kept, world=1) for kept in (1, 16))
    for name, gradient in all_of_it.items():
        assert gradient.norm() > 1e-3
        assert (little[name] - gradient).norm() <= 1e-3 * gradient.norm(), name
