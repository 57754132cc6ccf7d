"""Mistakes of the user that end a command with one line and exit code 2. A stack trace is for our bugs only."""

from mikoshi.data.errors import DataError
from mikoshi.parallel.errors import LayoutError


class ConfigError(ValueError):
    """The configuration cannot be used; the message is one line a mistake."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be saved or trusted; the message names the file and what to do."""


class RunError(ValueError):
    """A run folder that cannot be used; the message says why and what to do."""


class LaunchError(ValueError):
    """A cluster that cannot be used, or that refuses or does not answer; the message is one line with the way out."""


class OutputError(ValueError):
    """What a command was asked to print cannot be written; the message says where and why."""


class OutageError(LaunchError):
    """Nobody's mistake: nodes that did not come up, or storage that does not answer. Later, or elsewhere, it may work."""


class TooFewError(LaunchError):
    """A cluster has fewer nodes that may be used than are asked for."""


class SpoiledError(RuntimeError):
    """The state of this process is not worth going on with; an earlier checkpoint may be."""


class DivergedError(SpoiledError):
    """Ranks that hold the same piece of the state hold different bits; the message names them."""


USER_ERRORS = (ConfigError, CheckpointError, RunError, DataError, LayoutError, LaunchError, OutputError)
