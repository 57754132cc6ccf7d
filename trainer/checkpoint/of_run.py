"""Where the checkpoints of a run are, and which of them stay."""

from __future__ import annotations

import os

from mikoshi.trainer.checkpoint.retention import Keep
from mikoshi.trainer.checkpoint.storage.base import Store
from mikoshi.trainer.checkpoint.storage.open import open_store
from mikoshi.trainer.config.run import RunConfig
from mikoshi.trainer.record.run_folder import RunFolder


def checkpoints_of(run: RunFolder, config: RunConfig, reader: bool = False) -> Store:
    """The store that `checkpoint.folder` names, by default the run folder's own. Raises CheckpointError if it cannot be.
    `reader`: of a command beside the run's own ranks, which must not share what these fetch."""
    own = f"-{os.environ.get('MIKOSHI_SUPERVISOR', os.getpid())}" if reader else ""
    return open_store(config.checkpoint.folder or run.checkpoints, scratch=run.path / f".fetched{own}")


def keep_of(config: RunConfig) -> Keep:
    """Which checkpoints the config asks to keep; where its loss guard goes back, those that it may go back to as well."""
    asked, guard = config.checkpoint, config.guard
    back = (guard.rewind, asked.regular) if guard.spike == "rewind" else (0, 0)
    return Keep(asked.keep, asked.keep_every, *back)
