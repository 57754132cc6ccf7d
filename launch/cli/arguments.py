"""Arguments and options that several verbs share, so that each means the same everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Config = Annotated[Path, typer.Argument(help="the run's TOML file", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="settings over the file's, as section.key=value", show_default=False)
]
Run = Annotated[Path, typer.Argument(help="a run folder, such as runs/quickstart", show_default=False)]
NamedRun = Annotated[Path, typer.Argument(help="a run folder, such as runs/quickstart, or a run's name", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="print it as JSON")]


def local_gpus(device: str) -> int:
    """Number of ranks for an engine.device on this machine: one for each GPU, at least one."""
    if device == "cpu":
        return 1
    import torch

    return max(1, torch.cuda.device_count())
