"""One small model of every kind, and layouts written as `tp=2 pp=2`."""

BASE = {"vocab": 384, "context": 64, "layers": 4, "width": 64, "heads": 4, "mlp_width": 96}
GPT2 = {"position": "learned", "norm": "layernorm", "mlp": "gelu_tanh", "bias": True, "tied": True}
MODELS = {
    "llama": {"kv_heads": 2},
    "gpt2": GPT2,
    "gpt1": GPT2 | {"norm_order": "post"},
    "bloom": {"position": "alibi", "norm": "layernorm", "mlp": "gelu_tanh", "bias": True, "embedding_norm": True, "tied": True},
    "palm": {"block": "parallel", "kv_heads": 1, "tied": True},
    "qwen3": {"kv_heads": 2, "qk_norm": True, "layers": 8},
    "mistral": {"kv_heads": 2, "windows": [24, 0]},
    "mixtral": {"kv_heads": 2, "moe": {"experts": 4, "top_k": 2, "aux_loss": 0.01, "z_loss": 0.001}},
    "deepseek": {
        "layers": 8,
        "moe": {"experts": 8, "top_k": 2, "width": 48, "shared": 1, "router": "sigmoid", "groups": 4, "top_groups": 2,
                "bias_rate": 0.01, "aux_loss": 0.001, "first": 1, "scale": 1.5},
    },
}  # fmt: skip


def degrees(text):
    pairs = (pair.split("=") for pair in text.split())
    return {key: int(value) if value.isdigit() else value for key, value in pairs}
