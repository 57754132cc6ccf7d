"""The checkpoint store and the retention policy of a run, from its config."""

from __future__ import annotations

import os

from mikoshi.trainer.checkpoint.retention import Keep
from mikoshi.trainer.checkpoint.storage.base import Store
from mikoshi.trainer.checkpoint.storage.open import open_store
from mikoshi.trainer.config.run import RunConfig
from mikoshi.trainer.record.run_folder import RunFolder


def checkpoints_of(run: RunFolder, config: RunConfig, reader: bool = False) -> Store:
    """Returns the store that `checkpoint.folder` names; by default the run folder's own.

    Raises CheckpointError if the address cannot be used.

    reader: True for a command beside the run's ranks, which must not share the files that these fetch.
    """
    suffix = f"-{os.environ.get('MIKOSHI_SUPERVISOR', os.getpid())}" if reader else ""
    return open_store(config.checkpoint.folder or run.checkpoints, scratch=run.path / f".fetched{suffix}")


def retention_of(config: RunConfig) -> Keep:
    """Returns which checkpoints the config keeps, including those that its loss guard may rewind to."""
    section, guard = config.checkpoint, config.guard
    rewind = (guard.rewind, section.regular) if guard.spike == "rewind" else (0, 0)
    return Keep(section.keep, section.keep_every, *rewind)
