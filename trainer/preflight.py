"""Everything that can be refused before a rank starts: data, vocabulary, layout, run folder, packages."""

from __future__ import annotations

import importlib.util

from data.errors import DataError
from data.loader import open_split
from data.prepare import HELD_OUT, TRAIN
from data.shards import TOKENIZER, DatasetInfo
from data.tokenizer import load_tokenizer
from parallel.world import check_device
from trainer.config import RunConfig
from trainer.engines.carry import layout_of
from trainer.errors import ConfigError
from trainer.runfolder import RunFolder


def preflight(config: RunConfig, ranks: int) -> DatasetInfo:
    """Check a run of `ranks` ranks. Raises ConfigError, DataError, LayoutError or RunError, one line each."""
    layout_of(config, ranks)
    _, info = open_split(config.data.path, TRAIN, config.train.context)
    open_split(config.data.path, HELD_OUT, config.train.context)
    if config.model.vocab < info.vocab:
        raise ConfigError(
            f"model.vocab = {config.model.vocab}: smaller than the {info.vocab} tokens of the data's tokenizer: "
            f"use model.vocab={info.vocab} or more"
        )
    tokenizer = load_tokenizer(config.data.path / TOKENIZER)
    if tokenizer.fingerprint != info.tokenizer:
        raise DataError(f"{config.data.path / TOKENIZER}: not the tokenizer that made the data; prepare the data again")
    if config.log.wandb and importlib.util.find_spec("wandb") is None:
        raise ConfigError(f'log.wandb = "{config.log.wandb}": the package wandb is not installed: pip install "mikoshi[wandb]"')
    check_device("cuda" if config.parallel.async_tp else config.engine.device)
    RunFolder(config.run.path).make()
    return info
