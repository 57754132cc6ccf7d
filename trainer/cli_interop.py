"""The verbs that serve users of other libraries: a micro-batch that fits, and weights in and out as safetensors."""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from data.jsontext import dumps
from trainer.cli_data import AsJson, Config, Overrides
from trainer.rank import refuse_several
from trainer.streams import go_on_unread

if TYPE_CHECKING:
    from trainer.config import RunConfig
    from trainer.interop.committed import Committed

FIT_BATCH_EXAMPLES = (
    "Examples: `mikoshi fit-batch run.toml --ranks 8`, `mikoshi fit-batch run.toml parallel.zero=3 --memory 70 --json`"
)
EXPORT_EXAMPLES = (
    "Examples: `mikoshi checkpoint export runs/quickstart weights`, "
    "`mikoshi checkpoint export runs/big/checkpoints/step-00012000 weights --max-shard-size 2GB`"
)
IMPORT_EXAMPLES = "Example: `mikoshi checkpoint import weights fine-tune.toml`, then `mikoshi train fine-tune.toml`"


def fit_batch(
    config: Config,
    overrides: Overrides = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="ranks on this machine (default: its GPUs, else 1)", show_default=False)
    ] = None,
    memory: Annotated[
        float | None, typer.Option(min=0.01, help="GiB that a rank may hold (default: what there is)", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Find the largest train.micro_batch that fits, by taking two real steps with each size, from a rank's whole share down.

    Only sizes that divide the share are tried, each in rank processes of its own. Nothing is written: give the line that is
    printed to `train`, or put it into the run's file. --memory: on a GPU the allocator's, on a CPU a process's whole data.
    Where none fits --json has `error`, and `micro_batch` is null.
    """
    go_on_unread()
    from trainer.config import load_config

    run = load_config(config, overrides or [])
    refuse_several("fit-batch")
    from launch.fitting import attempts
    from parallel.world import check_device
    from trainer.engines.carry import layout_of
    from trainer.engines.limits import refuse
    from trainer.errors import ConfigError, LaunchError
    from trainer.microbatch import Attempt, find
    from trainer.preflight import foresee

    count = ranks or _local_gpus(run.engine.device)
    foresee(run, count)
    check_device(run.engine.device)
    refuse(run, layout_of(run, count), _cuda(run.engine.device))

    tried = list[Attempt]()

    def tell(attempt: Attempt) -> None:
        tried.append(attempt)
        how = f"fits, {attempt.peak / 2**30:.2f} GiB at the peak" if attempt.fits else f"does not fit: {attempt.why}"
        print(f"train.micro_batch={attempt.micro_batch}: {how} ({attempt.seconds:.1f} s)", file=sys.stderr, flush=True)

    def show(found: int | None, **more: object) -> None:
        typer.echo(dumps({"micro_batch": found, "ranks": count, **more, "tried": [asdict(one) for one in tried]}))

    limit = None if memory is None else int(memory * 2**30)
    try:
        with attempts(count, limit) as carry:
            found, _ = find(run, count, limit, carry, tell)
    except (ConfigError, LaunchError) as error:
        if as_json:
            show(None, error=str(error).partition("\n")[0])
        raise
    if as_json:
        show(found, peak_bytes=tried[-1].peak)
    else:
        typer.echo(f"train.micro_batch={found}")


def _cuda(device: str) -> bool:
    import torch

    return device != "cpu" and torch.cuda.is_available()


def _local_gpus(device: str) -> int:
    import torch

    return max(1, torch.cuda.device_count()) if _cuda(device) else 1


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
    from trainer.interop.committed import open_committed
    from trainer.interop.sharded import export, parse_size

    largest = parse_size(max_shard_size)
    committed = open_committed(source)
    tell_passed(committed)
    made = export(committed, folder, largest)
    typer.echo(f"{folder}: {made.files} file{'s' * (made.files != 1)}, {made.bytes / 1e6:,.1f} MB, of step {made.step}")
    if made.largest > largest:
        typer.echo(f"the largest has {made.largest / 1e6:,.1f} MB: a tensor is never cut", err=True)


def tell_passed(committed: Committed) -> None:
    """That newer checkpoints of the run are damaged, before an older one is taken for them."""
    for why in committed.passed:
        typer.echo(f"not taken: {why}", err=True)


def tell_begun(place: str, source: object, config: Path, overrides: list[str] | None, checked: bool, run: RunConfig) -> None:
    """What was made of imported weights, what nobody has compared, and the command that goes on."""
    from trainer.interop.model_file import untold

    if not checked:
        typer.echo(untold(run.model), err=True)
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
    from trainer.config import load_config

    run = load_config(config, overrides or [])
    from trainer.interop.begin import begin_run
    from trainer.interop.model_file import check_model
    from trainer.interop.sharded import open_weights

    with open_weights(folder, run.model) as weights:
        place = begin_run(run, weights, source=str(folder))
    tell_begun(place, folder, config, overrides, check_model(folder, run.model), run)
