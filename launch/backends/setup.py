"""Runs the setup lines of a cluster file before a command, so that neither disturbs the other."""

from __future__ import annotations

from pathlib import Path

from mikoshi.data.io.atomic import write_file
from mikoshi.launch.runs.record import SubmittedRun

SETUP = 'mikoshi_setup() { . "$0"; }; mikoshi_setup </dev/null >&2 && exec "$@"'
"""For bash -c, with the file of setup lines as $0 and a command after it. The lines cannot see the command's arguments, read
its input or write to its output. If the last line fails, the command does not run."""

LOGIN = SETUP.replace("{ ", "{ [ -r /etc/profile ] && . /etc/profile; ", 1)
"""The same after a login's setup, such as the command `module`, which exists only after /etc/profile has been read."""


def setup_file(run: SubmittedRun) -> Path:
    """The file with a run's setup lines."""
    return run.folder.path.absolute() / "setup.sh"


def write_setup(run: SubmittedRun) -> None:
    """Write the setup lines of the cluster file to that file, if there are any."""
    if lines := run.spec.cluster.setup:
        write_file(setup_file(run), lines.encode("utf-8", "surrogateescape") + b"\n")
