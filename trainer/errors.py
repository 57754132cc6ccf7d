"""Mistakes of the user that end a command with one line and exit code 2. A stack trace is for our bugs only."""

from data.errors import DataError
from parallel.errors import LayoutError


class ConfigError(ValueError):
    """The configuration cannot be used; the message is one line a mistake."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be saved or trusted; the message names the file and what to do."""


class RunError(ValueError):
    """A run folder that cannot be used; the message says why and what to do."""


USER_ERRORS = (ConfigError, CheckpointError, RunError, DataError, LayoutError)
