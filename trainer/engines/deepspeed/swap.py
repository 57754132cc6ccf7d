"""Where a rank swaps to a disk: a folder of its own that goes with it, and that the next run removes where it could not.

NVME/RUN-rank0-XXXX.HOST.mikoshi-swap         what DeepSpeed keeps there
NVME/RUN-rank0-XXXX.HOST.mikoshi-swap-lock    held while the process is; gone after the folder is
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import re
import shutil
import socket
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path

from mikoshi.trainer.config.run import RunConfig
from mikoshi.trainer.errors import ConfigError

_FOLDER, _LOCK = ".mikoshi-swap", ".mikoshi-swap-lock"


def swap_folder(config: RunConfig, rank: int, owner: object) -> tuple[Path | None, Callable[[], object]]:
    """A new folder below engine.deepspeed.nvme for a rank of a run, or None where nothing is swapped, and what removes it;
    it goes with `owner` in any case. What dead processes of this host left there is removed first. Raises ConfigError where
    the disk cannot be used so."""
    own = config.engine.deepspeed
    if own.nvme is None or "nvme" not in (own.offload_optimizer, own.offload_parameters):
        return None, lambda: None
    name = ""
    try:
        sweep(own.nvme)
        lock, name = tempfile.mkstemp("", f"{config.run.name}-rank{rank}-", own.nvme)
        fcntl.flock(lock, fcntl.LOCK_EX)
        stem = f"{name}.{_host()}"
        Path(name).rename(stem + _LOCK)  # locked before it has its name: a sweep never finds it free
        folder = Path(stem + _FOLDER)
        folder.mkdir(mode=0o700)
    except OSError as error:
        if name:
            Path(name).unlink(missing_ok=True)
        raise ConfigError(
            f'engine.deepspeed.nvme = "{own.nvme}": cannot be swapped to: {error.strerror}: give a folder on a local disk'
        ) from None
    return folder, weakref.finalize(owner, _leave, folder, lock, os.getpid())


def sweep(nvme: Path) -> None:
    """Remove the folders of this host's processes that are no more. The system lets go of a lock however its process has
    ended; of another host's it may not know."""
    for lock in nvme.glob(f"*.{glob.escape(_host())}{_LOCK}"):
        with contextlib.suppress(OSError):  # in use, another user's, or just gone
            held = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(Path(str(lock).removesuffix(_LOCK) + _FOLDER))
            finally:
                os.close(held)


def _host() -> str:
    return re.sub(r"[^\w-]", "-", socket.gethostname())


def _remove(folder: Path) -> None:
    """The folder, and only then what says that it is there: a removal cut short is gone on with by the next."""
    shutil.rmtree(folder, ignore_errors=True)
    if not folder.exists():
        Path(str(folder).removesuffix(_FOLDER) + _LOCK).unlink(missing_ok=True)


def _leave(folder: Path, lock: int, process: int) -> None:
    if os.getpid() == process:  # a forked child has the same finalizers
        _remove(folder)
        os.close(lock)
