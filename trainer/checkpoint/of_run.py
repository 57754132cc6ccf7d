"""Where the checkpoints of a run are."""

from __future__ import annotations

import os

from trainer.checkpoint.store import Store, open_store
from trainer.config import RunConfig
from trainer.runfolder import RunFolder


def checkpoints_of(run: RunFolder, config: RunConfig, reader: bool = False) -> Store:
    """The store that `checkpoint.folder` names, by default the run folder's own. Raises CheckpointError if it cannot be.
    `reader`: of a command beside the run's own ranks, which must not share what these fetch."""
    own = f"-{os.environ.get('MIKOSHI_SUPERVISOR', os.getpid())}" if reader else ""
    return open_store(config.checkpoint.folder or run.checkpoints, scratch=run.path / f".fetched{own}")
