"""Text from a trained model: one token after another, each costing one pass over one position."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mikoshi.data.tokenizer.tokenizer import Tokenizer, load_saved
from mikoshi.parallel.process.process_group import World
from mikoshi.trainer.checkpoint.of_run import checkpoints_of
from mikoshi.trainer.checkpoint.restore import load, newest_valid
from mikoshi.trainer.config.run import RunConfig, load_config, parse_config
from mikoshi.trainer.engines.base import Engine
from mikoshi.trainer.engines.build import build_engine, leave_empty
from mikoshi.trainer.engines.layout import layout_of
from mikoshi.trainer.errors import CheckpointError, ConfigError
from mikoshi.trainer.model.gpt import GPT, KVCache
from mikoshi.trainer.record.run_folder import RunFolder

_COLDEST, _HOTTEST = 1e-6, 1e30
"""Temperatures below which only the likeliest token has a chance, and above which all have the same."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. temperature 0, or so low that nothing else has a chance: the likeliest. top_k 0 and
    top_p 1: no cut."""

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for key, good, must in (
            ("temperature", 0 <= self.temperature < math.inf, "a number from 0 up"),
            ("top-k", self.top_k >= 0, "at least 0"),
            ("top-p", 0 < self.top_p <= 1, "above 0 and at most 1"),
        ):
            if not good:
                raise ConfigError(f"--{key} must be {must}, not {getattr(self, key.replace('-', '_'))}")


def load_model(folder: RunFolder, device: torch.device) -> tuple[GPT, Tokenizer, RunConfig, int]:
    """The newest valid checkpoint's model, fp32, its tokenizer, its config and its step. Raises CheckpointError."""
    found = newest_valid(checkpoints_of(folder, load_config(folder.path), reader=True), set_aside=False)
    if found is None:
        raise CheckpointError(f"{folder.path}: there is no checkpoint yet; train first, or wait for one")
    path, manifest, _ = found
    config = parse_config(manifest.record["config"], str(path))
    with torch.device("meta"):
        model = GPT(config.model)
    model.to_empty(device=device)
    load(path, manifest, {f"model.{name}": p.detach() for name, p in model.named_parameters()})
    return model.eval(), load_saved(folder.tokenizer), config, manifest.step


def known_ids(tokenizer: Tokenizer) -> Tensor:
    """Which ids are tokens, up to the last that is. The rows of a model's vocabulary that are beyond, or in a gap of the ids,
    were never learned."""
    known = torch.zeros(tokenizer.vocab, dtype=torch.bool)
    known[list(tokenizer.backend.get_vocab().values())] = True
    return known


def choose(logits_V: Tensor, sampling: Sampling, generator: torch.Generator, known: Tensor | None = None) -> int:
    """One token id from the logits of the next position, of those that are `known` alone. top-p: Holtzman et al. 2020
    (arXiv:1904.09751). Raises CheckpointError for logits that are no numbers."""
    logits = logits_V.float()
    if known is not None:
        logits = logits[: len(known)].masked_fill(~known[: len(logits)].to(logits.device), -torch.inf)
    best = logits.argmax()
    if not torch.isfinite(logits[best]):
        raise CheckpointError("the model's scores of the next token are not finite: its checkpoint is of no use for text")
    if sampling.temperature < _COLDEST:
        return int(best)
    logits = logits / min(sampling.temperature, _HOTTEST)
    if sampling.top_k:
        kept = logits.topk(min(sampling.top_k, len(logits))).values[-1]
        logits = logits.masked_fill(logits < kept, -torch.inf)
    p, order = logits.softmax(-1).sort(descending=True, stable=True)
    p = p.masked_fill(p.cumsum(-1) - p >= sampling.top_p, 0.0)
    return int(order[torch.multinomial(p.cpu(), 1, generator=generator).to(order.device)])


def _any_of(end: int | Collection[int]) -> Collection[int]:
    return {end} if isinstance(end, int) else end


@torch.inference_mode()
def generate(
    model: GPT, prompt: list[int], tokens: int, sampling: Sampling, end: int | Collection[int], known: Tensor | None = None
) -> Iterator[int]:
    """Up to `tokens` ids, of those that are `known` (all by default), that go on from `prompt` (not empty), stopping before
    `end`, or before any of several.

    Keys and values are kept. With learned positions nothing goes beyond the context: the window is then moved on by
    half and its keys and values are made again. Where dynamic RoPE has other frequencies at every length, nothing can be kept.
    """
    generator, stops = torch.Generator().manual_seed(sampling.seed), _any_of(end)
    device, dtype = model.head_weight.device, model.head_weight.dtype
    room = model.config.context if model.config.position == "learned" else len(prompt) + tokens
    ids = list(prompt)
    fresh, cache = ids[-room:], KVCache.empty(model.config, 1, room, device, dtype)
    for _ in range(tokens):
        if cache.length + len(fresh) > room:
            fresh, cache.length = ids[-max(1, room // 2) :], 0
        if model.config.position == "rotary" and model.config.rope.varies(len(ids)):
            logits = model(torch.tensor([ids], device=device))[0, -1]
        else:
            logits = model(torch.tensor([fresh], device=device), cache=cache)[0, -1]
        token = choose(logits, sampling, generator, known)
        if token in stops:
            return
        ids.append(token)
        fresh = [token]
        yield token


def generate_together(
    engine: Engine,
    prompt: list[int],
    tokens: int,
    sampling: Sampling,
    end: int | Collection[int],
    known: Tensor | None = None,
) -> Iterator[int]:
    """The same with a model that many ranks carry: every token is a pass of the whole window through all stages, without
    kept keys and values. Collective; every rank gets the same ids."""
    generator, stops = torch.Generator().manual_seed(sampling.seed), _any_of(end)
    ids = list(prompt)
    for _ in range(tokens):
        token = choose(engine.next_logits(ids).cpu(), sampling, generator, known)
        if token in stops:
            return
        ids.append(token)
        yield token


def load_engine(folder: RunFolder, overrides: dict[str, int], place: World, device: torch.device) -> tuple[Engine, Tokenizer]:
    """The newest valid checkpoint's model over all ranks of `place`: tp and pp as in `overrides`, the rest hold shards.
    Collective. Raises CheckpointError or LayoutError."""
    found = newest_valid(checkpoints_of(folder, load_config(folder.path), reader=True), set_aside=False)
    if found is None:
        raise CheckpointError(f"{folder.path}: there is no checkpoint yet; train first, or wait for one")
    path, manifest, _ = found
    config = forward_config(parse_config(manifest.record["config"], str(path)), overrides, place.size)
    if config.model.position == "rotary" and config.model.rope.varies(config.train.context):
        raise ConfigError(
            'model.rope.scaling = "dynamic": ranks together read rows of train.context tokens, beyond rope.original_context, '
            "where every length has frequencies of its own: generate on one rank"
        )
    engine = build_engine(config, layout_of(config, place.size), device, fill_weights=leave_empty)
    state = {name: tensor for name, tensor in engine.state().items() if name.startswith("model.")}
    load(path, manifest, state)
    engine.load_state(state)
    return engine, load_saved(folder.tokenizer)


def forward_config(config: RunConfig, overrides: dict[str, int], world: int) -> RunConfig:
    """The config for forward passes on `world` ranks: native engine, ZeRO 3, and only the parallel degrees in `overrides`."""
    plain: dict[str, object] = {"schedule": "1f1b", "virtual_stages": None, "replicas": None, "offload": "none"}
    plain |= {"cp": 1, "ep": 1, "expert_tp": None, "zero": 3}
    parallel = config.parallel.model_copy(update=plain | overrides)
    train = config.train.model_copy(update={"global_batch": world, "micro_batch": None})
    engine = config.engine.model_copy(update={"kind": "native"})
    return config.model_copy(update={"parallel": parallel, "train": train, "engine": engine})


def text_stream(tokenizer: Tokenizer, prompt: list[int], ids: Iterator[int]) -> Iterator[str]:
    """The text of `ids` in pieces, held back while a character's bytes are incomplete."""
    seen = list(prompt)
    shown = tokenizer.decode(seen)
    for token in ids:
        seen.append(token)
        text = tokenizer.decode(seen)
        if not text.endswith("�"):
            yield text[len(shown) :]
            shown = text
    yield tokenizer.decode(seen)[len(shown) :]
