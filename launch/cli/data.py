"""The verbs that make data and look at it: a thin layer over the modules beneath, imported on demand."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mikoshi.data.io.json import dumps
from mikoshi.launch.cli.arguments import AsJson, Config, Overrides
from mikoshi.trainer.exit_codes import PREEMPTED
from mikoshi.trainer.streams import go_on_unread

if TYPE_CHECKING:
    from rich.console import Console

    from mikoshi.data.dataset.shards import DatasetInfo
    from mikoshi.data.io.progress import ProgressCallback
    from mikoshi.data.prepare.prepare import Progress, Recipe
    from mikoshi.trainer.config.run import RunConfig

PREPARE_EXAMPLES = (
    "Examples: `mikoshi prepare configs/runs/quickstart.toml data.source=my/texts data.path=build/my-texts`, "
    "`mikoshi prepare run.toml 'data.source=\"s3://bucket/web/*.jsonl.zst\"' data.filters.deduplicate=true --workers 32`"
)

RunOrConfig = Annotated[Path, typer.Argument(help="a run folder, or a run's TOML file", show_default=False)]
Width = Annotated[
    int | None, typer.Option(min=20, help="columns to wrap lines at (default: lines are left as they are)", show_default=False)
]

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
    go_on_unread()
    from rich.console import Console

    from mikoshi.data.dataset.dataset import is_megatron, is_remote
    from mikoshi.data.prepare.prepare import Stopped, prepare_all
    from mikoshi.data.prepare.prepare import prepare as prepare_one
    from mikoshi.trainer.config.run import load_config
    from mikoshi.trainer.errors import ConfigError
    from mikoshi.trainer.feed.feed import dataset_locations, recipes

    run = load_config(config, overrides or [])
    if is_remote(run.data.path) or is_megatron(run.data.path):
        raise ConfigError(
            f"data.path = {run.data.path!r}: data is prepared in a folder of this machine: give one, and copy it there "
            "afterwards"
        )
    to_prepare = recipes(run.data)
    if not to_prepare:
        raise ConfigError("data.mixture: every source has a path, so there is nothing to prepare")
    console = Console(highlight=False, soft_wrap=True)
    try:
        with progress_bars(console) as show:
            if run.data.mixture:
                made = prepare_all(to_prepare, Path(run.data.path), show, workers=workers)
            else:
                made = {"": prepare_one(to_prepare[""], Path(run.data.path), show, workers=workers)}
    except Stopped as stopped:
        typer.echo(str(stopped), err=True)
        raise typer.Exit(PREEMPTED) from None
    for name, (info, new) in made.items():
        _print_prepared(console, dataset_locations(run.data)[name], info, new)
        console.print(f"  {_document_marks(to_prepare[name], Path(dataset_locations(run.data)[name]), info)}", markup=False)
    _print_rows(console, run, made)


def _print_rows(console: Console, run: RunConfig, made: Collection[str]) -> None:
    """Print the rows that a run makes of its data. Raises DataError if there are none, or if no token is predicted."""
    from mikoshi.data.dataset.predicted import check_predicts, unpredicted_share
    from mikoshi.data.dataset.shards import HELD_OUT, TRAIN
    from mikoshi.data.dataset.split import open_corpus
    from mikoshi.trainer.feed.feed import datasets

    context, fit = run.train.context, run.data.packing == "fit"
    for name, dataset in datasets(run, None if fit else made).items():
        head = f"  {name + ': ' if name else ''}"
        for split, what in ((TRAIN, "training"), (HELD_OUT, "held-out")):
            if not fit and all(shard.tokens <= context for shard in dataset.shards(split)):
                continue  # training reports that
            corpus = open_corpus(dataset, split, context, run.data.packing, name)
            if corpus.plan is not None and split == TRAIN:
                used = f"{corpus.plan.used:.2%} of their places used"
                console.print(f"{head}{corpus.samples:,} rows of {context} tokens, {used}", markup=False)
            if share := unpredicted_share(corpus, run.data.document_mask):
                none = ": it has no held-out loss" if share == 1.0 and split == HELD_OUT else ""
                text = f"{share:.1%} of the {corpus.samples:,} {what} rows of {context} tokens predict no token{none}"
                console.print(f"{head}{text}", markup=False)
            if split == TRAIN:
                check_predicts(corpus, run.data.document_mask)


def _print_prepared(console: Console, place: str, info: DatasetInfo, new: bool) -> None:
    from mikoshi.data.dataset.shards import HELD_OUT, TRAIN

    report = info.report
    dropped = ", ".join(f"{count:,} {why}" for why, count in report["dropped"].items())
    console.print(
        f"{'prepared' if new else 'already prepared'}: {place}\n"
        f"  {report['documents']:,} documents, {report['bytes'] / 1e6:.1f} MB of text; "
        f"{report['skipped']:,} skipped, {report['empty']:,} empty{f'; left out: {dropped}' if dropped else ''}\n"
        f"  {info.tokens(TRAIN):,} training and {info.tokens(HELD_OUT):,} held-out tokens, vocabulary {info.vocab}\n"
        f"  a model that knows only how frequent each token is has a held-out loss of {info.unigram_nats:.3f}",
        markup=False,
    )
    if report.get("contents") == "unknown":
        console.print("  made before contents were written down: its source is compared by names and sizes alone", markup=False)
    if "chat" in report.get("earlier", ()):
        text = "made by earlier rules, by which the end of a turn may not be learned, and goes on so"
        console.print(f"  {text}: prepare to another data.path for today's", markup=False)
    for line in files_read(report.get("files", {})):
        console.print(f"  {line}", markup=False)
    for problem in report["skipped_names"]:
        console.print(f"  skipped {problem}", markup=False)


def _document_marks(recipe: Recipe, folder: Path, info: DatasetInfo) -> str:
    """How documents begin and end, and whether the tokenizer's files say otherwise today."""
    from mikoshi.data.dataset.shards import TOKENIZER
    from mikoshi.data.tokenizer.special_tokens import BoundaryTokens
    from mikoshi.data.tokenizer.tokenizer import parse_tokenizer

    made = parse_tokenizer((folder / TOKENIZER).read_bytes(), str(folder / TOKENIZER), info.boundaries)

    def describe(marks: BoundaryTokens) -> str:
        name = made.backend.id_to_token
        begin = "with no token of their own" if marks.bos is None else f"with {name(marks.bos)!r}"
        return f"begin {begin} and end with {name(marks.separator)!r}"

    now = made if recipe.tokenizer is None else recipe.load_tokenizer()
    if (now.bos, now.separator) == (made.bos, made.separator):
        return f"documents {describe(made.boundaries)}"
    return (
        f"documents {describe(made.boundaries)}, as they were prepared, and go on so; by the tokenizer's files they would "
        f"{describe(now.boundaries)}: prepare to another data.path for that"
    )


def files_read(files: dict[str, Any]) -> Iterator[str]:
    """Lines about the files of a source: files read by format, and files left out by reason."""
    if read := files.get("read"):
        yield "files read: " + ", ".join(f"{count:,} {kind}" for kind, count in read.items())
    for reason, count in files.get("left_out", {}).items():
        names = files["left_out_names"][reason]
        yield f"files left out as {reason}: {count:,} ({', '.join(names)}{', ...' if count > len(names) else ''})"


@contextmanager
def progress_bars(console: Console) -> Iterator[ProgressCallback]:
    """ProgressCallback a progress bar for each phase, with rate and time left; nothing outside of a terminal."""
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


@data_app.command(
    epilog="Examples: `mikoshi data inspect runs/quickstart --step 120`, "
    "`mikoshi data inspect run.toml --step 1000000000 --row 3 --json`, "
    "`mikoshi data inspect runs/chat --step 0 --rows 2 > batch.txt`"
)
def inspect(
    run: RunOrConfig,
    overrides: Overrides = None,
    step: Annotated[int, typer.Option(help="counted from 0: what the log calls step 1 is --step 0")] = 0,
    rows: Annotated[
        int | None, typer.Option(min=1, help="rows to show (default: 4, or 1 with --row)", show_default=False)
    ] = None,
    row: Annotated[int | None, typer.Option(help="the first row to show (default: 0)", show_default=False)] = None,
    width: Width = None,
    as_json: AsJson = False,
) -> None:
    """Show the global batch at any step, past or future, as text: documents, and what of them is predicted.

    Of a run folder, past batches are those that the run consumed, however its mixture was changed on the way.
    """
    from mikoshi.trainer.inspect.batches import batch_rows, open_view, print_batch

    view = open_view(run, overrides or [])
    found = batch_rows(view, step, row or 0, rows or (4 if row is None else 1))
    if as_json:
        consumed = None if view.done is None else step < view.done
        typer.echo(dumps({"step": step, "consumed": consumed, "rows": [asdict(r) for r in found]}))
    else:
        print_batch(view, step, found, _console(width))


@data_app.command(
    epilog="Examples: `mikoshi data stats configs/runs/quickstart.toml`, `mikoshi data stats runs/quickstart --json`"
)
def stats(run: RunOrConfig, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Count documents, tokens, rows and epochs of every source, its share of the run, lengths and packing."""
    from rich.console import Console

    from mikoshi.trainer.inspect.batches import open_view
    from mikoshi.trainer.inspect.statistics import print_stats
    from mikoshi.trainer.inspect.statistics import stats as count

    found = count(open_view(run, overrides or []))
    if as_json:
        typer.echo(dumps(asdict(found)))
    else:
        print_stats(found, Console(highlight=False, soft_wrap=True, width=500))


@data_app.command(
    epilog="Examples: `mikoshi data sample run.toml -n 3`, `mikoshi data sample run.toml --source web --held-out --seed 7`"
)
def sample(
    run: RunOrConfig,
    overrides: Overrides = None,
    source: Annotated[str | None, typer.Option(help="a source of the mixture (default: each)", show_default=False)] = None,
    number: Annotated[int, typer.Option("-n", "--number", min=1, help="documents of each source")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="the same seed draws the same documents")] = 0,
    held_out: Annotated[bool, typer.Option("--held-out", help="of the held-out split, not the training split")] = False,
    tokens: Annotated[int, typer.Option(min=1, help="of each document, the first to show")] = 500,
    width: Width = None,
    as_json: AsJson = False,
) -> None:
    """Show documents drawn at random from the prepared data, decoded, with their positions."""
    from mikoshi.trainer.inspect.batches import open_view
    from mikoshi.trainer.inspect.sample import print_documents, sample_documents

    view = open_view(run, overrides or [])
    found = sample_documents(view, source, number, seed, held_out, tokens)
    if as_json:
        decode = view.feed.tokenizer.decode
        typer.echo(dumps([asdict(one) | {"text": decode(one.beginning.tokens)} for one in found]))
    else:
        print_documents(found, view.feed.tokenizer, _console(width))


@data_app.command(epilog="Example: `mikoshi data verify configs/runs/quickstart.toml`")
def verify(run: RunOrConfig, overrides: Overrides = None) -> None:
    """Read all of the prepared data and compare every digest; exit 2 and name every file that is not what it was."""
    go_on_unread()
    from rich.console import Console

    from mikoshi.data.errors import DataError
    from mikoshi.trainer.config.run import load_config
    from mikoshi.trainer.inspect.verify import verify_datasets

    config, console, damaged = load_config(run, overrides or []), Console(highlight=False, soft_wrap=True), list[str]()
    with progress_bars(console) as show:
        for verdict in verify_datasets(config, show):
            text = f"{len(verdict.damaged)} damaged" if verdict.damaged else "whole"
            name = f"{verdict.source}: " if verdict.source else ""
            size = f"{verdict.files} files read, {verdict.bytes / 1e6:,.1f} MB"
            console.print(f"{name}{verdict.place}: {size}: {text}", markup=False)
            damaged += verdict.damaged
    if damaged:
        raise DataError("\n".join(damaged))


def _console(width: int | None) -> Console:
    from rich.console import Console

    return Console(highlight=False, soft_wrap=width is None, width=width)


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
    go_on_unread()
    from rich.console import Console

    from mikoshi.data.io.atomic import write_file
    from mikoshi.data.prepare.prepare import Recipe, train_shared_tokenizer
    from mikoshi.data.sources.text import SourceSpec
    from mikoshi.trainer.errors import ConfigError

    if out.exists():
        raise ConfigError(f"--out {out}: exists already: remove it or give another path")
    console = Console(highlight=False, soft_wrap=True)
    with progress_bars(console) as show:
        made = train_shared_tokenizer({"": Recipe(SourceSpec(source, column=column, on_invalid="skip"), vocab=vocab)}, show)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_file(out, made.backend.to_str().encode())
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be written: {error.strerror}: give another path") from None
    console.print(f"{out}: {made.vocab} tokens; use it with data.tokenizer={out}", markup=False)


@data_app.command(
    name="to-megatron",
    epilog="Example: `mikoshi data to-megatron configs/runs/quickstart.toml build/quickstart-train --split train`",
)
def to_megatron(
    run: RunOrConfig,
    prefix: Annotated[Path, typer.Argument(help="PREFIX.bin and PREFIX.idx are written", show_default=False)],
    overrides: Overrides = None,
    source: Annotated[str, typer.Option(help="a source of the mixture", show_default=False)] = "",
    split: Annotated[str, typer.Option(help="train or held_out")] = "train",
) -> None:
    """Write prepared documents as a Megatron corpus, which Megatron-LM and `data.path` read as it is."""
    from mikoshi.data.dataset.megatron import write_megatron
    from mikoshi.data.dataset.shards import bytes_per_token
    from mikoshi.trainer.config.run import load_config
    from mikoshi.trainer.errors import ConfigError
    from mikoshi.trainer.feed.feed import datasets

    found = datasets(load_config(run, overrides or []))
    if source not in found:
        raise ConfigError(f"--source {source!r}: the sources are {', '.join(found)}")
    dataset = found[source]
    prefix.parent.mkdir(parents=True, exist_ok=True)
    made = write_megatron(prefix, map(dataset.shard, dataset.shards(split)), bytes_per_token(dataset.info.vocab))
    typer.echo(f"{made.prefix}.bin and .idx: {made.documents:,} documents, {made.tokens:,} tokens; SHA-256 {made.digest}")


@data_app.command(name="in-order", epilog="Example: `mikoshi data in-order corpora/deduplicated build/in-order`")
def in_order(
    prefix: Annotated[Path, typer.Argument(help="a Megatron corpus whose .idx points here and there", show_default=False)],
    target: Annotated[Path, typer.Argument(help="TARGET.bin and TARGET.idx are written", show_default=False)],
) -> None:
    """Write a Megatron corpus anew in the order of its .idx, as one that only its index was shuffled in must be to be read."""
    from mikoshi.data.dataset.megatron import rewrite_in_order

    target.parent.mkdir(parents=True, exist_ok=True)
    made = rewrite_in_order(prefix, target)
    typer.echo(f"{made.prefix}.bin and .idx: {made.documents:,} documents, {made.tokens:,} tokens; SHA-256 {made.digest}")
