"""Checks everything that can be checked before a rank starts: data, vocabulary, layout, run folder, packages."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import torch

from mikoshi.data.dataset.predicted import check_predicts
from mikoshi.parallel.process.process_group import check_device
from mikoshi.trainer.checkpoint.of_run import checkpoints_of
from mikoshi.trainer.config.run import RunConfig
from mikoshi.trainer.engines.layout import layout_of
from mikoshi.trainer.engines.limits import refuse
from mikoshi.trainer.engines.precision import choose_precision
from mikoshi.trainer.errors import ConfigError
from mikoshi.trainer.feed.feed import check_cache, dataset_locations, open_feed, recipes
from mikoshi.trainer.feed.streamed import hold_out
from mikoshi.trainer.record.run_folder import RunFolder
from mikoshi.trainer.record.wandb import check_key


def preflight(config: RunConfig, ranks: int) -> None:
    """Check a run of `ranks` ranks. Raises ConfigError, DataError, LayoutError or RunError, one line each."""
    _foresee(config, ranks, config.engine.device != "cpu" and torch.cuda.is_available(), here=True)
    if config.log.wandb and importlib.util.find_spec("wandb") is None:
        raise ConfigError(f'log.wandb = "{config.log.wandb}": the package wandb is not installed: pip install "mikoshi[wandb]"')
    if config.log.wandb:
        check_key(config.log.wandb, os.environ, Path.home())
    check_device("cuda" if config.parallel.async_tp else config.engine.device)
    RunFolder(config.run.path).make()


def foresee(config: RunConfig, ranks: int) -> None:
    """The part of preflight that any machine with the data can do, even one without ranks. Creates nothing."""
    _foresee(config, ranks, {"cpu": False, "cuda": True}.get(config.engine.device), here=False)


def _foresee(config: RunConfig, ranks: int, cuda: bool | None, here: bool) -> None:
    """`cuda`, `here`: as an engine's Case has them, all that is known at once: what a run that lacks its GPUs could not do on
    them either is no reason to give it."""
    layout = layout_of(config, ranks)
    refuse(
        config if cuda is not False else choose_precision(config, layout, "cpu", bf16_everywhere=False)[0], layout, cuda, here
    )
    if config.data.document_mask and config.model.position == "rotary" and config.model.rope.varies(config.train.context):
        raise ConfigError(
            f'model.rope.scaling = "dynamic" with data.document_mask and train.context = {config.train.context}: beyond '
            f"rope.original_context {config.model.rope.original_context} every length has frequencies of its own, which "
            "documents in one row cannot have: set data.document_mask=false, train.context="
            f'{config.model.rope.original_context}, or model.rope.scaling="yarn"'
        )
    if config.data.stream:
        hold_out(config, recipes(config.data), dataset_locations(config.data))
    feed = open_feed(config)
    vocab = feed.tokenizer.vocab
    if config.model.vocab < vocab:
        raise ConfigError(
            f"model.vocab = {config.model.vocab}: smaller than the {vocab} tokens of the data's tokenizer: "
            f"use model.vocab={vocab} or more"
        )
    check_cache(feed)
    for corpus in feed.train.values():
        check_predicts(corpus, config.data.document_mask)
    if not checkpoints_of(
        RunFolder(config.run.path), config
    ).steps():  # else what it has consumed counts, which its ranks will read
        feed.continued(None)
