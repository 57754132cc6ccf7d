"""The `mikoshi` command: thin verbs over the modules beneath. Nothing heavy is imported before a verb needs it."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer

from data.jsontext import dumps
from trainer import cli_chaos, cli_checkpoint, cli_cluster, cli_compare, cli_data, cli_interop, cli_megatron, cli_watch
from trainer.cli_data import Config, Overrides
from trainer.exit_codes import DONE
from trainer.rank import end_now, generate_rank, outage, place_here, say, told, train_rank, train_supervised
from trainer.stop import stopping_is_no_crash
from trainer.streams import go_on_unread, open_streams

if TYPE_CHECKING:
    from trainer.config import RunConfig
    from trainer.runfolder import RunFolder

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Train a GPT on any layout of GPUs: one config, one plain model, the same run.",
    epilog="First run: `mikoshi prepare configs/runs/quickstart.toml`, then `mikoshi train configs/runs/quickstart.toml`.",
)

Run = Annotated[Path, typer.Argument(help="a run folder, such as runs/quickstart", show_default=False)]


app.command(epilog=cli_data.PREPARE_EXAMPLES)(cli_data.prepare)
app.add_typer(cli_data.data_app, name="data")
app.add_typer(cli_data.tokenizer_app, name="tokenizer")
app.command(epilog=cli_chaos.EXAMPLES)(cli_chaos.chaos)
app.command(epilog=cli_compare.EXAMPLES)(cli_compare.compare)
cli_checkpoint.checkpoint_app.command(name="export", epilog=cli_interop.EXPORT_EXAMPLES)(cli_interop.export_weights)
cli_checkpoint.checkpoint_app.command(name="import", epilog=cli_interop.IMPORT_EXAMPLES)(cli_interop.import_weights)
for name, verb, examples in cli_megatron.VERBS:
    cli_checkpoint.checkpoint_app.command(name=name, epilog=examples)(verb)
app.add_typer(cli_checkpoint.checkpoint_app, name="checkpoint")
app.command(name="fit-batch", epilog=cli_interop.FIT_BATCH_EXAMPLES)(cli_interop.fit_batch)
app.command(epilog=cli_cluster.SUBMIT_EXAMPLES)(cli_cluster.submit)
app.command(epilog=cli_watch.STATUS_EXAMPLES)(cli_watch.status)
app.command(epilog=cli_watch.LOGS_EXAMPLES)(cli_watch.logs)
app.command(epilog=cli_cluster.CANCEL_EXAMPLES)(cli_cluster.cancel)
app.command(epilog=cli_cluster.RESUME_EXAMPLES)(cli_cluster.resume)
app.command(epilog=cli_watch.RUNS_EXAMPLES)(cli_watch.runs)
app.command(epilog=cli_cluster.DOCTOR_EXAMPLES)(cli_cluster.doctor)
app.command(epilog=cli_cluster.EXPORT_EXAMPLES)(cli_cluster.export)


@app.command(
    epilog="Examples: `mikoshi train configs/runs/quickstart.toml --ranks 2`, "
    "`mikoshi train run.toml optim.lr=1e-3 parallel.zero=3`, `torchrun --nproc-per-node 8 -m trainer.cli train run.toml`"
)
def train(
    config: Config,
    overrides: Overrides = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="ranks on this machine (default: its GPUs, else 1)", show_default=False)
    ] = None,
) -> None:
    """Train, from the newest valid checkpoint of the run if there is one.

    Starts its own ranks, watches them and starts them again after a fault; under torchrun, srun, mpirun or any launcher that
    sets RANK and WORLD_SIZE it takes its place instead, and refuses --ranks of another number. SIGTERM, SIGUSR1, SIGUSR2 or
    Ctrl-C finish the step, save, and exit with code 75: the same command goes on from there.
    """
    go_on_unread()
    with stopping_is_no_crash():
        raise typer.Exit(_train(config, overrides or [], ranks))


def _train(config: Path, overrides: list[str], ranks: int | None) -> int:
    from trainer.config import load_config

    run = load_config(config, overrides)
    place = place_here(ranks)
    from parallel.world import World
    from trainer.errors import ConfigError
    from trainer.interop.accelerate_start import lone_of_several
    from trainer.preflight import preflight

    if place is not None:
        if place.size == 1 and ranks is None and (gpus := _local_gpus(run)) > 1:
            print(f"note: {place.source}: one rank, which uses one of the {gpus} GPUs here", file=sys.stderr)
        return train_rank(run, place)
    if why := lone_of_several(os.environ):
        raise ConfigError(why)
    count = ranks or _local_gpus(run)
    if count == 1 and not run.recovery.restarts:  # nothing to be started again: no second process is needed
        preflight(run, 1)
        return train_rank(run, World())
    from launch.supervisor import Job, supervise, warm
    from trainer.runfolder import RunFolder

    with warm(count):  # the ranks' imports, while this process looks at the data
        preflight(run, count)
        return supervise(Job(count, train_supervised, (run,), RunFolder(run.run.path), run.recovery))


def _local_gpus(run: RunConfig) -> int:
    if run.engine.device == "cpu":
        return 1
    import torch

    return max(1, torch.cuda.device_count())


@app.command(
    epilog='Examples: `mikoshi generate runs/quickstart --prompt "def main():" --tokens 200 --seed 1`, '
    '`mikoshi generate runs/talk --chat --prompt "What is 2+2?"`, `mikoshi generate runs/big --ranks 4 --tp 2 --pp 2`'
)
def generate(
    run: Run,
    prompt: Annotated[str, typer.Option(help="text to go on from; empty: the start of a document")] = "",
    chat: Annotated[bool, typer.Option("--chat", help="the prompt is a user's turn: apply the run's chat template")] = False,
    special: Annotated[
        bool | None,
        typer.Option(help="special tokens written out in the prompt are real ones (default: in a run of conversations)"),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="tokens to write, at most")] = 200,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token")] = 0.8,
    top_k: Annotated[int, typer.Option(help="choose among the k likeliest; 0: all")] = 0,
    top_p: Annotated[float, typer.Option(help="choose among the likeliest that together reach p")] = 0.95,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="the same seed writes the same text")] = 0,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="where the model runs")] = "auto",
    ranks: Annotated[
        int | None, typer.Option(min=1, help="ranks that carry the model together (default: 1)", show_default=False)
    ] = None,
    tp: Annotated[int, typer.Option(min=1, help="of them, tensor parallel")] = 1,
    pp: Annotated[int, typer.Option(min=1, help="and pipeline parallel; the rest hold shards (ZeRO)")] = 1,
) -> None:
    """Write text with a run's newest checkpoint, up to the end of a document or, in a conversation, of a turn.

    On one rank keys and values are kept from token to token. A model too large for that is carried by several `--ranks`,
    and each token is a pass of the whole window through all of them.
    """
    from trainer.errors import ConfigError
    from trainer.generate import Sampling, text_stream
    from trainer.runfolder import open_run

    try:
        prompt = os.fsencode(prompt).decode("utf-8")  # whatever the locale made of the bytes
    except UnicodeError:
        raise ConfigError("--prompt is not UTF-8 text") from None
    folder, sampling = open_run(run), Sampling(temperature, top_k, top_p, seed)
    place = place_here(ranks)
    from parallel.world import World, pick_device

    ranks, degrees = ranks or 1, {"tp": tp, "pp": pp}
    if place is not None:
        raise typer.Exit(generate_rank(folder, device, prompt, chat, special, tokens, sampling, degrees))
    if ranks > 1 or tp * pp > 1:
        _check_generation(folder, ranks, degrees)
    if ranks > 1:
        from launch.supervisor import Job, supervise

        raise typer.Exit(
            supervise(Job(ranks, generate_rank, (folder, device, prompt, chat, special, tokens, sampling, degrees)))
        )
    from trainer.generate import generate as write
    from trainer.generate import known_ids, load_model
    from trainer.prompt import start_of

    model, tokenizer, _, _ = load_model(folder, pick_device(device, World()))
    (start, stops), known = start_of(folder, tokenizer, prompt, chat, special), known_ids(tokenizer)
    typer.echo(prompt + "\n" * chat, nl=False)
    for piece in text_stream(tokenizer, start, write(model, start, tokens, sampling, stops, known)):
        typer.echo(piece, nl=False)
    typer.echo()


def _check_generation(folder: RunFolder, ranks: int, degrees: dict[str, int]) -> None:
    """Refuse a layout that cannot be before any rank starts. Raises ConfigError or LayoutError."""
    from trainer.config import load_config
    from trainer.engines.carry import layout_of
    from trainer.errors import ConfigError
    from trainer.generate import spread

    need, given = math.prod(degrees.values()), [name for name, degree in degrees.items() if degree > 1]
    if ranks % need:
        raise ConfigError(
            f"{' '.join(f'--{name} {degrees[name]}' for name in given)}: --ranks must be a multiple of {need}, not {ranks}: "
            f"use --ranks {-(-ranks // need) * need}, or leave out {' and '.join(f'--{name}' for name in given)}"
        )
    layout_of(spread(load_config(folder.path), degrees, ranks), ranks)


@app.command(
    epilog="Examples: `mikoshi layout configs/runs/gpt2-124m.toml --world 8 parallel.tp=2 parallel.pp=2`, "
    "`mikoshi layout run.toml --world 64 --node 4 --svg layout.svg`"
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
    """Show what every rank would carry, before a GPU or the data is touched: layers, heads, experts, tokens, rows, bubble."""
    from rich.console import Console

    from trainer.config import load_config

    run = load_config(config, overrides or [])
    from trainer.layout_svg import write_drawing
    from trainer.layout_text import print_layout
    from trainer.layout_view import layout_view

    view = layout_view(run, world or _local_gpus(run), node)
    print_layout(view, Console(highlight=False, soft_wrap=True, width=500))
    if svg is not None:
        write_drawing(view, svg)
        typer.echo(f"drawing: {svg}")


@app.command(
    epilog="Examples: `mikoshi dryrun configs/runs/gpt2-124m.toml --world 8 parallel.tp=2`, "
    "`mikoshi dryrun configs/runs/gpt3-175b.toml --world 1536 --rank all --memory 80`"
)
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

    from trainer.config import load_config

    run = load_config(config, overrides or [])
    from trainer.dryrun_text import print_dry_runs, run_ranks

    results = run_ranks(run, world or _local_gpus(run), rank)
    if as_json:
        typer.echo(dumps([result.as_json() for result in results], indent=2))
    else:
        print_dry_runs(results, memory, Console(highlight=False, soft_wrap=True, width=500))
    if memory is not None and max(result.device_peak for result in results) > memory * 2**30:
        from parallel.errors import LayoutError

        worst = max(results, key=lambda result: result.device_peak)
        raise LayoutError(
            f"rank {worst.rank} needs {worst.device_peak / 2**30:.1f} GiB, more than the {memory:g} GiB of --memory"
        )


@app.command(epilog="Example: `mikoshi report runs/quickstart`, then open runs/quickstart/report.html in a browser.")
def report(
    run: Run,
    out: Annotated[
        Path | None, typer.Option(help="file to write (default: report.html in the run)", show_default=False)
    ] = None,
) -> None:
    """Make one self-contained HTML page of a run: curves, events, layout, config."""
    from trainer.report import write_report
    from trainer.runfolder import open_run

    folder = open_run(run)
    target = out or folder.report
    write_report(folder, target)
    typer.echo(f"report: {target}")


@app.command(
    epilog="Examples: `mikoshi config configs/runs/quickstart.toml optim.lr=1e-3`, "
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
    from trainer.config import RunConfig, load_config, to_toml
    from trainer.errors import ConfigError

    if schema:
        typer.echo(dumps(RunConfig.model_json_schema(), indent=2))
        return
    if from_accelerate is not None:
        from trainer.interop.accelerate_config import convert

        if run is not None:
            raise ConfigError(f"config: {run} and --from-accelerate {from_accelerate}: give one of them")
        typer.echo(convert(from_accelerate), nl=False)
        return
    if run is None:
        raise ConfigError("config: give a run's TOML file or folder, --schema, or --from-accelerate with a YAML file")
    if optim:
        from trainer.optim_view import optim_lines

        typer.echo("\n".join(optim_lines(load_config(run, overrides or []))))
        return
    typer.echo(to_toml(load_config(run, overrides or [])), nl=False)


def main() -> None:
    """Entry point. Exit codes: 0 done, 1 fault, 2 the user's mistake, 75 stopped on request and saved."""
    open_streams()
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except Exception as error:
        if told(error) is None and not outage(error):
            raise
        sys.exit(say(error, rank=0))


def command() -> NoReturn:
    """The program: main(). One that was a rank itself is gone after it, whatever threads and destructors of libraries want:
    gloo's joins a thread that waits for the interpreter, which waits for it."""
    try:
        main()
        code: object = DONE
    except SystemExit as end:
        code = end.code
    world = sys.modules.get("parallel.world")
    if world is not None and world.has_joined() and isinstance(code, int):
        end_now(code)
    sys.exit(code)  # type: ignore[arg-type]


if __name__ == "__main__":
    command()
