"""Files that cannot be opened just now, though they are there and whole: the process has no handle left."""

import contextlib
import os
import resource
from pathlib import Path

from mikoshi.data.errors import os_errors_named


@contextlib.contextmanager
def no_handles():
    """Whatever would open a file in the block meets EMFILE, as in an outage that passes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with Path(os.devnull).open() as file:
        free = file.fileno()  # the lowest one. Not 0 handles: poll() fails then, and with it a server's thread in this process
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def read_without(_context, job, _tell):
    """A task of a worker that has none."""
    with no_handles(), os_errors_named(job):
        return Path(job).read_bytes()
