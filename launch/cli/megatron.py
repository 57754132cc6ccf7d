"""The verbs that exchange weights with Megatron-core by its torch_dist checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mikoshi.launch.cli.arguments import Config, Overrides
from mikoshi.launch.cli.weights import print_imported, print_skipped

IMPORT_EXAMPLES = "Example: `mikoshi checkpoint import-megatron megatron/checkpoints run.toml`, then `mikoshi train run.toml`"
EXPORT_EXAMPLES = (
    "Examples: `mikoshi checkpoint export-megatron runs/big megatron/checkpoints`, "
    "`mikoshi checkpoint export-megatron runs/big/checkpoints/step-00012000 out --vocab 50304`"
)


def import_megatron(
    folder: Annotated[Path, typer.Argument(help="Megatron's checkpoints, or one iteration's folder", show_default=False)],
    config: Config,
    overrides: Overrides = None,
) -> None:
    """Begin a run with the weights of a torch_dist checkpoint of Megatron-core, at step 0 of its data.

    The optimizer's state is not brought over. Nothing in the folder is unpickled or run.
    """
    from mikoshi.trainer.config.run import load_config

    run = load_config(config, overrides or [])
    from mikoshi.trainer.interop.begin import begin_run
    from mikoshi.trainer.interop.megatron.torch_dist import find_weights
    from mikoshi.trainer.interop.model_file import check_model

    weights = find_weights(folder, run.model)
    if weights.padding:
        typer.echo(f"the first {run.model.vocab} rows of the vocabulary: {weights.padding} rows of padding are left out")
    place = begin_run(run, weights, source=str(weights.source))
    print_imported(place, weights.source, config, overrides, check_model(weights.source, run.model), run)


def export_megatron(
    source: Annotated[Path, typer.Argument(help="a run folder, or a step's in its checkpoints", show_default=False)],
    folder: Annotated[Path, typer.Argument(help="where Megatron's checkpoints are to be", show_default=False)],
    vocab: Annotated[
        int | None, typer.Option(min=1, help="rows to pad the vocabulary to (default: as the model has)", show_default=False)
    ] = None,
) -> None:
    """Write a checkpoint's weights as Megatron-core's torch_dist, which it loads in any of its layouts.

    Every byte is verified first. Without Megatron-core, a GPU or the memory for more than a layer and the embedding.
    """
    from mikoshi.trainer.interop.committed import open_committed
    from mikoshi.trainer.interop.megatron.export import export_megatron as write

    found = open_committed(source)
    print_skipped(found)
    typer.echo(f"{write(found, folder, vocab)}: the weights of {found.saved}")


VERBS = (("import-megatron", import_megatron, IMPORT_EXAMPLES), ("export-megatron", export_megatron, EXPORT_EXAMPLES))
