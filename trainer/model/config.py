"""The shape of a GPT: every architecture the model file knows is a value of ModelConfig, never another class."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Count = Annotated[int, Field(gt=0)]
Natural = Annotated[int, Field(ge=0)]

GATED = ("swiglu", "geglu")
"""The kinds of MLP with a gate beside the up projection."""


class RopeConfig(BaseModel):
    """Rotary position embedding (Su et al. 2021) and how its frequencies are stretched past the trained context."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    theta: float = Field(10_000.0, gt=0, description="base of the geometric frequencies")
    fraction: float = Field(1.0, gt=0, le=1, description="part of each head that is rotated")
    scaling: Literal["none", "linear", "dynamic", "yarn", "llama3"] = Field(
        "none", description="how frequencies are stretched past original_context"
    )
    factor: float = Field(1.0, ge=1, description="how many times longer than original_context")
    original_context: Count = Field(8192, description="context the frequencies were trained at")
    low_freq_factor: float = Field(1.0, gt=0, description="llama3: wavelengths beyond original_context/this are stretched")
    high_freq_factor: float = Field(4.0, gt=0, description="llama3: wavelengths under original_context/this are kept")
    beta_fast: float = Field(32.0, gt=0, description="yarn: rotations in the context above which a frequency is kept")
    beta_slow: float = Field(1.0, gt=0, description="yarn: rotations in the context below which it is interpolated")
    truncate: bool = Field(True, description="yarn: the pairs between which it changes over are whole numbers")
    attention_factor: float | None = Field(
        None, gt=0, description="yarn: what cos and sin are multiplied by (default: by factor and the two mscales)"
    )
    mscale: float | None = Field(
        None, gt=0, description="yarn: with mscale_all_dim, the factor is m(mscale) / m(mscale_all_dim), m(s) = 0.1 s ln f + 1"
    )
    mscale_all_dim: float | None = Field(None, gt=0, description="yarn: see mscale; without either, the factor is m(1)")

    @model_validator(mode="after")
    def _yarn_alone(self) -> RopeConfig:
        for key in ("attention_factor", "mscale", "mscale_all_dim"):
            if self.scaling != "yarn" and getattr(self, key) is not None:
                raise ValueError(f'rope.{key} is of rope.scaling = "yarn": leave it out with "{self.scaling}"')
        return self

    def varies(self, length: int) -> bool:
        """Whether positions up to `length` turn at rates that depend on how many there are: what was rotated for a shorter
        text cannot be kept then, and documents side by side cannot share one length."""
        return self.scaling == "dynamic" and length > self.original_context


class MoEConfig(BaseModel):
    """Mixture of experts in place of the dense MLP (Shazeer et al. 2017, arXiv:1701.06538), no token dropped."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    experts: Count = Field(description="routed experts of a layer")
    top_k: Count = Field(description="experts a token is sent to")
    width: Count | None = Field(None, description="mlp width of one expert (default: the model's mlp_width)")
    shared: Natural = Field(0, description="experts that see every token, as one dense MLP of shared x width")
    router: Literal["softmax", "sigmoid"] = Field("softmax", description="how logits become scores")
    normalise: bool = Field(True, description="the chosen experts' weights are divided by their sum")
    scale: float = Field(1.0, gt=0, description="multiplies the routed weights (DeepSeek's routed_scaling_factor)")
    groups: Count = Field(1, description="experts in this many equal groups, scored by the sum of their two best")
    top_groups: Count = Field(1, description="groups a token may choose from")
    aux_loss: float = Field(
        0.0, ge=0, description="weight, beside the mean loss, of the load balancing loss, taken over each row: over all tokens "
        "but padding, those that are not predicted too",
    )  # fmt: skip
    z_loss: float = Field(
        0.0, ge=0, description="weight, beside the mean loss, of the squared log-sum-exp of the router's logits, over the same"
    )  # fmt: skip
    bias_rate: float | None = Field(
        None, ge=0, description="step of the bias that balances the choice without a loss (DeepSeek-V3); none: no bias"
    )
    first: Natural = Field(0, description="layers before this one are dense")
    every: Count = Field(1, description="from `first` on, each `every`-th layer has experts")

    @model_validator(mode="after")
    def _choice_is_possible(self) -> MoEConfig:
        if self.top_k > self.experts:
            raise ValueError(f"top_k {self.top_k} is more than experts {self.experts}")
        if self.experts % self.groups:
            raise ValueError(f"experts {self.experts} is not divisible by groups {self.groups}")
        if self.top_groups > self.groups:
            raise ValueError(f"top_groups {self.top_groups} is more than groups {self.groups}")
        if self.top_k > (reach := self.experts // self.groups * self.top_groups):
            raise ValueError(f"top_k {self.top_k} is more than the {reach} experts in top_groups {self.top_groups} groups")
        return self


class ModelConfig(BaseModel):
    """One GPT. Sizes in elements; `None` means the usual value, derived in the properties below."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    vocab: Count = Field(description="rows of the embedding; at least the tokenizer's size")
    context: Count = Field(description="longest sequence; the number of learned positions")
    layers: Count = Field(description="transformer blocks")
    width: Count = Field(description="elements of the residual stream")
    heads: Count = Field(description="query heads of attention")
    kv_heads: Count | None = Field(None, description="key/value heads: heads for MHA, 1 for multi-query (default: heads)")
    head_dim: Count | None = Field(None, description="default: width / heads")
    mlp_width: Count | None = Field(None, description="default: 4 x width")

    position: Literal["learned", "rotary", "alibi", "none"] = Field(
        "rotary", description="how the model knows where a token stands"
    )
    rope: RopeConfig = RopeConfig()
    norm: Literal["layernorm", "rmsnorm"] = Field("rmsnorm", description="the norm of blocks, embedding and head")
    norm_eps: float = Field(1e-5, gt=0, description="what a norm adds to the variance, or the mean square")
    norm_order: Literal["pre", "post"] = Field("pre", description="post: GPT-1, norm after the residual sum")
    block: Literal["serial", "parallel"] = Field("serial", description="parallel: PaLM, attention and MLP side by side")
    mlp: Literal["gelu", "gelu_tanh", "relu", "swiglu", "geglu"] = Field(
        "swiglu", description="activation of the MLP; swiglu and geglu have a gate"
    )
    moe: MoEConfig | None = Field(None, description="experts in place of the MLP (default: every layer is dense)")
    bias: bool = Field(False, description="biases in every linear layer and LayerNorm")
    qkv_bias: bool | None = Field(None, description="biases of q, k, v alone (default: bias)")
    qk_norm: bool = Field(False, description="RMSNorm of queries and keys per head, before the rotation")
    embedding_norm: bool = Field(False, description="a norm right after the embedding (BLOOM)")
    tied: bool = Field(False, description="the head shares the embedding's weight")
    windows: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (0,), min_length=1, description="attention window per layer, cycled over the layers; 0 is full causal attention"
    )
    logit_scale: float = Field(1.0, gt=0, description="multiplies the logits (PaLM: 1/sqrt(width))")

    init_std: float = Field(0.02, gt=0, description="standard deviation of initial weights")
    embedding_std: float | None = Field(None, gt=0, description="default: init_std")
    init_residual_scaled: bool = Field(True, description="std / sqrt(2 x layers) for what is added to the residual")

    @property
    def n_kv(self) -> int:
        """Number of key/value heads."""
        return self.kv_heads or self.heads

    @property
    def d_head(self) -> int:
        """Elements of a head."""
        return self.head_dim or self.width // self.heads

    @property
    def d_mlp(self) -> int:
        """Width of the MLP."""
        return self.mlp_width or 4 * self.width

    @property
    def bias_qkv(self) -> bool:
        """Whether the q, k and v projections have biases."""
        return self.bias if self.qkv_bias is None else self.qkv_bias

    @property
    def d_rotary(self) -> int:
        """Elements of a head that are rotated: even, at least 2."""
        return int(self.d_head * self.rope.fraction) // 2 * 2

    def window(self, layer: int) -> int:
        """Returns the attention window of a layer in positions; 0 is full causal attention."""
        return self.windows[layer % len(self.windows)]

    def is_moe(self, layer: int) -> bool:
        """Whether a layer has a mixture of experts in place of an MLP."""
        return self.moe is not None and layer >= self.moe.first and (layer - self.moe.first) % self.moe.every == 0

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
        if self.moe is not None:
            if self.mlp not in GATED:
                raise ValueError(f'experts are gated MLPs: mlp "{self.mlp}" is not one of {", ".join(GATED)}')
            if self.bias:
                raise ValueError("experts have no biases: use bias = false (qkv_bias = true is possible)")
            if self.moe.first >= self.layers:
                raise ValueError(f"moe.first {self.moe.first} leaves none of {self.layers} layers with experts: drop moe")
        return self
