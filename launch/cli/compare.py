"""`mikoshi compare`: engines and layouts side by side on one run's config, data and seed."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mikoshi.data.io.json import dumps
from mikoshi.launch.cli.arguments import AsJson, Overrides
from mikoshi.trainer.exit_codes import DONE, FAULT, USER_ERROR
from mikoshi.trainer.streams import go_on_unread
from mikoshi.trainer.train.rank import refuse_several

if TYPE_CHECKING:
    from rich.console import Console

    from mikoshi.launch.controller.rounds import Show
    from mikoshi.trainer.compare.comparison import Comparison

EXAMPLES = (
    "Examples: `mikoshi compare configs/runs/quickstart.toml --engines native,deepspeed,megatron --ranks 2`, "
    '`mikoshi compare run.toml --ranks 8 --layouts "zero=3" --layouts "tp=2 pp=2 train.micro_batch=1" engine.precision=bf16`, '
    "`mikoshi compare run.toml --engines native,native` for the noise of the machine, "
    "`mikoshi compare runs/compare-quickstart` for the table and the page once more"
)
_WIDTH = 500
"""Columns for output that is not a terminal, where lines are not wrapped."""
_INTERRUPTED = 130  # the shell's exit code for Ctrl-C


def compare(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(help="the run's TOML file; or a comparison's folder", show_default=False)],
    overrides: Overrides = None,
    engines: Annotated[
        str | None, typer.Option(help="with commas: native, deepspeed, megatron (default: the config's)", show_default=False)
    ] = None,
    layouts: Annotated[
        list[str] | None, typer.Option(help='settings such as "tp=2 zero=1" or "pp=2 train.micro_batch=1", once a layout '
                                       "(default: as the config has it)", show_default=False)
    ] = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="ranks on this machine (default: its GPUs, else 1)", show_default=False)
    ] = None,
    steps: Annotated[int, typer.Option(help="of each run, its own first ones: 5 or more, as 3 are to warm up")] = 20,
    rounds: Annotated[int, typer.Option(min=1, help="runs of each contestant")] = 3,
    out: Annotated[
        Path | None, typer.Option(help="folder for everything (default: runs/compare-NAME)", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Train the same first steps with every engine in every layout, in turn, and compare speed, memory, losses.

    Contestants are short runs of their own, with neither evaluation nor checkpoint. One that cannot run becomes a row with
    the reason. Exit code 1 if one failed, 2 if none could run, which leaves no folder; Ctrl-C ends all ranks and keeps what
    has been measured. Given a comparison's folder, it makes the table and the page again; only --json is allowed then.
    """
    go_on_unread()
    from rich.console import Console

    if (config / "plan.json").is_file():
        _refuse_settings(context, config)
        _write_results(config, as_json)
        return
    refuse_several("compare")
    folder = _plan(config, overrides or [], engines, layouts or [], ranks, steps, rounds, out, as_json)
    from mikoshi.launch.controller.rounds import run_rounds

    interrupted = False
    try:
        with _progress_line(Console(highlight=False, soft_wrap=True, stderr=True)) as show:
            run_rounds(folder, show)
    except KeyboardInterrupt:
        interrupted = True
    found = _write_results(folder, as_json)
    if interrupted:
        raise typer.Exit(_INTERRUPTED)
    raise typer.Exit(_exit_code(found, folder))


def _refuse_settings(context: typer.Context, folder: Path) -> None:
    """Refuse settings for a comparison that exists. Raises ConfigError."""
    from mikoshi.trainer.errors import ConfigError

    given = [name for name in sorted(context.params) if name not in ("config", "as_json") and _is_given(context, name)]
    if given:
        named = ", ".join("overrides" if name == "overrides" else f"--{name}" for name in given)
        raise ConfigError(
            f"{named}: {folder} is a comparison that is there, of which nothing can be set: give the run's TOML file"
        )


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _exit_code(found: Comparison, folder: Path) -> int:
    if any(row.failed for row in found.rows):
        typer.echo(f"error: a contestant failed: see {folder / 'output.txt'}", err=True)
        return FAULT
    if not found.complete:
        typer.echo(f"error: the runs ended before the last one: see {folder / 'output.txt'}", err=True)
        return FAULT
    return DONE


def _plan(
    config: Path, overrides: list[str], engines: str | None, layouts: list[str], ranks: int | None, steps: int, rounds: int,
    out: Path | None, as_json: bool,
) -> Path:  # fmt: skip
    """Write the plan into its folder. If no contestant can run, print why and exit. Raises what preflight does."""
    from mikoshi.trainer.config.run import load_config
    from mikoshi.trainer.errors import ConfigError

    run = load_config(config, overrides)
    kinds = [override for override in overrides if override.startswith("engine.kind=")]
    if engines is not None and kinds:
        raise ConfigError(f"{kinds[0]} and --engines {engines}: give one of them")
    import torch

    from mikoshi.launch.controller.rounds import machine, versions
    from mikoshi.trainer.compare.comparison import ComparisonPlan, make_comparison, refused_comparison, write_comparison_plan

    count = ranks or (1 if run.engine.device == "cpu" else max(1, torch.cuda.device_count()))
    folder = out or run.run.folder / f"compare-{run.run.name}"
    contestants, configs = make_comparison(
        config, overrides, run.engine.kind if engines is None else engines, layouts, count, steps, folder
    )
    command = shlex.join(["mikoshi", *sys.argv[1:]])
    plan = ComparisonPlan(str(config), command, count, steps, rounds, contestants, machine(), versions())
    if not plan.schedule:
        _print(refused_comparison(plan), as_json)
        typer.echo("error: no contestant can run, for the reasons above; no folder was made", err=True)
        raise typer.Exit(USER_ERROR)
    write_comparison_plan(plan, configs, folder)
    return folder


def _write_results(folder: Path, as_json: bool) -> Comparison:
    """Print the measurements, and write them beside the runs."""
    from mikoshi.data.io.atomic import write_file
    from mikoshi.trainer.compare.comparison import read_comparison
    from mikoshi.trainer.compare.page import write_page
    from mikoshi.trainer.compare.text import markdown

    found = read_comparison(folder)
    write_file(folder / "summary.json", dumps(found.as_json(), indent=2).encode() + b"\n")
    write_file(folder / "compare.md", markdown(found).encode())
    if found.first is not None:
        write_page(found, folder / "compare.html")
    _print(found, as_json)
    if not as_json:
        typer.echo(f"figures: {folder / 'summary.json'}")
        if found.first is not None:
            typer.echo(f"page: {folder / 'compare.html'}")
    return found


def _print(found: Comparison, as_json: bool) -> None:
    from rich.console import Console

    from mikoshi.trainer.compare.text import print_comparison

    if as_json:
        typer.echo(dumps(found.as_json(), indent=2))
    else:
        terminal = Console()
        fit = terminal.width if terminal.is_terminal else _WIDTH
        print_comparison(found, Console(highlight=False, soft_wrap=True, width=_WIDTH), fit)


@contextmanager
def _progress_line(console: Console) -> Iterator[Show]:
    """Show a live line in a terminal, or else a line for each run."""
    from rich import progress as rich

    from mikoshi.launch.controller.rounds import ComparisonProgress
    from mikoshi.trainer.record.durations import clock

    columns = (rich.TextColumn("{task.description}"), rich.BarColumn(bar_width=24), rich.MofNCompleteColumn(),
               rich.TextColumn("{task.fields[status]}"))  # fmt: skip
    with rich.Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("runs", total=None, status="")
        printed = 0

        def show(progress: ComparisonProgress) -> None:
            nonlocal printed
            left = "" if progress.left is None else f", {clock(progress.left)} left"
            now = f"round {progress.turn}, {progress.name}: step {progress.step}{left}"
            bar.update(task, completed=progress.done, total=progress.runs, status=now if progress.done < progress.runs else "")
            if not console.is_terminal and progress.last is not None and progress.done > printed:
                printed, last = progress.done, progress.last
                how = last["why"] or f"{last['ended'] - last['began']:.1f} s"
                console.print(
                    f"run {progress.done} of {progress.runs}: round {last['round']}, {last['name']}: {how}"
                    f"{left if progress.done < progress.runs else ''}", markup=False,
                )  # fmt: skip

        yield show
