"""A rank's swap folder on a disk: it is removed when the rank ends, or by the next run if the rank was killed.

NVME/RUN-rank0-XXXX.HOST.mikoshi-swap         what DeepSpeed keeps there
NVME/RUN-rank0-XXXX.HOST.mikoshi-swap-lock    locked while the process lives; removed after the folder
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
    """Returns a new folder below engine.deepspeed.nvme, and the function that removes it; (None, no-op) if nothing is
    swapped.

    Folders that dead processes of this host left are removed first. Raises ConfigError if the disk cannot be used.

    owner: the folder is removed at the latest when this object is.
    """
    section = config.engine.deepspeed
    if section.nvme is None or "nvme" not in (section.offload_optimizer, section.offload_parameters):
        return None, lambda: None
    name = ""
    try:
        sweep(section.nvme)
        lock, name = tempfile.mkstemp("", f"{config.run.name}-rank{rank}-", section.nvme)
        fcntl.flock(lock, fcntl.LOCK_EX)
        stem = f"{name}.{_host()}"
        Path(name).rename(stem + _LOCK)  # locked before it gets its name, so that no sweep finds it unlocked
        folder = Path(stem + _FOLDER)
        folder.mkdir(mode=0o700)
    except OSError as error:
        if name:
            Path(name).unlink(missing_ok=True)
        raise ConfigError(
            f'engine.deepspeed.nvme = "{section.nvme}": cannot be swapped to: {error.strerror}: give a folder on a local disk'
        ) from None
    return folder, weakref.finalize(owner, _remove_at_exit, folder, lock, os.getpid())


def sweep(nvme: Path) -> None:
    """Remove the folders of processes of this host that have ended.

    The system releases a lock however its process ended. Locks of other hosts cannot be judged.
    """
    for lock in nvme.glob(f"*.{glob.escape(_host())}{_LOCK}"):
        with contextlib.suppress(OSError):  # in use, another user's, or just gone
            handle = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(Path(str(lock).removesuffix(_LOCK) + _FOLDER))
            finally:
                os.close(handle)


def _host() -> str:
    return re.sub(r"[^\w-]", "-", socket.gethostname())


def _remove(folder: Path) -> None:
    """Remove the folder and then its lock file, so that the next sweep completes a removal that was cut short."""
    shutil.rmtree(folder, ignore_errors=True)
    if not folder.exists():
        Path(str(folder).removesuffix(_FOLDER) + _LOCK).unlink(missing_ok=True)


def _remove_at_exit(folder: Path, lock: int, process: int) -> None:
    if os.getpid() == process:  # a forked child has the same finalizers
        _remove(folder)
        os.close(lock)
