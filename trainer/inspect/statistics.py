"""A run's prepared data in numbers: documents, tokens, rows, what the run makes of them, and how they are packed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from rich import box
from rich.console import Console
from rich.table import Table

from mikoshi.data.dataset.dataset import is_remote
from mikoshi.data.dataset.predicted import unpredicted_share
from mikoshi.data.dataset.shards import HELD_OUT, TRAIN
from mikoshi.data.dataset.split import Corpus
from mikoshi.data.sampling.curriculum import MixtureHistory
from mikoshi.data.sampling.mixture import whole_weights
from mikoshi.data.sampling.sampler import Skips
from mikoshi.trainer.inspect.batches import DataView, print_line

_MOST_DOCUMENTS = 1 << 26
_BAR = 40

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Packed:
    """Rows of a training split. `used`: share of their places that hold a token; `joined`: share of the rows that hold
    more than one document; `cut`: documents that lie in more than one row, of `looked_at`. None: not known without
    fetching all of it."""

    rows: int
    used: float
    joined: float | None
    cut: int | None
    looked_at: int


@dataclass(frozen=True)
class SourceStats:
    """One source. `documents`, `tokens` and `bytes` by split; `drawn`: rows that the run reads in all, `epochs` how often
    that is every row, `share` their part of all; `cap`: rows that it gives at most, `spent` the step that reads its last.
    `lengths`: documents by tokens, under 64 those of 64 to 127. `nothing`: by split, share of the rows in which no token is
    predicted (None: not known without fetching all). `report`: what `prepare` said."""

    name: str
    place: str
    documents: dict[str, int]
    tokens: dict[str, int]
    bytes: dict[str, int]
    drawn: int
    epochs: float
    share: float
    cap: int | None
    spent: int | None
    lengths: dict[int, int]
    packed: Packed
    nothing: dict[str, float | None]
    report: dict[str, Any]


@dataclass(frozen=True)
class MixtureWeights:
    """Shares of the sources from a step (and position) on: as requested, and as rounded to the whole numbers of the sampler."""

    step: int
    position: int
    asked: dict[str, float]
    effective: dict[str, float]


@dataclass(frozen=True)
class Stats:
    """`steps` and `rows` that the run reads: those of train.steps, or fewer where the sources' epochs do not reach."""

    context: int
    packing: str
    wanted: int
    steps: int
    rows: int
    weights: tuple[MixtureWeights, ...]
    sources: tuple[SourceStats, ...]


def stats(view: DataView) -> Stats:
    """Raises DataError where a shard or an index is not as listed."""
    config, history, skipped = view.feed.config, view.continued.history, view.feed.skipped
    batch = config.train.global_batch
    steps = min(config.train.steps, _samples_before(skipped, history.end) // batch)
    rows = steps * batch
    reads = samples_by_source(history, skipped, rows)
    caps = history.requests[-1][1].caps
    sources = tuple(
        _source(name, view, reads[name], rows, _spent(view, name, steps, reads) if caps.get(name) is not None else None)
        for name in view.feed.train
    )
    weights = tuple(_weighed(history, skipped, batch))
    return Stats(config.train.context, config.data.packing, config.train.steps, steps, rows, weights, sources)


def samples_by_source(history: MixtureHistory, skipped: Skips, samples: int) -> dict[str, int]:
    """How many of the first `samples` samples are of each source."""
    end = int(skipped.positions(np.array([max(0, samples - 1)]))[0]) + 1 if samples else 0
    counts = history.counts(end)
    for start, stop in skipped.spans:
        if start < end:
            first, after = history.counts(start), history.counts(min(stop, end))
            counts = {name: count - after[name] + first[name] for name, count in counts.items()}
    return counts


def _samples_before(skipped: Skips, position: int) -> int:
    return position - sum(min(stop, position) - start for start, stop in skipped.spans if start < position)


def _spent(view: DataView, name: str, steps: int, reads: Mapping[str, int]) -> int | None:
    """The step, counted from 0, that reads the last row of a source whose epochs end in the run; None if they do not."""
    history, skipped, batch = view.continued.history, view.feed.skipped, view.loader.global_batch
    if not steps or not reads[name]:
        return None
    position = int(skipped.positions(np.array([steps * batch - 1]))[0]) + 1
    if position < history.end and history.weights(position).get(name):
        return None
    low, high = 0, steps
    while high - low > 1:
        middle = (low + high) // 2
        drawn = samples_by_source(history, skipped, middle * batch)[name]
        low, high = (low, middle) if drawn == reads[name] else (middle, high)
    return low


def _weighed(history: MixtureHistory, skipped: Skips, batch: int) -> list[MixtureWeights]:
    out = []
    ends = [*(since for since, _ in history.requests), history.end][1:]
    for (since, asked), end in zip(history.requests, ends, strict=True):
        passed = [stage for stage in asked.stages if stage[0] <= since][-1:]
        for start, weights in [*((since, w) for _, w in passed), *(s for s in asked.stages if since < s[0] < end)]:
            whole, total = whole_weights(weights), sum(weights.values())
            out.append(MixtureWeights(
                _samples_before(skipped, start) // batch, start, {n: w / total for n, w in weights.items()},
                {n: w / sum(whole.values()) for n, w in whole.items()},
            ))  # fmt: skip
    return out


def _source(name: str, view: DataView, reads: int, rows: int, spent: int | None) -> SourceStats:
    corpus = view.feed.train[name]
    info, splits = corpus.info, {split: shards for split, shards in corpus.info.splits.items() if split in (TRAIN, HELD_OUT)}
    packed, lengths = _packed(corpus)
    recorded, mask = info.report.get("lengths"), view.feed.config.data.document_mask
    nothing = {TRAIN: unpredicted_share(corpus, mask), HELD_OUT: unpredicted_share(view.feed.held_out[name], mask)}
    return SourceStats(
        name, corpus.dataset.place,
        {split: sum(s.documents for s in shards) for split, shards in splits.items()},
        {split: sum(s.tokens for s in shards) for split, shards in splits.items()},
        {split: sum(s.bytes for s in shards) for split, shards in splits.items()},
        reads, reads / corpus.samples, reads / max(1, rows), view.continued.history.requests[-1][1].caps.get(name), spent,
        {int(size): int(count) for size, count in recorded.items()} if recorded else lengths, packed, nothing,
        {key: value for key, value in info.report.items() if key != "lengths"},
    )  # fmt: skip


def _packed(corpus: Corpus) -> tuple[Packed, dict[int, int]]:
    """How the rows are packed, and the lengths of the documents that were looked at for it: all, of data at hand, but for
    very large ones."""
    context, plan = corpus.context, corpus.plan
    cut = several = looked_at = rows = 0
    lengths = np.zeros(64, np.int64)
    if not is_remote(corpus.dataset.place):
        for info, count in zip(corpus.shards, corpus.counts.tolist(), strict=True):
            if looked_at >= _MOST_DOCUMENTS:
                break
            ends = corpus.dataset.shard(info).ends.astype(np.int64)
            sizes = np.diff(ends, prepend=0)
            lengths += np.bincount(np.log2(np.maximum(sizes, 1)).astype(np.int64), minlength=64)
            looked_at += len(ends)
            rows += count
            cut += int((sizes - 1 > context).sum()) if plan else documents_cut(ends, sizes, count, context)
            several += 0 if plan else rows_joined(ends, count, context)
    if plan is not None:
        joined: float | None = float((np.diff(plan.starts.astype(np.int64)) > 1).mean())
    else:
        joined = several / rows if rows else None
    used = 1.0 if plan is None else plan.used
    found = {1 << power: count for power, count in enumerate(lengths.tolist()) if count}
    return Packed(corpus.samples, used, joined, cut if looked_at else None, looked_at), found


def documents_cut(ends: Ids, sizes: Ids, rows: int, context: int) -> int:
    """Documents whose tokens are read in more than one row. The last token of each need not be read."""
    starts = ends - sizes
    return int(((np.maximum(ends - 2, starts) // context > starts // context) & (starts < rows * context)).sum())


def rows_joined(ends: Ids, rows: int, context: int) -> int:
    """Rows with the end of a document inside."""
    inside = ends[(ends % context != 0) & (ends < rows * context)]
    return len(np.unique(inside // context))


def bucket(size: int) -> str:
    """Label of the histogram bucket from `size` to `2 * size - 1` tokens."""
    return f"{size:,}-{2 * size - 1:,}" if size > 1 else "1"


def describe_packing(packed: Packed, packing: str, context: int) -> str:
    """One line on how documents are packed into rows."""
    how = "fitted to whole documents" if packing == "fit" else "cut from the text as it comes"
    parts = [f"{packed.rows:,} rows of {context:,} tokens, {how}: {packed.used:.2%} of the places hold a token"]
    if packed.joined is not None:
        parts.append(f"{packed.joined:.1%} of the rows hold several documents")
    if packed.cut is not None:
        parts.append(f"{packed.cut:,} of {packed.looked_at:,} documents lie in several rows")
    return ", ".join(parts)


def describe_empty_rows(nothing: Mapping[str, float | None]) -> list[str]:
    """One line on rows that predict no token; none where there are no such rows."""
    names = {TRAIN: "training", HELD_OUT: "held-out"}
    parts = [f"{share:.1%} of the {names[split]} rows" for split, share in nothing.items() if share]
    return [f"{' and '.join(parts)} predict no token: a step of such rows alone changes nothing"] if parts else []


def report_lines(report: Mapping[str, Any]) -> list[str]:
    """What `prepare` said, in words."""
    if "read" not in report:
        return [f"made elsewhere: {report['format']}" if "format" in report else "no report of how it was prepared"]
    lines = [
        f"prepared from {report['source']}: {report['read']:,} documents read, {report['documents']:,} used, "
        f"{report['empty']:,} empty, {report['skipped']:,} unreadable, {sum(report['dropped'].values()):,} left out"
    ]
    lines += [f"left out, {reason}: {count:,}" for reason, count in report["dropped"].items()]
    lines += [f"unreadable, {problem}: {count:,}" for problem, count in report["problems"].items()]
    return lines + [f"such as {name}" for name in report["skipped_names"][:3]]


def print_stats(found: Stats, console: Console) -> None:
    """Print the statistics as tables, with a histogram of document lengths for each source."""
    print_line(console, f"train.steps = {found.wanted:,}: {found.rows:,} rows of {found.context:,} tokens")
    if found.steps < found.wanted:
        print_line(console, f"the sources' epochs are enough for {found.steps:,} steps only", "red")
    columns = ("source", "documents", "tokens", "held out", "rows", "read by the run", "epochs", "share")
    table = _table(columns)
    for s in found.sources:
        table.add_row(
            s.name or "all", f"{s.documents[TRAIN]:,}", f"{s.tokens[TRAIN]:,}", f"{s.tokens[HELD_OUT]:,}",
            f"{s.packed.rows:,}", f"{s.drawn:,}", f"{s.epochs:.3f}", f"{s.share:.2%}",
        )  # fmt: skip
    console.print(table)
    if len(found.sources) > 1:
        _print_weights(found, console)
    for s in found.sources:
        print_line(console, f"\n{s.name or 'the source'}: {s.place}", "bold")
        if s.cap is not None:
            end = "not reached in the run" if s.spent is None else f"its last is read in step {s.spent:,}"
            print_line(console, f"  at most {s.cap:,} rows: {end}")
        print_line(console, f"  {describe_packing(s.packed, found.packing, found.context)}")
        for line in [*describe_empty_rows(s.nothing), *report_lines(s.report)]:
            print_line(console, f"  {line}")
        print_line(console, "  tokens a document, the separator among them:")
        for line in bars(s.lengths):
            print_line(console, f"  {line}")


def _print_weights(found: Stats, console: Console) -> None:
    table = _table(("from step", "position", *(f"{s.name}: asked, effective" for s in found.sources)), left=0)
    for w in found.weights:
        shares = (f"{w.asked.get(s.name, 0):.4%}, {w.effective.get(s.name, 0):.4%}" for s in found.sources)
        table.add_row(f"{w.step:,}", f"{w.position:,}", *shares)
    console.print()
    console.print(table)


def _table(columns: Sequence[str], left: int = 1) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_edge=False)
    for number, name in enumerate(columns):
        table.add_column(name, no_wrap=True, justify="left" if number < left else "right")
    return table


def bars(lengths: Mapping[int, int]) -> list[str]:
    """A histogram in characters, one line a power of two."""
    if not lengths:
        return ["not known without reading all of it"]
    sizes = [1 << power for power in range(min(lengths).bit_length() - 1, max(lengths).bit_length())]
    total, most, width = sum(lengths.values()), max(lengths.values()), len(bucket(sizes[-1]))
    return [
        f"{bucket(size):>{width}} {'█' * round(_BAR * lengths.get(size, 0) / most):{_BAR}} "
        f"{lengths.get(size, 0):>{len(f'{most:,}')},} {lengths.get(size, 0) / total:6.1%}"
        for size in sizes
    ]
