"""Lines of set-up from a cluster file and the command that they are for keep out of each other's way."""

from __future__ import annotations

from pathlib import Path

from mikoshi.data.io.atomic import write_file
from mikoshi.launch.runs.record import Submitted

SETUP = 'mikoshi_setup() { . "$0"; }; mikoshi_setup </dev/null >&2 && exec "$@"'
"""For bash -c, with the file of setup lines as $0 and a command after it. The lines see no argument of that command, eat none
of its input and write nothing into its output; if the last of them fails it is not run."""

LOGIN = SETUP.replace("{ ", "{ [ -r /etc/profile ] && . /etc/profile; ", 1)
"""The same after what a login brings, such as the command `module`, which is there only where /etc/profile has been read."""


def setup_file(run: Submitted) -> Path:
    """Where the setup lines of the cluster file lie for those that start something for this run."""
    return run.folder.path.absolute() / "setup.sh"


def write_setup(run: Submitted) -> None:
    """Put them there, if there are any."""
    if lines := run.spec.cluster.setup:
        write_file(setup_file(run), lines.encode("utf-8", "surrogateescape") + b"\n")
