"""What Megatron-core cannot do, or would not do as this run needs it."""

from __future__ import annotations

import importlib.metadata

from mikoshi.parallel.layout import Layout
from mikoshi.trainer.config.run import RunConfig
from mikoshi.trainer.engines.limit import Case, Limit, installed
from mikoshi.trainer.model.config import ModelConfig

OLDEST, NEWEST = (0, 16, 1), (0, 20)
_PIP = 'pip install "mikoshi[megatron]"'
_NATIVE = 'engine.kind="native"'
_TE_PIP = 'pip install "transformer-engine[pytorch]" on a machine with a GPU'
_WITHOUT_TE = 'engine.megatron.transformer_engine="auto" engine.megatron.fp8=false'
"""Overrides that do without Transformer Engine; "off" contradicts FP8."""


def version() -> tuple[int, ...]:
    """Returns the version of the installed megatron-core; empty if there is none."""
    try:
        text = importlib.metadata.version("megatron-core")
    except importlib.metadata.PackageNotFoundError:
        return ()
    return tuple(int(part) for part in text.split(".")[:3] if part.isdigit())


def _lacks_hooks(case: Case) -> bool:
    """Whether the hooks that our layers use have moved in the installed version, found out by importing them."""
    if not case.on_this_machine or not version() or any(not installed(package) for package in ("einops", "psutil")):
        return False  # other rows of the table report this
    try:
        import mikoshi.trainer.engines.megatron.model  # noqa: F401
    except Exception:  # a Transformer Engine built against another torch raises errors of any kind
        return True
    return False


def transformer_engine(config: RunConfig, layout: Layout, cuda: bool) -> bool:
    """Whether the layers are Transformer Engine's.

    They are if the config asks for them, or if they are installed and support the run.
    """
    requested = config.engine.megatron.transformer_engine
    if requested == "off" or not cuda:
        return False
    return (
        requested == "on"
        or config.engine.megatron.fp8
        or (installed("transformer_engine") and not unsupported_by_transformer_engine(config, layout))
    )


def unsupported_by_transformer_engine(config: RunConfig, layout: Layout) -> bool:
    """Whether the run has something that Transformer Engine's layers compute differently or not at all."""
    model = config.model
    plain = model.moe is None and not config.data.document_mask and not any(model.windows) and model.position != "alibi"
    norm = model.norm == "rmsnorm" or (model.bias and not model.qk_norm)
    ulysses = layout.cp > 1 and layout.context_kind == "ulysses"
    return not plain or not norm or ulysses or config.engine.precision == "fp32" or config.engine.recompute != "none"


def _unavailable(case: Case) -> bool:
    """Whether this run cannot have Transformer Engine at all; then the other limits do not matter."""
    return case.cuda is False or (case.on_this_machine and not installed("transformer_engine"))


def _fp8(case: Case) -> bool:
    """Whether FP8 is requested and Transformer Engine may be available."""
    return case.config.engine.megatron.fp8 and not _unavailable(case)


def _requested(case: Case) -> bool:
    """Whether Transformer Engine's layers are requested by name and may be available."""
    own = case.config.engine.megatron
    return (own.transformer_engine == "on" or own.fp8) and not _unavailable(case)


def _uneven(case: Case) -> bool:
    """Whether a matrix or a micro-batch has a size that FP8 products cannot have."""
    model, layout = case.config.model, case.layout
    tokens = layout.micro_rows * case.config.train.context // layout.cp
    kv_heads = model.kv_heads or model.heads
    qkv = (model.heads + 2 * kv_heads) * model.d_head // layout.tp
    sizes = (model.width, model.d_mlp // layout.tp, model.heads * model.d_head // layout.tp, qkv, tokens)
    return any(size % 16 for size in sizes)


def _too_old_for_fp8(case: Case) -> bool:
    if not (case.cuda and case.on_this_machine):
        return False
    import torch

    return torch.cuda.get_device_capability() < (8, 9)


def _ulysses(case: Case) -> bool:
    return case.layout.cp > 1 and case.layout.context_kind == "ulysses"


def _odd_norm(case: Case) -> bool:
    model = case.config.model
    return model.norm == "layernorm" and (not model.bias or model.qk_norm)


def _model(case: Case) -> ModelConfig:
    return case.config.model


MEGATRON: tuple[Limit, ...] = (
    Limit(
        "megatron", "the package is not installed", "Megatron-core is an extra", _PIP,
        lambda case: case.on_this_machine and not version(),
    ),
    Limit(
        "megatron", "megatron-core older than 0.16.1, or 0.20 and newer", "its layers are known of these versions alone", _PIP,
        lambda case: case.on_this_machine and bool(version()) and not OLDEST <= version() < NEWEST,
    ),
    Limit(
        "megatron", "einops or psutil is not installed", "megatron-core needs them without saying so", _PIP,
        lambda case: case.on_this_machine and bool(version()) and not (installed("einops") and installed("psutil")),
    ),
    Limit(
        "megatron", "this build of megatron-core", "it cannot be imported, or lacks the hooks of the versions that are known",
        _PIP, _lacks_hooks,
    ),
    Limit(
        "megatron", 'optim.kind = "muon"', "q, k and v are one matrix here, and Muon treats each matrix as a whole",
        f'optim.kind="adamw", or {_NATIVE}', lambda case: case.config.optim.kind == "muon",
    ),
    Limit(
        "megatron", 'model.norm_order = "post"', "its layers norm before attention and MLP", _NATIVE,
        lambda case: _model(case).norm_order == "post",
    ),
    Limit(
        "megatron", 'model.block = "parallel"', "its layers go one after the other", _NATIVE,
        lambda case: _model(case).block == "parallel",
    ),
    Limit(
        "megatron", "model.embedding_norm", "its embedding has no norm", _NATIVE, lambda case: _model(case).embedding_norm,
    ),
    Limit(
        "megatron", "model.logit_scale other than 1", "its head has no scale", _NATIVE,
        lambda case: _model(case).logit_scale != 1.0,
    ),
    Limit(
        "megatron", "model.bias without model.qkv_bias", "where its linear layers have biases, q, k and v have", _NATIVE,
        lambda case: _model(case).bias and not _model(case).bias_qkv,
    ),
    Limit(
        "megatron", 'model.rope.scaling = "yarn"', "its rotation does not scale cosines and sines", _NATIVE,
        lambda case: _model(case).position == "rotary" and _model(case).rope.scaling == "yarn",
    ),
    Limit(
        "megatron", "model.kv_heads that parallel.tp does not divide", "its ranks hold whole groups of heads",
        "a smaller parallel.tp with parallel.zero=3, or " + _NATIVE, lambda case: _model(case).n_kv % case.layout.tp != 0,
    ),
    Limit(
        "megatron", "parallel.async_tp", "it is torch.compile that overlaps there", "parallel.async_tp=false",
        lambda case: case.config.parallel.async_tp,
    ),
    Limit(
        "megatron", 'engine.compile = "on"', "its layers are not compiled", 'engine.compile="auto"',
        lambda case: case.config.engine.compile == "on",
    ),
    Limit(
        "megatron", "engine.megatron.fp8 = true without Transformer Engine on CUDA",
        "FP8 is Transformer Engine's, which runs on CUDA alone", f"{_TE_PIP}, or engine.megatron.fp8=false",
        lambda case: case.config.engine.megatron.fp8 and _unavailable(case),
    ),
    Limit(
        "megatron", 'engine.megatron.transformer_engine = "on" without Transformer Engine on CUDA',
        "its fused layers run on CUDA alone", f'{_TE_PIP}, or engine.megatron.transformer_engine="auto"',
        lambda case: case.config.engine.megatron.transformer_engine == "on" and _unavailable(case),
    ),
    Limit(
        "megatron", 'engine.megatron.fp8 = true with engine.megatron.transformer_engine = "off"',
        "FP8 is of Transformer Engine", 'engine.megatron.transformer_engine="auto", or engine.megatron.fp8=false',
        lambda case: _fp8(case) and case.config.engine.megatron.transformer_engine == "off",
    ),
    Limit(
        "megatron", "engine.megatron.fp8 on a GPU before compute capability 8.9", "it has no FP8 products",
        "engine.megatron.fp8=false", lambda case: _fp8(case) and _too_old_for_fp8(case),
    ),
    Limit(
        "megatron", "engine.megatron.fp8 with sizes that 16 does not divide",
        "model.width, mlp_width / tp, heads x head_dim / tp, (heads + 2 kv_heads) x head_dim / tp and the tokens of a "
        "micro-batch are sides of FP8 products",
        "sizes that 16 divides, or engine.megatron.fp8=false",
        lambda case: _fp8(case) and _uneven(case),
    ),
    Limit(
        "megatron", "Transformer Engine with data.document_mask = true", "its attention is plain causal here",
        f"data.document_mask=false, or {_WITHOUT_TE}", lambda case: _requested(case) and case.config.data.document_mask,
    ),
    Limit(
        "megatron", "Transformer Engine with model.windows other than 0", "its attention is plain causal here",
        f"model.windows=[0], or {_WITHOUT_TE}", lambda case: _requested(case) and any(_model(case).windows),
    ),
    Limit(
        "megatron", 'Transformer Engine with model.position = "alibi"', "its attention is plain causal here", _WITHOUT_TE,
        lambda case: _requested(case) and _model(case).position == "alibi",
    ),
    Limit(
        "megatron", "Transformer Engine with model.moe", "its layers have no room for the run's experts", _WITHOUT_TE,
        lambda case: _requested(case) and _model(case).moe is not None,
    ),
    Limit(
        "megatron", 'Transformer Engine with engine.recompute other than "none"', "it makes nothing again in backward",
        f'engine.recompute="none", or {_WITHOUT_TE}', lambda case: _requested(case) and case.config.engine.recompute != "none",
    ),
    Limit(
        "megatron", 'Transformer Engine with engine.precision = "fp32"', "its fast kernels take bf16 alone",
        f'engine.precision="bf16", or {_WITHOUT_TE}', lambda case: _requested(case) and case.config.engine.precision == "fp32",
    ),
    Limit(
        "megatron", 'Transformer Engine with parallel.context_kind = "ulysses"', "it shares a row's tokens out otherwise",
        'parallel.context_kind="ring"', lambda case: _requested(case) and _ulysses(case),
    ),
    Limit(
        "megatron", "Transformer Engine with LayerNorm that has no biases or goes with model.qk_norm",
        "its LayerNorm has biases, and heads are normed as layers are", _WITHOUT_TE,
        lambda case: _requested(case) and _odd_norm(case),
    ),
)  # fmt: skip
