"""The shape of a GPT: every architecture the model file knows is a value of ModelConfig, never another class."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Count = Annotated[int, Field(gt=0)]


class RopeConfig(BaseModel):
    """Rotary position embedding (Su et al. 2021) and how its frequencies are stretched past the trained context."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    theta: float = Field(10_000.0, gt=0, description="base of the geometric frequencies")
    fraction: float = Field(1.0, gt=0, le=1, description="part of each head that is rotated")
    scaling: Literal["none", "linear", "dynamic", "yarn", "llama3"] = "none"
    factor: float = Field(1.0, ge=1, description="how many times longer than original_context")
    original_context: Count = Field(8192, description="context the frequencies were trained at")
    low_freq_factor: float = Field(1.0, gt=0, description="llama3: wavelengths beyond original_context/this are stretched")
    high_freq_factor: float = Field(4.0, gt=0, description="llama3: wavelengths under original_context/this are kept")
    beta_fast: float = Field(32.0, gt=0, description="yarn: rotations in the context above which a frequency is kept")
    beta_slow: float = Field(1.0, gt=0, description="yarn: rotations in the context below which it is interpolated")


class ModelConfig(BaseModel):
    """One GPT. Sizes in elements; `None` means the usual value, derived in the properties below."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    vocab: Count = Field(description="rows of the embedding; at least the tokenizer's size")
    context: Count = Field(description="longest sequence; the number of learned positions")
    layers: Count
    width: Count
    heads: Count
    kv_heads: Count | None = Field(None, description="key/value heads: heads for MHA, 1 for multi-query (default: heads)")
    head_dim: Count | None = Field(None, description="default: width / heads")
    mlp_width: Count | None = Field(None, description="default: 4 x width")

    position: Literal["learned", "rotary", "alibi", "none"] = "rotary"
    rope: RopeConfig = RopeConfig()
    norm: Literal["layernorm", "rmsnorm"] = "rmsnorm"
    norm_eps: float = Field(1e-5, gt=0)
    norm_order: Literal["pre", "post"] = Field("pre", description="post: GPT-1, norm after the residual sum")
    block: Literal["serial", "parallel"] = Field("serial", description="parallel: PaLM, attention and MLP side by side")
    mlp: Literal["gelu", "gelu_tanh", "relu", "swiglu", "geglu"] = "swiglu"
    bias: bool = Field(False, description="biases in every linear layer and LayerNorm")
    qkv_bias: bool | None = Field(None, description="biases of q, k, v alone (default: bias)")
    qk_norm: bool = Field(False, description="RMSNorm of queries and keys per head, before the rotation")
    embedding_norm: bool = Field(False, description="a norm right after the embedding (BLOOM)")
    tied: bool = Field(False, description="the head shares the embedding's weight")
    windows: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (0,), min_length=1, description="attention window per layer, cycled over the layers; 0 is full causal attention"
    )
    logit_scale: float = Field(1.0, gt=0, description="multiplies the logits (PaLM: 1/sqrt(width))")

    init_std: float = Field(0.02, gt=0)
    embedding_std: float | None = Field(None, gt=0, description="default: init_std")
    init_residual_scaled: bool = Field(True, description="std / sqrt(2 x layers) for what is added to the residual")

    @property
    def n_kv(self) -> int:
        return self.kv_heads or self.heads

    @property
    def d_head(self) -> int:
        return self.head_dim or self.width // self.heads

    @property
    def d_mlp(self) -> int:
        return self.mlp_width or 4 * self.width

    @property
    def bias_qkv(self) -> bool:
        return self.bias if self.qkv_bias is None else self.qkv_bias

    @property
    def d_rotary(self) -> int:
        """Elements of a head that are rotated: even, at least 2."""
        return int(self.d_head * self.rope.fraction) // 2 * 2

    def window(self, layer: int) -> int:
        return self.windows[layer % len(self.windows)]

    @model_validator(mode="after")
    def _shapes_agree(self) -> ModelConfig:
        if self.head_dim is None and self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by heads {self.heads}: change one, or give head_dim")
        if self.heads % self.n_kv:
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.n_kv}")
        if self.position == "rotary" and self.d_rotary < 2:
            raise ValueError(f"rope.fraction {self.rope.fraction} leaves nothing of head_dim {self.d_head} to rotate")
        if self.block == "parallel" and self.norm_order == "post":
            raise ValueError('block "parallel" has no post-norm form: use norm_order = "pre"')
        return self
