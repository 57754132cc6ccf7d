"""The verbs that export and import weights as safetensors."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mikoshi.launch.cli.arguments import Config, Overrides

if TYPE_CHECKING:
    from mikoshi.trainer.config.run import RunConfig
    from mikoshi.trainer.interop.committed import Committed

EXPORT_EXAMPLES = (
    "Examples: `mikoshi checkpoint export runs/quickstart weights`, "
    "`mikoshi checkpoint export runs/big/checkpoints/step-00012000 weights --max-shard-size 2GB`"
)
IMPORT_EXAMPLES = "Example: `mikoshi checkpoint import weights fine-tune.toml`, then `mikoshi train fine-tune.toml`"


def export_weights(
    source: Annotated[Path, typer.Argument(help="a run folder, or one of its checkpoints", show_default=False)],
    folder: Annotated[Path, typer.Argument(help="where they go; it must not exist", show_default=False)],
    max_shard_size: Annotated[
        str, typer.Option(help="of a file, such as 500MB or 5GB; a larger tensor has one of its own")
    ] = "5GB",
) -> None:
    """Write a checkpoint's weights as sharded safetensors under Mikoshi's own names, with a config.json of its model.

    The checkpoint, of a run its newest that verifies, is verified before. One shard at a time is in memory.
    """
    from mikoshi.trainer.interop.committed import open_committed
    from mikoshi.trainer.interop.sharded import export, parse_size

    largest = parse_size(max_shard_size)
    committed = open_committed(source)
    print_skipped(committed)
    made = export(committed, folder, largest)
    typer.echo(f"{folder}: {made.files} file{'s' * (made.files != 1)}, {made.bytes / 1e6:,.1f} MB, of step {made.step}")
    if made.largest > largest:
        typer.echo(f"the largest has {made.largest / 1e6:,.1f} MB: a tensor is never cut", err=True)


def print_skipped(committed: Committed) -> None:
    """Warn that newer checkpoints of the run are damaged and an older one is used."""
    for why in committed.rejected:
        typer.echo(f"not taken: {why}", err=True)


def print_imported(
    place: str, source: object, config: Path, overrides: list[str] | None, checked: bool, run: RunConfig
) -> None:
    """Print where imported weights went, what was not checked, and the command that trains on.

    checked: whether the model's settings were compared with those of the weights
    """
    from mikoshi.trainer.interop.model_file import unverifiable_settings

    if not checked:
        typer.echo(unverifiable_settings(run.model), err=True)
    again = shlex.join(["mikoshi", "train", str(config), *(overrides or [])])
    typer.echo(f"{place}: step 0, with the weights of {source}; go on with `{again}`")


def import_weights(
    folder: Annotated[Path, typer.Argument(help="with model.safetensors or its shards and index", show_default=False)],
    config: Config,
    overrides: Overrides = None,
) -> None:
    """Begin a run with weights from a folder of safetensors: its checkpoint of step 0, from which `mikoshi train` goes on.

    The names and shapes must be those of the config's model, as `checkpoint export` and accelerate's save_model write them. One
    tensor at a time is in memory.
    """
    from mikoshi.trainer.config.run import load_config

    run = load_config(config, overrides or [])
    from mikoshi.trainer.interop.begin import begin_run
    from mikoshi.trainer.interop.model_file import check_model
    from mikoshi.trainer.interop.sharded import open_weights

    with open_weights(folder, run.model) as weights:
        place = begin_run(run, weights, source=str(folder))
    print_imported(place, folder, config, overrides, check_model(folder, run.model), run)
