"""Lines of set-up from a cluster file and the command that they are for keep out of each other's way."""

from __future__ import annotations

SETUP = 'mikoshi_setup() { . "$0"; }; mikoshi_setup </dev/null >&2 && exec "$@"'
"""For bash -c, with the file of setup lines as $0 and a command after it. The lines see no argument of that command, eat none
of its input and write nothing into its output; if the last of them fails it is not run."""
