"""The batch at any step, and any document, as text: where it stands, where documents begin, and what is predicted.

A token is predicted where the label of the place before it is not IGNORED; in a row of T places that is also the token
after the last, which is shown with the row that predicts it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.text import Text

from mikoshi.data.dataset.dataset import is_megatron
from mikoshi.data.dataset.rows import IGNORED, RowLocation
from mikoshi.data.dataset.shards import Shard
from mikoshi.data.dataset.split import Corpus
from mikoshi.data.loader.loader import Loader, read_samples
from mikoshi.data.loader.resume_state import DataResumePoint, resume_from_record
from mikoshi.data.tokenizer.tokenizer import Tokenizer
from mikoshi.parallel.layout import Layout
from mikoshi.trainer.checkpoint.of_run import checkpoints_of
from mikoshi.trainer.checkpoint.storage.base import Store
from mikoshi.trainer.checkpoint.verify import read_manifest
from mikoshi.trainer.config.run import load_config
from mikoshi.trainer.errors import CheckpointError, ConfigError
from mikoshi.trainer.feed.feed import Feed, open_feed
from mikoshi.trainer.guard.loss_guard import read_rewinds
from mikoshi.trainer.record.run_folder import open_run
from mikoshi.trainer.train.resume import without_rewound

OPEN, CLOSE = "⟪", "⟫"
"""What stands around text that is not predicted, where nothing can be dimmed."""
MOST_STEPS = 1 << 40

Ids = npt.NDArray[np.int64]

_VISIBLE = {
    **{code: chr(0x2400 + code) for code in range(32) if code not in (9, 10)},
    **{code: f"\\x{code:02x}" for code in range(127, 160)},
}


@dataclass(frozen=True)
class DataView:
    """A run's prepared data, opened for inspection by one reader of all rows.

    done: step of the checkpoint that says which samples were consumed; None where only a config is known.
    """

    feed: Feed
    continued: DataResumePoint
    loader: Loader
    done: int | None

    def corpus(self, source: int) -> Corpus:
        """The corpus of a source, by its number in the mixture."""
        return self.loader.sampler.corpora[source]


def open_view(path: Path, overrides: Sequence[str] = ()) -> DataView:
    """The data of a config, or of a run folder as its newest checkpoint has consumed it. Raises ConfigError, DataError or
    CheckpointError, also for a stream, which has no order that could be looked into."""
    config = load_config(path, overrides)
    if config.data.stream:
        raise ConfigError(
            "data.stream = true: a stream's batches are known once they are read, so there is none to look at beforehand: "
            "prepare the data and set data.stream = false"
        )
    of_run = path.is_dir()
    feed = open_feed(without_rewound(config, read_rewinds(open_run(path).rewinds) if of_run else []))
    found = _newest(checkpoints_of(open_run(path), config)) if of_run else None
    accept = config.data.on_change == "accept"  # and steps that the sources are not enough for are no reason not to look
    continued = resume_from_record(found[1] if found else None, feed.identity, feed.mixture, feed.skipped.spans, accept)
    layout = Layout()
    loader = feed.loader(layout, layout.coordinates(0), continued)
    assert isinstance(loader, Loader)
    return DataView(feed, continued, loader, found[0] if found else None)


def _newest(store: Store) -> tuple[int, dict[str, Any]] | None:
    """Step and record of the data of the newest checkpoint whose manifest can be read; None where there is no checkpoint."""
    problems = []
    for step in store.steps():
        try:
            manifest = read_manifest(store, step)
            if "curriculum" not in manifest.record.get("data", {}):
                raise CheckpointError(f"{store.describe(step)}: says nothing of the order of its data: made by another version")
            return manifest.step, manifest.record["data"]
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise CheckpointError(f"{problems[0]}: what the run consumed is not known; give its TOML file to see what it asks for")
    return None


@dataclass(frozen=True)
class Segment:
    """Places of a row from `first` on that are read as one: of one document, `document` of its shard, from its token
    `offset` on; of none where the row is padding. `tokens`: what is read and, last, what is predicted and not read here;
    `predicted` for each of them. `ends`: whether the document's last token is among them."""

    document: int | None
    offset: int
    first: int
    places: int
    tokens: list[int]
    predicted: list[bool]
    ends: bool


@dataclass(frozen=True)
class BatchRow:
    """A row of a global batch: its number, its sample and its position in the order, where it comes from, its ids and
    labels, and for each place the document's number in the row and the position in it (None: read as one document)."""

    row: int
    sample: int
    position: int
    source: str
    epoch: int
    shard: str
    shard_row: int
    ids: list[int]
    labels: list[int]
    docs: list[int] | None
    positions: list[int] | None
    segments: tuple[Segment, ...]

    @property
    def documents(self) -> int:
        """Number of documents in the row; padding does not count."""
        return len({s.document for s in self.segments} - {None})


def shard_name(corpus: Corpus, shard: int) -> str:
    """A shard as a user can find it."""
    place, file = corpus.dataset.place, corpus.shards[shard].file
    return f"{place}, {file} part" if is_megatron(place) else f"{place.rstrip('/')}/{file}"


def batch_rows(view: DataView, step: int, first: int, count: int) -> list[BatchRow]:
    """Rows `first` to `first + count - 1` of the global batch at a step, as many of them as it has. Raises ConfigError for
    a step or row that there is none of, DataError for a step after the last that the sources are enough for."""
    batch = view.loader.global_batch
    if not 0 <= step < MOST_STEPS:
        raise ConfigError(f"--step {step}: there is no such step: give 0, the first batch, or more, under {MOST_STEPS}")
    if not 0 <= first < batch:
        raise ConfigError(f"--row {first}: the batch has rows 0 to {batch - 1} (train.global_batch = {batch})")
    course = view.loader.sampler
    samples = view.loader.samples(step).part(first, first + count)
    read = read_samples(course, samples, len(samples), view.loader.document_mask)
    out = []
    for n in range(len(samples)):
        source, shard, number = (int(a[n]) for a in (samples.source, samples.shard, samples.row))
        corpus = view.corpus(source)
        where = corpus.locate(shard, number)
        docs = None if read.docs is None else read.docs[n]
        out.append(BatchRow(
            first + n, step * batch + first + n, int(samples.position[n]), course.mixture.names[source],
            int(samples.draw[n]) // corpus.samples, shard_name(corpus, shard), number, read.tokens[n].tolist(),
            read.labels[n].tolist(), None if docs is None else docs.tolist(),
            None if read.positions is None else read.positions[n].tolist(),
            segments(read.tokens[n], read.labels[n], docs, _token_at(where, course.context), where.shard),
        ))  # fmt: skip
    return out


def _token_at(where: RowLocation, context: int) -> Ids:
    """Which token of its shard is read at each place of a row; -1 for padding."""
    if where.pieces is None:
        return np.arange(where.first, where.first + context)
    parts = [np.arange(first, first + length) for first, length in zip(*where.pieces, strict=True)]
    used = sum(map(len, parts))
    return np.concatenate([*parts, np.full(context - used, -1)])


def segments(tokens: Ids, labels: Ids, docs: Ids | None, at: Ids, shard: Shard) -> tuple[Segment, ...]:
    """A row cut where another document begins and where attention does (`docs`). `at`: the shard's token at each place."""
    wanted = np.maximum(at, 0).astype(shard.ends.dtype)
    owner = np.where(at < 0, -1, np.searchsorted(shard.ends, wanted, side="right").astype(np.int64))
    follows = at[1:] == at[:-1] + 1
    cut = (owner[1:] != owner[:-1]) | ~follows | (False if docs is None else docs[1:] != docs[:-1])
    cut &= (at[1:] >= 0) | (at[:-1] >= 0)
    learned = labels != IGNORED
    predicted = np.concatenate(([False], learned[:-1] & follows))
    begins = [0, *(np.flatnonzero(cut) + 1).tolist()]
    out = []
    for start, stop in zip(begins, [*begins[1:], len(at)], strict=True):
        if at[start] < 0:
            out.append(Segment(None, 0, start, stop - start, [], [], False))
            continue
        document = int(owner[start])
        ids, flags, end = tokens[start:stop].tolist(), predicted[start:stop].tolist(), int(at[stop - 1]) + 1
        if learned[stop - 1] and not (stop < len(at) and follows[stop - 1]):
            ids, flags, end = [*ids, int(labels[stop - 1])], [*flags, True], end + 1
        offset = int(at[start]) - (int(shard.ends[document - 1]) if document else 0)
        out.append(Segment(document, offset, start, stop - start, ids, flags, end == int(shard.ends[document])))
    return tuple(out)


def marked(tokenizer: Tokenizer, tokens: Sequence[int], predicted: Sequence[bool]) -> Iterator[tuple[str, bool]]:
    """The text of tokens in stretches, each with whether it is predicted. Put together they are the text of all; a character
    whose bytes lie on both sides goes with the later."""
    before, stop = "", 0
    for flag, run in groupby(predicted):
        stop += len(list(run))
        text = tokenizer.decode(tokens[:stop])
        if stop < len(tokens):
            text = text.rstrip("\ufffd")
        if text[len(before) :]:
            yield text[len(before) :], flag
        before = text


def shown(tokenizer: Tokenizer, segment: Segment, styled: bool) -> Text:
    """A segment's text, what is not predicted dimmed, or between OPEN and CLOSE. Control characters are made visible."""
    out = Text()
    for text, flag in marked(tokenizer, segment.tokens, segment.predicted):
        clean = text.translate(_VISIBLE)
        out.append(clean if flag or styled else f"{OPEN}{clean}{CLOSE}", style="" if flag else "dim")
    return out


def print_batch(view: DataView, step: int, rows: Sequence[BatchRow], console: Console) -> None:
    """The rows, each under a line that says what it is, and the documents in them."""
    feed, samples, styled = view.feed, view.loader.samples(step), is_styled(console)
    batch, position = view.loader.global_batch, samples.position
    when = ""
    if view.done is not None:
        when = ", consumed" if step < view.done else f", to come: the newest checkpoint is of step {view.done}"
    if step >= feed.config.train.steps:
        when += f", after the last of train.steps = {feed.config.train.steps}"
    print_line(console, f"step {step}, counted from 0 (in the log, step {step + 1}){when}")
    print_line(
        console, f"samples {step * batch} to {(step + 1) * batch - 1}, positions {position[0]} to {position[-1]} of the order"
    )
    if len(view.loader.sampler.mixture.names) > 1:
        names, counts = view.loader.sampler.mixture.names, np.bincount(samples.source).tolist()
        weights = feed.weights(view.continued, step)
        parts = [
            f"{name} {count} row{'' if count == 1 else 's'} ({weights.get(name, 0) / sum(weights.values()):.2%} asked)"
            for name, count in zip(names, counts, strict=False)
        ]
        print_line(console, ", ".join(parts))
    print_line(console, legend(styled))
    for row in rows:
        print_row(row, feed.tokenizer, len(row.ids), console)
    if len(rows) < batch:
        print_line(console, f"\n{len(rows)} of {batch} rows shown: --rows and --row choose others")


def legend(styled: bool) -> str:
    """One line that explains how text without a prediction is marked."""
    return "dimmed: read but not predicted" if styled else f"between {OPEN} and {CLOSE}: read but not predicted"


def print_row(row: BatchRow, tokenizer: Tokenizer, context: int, console: Console) -> None:
    """Print one row: a heading, and the text of each of its documents."""
    predicted = sum(label != IGNORED for label in row.labels)
    source = f"{row.source}, " if row.source else ""
    several = "1 document" if row.documents == 1 else f"{row.documents} documents"
    print_line(
        console,
        f"\n=== row {row.row}, position {row.position}: {source}{row.shard} row {row.shard_row}, epoch {row.epoch}; "
        f"{several}, {predicted} of {context} places predict ===",
        "bold",
    )
    before: int | None = None
    for segment in row.segments:
        if segment.document is None:
            print_line(console, f"--- padding: {segment.places} places ---", "cyan")
            continue
        last = segment.offset + len(segment.tokens) - 1
        what = "goes on, attention begins anew" if segment.document == before else f"document {segment.document} of the shard"
        where = f"its tokens {segment.offset} to {last}" if segment.offset or not segment.ends else f"whole, {last + 1} tokens"
        ends = ", its end" if segment.ends and segment.offset else ""
        print_line(console, f"--- {what}: {where}{ends} ---", "cyan")
        console.print(shown(tokenizer, segment, is_styled(console)))
        before = segment.document


def print_line(console: Console, text: str, style: str = "") -> None:
    """Print a line that is never wrapped."""
    console.print(text, style=style, markup=False, soft_wrap=True)


def is_styled(console: Console) -> bool:
    """Whether the console shows styles such as dimmed text."""
    return console.is_terminal and console.color_system is not None
