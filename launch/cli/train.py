"""The verbs that train a run, generate text with its model, and report on it."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mikoshi.launch.cli.arguments import Config, Overrides, Run, local_gpus
from mikoshi.trainer.signals import exit_on_stop_signal
from mikoshi.trainer.streams import go_on_unread
from mikoshi.trainer.train.rank import generate_rank, launched_world, train_rank, train_supervised

if TYPE_CHECKING:
    from mikoshi.trainer.record.run_folder import RunFolder

TRAIN_EXAMPLES = (
    "Examples: `mikoshi train configs/runs/quickstart.toml --ranks 2`, "
    "`mikoshi train run.toml optim.lr=1e-3 parallel.zero=3`, `torchrun --nproc-per-node 8 -m mikoshi train run.toml`"
)
GENERATE_EXAMPLES = (
    'Examples: `mikoshi generate runs/quickstart --prompt "def main():" --tokens 200 --seed 1`, '
    '`mikoshi generate runs/talk --chat --prompt "What is 2+2?"`, `mikoshi generate runs/big --ranks 4 --tp 2 --pp 2`'
)
REPORT_EXAMPLES = "Example: `mikoshi report runs/quickstart`, then open runs/quickstart/report.html in a browser."


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
    with exit_on_stop_signal():
        raise typer.Exit(_train(config, overrides or [], ranks))


def _train(config: Path, overrides: list[str], ranks: int | None) -> int:
    from mikoshi.trainer.config.run import load_config

    run = load_config(config, overrides)
    place = launched_world(ranks)
    from mikoshi.parallel.process.process_group import World
    from mikoshi.trainer.errors import ConfigError
    from mikoshi.trainer.interop.accelerate.start import lone_process_reason
    from mikoshi.trainer.train.preflight import preflight

    if place is not None:
        if place.size == 1 and ranks is None and (gpus := local_gpus(run.engine.device)) > 1:
            print(f"note: {place.source}: one rank, which uses one of the {gpus} GPUs here", file=sys.stderr)
        return train_rank(run, place)
    if why := lone_process_reason(os.environ):
        raise ConfigError(why)
    count = ranks or local_gpus(run.engine.device)
    if count == 1 and not run.recovery.restarts:  # without restarts no second process is needed
        preflight(run, 1)
        return train_rank(run, World())
    from mikoshi.launch.controller.supervisor import Job, running_fork_server, supervise
    from mikoshi.trainer.record.run_folder import RunFolder

    with running_fork_server(count):  # it imports while this process checks the data
        preflight(run, count)
        return supervise(Job(count, train_supervised, (run,), RunFolder(run.run.path), run.recovery))


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
    from mikoshi.trainer.errors import ConfigError
    from mikoshi.trainer.generation.generate import Sampling, text_stream
    from mikoshi.trainer.record.run_folder import open_run

    try:
        prompt = os.fsencode(prompt).decode("utf-8")  # undo what the locale made of the bytes
    except UnicodeError:
        raise ConfigError("--prompt is not UTF-8 text") from None
    folder, sampling = open_run(run), Sampling(temperature, top_k, top_p, seed)
    place = launched_world(ranks)
    from mikoshi.parallel.process.process_group import World, pick_device

    ranks, degrees = ranks or 1, {"tp": tp, "pp": pp}
    if place is not None:
        raise typer.Exit(generate_rank(folder, device, prompt, chat, special, tokens, sampling, degrees))
    if ranks > 1 or tp * pp > 1:
        _check_generation(folder, ranks, degrees)
    if ranks > 1:
        from mikoshi.launch.controller.supervisor import Job, supervise

        raise typer.Exit(
            supervise(Job(ranks, generate_rank, (folder, device, prompt, chat, special, tokens, sampling, degrees)))
        )
    from mikoshi.trainer.generation.generate import generate as write
    from mikoshi.trainer.generation.generate import known_ids, load_model
    from mikoshi.trainer.generation.prompt import encode_prompt

    model, tokenizer, _, _ = load_model(folder, pick_device(device, World()))
    (start, stops), known = encode_prompt(folder, tokenizer, prompt, chat, special), known_ids(tokenizer)
    typer.echo(prompt + "\n" * chat, nl=False)
    for piece in text_stream(tokenizer, start, write(model, start, tokens, sampling, stops, known)):
        typer.echo(piece, nl=False)
    typer.echo()


def _check_generation(folder: RunFolder, ranks: int, degrees: dict[str, int]) -> None:
    """Refuse an invalid layout before any rank starts. Raises ConfigError or LayoutError."""
    from mikoshi.trainer.config.run import load_config
    from mikoshi.trainer.engines.layout import layout_of
    from mikoshi.trainer.errors import ConfigError
    from mikoshi.trainer.generation.generate import forward_config

    need, given = math.prod(degrees.values()), [name for name, degree in degrees.items() if degree > 1]
    if ranks % need:
        raise ConfigError(
            f"{' '.join(f'--{name} {degrees[name]}' for name in given)}: --ranks must be a multiple of {need}, not {ranks}: "
            f"use --ranks {-(-ranks // need) * need}, or leave out {' and '.join(f'--{name}' for name in given)}"
        )
    layout_of(forward_config(load_config(folder.path), degrees, ranks), ranks)


def report(
    run: Run,
    out: Annotated[
        Path | None, typer.Option(help="file to write (default: report.html in the run)", show_default=False)
    ] = None,
) -> None:
    """Make one self-contained HTML page of a run: curves, events, layout, config."""
    from mikoshi.trainer.record.run_folder import open_run
    from mikoshi.trainer.report.page import write_report

    folder = open_run(run)
    target = out or folder.report
    write_report(folder, target)
    typer.echo(f"report: {target}")
