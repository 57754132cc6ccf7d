"""The experts against the published classes, the balance losses against their formulas, and the promises to the engine."""

import copy

import pytest
import torch
import transformers as hf
from torch.utils.checkpoint import checkpoint

from mikoshi.trainer.engines.optim import Optimizers
from mikoshi.trainer.interop.huggingface import InteropError, convert_state, deepseek_moe_config, model_config
from mikoshi.trainer.model import moe as moe_module
from mikoshi.trainer.model.config import ModelConfig, MoEConfig
from mikoshi.trainer.model.gpt import GPT, KVCache
from mikoshi.trainer.model.init import Initial, Region, fill, initial
from mikoshi.trainer.model.mlp import MLP
from mikoshi.trainer.model.moe import MoE
from mikoshi.trainer.record.metrics import flops_per_token

BASE = dict(vocab=101, context=32, layers=3, width=32, heads=4, mlp_width=48)
DEEPSEEK = dict(experts=16, top_k=3, width=24, shared=2, router="sigmoid", groups=4, top_groups=2, bias_rate=0.01, scale=2.5)


def layer(seed=0, **settings):
    torch.manual_seed(seed)
    made = MoE(ModelConfig(**BASE, moe={"experts": 8, "top_k": 2, **settings}))
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return made


def gradients(module):
    return {name: p.grad for name, p in module.named_parameters() if p.requires_grad}


def same(found, expected, tolerance=1e-4):
    assert found.keys() == expected.keys()
    for name, value in found.items():
        scale = expected[name].abs().max().clamp(min=1.0)
        torch.testing.assert_close(
            value / scale, expected[name] / scale, atol=tolerance, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_deepseek_v3_block():
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    torch.manual_seed(0)
    config = hf.DeepseekV3Config(
        hidden_size=32, moe_intermediate_size=24, n_routed_experts=16, num_local_experts=16, n_shared_experts=2, n_group=4,
        topk_group=2, num_experts_per_tok=3, routed_scaling_factor=2.5, norm_topk_prob=True, num_hidden_layers=3,
        first_k_dense_replace=1, num_attention_heads=4,
    )  # fmt: skip
    config._experts_implementation = "eager"
    theirs = DeepseekV3MoE(config)
    for p in [*theirs.parameters(), *theirs.buffers()]:
        torch.nn.init.normal_(p, std=0.3)
    moe = deepseek_moe_config(config)
    assert moe == MoEConfig(**{**DEEPSEEK, "bias_rate": 0.001}, first=1)
    ours_config = ModelConfig(**BASE, moe=moe)
    ours = MoE(ours_config)
    ours.load_state_dict(convert_state("deepseek_moe", theirs.state_dict(), ours_config), strict=True)

    x = torch.randn(3, 20, 32)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [module(given) for module, given in zip((theirs, ours), inputs, strict=True)]
    assert outputs[0].abs().max() > 0.5
    torch.testing.assert_close(outputs[1], outputs[0], atol=1e-4, rtol=0)
    upstream = torch.randn_like(x)
    for output in outputs:
        output.backward(upstream)
    expected = convert_state("deepseek_moe", {n: p.grad for n, p in theirs.named_parameters()}, ours_config)
    same(gradients(ours), expected)
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, atol=1e-4, rtol=0)
    assert ours.router.bias.grad is None


@pytest.mark.parametrize("settings", [{}, DEEPSEEK, {"normalise": False, "top_k": 8}], ids=["softmax", "deepseek", "all"])
def test_equals_every_expert_asked_and_weighted(settings):
    """The textbook sum: all experts on all tokens, times a weight that is zero for those not chosen."""
    moe, x = layer(**settings), torch.randn(2, 7, 32, requires_grad=True)
    routing = moe.router(x.flatten(0, 1))
    dense_NE = torch.zeros_like(routing.scores_NE).scatter(1, routing.chosen_NK, routing.weights_NK)
    each = [
        torch.nn.functional.silu(x.flatten(0, 1) @ g.T) * (x.flatten(0, 1) @ u.T) @ d.T
        for g, u, d in zip(moe.experts.gate, moe.experts.up, moe.experts.down, strict=True)
    ]
    expected = torch.einsum("ne,enc->nc", dense_NE, torch.stack(each)).view_as(x)
    if moe.shared is not None:
        expected = expected + moe.shared(x)
    inputs = [x, *(p for p in moe.parameters() if p.requires_grad)]
    found = moe(x)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    upstream = torch.randn_like(x)
    for ours, theirs in zip(*(torch.autograd.grad(y, inputs, upstream) for y in (found, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
def test_balance_losses_are_their_formulas(router):
    moe = layer(router=router, aux_loss=0.7, z_loss=0.3, bias_rate=0.1)
    plain = copy.deepcopy(moe)
    plain.moe = MoEConfig(experts=8, top_k=2, router=router, bias_rate=0.1)
    x = torch.randn(3, 11, 32)
    upstream = torch.randn_like(x)

    ours_x = x.clone().requires_grad_()
    y = moe(ours_x)
    y.backward(upstream)

    plain_x = x.clone().requires_grad_()
    routing = plain.router(plain_x.flatten(0, 1))
    total = (plain(plain_x) * upstream).sum()
    assert torch.equal(y, plain(plain_x)), "the value of a training forward is not moved"
    scores = routing.scores_NE / routing.scores_NE.sum(-1, keepdim=True)
    for row, chosen in zip(scores.split(11), routing.chosen_NK.split(11), strict=True):
        share = torch.bincount(chosen.flatten(), minlength=8) / (11 * 2)
        total = total + 0.7 * 11 * 8 * (share * row.mean(0)).sum()
    total = total + 0.3 * (routing.logits_NE.exp().sum(-1).log() ** 2).sum()
    total.backward()
    torch.testing.assert_close(ours_x.grad, plain_x.grad, atol=1e-4, rtol=1e-4)
    same(gradients(moe), gradients(plain))


def test_aux_gradient_by_finite_difference():
    """Scores move smoothly while the choice stays: double precision cannot be had in the fp32 router, so a wide step."""
    moe, x = layer(aux_loss=0.5, z_loss=0.2), torch.randn(2, 6, 32)
    given = x.clone().requires_grad_()
    moe(given).backward(torch.zeros_like(x))  # what is left is the balance alone
    direction, eps = torch.randn_like(moe.router.weight), 1e-3

    def value(sign):
        moved = copy.deepcopy(moe)
        with torch.no_grad():
            moved.router.weight.add_(sign * eps * direction)
            routing = moved.router(x.flatten(0, 1))
            assert torch.equal(routing.chosen_NK, moe.router(x.flatten(0, 1)).chosen_NK)
            return moved.balance_loss(routing, moved.count(routing.chosen_NK, 2)).item()

    slope = (value(1) - value(-1)) / (2 * eps)
    assert (moe.router.weight.grad * direction).sum().item() == pytest.approx(slope, rel=1e-2)
    assert given.grad.abs().max() > 0


def test_aux_loss_is_that_of_transformers():
    """Theirs is a mean over tokens and its shares sum to top_k; ours is a sum and they sum to 1."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    moe, x = layer(aux_loss=1.0), torch.randn(1, 13, 32)
    routing = moe.router(x[0])
    ours = moe.balance_loss(routing, moe.count(routing.chosen_NK, 1))
    theirs = load_balancing_loss_func((routing.logits_NE,), num_experts=8, top_k=2)
    torch.testing.assert_close(ours, theirs * 13 / 2)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_aux_loss_of_a_padded_row_is_that_of_transformers(family):
    """By their attention_mask padding counts in neither the shares nor the scores; all other tokens do."""
    theirs_of = __import__(f"transformers.models.{family}.modeling_{family}", fromlist=["x"]).load_balancing_loss_func
    moe, x = layer(aux_loss=1.0), torch.randn(3, 13, 32)
    padding = torch.arange(13) >= torch.tensor([13, 9, 2])[:, None]
    for row, pad in zip(x, padding, strict=True):
        routing = moe.router(row)
        ours = moe.balance_loss(routing, moe.count(routing.chosen_NK, 1, ~pad), ~pad)
        theirs = theirs_of((routing.logits_NE,), num_experts=8, top_k=2, attention_mask=(~pad).long()[None])
        torch.testing.assert_close(ours, theirs * (~pad).sum() / 2)


def test_padding_is_in_no_load_and_no_balance():
    """The rows without their padding, and one more of padding alone, give the same."""
    short, padded = (layer(aux_loss=0.7, z_loss=0.3) for _ in range(2))
    short.balance_share = padded.balance_share = torch.tensor(0.25)
    x, upstream = torch.randn(3, 9, 32), torch.randn(3, 9, 32)
    padding = torch.arange(9) >= torch.tensor([6, 6, 0])[:, None]
    short(x[:2, :6].clone().requires_grad_()).backward(upstream[:2, :6])
    given = x.clone().requires_grad_()
    padded(given, padding).backward(upstream * ~padding[..., None])
    same(gradients(padded), gradients(short))
    assert not given.grad[padding].any() and given.grad[~padding].any()
    load = padded.take_load()
    assert load.sum() == 2 * 6 * 2
    assert torch.equal(load, short.take_load())


@pytest.mark.parametrize("width", [4, 12])
def test_a_part_of_the_sequence_takes_its_part_of_the_padding(width):
    whole, part = layer(aux_loss=0.7), layer(aux_loss=0.7)
    x, padding = torch.randn(2, 12, 32), torch.arange(12) >= torch.tensor([12, 6])[:, None]
    part.own_tokens = lambda mask: mask.chunk(3, -1)[1]
    whole(x[:, 4:8], padding[:, 4:8]).sum().backward()
    part(x[:, 4:8], padding[:, 4:8] if width == 4 else padding).sum().backward()
    same(gradients(part), gradients(whole), tolerance=1e-6)
    assert torch.equal(part.take_load(), whole.take_load())


def test_ranks_that_share_a_row_add_up_to_the_whole():
    whole, x = layer(aux_loss=0.7, z_loss=0.3), torch.randn(2, 12, 32)
    parts = [copy.deepcopy(whole) for _ in range(3)]
    upstream = torch.randn_like(x)
    whole(x.requires_grad_()).backward(upstream)
    counts = whole.count(whole.router(x.flatten(0, 1)).chosen_NK, 2)
    for part, part_x, part_up in zip(parts, x.detach().split(4, 1), upstream.split(4, 1), strict=True):
        part.row_sum = lambda local: counts.clone() if local.shape == counts.shape else pytest.fail("a [B, E] tensor")
        part(part_x.contiguous()).backward(part_up)
    same({n: sum(gradients(p)[n] for p in parts) for n in gradients(whole)}, gradients(whole))
    assert torch.equal(sum(part.take_load() for part in parts), counts.sum(0))


def test_an_expert_without_rows_gets_zero_gradients():
    moe = layer(experts=6, top_k=1, bias_rate=0.0)
    with torch.no_grad():
        moe.router.bias.copy_(torch.tensor([9.0, 0, 0, 0, 0, 0]))
    moe(torch.randn(2, 5, 32)).sum().backward()
    for p in moe.experts.parameters():
        assert p.grad[0].abs().max() > 0
        assert torch.equal(p.grad[1:], torch.zeros_like(p.grad[1:]))

    rows = torch.randn(0, 32, requires_grad=True)
    found = moe.experts(rows, torch.zeros(6, dtype=torch.int64))
    assert found.shape == (0, 32)
    moe.zero_grad()
    found.sum().backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in moe.experts.parameters())


def test_a_part_of_the_experts_computes_its_rows():
    experts = layer().experts
    counts = torch.tensor([3, 0, 2, 4, 1, 0, 5, 2])
    rows = torch.randn(17, 32)
    low, high = (experts.compute(r, c, *(p[s] for p in (experts.gate, experts.up, experts.down)))
                 for r, c, s in ((rows[:9], counts[:4], slice(0, 4)), (rows[9:], counts[4:], slice(4, 8))))  # fmt: skip
    torch.testing.assert_close(torch.cat([low, high]), experts(rows, counts))


def test_grouped_product_agrees_with_the_loop(monkeypatch):
    moe, x = layer().bfloat16(), torch.randn(2, 9, 32, dtype=torch.bfloat16)
    results = []
    for grouped in (False, True):
        monkeypatch.setattr(moe_module, "_fits_grouped", lambda *_, answer=grouped: answer)
        moe.zero_grad()
        y = moe(x)
        y.backward(torch.ones_like(y))
        results.append({"y": y.detach(), **gradients(moe)})
    assert moe.router(x.flatten(0, 1)).weights_NK.dtype == torch.float32
    same(results[1], results[0], tolerance=2e-2)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recompute_counts_once(reentrant):
    settings = dict(aux_loss=0.7, z_loss=0.3)
    plain, recomputed = layer(**settings), layer(**settings)
    x = torch.randn(2, 6, 32, requires_grad=True)
    for _ in range(2):  # micro-batches add up
        plain(x).sum().backward()
        checkpoint(recomputed, x, use_reentrant=reentrant).sum().backward()
    same(gradients(recomputed), gradients(plain), tolerance=1e-6)
    load = recomputed.take_load()
    assert load.dtype == torch.int64
    assert load.sum() == 2 * 2 * 6 * 2
    assert torch.equal(load, plain.take_load())
    assert torch.equal(recomputed.take_load(), torch.zeros(8, dtype=torch.int64))


def test_a_backward_split_in_two_counts_once():
    """Zero-bubble pipelines take the gradients of the inputs and those of the weights at different times."""
    from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

    whole, split = layer(aux_loss=0.7), layer(aux_loss=0.7)
    x, upstream = torch.randn(2, 6, 32), torch.randn(2, 6, 32)
    (x.requires_grad_() + whole(x)).backward(upstream)
    given = x.detach().clone().requires_grad_()
    trained = [p for p in split.parameters() if p.requires_grad]
    _, groups = stage_backward_input([given + split(given)], [upstream], [given], iter(trained))
    stage_backward_weight(iter(trained), groups)
    same(gradients(split), gradients(whole), tolerance=1e-6)
    torch.testing.assert_close(given.grad, x.grad)
    assert torch.equal(split.take_load(), whole.take_load())


def test_evaluation_counts_nothing():
    moe, x = layer(aux_loss=1.0), torch.randn(1, 4, 32)
    with torch.no_grad():
        moe(x)
    moe.eval()(x.requires_grad_()).sum().backward()
    assert moe.load is None


def test_compiled_block_is_the_same():
    moe, x = layer(aux_loss=0.7), torch.randn(2, 6, 32)
    compiled = copy.deepcopy(moe)
    compiled.forward = torch.compile(compiled.forward, backend="aot_eager")
    for module in (moe, compiled):
        module(x).sum().backward()
    same(gradients(compiled), gradients(moe))
    assert torch.equal(compiled.take_load(), moe.take_load())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dry_run_on_fake_tensors(dtype):
    from torch._subclasses import FakeTensorMode

    config = ModelConfig(**BASE, moe={**DEEPSEEK, "aux_loss": 0.1, "z_loss": 0.1})
    with FakeTensorMode():
        model = GPT(config)
        for p in model.parameters():
            p.data = p.data.to(dtype)
        tokens = torch.zeros(2, 16, dtype=torch.int64)
        model(tokens, tokens).backward()
        assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters() if p.requires_grad)
        assert model.blocks["0"].mlp.take_load().shape == (16,)


def test_which_layers_and_what_names():
    config = ModelConfig(**{**BASE, "layers": 6}, moe={**DEEPSEEK, "first": 1, "every": 2})
    assert [config.is_moe(i) for i in range(6)] == [False, True, False, True, False, True]
    assert not ModelConfig(**BASE).is_moe(0)
    model = GPT(config)
    assert isinstance(model.blocks["0"].mlp, MLP)
    assert not list(model.buffers())
    assert {name for name, _ in model.blocks["1"].mlp.named_parameters()} == {
        "router.weight", "router.bias", "experts.gate", "experts.up", "experts.down",
        "shared.gate.weight", "shared.up.weight", "shared.down.weight",
    }  # fmt: skip
    at = "blocks.1.mlp."
    assert initial(at + "router.bias", config) == Initial("constant", 0.0)
    assert {initial(at + n, config) for n in ("router.weight", "experts.gate", "experts.up")} == {Initial("normal", 0.02)}
    assert initial(at + "experts.down", config) == initial(at + "shared.down.weight", config) != Initial("normal", 0.02)


def test_a_part_of_the_experts_starts_from_the_same_bits():
    config = ModelConfig(**BASE, moe={"experts": 8, "top_k": 2})
    name, whole, part = "blocks.0.mlp.experts.down", torch.empty(8, 32, 48), torch.empty(3, 32, 24)
    fill(whole, name, Region.all_of(whole.shape), initial(name, config), seed=1)
    fill(part, name, Region((4, 0, 24), (3, 32, 24), (8, 32, 48)), initial(name, config), seed=1)
    assert torch.equal(part, whole[4:7, :, 24:])


def test_cached_generation_equals_the_full_pass():
    model = GPT(ModelConfig(**BASE, moe=DEEPSEEK)).eval()
    tokens = torch.randint(0, 101, (2, 12))
    cache = KVCache.empty(model.config, 2, 12, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        found = torch.cat(
            [model(tokens[:, :5], cache=cache), *(model(tokens[:, i : i + 1], cache=cache) for i in range(5, 12))], 1
        )
        torch.testing.assert_close(found, model(tokens), atol=2e-5, rtol=1e-4)


def test_optimizers_leave_the_bias_alone():
    from mikoshi.trainer.config.run import OptimSection

    model = GPT(ModelConfig(**BASE, moe=DEEPSEEK))
    optimizers = Optimizers(model.named_parameters(), OptimSection(kind="adamw"))
    states = {name for name, _ in optimizers.state()}
    assert "optim.blocks.0.mlp.experts.gate.exp_avg" in states
    assert "optim.blocks.0.mlp.router.weight.exp_avg" in states
    assert not any("router.bias" in name for name in states)


def test_flops_count_the_experts_at_work():
    dense = ModelConfig(**BASE)
    sparse = ModelConfig(**BASE, moe={"experts": 8, "top_k": 2, "width": 16, "shared": 1, "first": 1})
    added = 2 * (8 * 32 + 3 * 3 * 32 * 16 - 3 * 32 * 48)  # two layers: router, 2 + 1 experts, less the dense MLP
    assert flops_per_token(sparse, 32) - flops_per_token(dense, 32) == 6 * added


@pytest.mark.parametrize(
    ("model", "moe", "message"),
    [
        ({}, {"top_k": 9}, "top_k 9 is more than experts 8"),
        ({}, {"groups": 3}, "not divisible by groups 3"),
        ({}, {"groups": 2, "top_groups": 3}, "top_groups 3"),
        ({}, {"groups": 4, "top_groups": 1, "top_k": 3}, "the 2 experts in top_groups 1"),
        ({}, {"first": 3}, "moe.first 3"),
        ({"mlp": "gelu"}, {}, 'mlp "gelu" is not one of swiglu, geglu'),
        ({"bias": True}, {}, "no biases"),
    ],
)
def test_impossible_experts_are_refused(model, moe, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**BASE, **model, moe={"experts": 8, "top_k": 2, **moe})


def test_layers_of_qwen3_moe():
    def imported(**settings):
        return model_config(hf.Qwen3MoeConfig(num_hidden_layers=6, num_experts=4, num_experts_per_tok=2, **settings)).moe

    assert (imported(decoder_sparse_step=2).first, imported(decoder_sparse_step=2).every) == (1, 2)
    assert (imported(mlp_only_layers=[0, 1]).first, imported(mlp_only_layers=[0, 1]).every) == (2, 1)
    assert imported(mlp_only_layers=list(range(6))) is None
    with pytest.raises(InteropError, match="mlp_only_layers"):
        imported(mlp_only_layers=[3])
