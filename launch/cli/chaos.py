"""`mikoshi chaos`: a run that suffers faults on purpose, and a table of what became of each."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mikoshi.data.io.json import dumps
from mikoshi.launch.cli.arguments import AsJson, Config, Overrides
from mikoshi.trainer.exit_codes import FAULT
from mikoshi.trainer.streams import go_on_unread
from mikoshi.trainer.train.rank import refuse_several

if TYPE_CHECKING:
    from rich.console import Console

    from mikoshi.launch.chaos.run import ChaosOutcome, ChaosProgress, Show
    from mikoshi.trainer.chaos.plan import FaultPlan, FaultSetting
    from mikoshi.trainer.config.run import RunConfig

EXAMPLES = (
    "Examples: `mikoshi chaos configs/runs/quickstart.toml --ranks 4 --faults 20 checkpoint.every=5`, "
    "`mikoshi chaos run.toml --ranks 8 --kinds kill,stop,preempt --seed 7`, "
    "`mikoshi chaos run.toml --ranks 8 --write-plan plan.toml`, then `mikoshi chaos run.toml --ranks 8 --plan plan.toml`"
)


def chaos(
    config: Config,
    overrides: Overrides = None,
    ranks: Annotated[int, typer.Option(min=1, help="ranks on this machine")] = 4,
    faults: Annotated[int, typer.Option(min=1, help="how many")] = 20,
    seed: Annotated[int, typer.Option(min=0, help="the same seed, config and ranks make the same plan")] = 1,
    kinds: Annotated[
        str, typer.Option(help="of faults, with commas: kill, stop, slow, nan, flip, fill, corrupt, launcher, node, preempt, "
                          "raise (default: all that this run can have)", show_default=False)
    ] = "",
    plan: Annotated[
        Path | None, typer.Option(help="a file with the faults, instead of drawing them from the seed", show_default=False)
    ] = None,
    write_plan: Annotated[
        Path | None, typer.Option(help="write the plan to this file and do nothing else", show_default=False)
    ] = None,
    compare: Annotated[bool, typer.Option(help="also train quietly, and compare the final weights bit by bit")] = True,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Train while faults strike, and tell what became of each: try on your own machine what Mikoshi promises.

    The real command trains in a folder of its own, NAME-chaos, and is launched again where a fault ends it. Ranks are killed,
    stopped and slowed down, weights and gradients spoiled, checkpoints damaged, the disk filled up. Exit code 0 if everything
    ended as promised, 1 if not.
    """
    go_on_unread()
    from mikoshi.trainer.config.run import load_config

    run = load_config(config, overrides or [])
    refuse_several("chaos")
    from rich.console import Console

    from mikoshi.launch.chaos.run import comparable, run_with_faults, setting_of
    from mikoshi.trainer.chaos.plan import write_fault_plan

    console = Console(highlight=False, soft_wrap=True, stderr=as_json)
    requested = _plan(run, setting_of(run, ranks), plan, faults, seed, kinds, console)
    if write_plan is not None:
        _write(write_plan, write_fault_plan(requested))
        typer.echo(f"{write_plan}: {len(requested.faults)} faults; use it with --plan {write_plan}")
        return
    if compare and not comparable(run, requested):
        console.print("weights are not compared: with guard.retry = false a step with a NaN is left out for good")
        compare = False
    with _progress_line(console, len(requested.faults)) as show:
        outcome = run_with_faults(run, ranks, requested, compare, show)
    if as_json:
        typer.echo(dumps(_as_json(outcome), indent=2))
    else:
        _print(outcome, Console(highlight=False, soft_wrap=True, width=500))
    if not outcome.good:
        raise typer.Exit(FAULT)


def _plan(
    run: RunConfig, setting: FaultSetting, plan: Path | None, faults: int, seed: int, kinds: str, console: Console
) -> FaultPlan:  # fmt: skip
    """Return the requested plan. Raises ConfigError."""
    from mikoshi.trainer.chaos.plan import KINDS, make_fault_plan, read_fault_plan
    from mikoshi.trainer.errors import ConfigError

    if run.checkpoint.folder:
        console.print(f"checkpoint.folder = {run.checkpoint.folder}: not used: checkpoints are kept in the run's own folder")
    if plan is not None:
        if kinds:
            raise ConfigError("--kinds and --plan: the plan has its kinds: leave one out")
        requested = read_fault_plan(plan, setting.ranks)
        for kind in dict.fromkeys(fault.kind for fault in requested.faults):
            if why := setting.refusal(kind):
                raise ConfigError(f'--plan {plan}: "{kind}": {why}')
        return requested
    wanted = [kind.strip() for kind in kinds.split(",")] if kinds else list(KINDS)
    if unknown := [kind for kind in wanted if kind not in KINDS]:
        raise ConfigError(f"--kinds {kinds}: {unknown[0]!r} is none of {', '.join(KINDS)}")
    refused = {kind: why for kind in wanted if (why := setting.refusal(kind))}
    for kind, why in refused.items():
        if kinds:
            raise ConfigError(f'--kinds {kinds}: "{kind}": {why}')
        console.print(f'no fault "{kind}": {why}', markup=False)
    return make_fault_plan(seed, faults, [kind for kind in wanted if kind not in refused], setting)


def _write(path: Path, text: str) -> None:
    from mikoshi.data.io.atomic import write_file
    from mikoshi.trainer.errors import ConfigError

    try:
        write_file(path, text.encode())
    except OSError as error:
        raise ConfigError(f"--write-plan {path}: cannot be written: {error.strerror}: give another path") from None


@contextmanager
def _progress_line(console: Console, faults: int) -> Iterator[Show]:
    """Show a live line in a terminal, or else a line for each fault."""
    from rich import progress as rich

    columns = (rich.TextColumn("{task.description}"), rich.BarColumn(bar_width=24), rich.MofNCompleteColumn(),
               rich.TextColumn("{task.fields[status]}"), rich.TimeElapsedColumn())  # fmt: skip
    with rich.Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        tasks: dict[str, rich.TaskID] = {}
        printed = 0

        def show(progress: ChaosProgress) -> None:
            nonlocal printed
            if progress.name not in tasks:
                tasks[progress.name] = bar.add_task(progress.name, total=progress.steps, status="")
            struck = progress.struck
            text = f"fault {len(struck)}/{faults}: {struck[-1].description}" if struck else ""
            bar.update(tasks[progress.name], completed=progress.step, status=text)
            if not console.is_terminal:
                for number in range(printed, len(struck)):
                    print(f"fault {number + 1}/{faults}: {struck[number].description}", file=sys.stderr, flush=True)
                printed = max(printed, len(struck))

        yield show


def _print(outcome: ChaosOutcome, console: Console) -> None:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("#", "fault", "rank", "step", "phase", "what happened", "noticed", "back", ""):
        table.add_column(name, justify="right" if name in ("#", "rank", "step", "noticed", "back") else "left")
    for row in outcome.rows:
        fault = row.fault
        verdict = "as promised" if row.good else "NOT as promised"
        cells = (str(row.number + 1), fault.name, str(fault.rank), str(fault.step), fault.phase, row.happened,
                 _seconds(row.noticed), _seconds(row.back), verdict)  # fmt: skip
        table.add_row(*cells, style=None if row.good else "red")
    console.print(table)
    good = sum(row.good for row in outcome.rows)
    lines = [f"{good} of {len(outcome.rows)} faults ended as promised, in {len(outcome.launches)} launches"]
    if outcome.code:
        lines.append(f"the run ended with exit code {outcome.code} before its last step: see {outcome.folder.path}")
    lines.append(f"with faults: {outcome.goodput.words()}")
    if outcome.quiet is not None:
        lines.append(f"quiet:       {outcome.quiet.words()}")
    lines.append(f"left behind: {', '.join(outcome.processes + outcome.files) or 'no process, no file'}")
    if outcome.weights is not None:
        lines.append(f"final weights equal to the quiet run's, to the bit: {'yes' if outcome.weights else 'NO'}")
    console.print("\n".join(lines), markup=False)


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} s"


def _as_json(outcome: ChaosOutcome) -> dict[str, Any]:
    return {
        "good": outcome.good,
        "code": outcome.code,
        "folder": str(outcome.folder.path),
        "faults": [asdict(row) for row in outcome.rows],
        "launches": [asdict(launch) for launch in outcome.launches],
        "left": {"processes": outcome.processes, "files": outcome.files},
        "goodput": outcome.goodput.figures(),
        "quiet": None if outcome.quiet is None else outcome.quiet.figures(),
        "weights_equal": outcome.weights,
    }
