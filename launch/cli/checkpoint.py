"""The verbs that list, verify and prune a run's checkpoints."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mikoshi.data.io.json import dumps
from mikoshi.launch.cli.arguments import AsJson, Run
from mikoshi.trainer.streams import go_on_unread

if TYPE_CHECKING:
    from rich.console import Console

    from mikoshi.trainer.checkpoint.storage.base import Store
    from mikoshi.trainer.checkpoint.survey import Entry, Progress
    from mikoshi.trainer.config.run import RunConfig
    from mikoshi.trainer.record.run_folder import RunFolder


checkpoint_app = typer.Typer(
    no_args_is_help=True,
    help="A run's checkpoints: what is there, whether it is whole, what may go; and weights from and for other programs.",
    epilog="Examples: `mikoshi checkpoint list runs/quickstart`, `mikoshi checkpoint export runs/quickstart weights`",
)


@checkpoint_app.command(
    name="list", epilog="Examples: `mikoshi checkpoint list runs/quickstart`, `mikoshi checkpoint list runs/big --json`"
)
def list_(run: Run, as_json: AsJson = False) -> None:
    """Show what checkpoints a run has, newest first, and which of them the next save leaves.

    Names and sizes are compared with the manifest, which is quick; `verify` reads every byte.
    """
    from mikoshi.trainer.checkpoint.of_run import retention_of
    from mikoshi.trainer.checkpoint.survey import survey

    with _open_checkpoints(run) as (store, config, _):
        found, others = survey(store, retention_of(config)), store.leftovers()
        if as_json:
            listing = {"place": store.address, "checkpoints": [asdict(entry) for entry in found], "others": others}
            typer.echo(dumps(listing))
        else:
            _print_list(_console(), store.address, found, others)


def _print_list(console: Console, place: str, found: list[Entry], others: list[str]) -> None:
    from datetime import datetime

    from rich import box
    from rich.table import Table

    from mikoshi.trainer.checkpoint.storage.base import DAMAGED

    if not found:
        console.print(f"{place}: there is no checkpoint yet", markup=False)
    else:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_edge=False, title=None)
        for name in ("step", "written", "size", "files", "ranks", "layout", "by sizes", "kept"):
            table.add_column(name, no_wrap=True, justify="right" if name in ("step", "size", "files", "ranks") else "left")
        for entry in found:
            when = "?" if entry.written is None else f"{datetime.fromtimestamp(entry.written):%Y-%m-%d %H:%M:%S}"
            state = "damaged" if entry.problems else "whole"
            ranks = "?" if entry.ranks is None else str(entry.ranks)
            kept = entry.kept or "no: the next save removes it"
            table.add_row(str(entry.step), when, _size(entry.bytes), str(entry.files), ranks, entry.layout, state, kept)
        console.print(table)
        console.print(f"in {place}", markup=False)
    for entry in found:
        for problem in entry.problems:
            console.print(f"damaged: {problem}", markup=False)
    for name in others:
        what = "refused and set aside" if DAMAGED in name else "unfinished: being written, or left by a kill"
        console.print(f"{name}: {what}", markup=False)


@checkpoint_app.command(
    epilog="Examples: `mikoshi checkpoint verify runs/quickstart`, `mikoshi checkpoint verify runs/big --step 12000 --sizes`"
)
def verify(
    run: Run,
    step: Annotated[int | None, typer.Option(min=0, help="only this one (default: all)", show_default=False)] = None,
    sizes: Annotated[bool, typer.Option("--sizes", help="compare names and sizes only, not every byte")] = False,
) -> None:
    """Compare checkpoints with their manifests, every byte; exit 2 and name every file that is not what it was.

    Nothing is changed. Remote files are fetched, a step at a time, to the folder for temporary files (TMPDIR).
    """
    go_on_unread()
    from mikoshi.trainer.checkpoint.survey import bytes_of, faults
    from mikoshi.trainer.errors import CheckpointError

    with _open_checkpoints(run) as (store, _, _):
        steps, console, damaged = store.steps(), _console(), list[str]()
        if not steps:
            raise CheckpointError(f"{store.address}: there is no checkpoint yet: train first, or wait for one")
        if step is not None and step not in steps:
            raise CheckpointError(f"--step {step}: {store.address} has the steps {', '.join(map(str, steps[:20]))}")
        for one in steps if step is None else [step]:
            total = bytes_of(store, one)
            with suppress(FileNotFoundError):  # its run has just removed it
                with _progress_bar(console, f"step {one}", total) as seen:
                    found = faults(store, one, digests=not sizes, progress=seen)
                how = "by sizes" if sizes else f"{_size(total)} read"
                console.print(f"{store.describe(one)}: {f'{len(found)} damaged' if found else 'whole'}, {how}", markup=False)
                damaged += found
        if damaged:
            raise CheckpointError("\n".join(damaged))


@checkpoint_app.command(
    epilog="Examples: `mikoshi checkpoint prune runs/big --last 3 --every 10000 --dry-run`, `mikoshi checkpoint prune runs/big`"
)
def prune(
    run: Run,
    last: Annotated[
        int | None, typer.Option(min=1, help="newest to keep (default: checkpoint.keep)", show_default=False)
    ] = None,
    every: Annotated[
        int | None,
        typer.Option(min=0, help="multiples of it are kept too; 0: none (default: checkpoint.keep_every)", show_default=False),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only say what would be removed")] = False,
) -> None:
    """Remove checkpoints that need not be kept. The newest one that verifies, every byte read, always stays.

    Not while the run trains, which removes them itself.
    """
    go_on_unread()
    from mikoshi.trainer.checkpoint.of_run import retention_of
    from mikoshi.trainer.checkpoint.survey import bytes_of, verified_removable

    with _open_checkpoints(run) as (store, config, folder), nullcontext() if dry_run else folder.lock(patience=0):
        console, configured = _console(), retention_of(config)
        keep = replace(
            configured, last=configured.last if last is None else last, every=configured.every if every is None else every
        )
        total = max((bytes_of(store, step) for step in store.steps()[:1]), default=0)
        with _progress_bar(console, "verifying the newest", total) as seen:
            gone, valid = verified_removable(store, keep, seen)
        for step in gone:
            if not dry_run:
                with suppress(FileNotFoundError):  # its run has just removed it
                    store.remove(step)
            console.print(f"{'would remove' if dry_run else 'removed'} {store.describe(step)}", markup=False)
        left = len(store.steps()) - dry_run * len(gone)
        text = f"{len(gone)} {'to remove' if dry_run else 'removed'}, {left} {'to keep' if dry_run else 'kept'}"
        console.print(f"{text}{'' if valid is None else f'; the newest valid one is of step {valid}'}", markup=False)


@contextmanager
def _open_checkpoints(run: Path) -> Iterator[tuple[Store, RunConfig, RunFolder]]:
    """The store of a run's checkpoints, even if the run folder was moved, with the run's config and folder."""
    from mikoshi.trainer.checkpoint.storage.open import open_store
    from mikoshi.trainer.config.run import load_config
    from mikoshi.trainer.errors import CheckpointError
    from mikoshi.trainer.record.run_folder import open_run

    folder = open_run(run)
    config = load_config(folder.path)
    with tempfile.TemporaryDirectory(prefix="mikoshi-") as scratch:
        try:
            yield open_store(config.checkpoint.folder or folder.checkpoints, Path(scratch)), config, folder
        except OSError as error:
            if error.errno is None:  # a store that does not answer; the message has its address and the cause
                raise CheckpointError(str(error)) from None
            raise


@contextmanager
def _progress_bar(console: Console, what: str, total: int) -> Iterator[Progress]:
    """Show a progress bar with rate and time left; nothing outside of a terminal."""
    from rich import progress as rich

    columns = (
        rich.TextColumn("{task.description}"), rich.BarColumn(), rich.DownloadColumn(), rich.TransferSpeedColumn(),
        rich.TimeRemainingColumn(),
    )  # fmt: skip
    with rich.Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True, width=500)


def _size(count: int) -> str:
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if count >= unit:
            return f"{count / unit:,.2f} {name}"
    return f"{count / 1e3:,.1f} kB"
