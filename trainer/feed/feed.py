"""A run's data, from its config: the sources, the datasets, the order of samples, and this rank's loader of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np

from mikoshi.data.dataset.dataset import Dataset, is_megatron, is_remote, open_dataset
from mikoshi.data.dataset.rows import Batch, ColumnRanges, column_ranges
from mikoshi.data.dataset.shards import HELD_OUT, TOKENIZER, TRAIN
from mikoshi.data.dataset.split import Corpus, open_corpus
from mikoshi.data.errors import DataError
from mikoshi.data.io.cache import default_folder
from mikoshi.data.io.fetch import CacheLimits
from mikoshi.data.loader.lanes import Stream
from mikoshi.data.loader.loader import Loader, evaluation_batches
from mikoshi.data.loader.resume_state import DataResumePoint, Identity, TrainingLoader, first_digest, resume_from_record
from mikoshi.data.loader.stream import StreamLoader, check_whole_batches
from mikoshi.data.prepare.prepare import Recipe
from mikoshi.data.prepare.quality import Filters
from mikoshi.data.sampling.curriculum import MixtureHistory, MixtureRequest
from mikoshi.data.sampling.sampler import Skips, make_sampler, make_skips
from mikoshi.data.sources.text import SourceSpec
from mikoshi.data.tokenizer.special_tokens import AUTO
from mikoshi.data.tokenizer.tokenizer import Tokenizer, parse_tokenizer
from mikoshi.parallel.context import token_positions
from mikoshi.parallel.layout import Coordinates, Layout
from mikoshi.trainer.config.data import DataSection, MixedSection
from mikoshi.trainer.config.run import RunConfig
from mikoshi.trainer.errors import ConfigError
from mikoshi.trainer.feed.streamed import stream_fingerprint, streams

_SOURCE_KEYS = ("format", "template", "where", "chat", "chat_date", "messages", "prompt", "response", "on_invalid", "on_broken")


def sources(data: DataSection) -> dict[str, SourceSpec]:
    """What is to be read for each source, "" the name of a lone one; those of a mixture that have a path of their own are
    prepared already. Raises DataError where none is given."""
    if not data.mixture:
        if not data.source:
            raise DataError('data.source: missing; give a file or folder of text, or "python-stdlib"')
        return {"": _spec(data, data.source)}
    out = {}
    for name, mixed in data.mixture.items():
        if mixed.source:
            out[name] = _spec(data, mixed.source, mixed)
        elif not mixed.path:
            raise DataError(f"data.mixture.{name}.source: missing; give a file or folder of text, or its prepared data in path")
    return out


def _spec(data: DataSection, source: str, mixed: MixedSection | None = None) -> SourceSpec:
    def value(key: str) -> Any:
        own = None if mixed is None else getattr(mixed, key)
        return getattr(data, key) if own is None else own

    return SourceSpec(source=source, column=value("text_column"), **{key: value(key) for key in _SOURCE_KEYS})


def recipes(data: DataSection) -> dict[str, Recipe]:
    """How each source is prepared. Raises DataError for settings that cannot be."""
    filters = Filters(**data.filters.model_dump(exclude={"deduplicate"}))
    return {
        name: Recipe(
            spec, data.tokenizer, data.tokenizer_vocab, data.held_out, filters=filters,
            deduplicate=data.filters.deduplicate, max_invalid=data.max_invalid, separator=data.separator, bos=data.bos,
        )
        for name, spec in sources(data).items()
    }  # fmt: skip


def dataset_locations(data: DataSection) -> dict[str, str]:
    """Folder or URL of each source's prepared dataset."""
    if not data.mixture:
        return {"": data.path}
    root = data.path.rstrip("/")
    return {name: mixed.path or f"{root}/{name}" for name, mixed in data.mixture.items()}


def cache_limits(config: RunConfig) -> CacheLimits:
    """Where shards of a distant dataset are kept on this node."""
    cache = config.data.cache
    folder = default_folder() if cache.folder is None else cache.folder.expanduser().absolute()
    return CacheLimits(folder, cache.bytes, user=config.run.name, private=cache.folder is None)


def datasets(config: RunConfig, names: Collection[str] | None = None) -> dict[str, Dataset]:
    """The prepared dataset of each source, or of those of these `names`, open. Raises DataError if one is not there, or not
    like the others."""
    data = config.data
    limits = cache_limits(config)
    marks = data.separator, data.bos
    chosen = {name: place for name, place in dataset_locations(data).items() if names is None or name in names}
    found = {name: open_dataset(place, limits, data.tokenizer, data.held_out, marks) for name, place in chosen.items()}
    (first_name, first), *others = found.items()
    for name, other in others:
        if not _one_tokenizer(other, first):
            raise DataError(
                f"data.mixture.{name}: {other.place} was made by another tokenizer than {first.place} ({first_name}): prepare "
                "both with one data.tokenizer, data.separator and data.bos"
            )
    return found


def _one_tokenizer(one: Dataset, other: Dataset) -> bool:
    """Whether one tokenizer made both; of a Megatron corpus it is not known how its documents begin and end."""
    if one.info.tokenizer == other.info.tokenizer:
        return True
    loose = is_megatron(one.place) or is_megatron(other.place)
    return loose and tokenizer_of(one).digest == tokenizer_of(other).digest


def tokenizer_of(dataset: Dataset) -> Tokenizer:
    """The tokenizer that made a dataset. Raises DataError if the file beside it is another."""
    info = dataset.info
    tokenizer = parse_tokenizer(dataset.read(TOKENIZER), f"{dataset.place}/{TOKENIZER}", info.boundaries)
    expected = tokenizer.digest if is_megatron(dataset.place) else tokenizer.fingerprint
    if (expected, tokenizer.vocab) != (info.tokenizer, info.vocab):
        raise DataError(f"{dataset.place}/{TOKENIZER}: not the tokenizer that made the data; prepare the data again")
    return replace(tokenizer, fingerprint=info.tokenizer)


def check_boundary_tokens(data: DataSection, tokenizer: Tokenizer, place: str) -> None:
    """Raises ConfigError where the config names other separator or BOS tokens than the data was prepared with."""
    name = tokenizer.backend.id_to_token
    begin, end = "none" if tokenizer.bos is None else name(tokenizer.bos), name(tokenizer.separator)
    for key, wanted, has in (("separator", data.separator or end, end), ("bos", data.bos, begin)):
        if wanted not in (has, AUTO if key == "bos" else has):
            raise ConfigError(
                f"data.{key} = {wanted!r}: the data at {place} was prepared with {has!r}: leave the key out, or prepare the "
                "data anew elsewhere"
            )


def requested_mixture(config: RunConfig, corpora: Mapping[str, Corpus]) -> MixtureRequest:
    """The mixture that the config requests, in samples."""
    data, context = config.data, config.train.context
    if not data.mixture:
        return MixtureRequest(((0, {"": 1.0}),), {"": None})
    starts = {0, *(-(-tokens // context) for mixed in data.mixture.values() for tokens, _ in mixed.schedule)}
    stages = []
    for start in sorted(starts):
        weights = {}
        for name, mixed in data.mixture.items():
            passed = [weight for tokens, weight in mixed.schedule if -(-tokens // context) <= start]
            weights[name] = passed[-1] if passed else mixed.weight
        stages.append((start, weights))
    caps = {
        name: None if mixed.epochs is None else int(mixed.epochs * corpora[name].samples)
        for name, mixed in data.mixture.items()
    }
    return MixtureRequest(tuple(stages), caps)


@dataclass(frozen=True)
class Feed:
    """The data of a run, open: rows of the sources' shards, or `streams` of the sources themselves in `lanes`.
    `identity`: what may not change in the run. `skipped`: positions left out."""

    config: RunConfig
    datasets: dict[str, Dataset]
    train: dict[str, Corpus]
    held_out: dict[str, Corpus]
    tokenizer: Tokenizer
    identity: Identity
    mixture: MixtureRequest
    skipped: Skips
    streams: tuple[Stream, ...] = ()
    lanes: int = 0

    @property
    def description(self) -> str:
        """How much there is to train on."""
        if self.streams:
            size = sum(stream.selection.source.bytes for stream in self.streams)
            now = ", by today's rules for conversations, unlike what was read before" if self._earlier else ""
            return f"{size / 1e6:,.1f} MB of raw text in {self.lanes} lanes{now}"
        return f"{sum(corpus.info.tokens(TRAIN) for corpus in self.train.values()):,} training tokens"

    @property
    def _earlier(self) -> bool:
        """Whether a source is known as an earlier version told it."""
        known, now = cast(dict[str, str], self.identity["sources"]), recipes(self.config.data)
        return any(known[s.name] != stream_fingerprint(now[s.name], s.selection.source) for s in self.streams)

    @property
    def distant(self) -> bool:
        """Whether some of it is fetched from another machine while the run goes on."""
        raw = [spec.source for spec in sources(self.config.data).values()] if self.streams else []
        return any(is_remote(place) or place.startswith("hub:") for place in [*(d.place for d in self.datasets.values()), *raw])

    @property
    def unigram_nats(self) -> float:
        """Held-out loss of a model that knows only token frequencies, the mean of the sources' by their first weights."""
        weights = self.mixture.stages[0][1]
        weighted = sum(w * self.datasets[name].info.unigram_nats for name, w in weights.items())
        return weighted / sum(weights.values())

    def weights(self, continued: DataResumePoint, step: int) -> dict[str, float]:
        """The sources' weights in the mixture at a step."""
        position = int(self.skipped.positions(np.array([step * self.config.train.global_batch]))[0])
        return {name: float(weight) for name, weight in continued.history.weights(position).items()}

    def continued(self, record: Mapping[str, Any] | None) -> DataResumePoint:
        """How the run goes on from a checkpoint's record of its data. Raises DataError if it cannot."""
        accept = self.config.data.on_change == "accept"
        continued = resume_from_record(record, self.identity, self.mixture, self.skipped.spans, accept)
        check_steps(self, continued.history)
        return continued

    def loader(self, layout: Layout, here: Coordinates, continued: DataResumePoint) -> TrainingLoader:
        """This rank's loader, at the beginning of the run. Its sources are numbered as the run's history has them, whatever
        their order in the config."""
        config = self.config
        starts = self.skipped.positions(
            np.array([step * config.train.global_batch for step, _ in config.data.warmup], dtype=np.int64)
        )
        warmup = tuple((start, tokens) for start, (_, tokens) in zip(starts.tolist(), config.data.warmup, strict=True))
        if self.streams:
            named = {stream.name: stream for stream in self.streams}
            streams_now = tuple(named[name] for name in continued.history.names if name in named)
            return StreamLoader(
                streams_now, continued.history, self.skipped, self.lanes, config.train.context, config.train.global_batch,
                here.data, layout.data_ranks, config.data.document_mask, context_columns(config, layout, here), warmup,
                config.data.max_invalid,
            )  # fmt: skip
        course = make_sampler(
            tuple(self.train[name] for name in continued.history.names if name in self.train), continued.history,
            config.run.seed, config.data.shuffle_window, self.skipped, warmup,
        )  # fmt: skip
        loader = Loader(
            course, config.train.global_batch, here.data, layout.data_ranks, config.data.document_mask,
            context_columns(config, layout, here),
        )  # fmt: skip
        loader.resume_at(0, first_digest(self.identity))
        return loader

    def evaluation(self, layout: Layout, here: Coordinates) -> dict[str, Iterator[Batch]]:
        """This rank's rows of the held-out text of every source, and their columns."""
        config = self.config
        return {
            name: evaluation_batches(
                corpus, config.train.global_batch, config.eval.batches, here.data, layout.data_ranks,
                config.data.document_mask, context_columns(config, layout, here),
            )
            for name, corpus in self.held_out.items()
        }  # fmt: skip


def context_columns(config: RunConfig, layout: Layout, here: Coordinates) -> ColumnRanges | None:
    """The columns of every row that this rank holds under context parallelism; None for all."""
    if layout.cp == 1:
        return None
    return column_ranges(token_positions(here.cp, layout.cp, config.train.context, layout.context_kind))


def open_feed(config: RunConfig) -> Feed:
    """Open a run's prepared data. Raises DataError if it is not there, not whole or too little for one row."""
    data, context = config.data, config.train.context
    found = datasets(config)
    tokenizer = tokenizer_of(next(iter(found.values())))
    check_boundary_tokens(data, tokenizer, data.path)
    left_out = make_skips(data.skip)
    if data.stream:
        check_whole_batches(left_out, config.train.global_batch)
        made, prints, lanes = streams(config, recipes(data), tokenizer, {name: d.info.recipe for name, d in found.items()})
        train = {}
    else:
        made, lanes = (), 0
        train = {name: open_corpus(d, TRAIN, context, data.packing, name) for name, d in found.items()}
        prints = {name: d.info.fingerprint for name, d in found.items()}
    held_out = {name: open_corpus(d, HELD_OUT, context, data.packing, name) for name, d in found.items()}
    identity: Identity = {
        "run.seed": config.run.seed,
        "train.context": context,
        "data.packing": data.packing,
        "data.document_mask": data.document_mask,
        "data.shuffle_window": data.shuffle_window,
        "data.tokenizer": tokenizer.fingerprint,
        "data.warmup": [list(w) for w in data.warmup],
        "data.lanes": lanes,
        "sources": prints,
    }
    return Feed(config, found, train, held_out, tokenizer, identity, requested_mixture(config, train), left_out, made, lanes)


def check_steps(feed: Feed, history: MixtureHistory) -> None:
    """Raises ConfigError where the sources give too few samples for the steps."""
    config, end = feed.config, history.end
    wanted = config.train.steps * config.train.global_batch
    last = int(feed.skipped.positions(np.array([max(0, wanted - 1)]))[0])
    if last >= end:
        steps = (end - (last + 1 - wanted)) // config.train.global_batch
        caps = ", ".join(f"{name} {mixed.epochs:g}" for name, mixed in config.data.mixture.items() if mixed.epochs)
        raise ConfigError(
            f"train.steps = {config.train.steps}: the sources' epochs ({caps}) are enough for {steps} steps: lower it, or "
            "raise data.mixture.NAME.epochs"
        )


def check_cache(feed: Feed) -> None:
    """Raises ConfigError where the shards that are shuffled together, those of all sources, are more than the cache holds."""
    window, cache = feed.config.data.shuffle_window, feed.config.data.cache.bytes
    far = [corpus for corpus in feed.train.values() if is_remote(corpus.dataset.place)]
    sizes = [size for c in far for size in sorted((s.bytes for s in c.shards), reverse=True)[: window or None]]
    if sum(sizes) > cache:
        names = ", ".join(corpus.dataset.place for corpus in far)
        raise ConfigError(
            f"data.shuffle_window = {window}: {len(sizes)} shards of {names}, {sum(sizes)} bytes, are shuffled together, and "
            f"data.cache.bytes is {cache}: they would be fetched over and over: set a window of fewer shards, or raise "
            "data.cache.bytes"
        )
