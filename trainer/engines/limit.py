"""One row of the table of what an engine cannot do, and the case that it is checked against."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

from mikoshi.parallel.layout import Layout
from mikoshi.trainer.config.engine import Kind
from mikoshi.trainer.config.run import RunConfig


@dataclass(frozen=True)
class Case:
    """A run on the ranks of a layout.

    cuda: whether the ranks run on GPUs; None means not known, as on a submitting machine.
    on_this_machine: whether the ranks run here, so that this machine's packages and tools are theirs.
    """

    config: RunConfig
    layout: Layout
    cuda: bool | None
    on_this_machine: bool = True


def on_gpus(case: Case) -> bool:
    """Whether a case is known to run on GPUs."""
    return bool(case.cuda) or (case.cuda is None and case.config.engine.device == "cuda")


@dataclass(frozen=True)
class Limit:
    """What an engine cannot do.

    what: the setting or the combination of settings, with its keys.
    why: the reason.
    instead: overrides, or words, for the nearest thing that works.
    applies: whether a case is one of these; never raises.
    """

    engine: Kind
    what: str
    why: str
    instead: str
    applies: Callable[[Case], bool]


def installed(package: str) -> bool:
    """Whether a package can be imported, found out without importing it."""
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False
