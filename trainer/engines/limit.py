"""One row of the table of what an engine cannot do, and what it is asked about."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

from mikoshi.parallel.layout import Layout
from mikoshi.trainer.config.engine import Kind
from mikoshi.trainer.config.run import RunConfig


@dataclass(frozen=True)
class Case:
    """A run on the ranks of a layout. cuda: whether those are GPUs; None: not known here, as on a submitting machine. here:
    whether they run on this machine, whose packages and tools are then theirs."""

    config: RunConfig
    layout: Layout
    cuda: bool | None
    here: bool = True


def on_gpus(case: Case) -> bool:
    """Whether a case is known to run on GPUs."""
    return bool(case.cuda) or (case.cuda is None and case.config.engine.device == "cuda")


@dataclass(frozen=True)
class Limit:
    """What an engine cannot do. what: the setting or the combination, with its keys. why: the reason. instead: overrides, or
    in words, what comes nearest and works. met: whether a case is one of these; never raises."""

    engine: Kind
    what: str
    why: str
    instead: str
    met: Callable[[Case], bool]


def installed(package: str) -> bool:
    """Whether a package can be imported, told without importing it."""
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False
