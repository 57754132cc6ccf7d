"""Our GPT against the Hugging Face classes: random weights in both, the same logits and the same gradients."""

import math

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

from mikoshi.trainer.generation.generate import Sampling, generate
from mikoshi.trainer.interop.huggingface import InteropError, convert_state, load_into, model_config
from mikoshi.trainer.model.gpt import GPT, KVCache

LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
SMALL = dict(vocab_size=199, hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=80,
             max_position_embeddings=64)  # fmt: skip
GPT2 = dict(vocab_size=199, n_positions=64, n_embd=48, n_layer=3, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
QWEN3_MOE = dict(**SMALL, num_key_value_heads=2, head_dim=16, num_experts=8, num_experts_per_tok=3, moe_intermediate_size=24)


def legacy(**scaling):
    """A config as files had it before rope_parameters."""
    return hf.LlamaConfig.from_dict({**SMALL, "num_key_value_heads": 2, "rope_theta": 1e4, "rope_scaling": scaling})


def yarn(**given):
    return hf.LlamaConfig(**SMALL, num_key_value_heads=2, rope_parameters={**YARN, **given})


CASES = {
    "yarn-factor-1": lambda: yarn(attention_factor=1.0),
    "yarn-factor-2": lambda: yarn(attention_factor=2.0),
    "yarn-factor-null": lambda: yarn(attention_factor=None, mscale=None, mscale_all_dim=None, beta_fast=None),
    "yarn-factor-default": lambda: yarn(attention_factor=0.1 * math.log(4.0) + 1.0, beta_fast=32.0, beta_slow=1.0),
    "yarn-mscales-1": lambda: yarn(mscale=1.0, mscale_all_dim=1.0),
    "yarn-mscales": lambda: yarn(mscale=0.707, mscale_all_dim=1.0),
    "yarn-mscale-alone": lambda: yarn(mscale=1.0),
    "yarn-mscale-all-0": lambda: yarn(mscale=2.0, mscale_all_dim=0),
    "yarn-factor-over-mscales": lambda: yarn(attention_factor=1.5, mscale=0.5, mscale_all_dim=1.0),
    "yarn-not-truncated": lambda: yarn(truncate=False, beta_fast=8.0),
    "yarn-no-factor": lambda: yarn(factor=None),
    "llama3-null": lambda: hf.LlamaConfig(**SMALL, rope_parameters={**LLAMA3, "attention_factor": 1.0, "mscale": None}),
    "dynamic": lambda: hf.LlamaConfig(**SMALL, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 3.0}),
    "dynamic-beyond": lambda: hf.LlamaConfig(
        **SMALL | {"max_position_embeddings": 24},
        rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 3.0, "original_max_position_embeddings": 8},
    ),
    "legacy-linear": lambda: legacy(type="linear", factor=2.0),
    "legacy-dynamic": lambda: legacy(type="dynamic", factor=2.0),
    "legacy-yarn": lambda: legacy(type="yarn", factor=4.0, original_max_position_embeddings=32, finetuned=True),
    "legacy-both-names": lambda: legacy(type="linear", rope_type="linear", factor=2.0),
    "gpt1": lambda: hf.OpenAIGPTConfig(**GPT2),
    "gpt2": lambda: hf.GPT2Config(**GPT2),
    "bloom": lambda: hf.BloomConfig(vocab_size=199, hidden_size=48, n_layer=3, n_head=4),
    "bloom-6-heads": lambda: hf.BloomConfig(vocab_size=199, hidden_size=48, n_layer=2, n_head=6),
    "llama-gqa": lambda: hf.LlamaConfig(**SMALL, num_key_value_heads=2),
    "llama-tied": lambda: hf.LlamaConfig(**SMALL, num_key_value_heads=4, tie_word_embeddings=True),
    "llama3-rope": lambda: hf.LlamaConfig(**SMALL, num_key_value_heads=2, rope_parameters=LLAMA3),
    "yarn-rope": lambda: hf.LlamaConfig(**SMALL, num_key_value_heads=2, rope_parameters=YARN),
    "linear-rope": lambda: hf.LlamaConfig(
        **SMALL, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    ),
    "mistral-window": lambda: hf.MistralConfig(**SMALL, num_key_value_heads=2, head_dim=16, sliding_window=7),
    "qwen2": lambda: hf.Qwen2Config(**SMALL, num_key_value_heads=2),
    "qwen3": lambda: hf.Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=16),
    "qwen3-alternating": lambda: hf.Qwen3Config(
        **SMALL, num_key_value_heads=2, head_dim=16, use_sliding_window=True, sliding_window=5,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "mixtral": lambda: hf.MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=6, num_experts_per_tok=2),
    "mixtral-window-tied": lambda: hf.MixtralConfig(
        **SMALL, num_key_value_heads=2, sliding_window=7, num_local_experts=4, num_experts_per_tok=3, tie_word_embeddings=True,
    ),
    "qwen3-moe": lambda: hf.Qwen3MoeConfig(**QWEN3_MOE, norm_topk_prob=True),
    "qwen3-moe-some-dense": lambda: hf.Qwen3MoeConfig(**QWEN3_MOE, decoder_sparse_step=2, tie_word_embeddings=True),
    "qwen3-moe-window": lambda: hf.Qwen3MoeConfig(
        **QWEN3_MOE, mlp_only_layers=[0], use_sliding_window=True, sliding_window=5
    ),
    # Cohere is PaLM's block: attention and MLP side by side, LayerNorm without bias, SwiGLU, one key/value head.
    "palm-as-cohere": lambda: hf.CohereConfig(**SMALL, num_key_value_heads=1, logit_scale=0.5),
}  # fmt: skip


def pair(case):
    torch.manual_seed(0)
    config = CASES[case]()
    config._attn_implementation = config._experts_implementation = "eager"
    theirs = hf.AutoModelForCausalLM.from_config(config).float()
    for name, p in theirs.named_parameters():  # norms and biases too: a constant would hide a mix-up
        torch.nn.init.normal_(p, mean=1.0 if "norm" in name or ".ln_" in name else 0.0, std=0.1)
    ours = GPT(model_config(config))
    load_into(ours, config.model_type, theirs.state_dict(), ours.config)
    return theirs.eval(), ours


@pytest.mark.parametrize("case", CASES)
def test_same_logits_and_gradients(case):
    theirs, ours = pair(case)
    tokens, labels = torch.randint(0, 199, (2, 3, 40)).unbind()
    theirs_logits, ours_logits = theirs(tokens).logits, ours(tokens)
    assert theirs_logits.abs().max() > 0.5, "the models must say something for the comparison to mean anything"
    torch.testing.assert_close(ours_logits, theirs_logits, atol=1e-4, rtol=0)

    torch.nn.functional.cross_entropy(theirs_logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    ours(tokens, labels).backward()
    expected = convert_state(ours_family(theirs), {n: p.grad for n, p in theirs.named_parameters()}, ours.config)
    found = {n: p.grad for n, p in ours.named_parameters()}
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        scale = expected[name].abs().max().clamp(min=1.0)
        torch.testing.assert_close(grad / scale, expected[name] / scale, atol=1e-4, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def ours_family(model):
    return model.config.model_type


@pytest.mark.parametrize("case", ["mixtral", "qwen3-moe-some-dense"])
def test_released_files_with_every_expert_apart(case, tmp_path):
    theirs, ours = pair(case)
    theirs.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    assert any(".experts.0." in name for name in state)
    found = convert_state(ours_family(theirs), state, ours.config)
    assert found.keys() == ours.state_dict().keys()
    assert all(torch.equal(value, found[name]) for name, value in ours.state_dict().items())
    missing = {name: value for name, value in state.items() if ".experts.1." not in name}
    with pytest.raises(InteropError, match="experts"):
        convert_state(ours_family(theirs), missing, ours.config)


def test_the_head_of_a_tied_model_is_not_lost():
    theirs, ours = pair("llama-tied")
    state = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    assert "lm_head.weight" in state
    found = convert_state("llama", state, ours.config)
    assert "head.weight" not in found
    alone = {name: tensor for name, tensor in state.items() if "embed_tokens" not in name}
    assert torch.equal(convert_state("llama", alone, ours.config)["embed.weight"], state["lm_head.weight"])
    state["lm_head.weight"][7, 3] += 1e-3
    with pytest.raises(InteropError, match=r"tie_word_embeddings = true, but lm_head\.weight differs"):
        convert_state("llama", state, ours.config)


def test_dynamic_rope_keeps_no_keys_and_shares_no_row():
    theirs, ours = pair("dynamic-beyond")
    ours.eval()
    tokens = torch.randint(0, 199, (1, 30))
    with pytest.raises(ValueError, match="kept keys nor documents"):
        ours(tokens, cache=KVCache.empty(ours.config, 1, 30, torch.device("cpu"), torch.float32))
    with pytest.raises(ValueError, match="kept keys nor documents"):
        ours(tokens, docs_BS=torch.zeros(1, 30, dtype=torch.long), positions_BT=torch.arange(30)[None])
    prompt, expected = tokens[0, :20].tolist(), tokens[0, :20].tolist()
    for _ in range(8):  # from within the trained context to beyond it, each token from one pass of all before it
        expected.append(int(theirs(torch.tensor([expected]), use_cache=False).logits[0, -1].argmax()))
    assert prompt + list(generate(ours, prompt, 8, Sampling(temperature=0), end=-1)) == expected


def test_dynamic_rope_matches_beyond_the_trained_context():
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    from mikoshi.trainer.model.rotary import frequencies

    config = hf.LlamaConfig(**SMALL, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 3.0})
    expected, _ = ROPE_INIT_FUNCTIONS["dynamic"](config, torch.device("cpu"), seq_len=150)
    found, _ = frequencies(model_config(config).rope, 12, 150)
    torch.testing.assert_close(found, expected)


def test_unknown_family_and_unknown_weight_are_named():
    with pytest.raises(InteropError, match="'opt'"):
        model_config(hf.OPTConfig())
    with pytest.raises(InteropError, match="scale_attn_by_inverse_layer_idx"):
        model_config(hf.GPT2Config(**GPT2, scale_attn_by_inverse_layer_idx=True))
    with pytest.raises(InteropError, match="attention_factor"):
        model_config(hf.LlamaConfig(**SMALL, rope_parameters={**LLAMA3, "attention_factor": 2.0}))
    with pytest.raises(InteropError, match=r"factor = 0\.5"):
        model_config(yarn(factor=0.5))
    longrope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 6, "long_factor": [2.0] * 6,
                "original_max_position_embeddings": 32, "factor": 2.0, "attention_factor": 1.0}  # fmt: skip
    with pytest.raises(InteropError, match="longrope"):
        model_config(hf.LlamaConfig(**SMALL, rope_parameters=longrope))
    ours = model_config(CASES["gpt2"]())
    with pytest.raises(InteropError, match="surprise"):
        convert_state("gpt2", {"h.0.surprise.weight": torch.zeros(1)}, ours)
