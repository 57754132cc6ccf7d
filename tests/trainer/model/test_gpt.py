"""What the model promises beyond other people's architectures: masks, cache, chunked loss, no buffers."""

import pytest
import torch

from mikoshi.trainer.model import attention, loss
from mikoshi.trainer.model.config import ModelConfig
from mikoshi.trainer.model.gpt import GPT, KVCache
from mikoshi.trainer.model.init import Region, fill, initial

BASE = dict(vocab=101, context=32, layers=4, width=32, heads=4, mlp_width=48)
MODELS = {
    "gpt3-banded": ModelConfig(**BASE, position="learned", norm="layernorm", mlp="gelu", bias=True, tied=True, windows=(0, 5)),
    "llama": ModelConfig(**BASE, kv_heads=2, qk_norm=True, windows=(7, 0, 0)),
    "bloom": ModelConfig(**BASE, position="alibi", norm="layernorm", embedding_norm=True, mlp="gelu_tanh", bias=True),
    "palm": ModelConfig(**BASE, kv_heads=1, block="parallel", norm="layernorm", tied=True, logit_scale=0.2),
    "gpt1": ModelConfig(**BASE, position="learned", norm="layernorm", norm_order="post", mlp="gelu", bias=True),
    "partial-rotary": ModelConfig(**{**BASE, "position": "rotary"}, rope={"fraction": 0.5}, mlp="geglu"),
}  # fmt: skip


def build(config, seed=1):
    with torch.device("meta"):
        model = GPT(config)
    model.to_empty(device="cpu")
    for name, p in model.named_parameters():
        rule = initial(name, config)
        fill(p, name, Region.all_of(p.shape), rule, seed)
        if rule.kind == "normal":
            p.data.mul_(5)  # far from zero, so that attention is not uniform
    assert not list(model.buffers())
    return model


@pytest.fixture(params=MODELS)
def model(request):
    return build(MODELS[request.param])


def test_packed_documents_are_as_if_alone(model):
    lengths = [5, 12, 1, 14]
    tokens = torch.randint(0, 101, (2, 32))
    docs = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths)).expand(2, -1)
    positions = torch.cat([torch.arange(n) for n in lengths]).expand(2, -1)
    packed = model(tokens, docs_BS=docs, positions_BT=positions)
    alone = torch.cat([model(part) for part in tokens.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(packed, alone, atol=2e-5, rtol=1e-4)


def test_cached_generation_equals_the_full_pass(model):
    tokens = torch.randint(0, 101, (2, 20))
    cache = KVCache.empty(model.config, 2, 20, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        steps = [model(tokens[:, :9], cache=cache), model(tokens[:, 9:13], cache=cache)]
        steps += [model(tokens[:, i : i + 1], cache=cache) for i in range(13, 20)]
        torch.testing.assert_close(torch.cat(steps, 1), model(tokens), atol=2e-5, rtol=1e-4)


def test_flex_attention_agrees_with_the_dense_mask():
    torch.manual_seed(0)
    q, (k, v) = torch.randn(2, 4, 64, 16), torch.randn(2, 2, 2, 64, 16).unbind()
    docs = torch.tensor([[0] * 20 + [1] * 44, [0] * 7 + [1] * 30 + [2] * 27])
    slopes = attention.alibi_slopes(4)
    positions = torch.arange(64)
    for window, d, s in [(0, docs, None), (9, None, None), (9, docs, slopes), (0, None, slopes)]:
        flex = attention.flex_mask(window, 64, None, d, s, torch.device("cpu"))
        dense = attention.dense_mask(window, positions, positions, d, s, torch.float32)
        torch.testing.assert_close(attention.attend(q, k, v, flex), attention.attend(q, k, v, dense), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunked_loss_equals_cross_entropy(monkeypatch, dtype):
    monkeypatch.setitem(loss.CHUNK_ELEMENTS, "cpu", 101 * 16)
    torch.manual_seed(0)
    x = torch.randn(2, 37, 24, dtype=dtype, requires_grad=True)
    w = torch.randn(101, 24, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, 101, (2, 37))
    labels[0, 5:20] = loss.IGNORED
    found = loss.next_token_loss(x, w, labels, 0.7)
    grads = torch.autograd.grad(found / 59, (x, w))
    logits = (x @ w.T).float() * 0.7
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    expected_grads = torch.autograd.grad(expected / 59, (x, w))
    tight = dict(rtol=1e-5, atol=1e-6) if dtype == torch.float32 else dict(rtol=2e-2, atol=2e-3)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-3)
    for ours, theirs in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(ours, theirs, **tight)


def test_the_full_logits_never_exist_at_once():
    shapes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            shapes.extend(t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor))
            return out

    x, w = torch.randn(1, 4096, 8, requires_grad=True), torch.randn(8192, 8, requires_grad=True)
    labels = torch.randint(0, 8192, (1, 4096))
    with Watch():
        loss.next_token_loss(x, w, labels).backward()
    assert max(shapes) <= loss.CHUNK_ELEMENTS["cpu"]
    assert max(shapes) < 4096 * 8192 / 4


def test_evaluation_makes_no_gradient():
    made = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made.append(str(func))
            return func(*args, **(kwargs or {}))

    x, w = torch.randn(1, 64, 8), torch.nn.Parameter(torch.randn(128, 8))
    with Watch(), torch.no_grad():
        loss.next_token_loss(x, w, torch.randint(0, 128, (1, 64)))
    assert sum("mm" in op for op in made) == 1


def test_initialisation_is_normal_and_named():
    config = MODELS["llama"]
    w = torch.empty(700, 900)
    rule = initial("blocks.0.attn.q.weight", config)
    fill(w, "blocks.0.attn.q.weight", Region.all_of(w.shape), rule, seed=7, threads=2)
    z = (w / rule.value).double().flatten()
    n = z.numel()
    assert abs(z.mean()) < 4 / n**0.5
    assert abs(z.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs((z**4).mean() - 3) < 4 * (96 / n) ** 0.5
    for other, seed in (("blocks.1.attn.q.weight", 7), ("blocks.0.attn.q.weight", 8)):
        w2 = torch.empty_like(w)
        fill(w2, other, Region.all_of(w.shape), rule, seed=seed)
        correlation = (z * (w2 / rule.value).double().flatten()).mean()
        assert abs(correlation) < 4 / n**0.5


def test_any_region_of_a_parameter_is_the_same_bits():
    rule = initial("head.weight", MODELS["llama"])
    whole = torch.empty(301, 7, 53)
    fill(whole, "head.weight", Region.all_of(whole.shape), rule, seed=3)
    for offset, shape in [((0, 0, 0), (10, 7, 53)), ((291, 0, 0), (10, 7, 53)), ((5, 2, 11), (200, 4, 30))]:
        part = torch.empty(shape)
        fill(part, "head.weight", Region(offset, shape, tuple(whole.shape)), rule, seed=3, threads=2)
        window = tuple(slice(o, o + s) for o, s in zip(offset, shape, strict=True))
        assert torch.equal(part, whole[window])


def test_bad_shapes_are_refused():
    for change, message in [
        ({"heads": 5}, "width 32 is not divisible by heads 5"),
        ({"kv_heads": 3}, "not a multiple of kv_heads 3"),
        ({"block": "parallel", "norm_order": "post"}, "no post-norm form"),
    ]:
        with pytest.raises(ValueError, match=message):
            ModelConfig(**{**BASE, **change})
