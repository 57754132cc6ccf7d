"""The verbs that predict a run before a GPU is used: its layout, its memory, its micro-batch."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from mikoshi.data.io.json import dumps
from mikoshi.launch.cli.arguments import AsJson, Config, Overrides, local_gpus
from mikoshi.trainer.streams import go_on_unread
from mikoshi.trainer.train.rank import refuse_several

LAYOUT_EXAMPLES = (
    "Examples: `mikoshi layout configs/runs/gpt2-124m.toml --world 8 parallel.tp=2 parallel.pp=2`, "
    "`mikoshi layout run.toml --world 64 --node 4 --svg layout.svg`"
)
DRYRUN_EXAMPLES = (
    "Examples: `mikoshi dryrun configs/runs/gpt2-124m.toml --world 8 parallel.tp=2`, "
    "`mikoshi dryrun configs/runs/gpt3-175b.toml --world 1536 --rank all --memory 80`"
)
FIT_BATCH_EXAMPLES = (
    "Examples: `mikoshi fit-batch run.toml --ranks 8`, `mikoshi fit-batch run.toml parallel.zero=3 --memory 70 --json`"
)


def layout(
    config: Config,
    overrides: Overrides = None,
    world: Annotated[
        int | None, typer.Option(min=1, help="ranks to lay out (default: this machine's GPUs, else 1)", show_default=False)
    ] = None,
    node: Annotated[int, typer.Option(min=1, help="GPUs of a node")] = 8,
    svg: Annotated[Path | None, typer.Option(help="also draw it, into this file", show_default=False)] = None,
) -> None:
    """Show what every rank would hold, before a GPU or the data is used: layers, heads, experts, tokens, rows, bubble."""
    from rich.console import Console

    from mikoshi.trainer.config.run import load_config

    run = load_config(config, overrides or [])
    from mikoshi.trainer.inspect.layout import layout_view
    from mikoshi.trainer.inspect.layout_svg import write_drawing
    from mikoshi.trainer.inspect.layout_text import print_layout

    view = layout_view(run, world or local_gpus(run.engine.device), node)
    print_layout(view, Console(highlight=False, soft_wrap=True, width=500))
    if svg is not None:
        write_drawing(view, svg)
        typer.echo(f"drawing: {svg}")


def dryrun(
    config: Config,
    overrides: Overrides = None,
    world: Annotated[
        int | None, typer.Option(min=1, help="ranks of the run (default: this machine's GPUs, else 1)", show_default=False)
    ] = None,
    rank: Annotated[
        str, typer.Option(help="a rank's number; ends: one of the first and one of the last stage; all: one of every stage")
    ] = "ends",
    memory: Annotated[
        float | None, typer.Option(min=0, help="GiB of a GPU: exit 2 when a rank needs more", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the figures as JSON")] = False,
) -> None:
    """Build the run and take a step at any world size in this process, without a GPU: memory, traffic and FLOPs of a rank.

    The engine's own code runs, on tensors without memory and among ranks that are not there. Peak memory is that of
    tensors: an allocator's fragmentation, CUDA's context and NCCL's buffers come on top (keep some GiB for them).
    """
    go_on_unread()
    from rich.console import Console

    from mikoshi.trainer.config.run import load_config

    run = load_config(config, overrides or [])
    from mikoshi.trainer.estimate.dryrun_text import print_dry_runs, run_ranks

    results = run_ranks(run, world or local_gpus(run.engine.device), rank)
    if as_json:
        typer.echo(dumps([result.as_json() for result in results], indent=2))
    else:
        print_dry_runs(results, memory, Console(highlight=False, soft_wrap=True, width=500))
    if memory is not None and max(result.device_peak for result in results) > memory * 2**30:
        from mikoshi.parallel.errors import LayoutError

        worst = max(results, key=lambda result: result.device_peak)
        raise LayoutError(
            f"rank {worst.rank} needs {worst.device_peak / 2**30:.1f} GiB, more than the {memory:g} GiB of --memory"
        )


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
    from mikoshi.trainer.config.run import load_config

    run = load_config(config, overrides or [])
    refuse_several("fit-batch")
    from mikoshi.launch.controller.trials import trial_runner
    from mikoshi.parallel.process.process_group import check_device
    from mikoshi.trainer.engines.layout import layout_of
    from mikoshi.trainer.engines.limits import refuse
    from mikoshi.trainer.errors import ConfigError, LaunchError
    from mikoshi.trainer.estimate.micro_batch import MicroBatchAttempt, find_micro_batch
    from mikoshi.trainer.train.preflight import foresee

    count = ranks or local_gpus(run.engine.device)
    foresee(run, count)
    check_device(run.engine.device)
    refuse(run, layout_of(run, count), _cuda(run.engine.device))

    tried = list[MicroBatchAttempt]()

    def tell(attempt: MicroBatchAttempt) -> None:
        tried.append(attempt)
        how = f"fits, {attempt.peak / 2**30:.2f} GiB at the peak" if attempt.fits else f"does not fit: {attempt.why}"
        print(f"train.micro_batch={attempt.micro_batch}: {how} ({attempt.seconds:.1f} s)", file=sys.stderr, flush=True)

    def show(found: int | None, **more: object) -> None:
        typer.echo(dumps({"micro_batch": found, "ranks": count, **more, "tried": [asdict(one) for one in tried]}))

    limit = None if memory is None else int(memory * 2**30)
    try:
        with trial_runner(count, limit) as run_trial:
            found, _ = find_micro_batch(run, count, limit, run_trial, tell)
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
