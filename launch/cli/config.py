"""The verb that prints a run's resolved config."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mikoshi.data.io.json import dumps
from mikoshi.launch.cli.arguments import Overrides

CONFIG_EXAMPLES = (
    "Examples: `mikoshi config configs/runs/quickstart.toml optim.lr=1e-3`, "
    "`mikoshi config run.toml optim.kind=muon --optim`, `mikoshi config --schema`, "
    '`mikoshi config --from-accelerate default_config.yaml > layout.toml`, then base = ["layout.toml"] in a run'
)


def config(
    run: Annotated[Path | None, typer.Argument(help="a run's TOML file or its run folder", show_default=False)] = None,
    overrides: Overrides = None,
    schema: Annotated[bool, typer.Option("--schema", help="print the JSON Schema of a run's config instead")] = False,
    optim: Annotated[
        bool, typer.Option("--optim", help="print what each parameter gets instead: optimizer, weight decay, learning rate")
    ] = False,
    from_accelerate: Annotated[
        Path | None, typer.Option(help="print what a config file of accelerate says, as a base of runs", show_default=False)
    ] = None,
) -> None:
    """Print a run's resolved config: its base files, its own settings and every default, as TOML.

    What a run settles itself (train.micro_batch, checkpoint.every by time) has no line unless given; --schema has all keys.
    """
    from mikoshi.trainer.config.run import RunConfig, load_config, to_toml
    from mikoshi.trainer.errors import ConfigError

    if schema:
        typer.echo(dumps(RunConfig.model_json_schema(), indent=2))
        return
    if from_accelerate is not None:
        from mikoshi.trainer.interop.accelerate.config import convert

        if run is not None:
            raise ConfigError(f"config: {run} and --from-accelerate {from_accelerate}: give one of them")
        typer.echo(convert(from_accelerate), nl=False)
        return
    if run is None:
        raise ConfigError("config: give a run's TOML file or folder, --schema, or --from-accelerate with a YAML file")
    if optim:
        from mikoshi.trainer.inspect.optimizer import optim_lines

        typer.echo("\n".join(optim_lines(load_config(run, overrides or []))))
        return
    typer.echo(to_toml(load_config(run, overrides or [])), nl=False)
