"""Documents drawn at random from prepared data, as text: the same for the same seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich.console import Console

from mikoshi.data.dataset.shards import Shard
from mikoshi.data.dataset.split import Corpus
from mikoshi.data.tokenizer.tokenizer import Tokenizer
from mikoshi.trainer.errors import ConfigError
from mikoshi.trainer.inspect.batches import DataView, Segment, is_styled, legend, print_line, shard_name, shown


@dataclass(frozen=True)
class SampledDocument:
    """A document: its place in a shard, its number of tokens, and its first tokens."""

    source: str
    shard: str
    document: int
    first_token: int
    tokens: int
    beginning: Segment


def sample_documents(
    view: DataView, source: str | None, count: int, seed: int, held_out: bool, most_tokens: int
) -> list[SampledDocument]:
    """`count` different documents of every source, or of one, each as likely as any other of its source (all, where there
    are fewer); of each no more than its first `most_tokens` tokens. Raises ConfigError for a source that there is none of."""
    corpora = view.feed.held_out if held_out else view.feed.train
    if source is not None and source not in corpora:
        known = ", ".join(name for name in corpora if name)
        way_out = f"the mixture has {known}" if known else "the run has one, without a name: leave --source out"
        raise ConfigError(f"--source {source}: there is no such source; {way_out}")
    out = []
    for name, corpus in corpora.items():
        if source in (None, name):
            out += _of(name, corpus, count, seed, most_tokens)
    return out


def _of(name: str, corpus: Corpus, count: int, seed: int, most_tokens: int) -> list[SampledDocument]:
    before = np.cumsum([0, *(shard.documents for shard in corpus.shards)])
    total = int(before[-1])
    rng = np.random.default_rng([seed, *name.encode()])
    found = []
    for number in rng.choice(total, size=min(count, total), replace=False).tolist():
        shard = int(np.searchsorted(before, number, side="right")) - 1
        opened, document = corpus.dataset.shard(corpus.shards[shard]), number - int(before[shard])
        first, stop = int(opened.ends[document - 1]) if document else 0, int(opened.ends[document])
        beginning = _beginning(opened, document, first, min(stop, first + most_tokens), stop)
        found.append(SampledDocument(name, shard_name(corpus, shard), document, first, stop - first, beginning))
    return found


def _beginning(shard: Shard, document: int, first: int, stop: int, end: int) -> Segment:
    flags = np.ones(stop - first, np.bool_)
    if shard.learned is not None:
        low = first // 8
        bits = np.unpackbits(shard.learned[low : -(-stop // 8)], bitorder="little")
        flags = bits[first - 8 * low : stop - 8 * low].astype(np.bool_)
    return Segment(document, 0, 0, stop - first, shard.tokens[first:stop].tolist(), flags.tolist(), stop == end)


def print_documents(found: Sequence[SampledDocument], tokenizer: Tokenizer, console: Console) -> None:
    """Print each document under a heading that says where it is."""
    print_line(console, legend(is_styled(console)))
    for one in found:
        source = f"{one.source}, " if one.source else ""
        cut = "" if one.beginning.ends else f", the first {one.beginning.places} shown (--tokens)"
        place = f"{source}{one.shard}, document {one.document}, from token {one.first_token}"
        print_line(console, f"\n=== {place}: {one.tokens} tokens{cut} ===", "bold")
        console.print(shown(tokenizer, one.beginning, is_styled(console)))
