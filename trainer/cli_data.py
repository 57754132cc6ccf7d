"""The verbs that make and look at data: thin over the modules beneath, which are imported when a verb needs them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trainer.exit_codes import PREEMPTED

if TYPE_CHECKING:
    from rich.console import Console

    from data.prepare import Progress
    from data.progress import Show

Config = Annotated[Path, typer.Argument(help="the run's TOML file", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="settings over the file's, as section.key=value", show_default=False)
]

PREPARE_EXAMPLES = (
    "Examples: `mikoshi prepare configs/runs/quickstart.toml data.source=my/texts data.path=build/my-texts`, "
    "`mikoshi prepare run.toml 'data.source=\"s3://bucket/web/*.jsonl.zst\"' data.filters.deduplicate=true --workers 32`"
)

data_app = typer.Typer(no_args_is_help=True, help="Look at a run's data: the batch at a step, counts, digests.")
tokenizer_app = typer.Typer(no_args_is_help=True, help="Make a tokenizer.")


def prepare(
    config: Config,
    overrides: Overrides = None,
    workers: Annotated[int | None, typer.Option(min=1, help="processes (default: the cores)", show_default=False)] = None,
) -> None:
    """Turn text into token shards: reads `data.source` or the sources of `data.mixture`, writes `data.path`.

    Stopped or killed, the same command goes on where it was; the result is the same to the byte, whatever the workers.
    """
    from rich.console import Console

    from data.corpus import open_corpus
    from data.dataset import is_megatron, is_remote
    from data.prepare import prepare_all
    from data.prepare import Stopped
    from data.prepare import prepare as prepare_one
    from data.shards import HELD_OUT, TRAIN
    from trainer.config import load_config
    from trainer.errors import ConfigError
    from trainer.feed import datasets, places, recipes

    run = load_config(config, overrides or [])
    if is_remote(run.data.path) or is_megatron(run.data.path):
        raise ConfigError(
            f"data.path = {run.data.path!r}: data is prepared in a folder of this machine: give one, and copy it there afterwards"
        )
    asked = recipes(run.data)
    if not asked:
        raise ConfigError("data.mixture: every source has a path, so there is nothing to prepare")
    console = Console(highlight=False, soft_wrap=True)
    try:
        with shown(console) as show:
            if run.data.mixture:
                made = prepare_all(asked, Path(run.data.path), show, workers=workers)
            else:
                made = {"": prepare_one(asked[""], Path(run.data.path), show, workers=workers)}
    except Stopped as stopped:
        typer.echo(str(stopped), err=True)
        raise typer.Exit(PREEMPTED) from None
    for name, (info, new) in made.items():
        report = info.report
        dropped = ", ".join(f"{count:,} {why}" for why, count in report["dropped"].items())
        console.print(
            f"{'prepared' if new else 'already prepared'}: {places(run.data)[name]}\n"
            f"  {report['documents']:,} documents, {report['bytes'] / 1e6:.1f} MB of text; "
            f"{report['skipped']:,} skipped, {report['empty']:,} empty{f'; left out: {dropped}' if dropped else ''}\n"
            f"  {info.tokens(TRAIN):,} training and {info.tokens(HELD_OUT):,} held-out tokens, vocabulary {info.vocab}\n"
            f"  a model that knows only how frequent each token is has a held-out loss of {info.unigram_nats:.3f}",
            markup=False,
        )
        for problem in report["skipped_names"]:
            console.print(f"  skipped {problem}", markup=False)
    if run.data.packing == "fit":
        for name, dataset in datasets(run).items():
            corpus = open_corpus(dataset, TRAIN, run.train.context, "fit", name)
            open_corpus(dataset, HELD_OUT, run.train.context, "fit", name)
            assert corpus.plan is not None
            console.print(
                f"  {name + ': ' if name else ''}{corpus.samples:,} rows of {run.train.context} tokens, "
                f"{corpus.plan.used:.2%} of their places used",
                markup=False,
            )


@contextmanager
def shown(console: Console) -> Iterator[Show]:
    """A progress bar a phase, with rate and time left; nothing where it is no terminal."""
    from rich import progress as rich

    columns = (
        rich.TextColumn("{task.description}"), rich.BarColumn(), rich.TaskProgressColumn(),
        rich.TextColumn("{task.fields[rate]}"), rich.TimeRemainingColumn(),
    )  # fmt: skip
    with rich.Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        tasks: dict[str, rich.TaskID] = {}

        def show(progress: Progress) -> None:
            if progress.phase not in tasks:
                tasks[progress.phase] = bar.add_task(progress.phase, total=progress.total_bytes, rate="")
            rate = f"{progress.bytes_per_second / 1e6:.1f} MB/s"
            bar.update(tasks[progress.phase], completed=progress.done_bytes, rate=rate)

        yield show


@tokenizer_app.command(
    name="train", epilog="Example: `mikoshi tokenizer train my/texts --vocab 32768 --out build/tokenizer.json`"
)
def train(
    source: Annotated[str, typer.Argument(help="text, as data.source names it", show_default=False)],
    out: Annotated[Path, typer.Option(help="the tokenizer.json to write", show_default=False)],
    vocab: Annotated[int, typer.Option(min=257, help="tokens")] = 8192,
    column: Annotated[str, typer.Option(help="column or key that holds the text")] = "text",
) -> None:
    """Train a byte-level BPE tokenizer on text: up to 64 MB of it, from all over the source."""
    from rich.console import Console

    from data.prepare import Recipe, train_on
    from data.text import SourceSpec
    from trainer.errors import ConfigError

    if out.exists():
        raise ConfigError(f"--out {out}: exists already: remove it or give another path")
    console = Console(highlight=False, soft_wrap=True)
    with shown(console) as show:
        made = train_on({"": Recipe(SourceSpec(source, column=column, on_invalid="skip"), vocab=vocab)}, show)
    out.parent.mkdir(parents=True, exist_ok=True)
    made.save(out)
    console.print(f"{out}: {made.vocab} tokens; use it with data.tokenizer={out}", markup=False)
