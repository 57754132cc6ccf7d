"""Trains on raw sources without preparation: holds out some documents beforehand and streams the rest.

The dataset folder of such a run holds the tokenizer and as many held-out documents of every source as evaluation needs,
found by reading from the source's beginning. It is made once; sources whose files have changed since are refused.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from mikoshi.data.dataset.dataset import is_megatron, is_remote
from mikoshi.data.dataset.shards import (
    HELD_OUT,
    INDEX,
    TOKENIZER,
    TRAIN,
    DatasetInfo,
    bytes_per_token,
    dataset_fingerprint,
    read_index,
    unigram_nats,
    write_index,
    write_shard,
)
from mikoshi.data.errors import DataError
from mikoshi.data.io.atomic import commit_folder, locked_folder, write_file
from mikoshi.data.io.progress import ProgressCallback, no_progress
from mikoshi.data.loader.lanes import PIECE_BYTES, Stream
from mikoshi.data.prepare.piece import Selection, Tally, encode_documents, is_held_out, text_digest, usable_documents
from mikoshi.data.prepare.prepare import Recipe, train_shared_tokenizer
from mikoshi.data.sources.contents import SOURCES, contents_of, read_contents
from mikoshi.data.sources.sources import Source, open_source, pieces
from mikoshi.data.tokenizer.special_tokens import AUTO
from mikoshi.data.tokenizer.tokenizer import Tokenizer, load_tokenizer, parse_tokenizer
from mikoshi.trainer.config.run import RunConfig
from mikoshi.trainer.errors import ConfigError

_MOST_LANES = 64
_COUNTED_TOKENS = 1 << 20
"""Training tokens from which their frequencies are told."""
_PATIENCE = 600.0


def stream_fingerprint(recipe: Recipe, source: Source, before: bool = False) -> str:
    """Changes when a setting of a source, or a name or size of its files does. `before`: as earlier versions told it."""
    plain: dict[str, Any] = {
        "files": source.describe(before),
        # Not on_invalid nor on_broken: where an error becomes a document left out, what was read before stays what it was.
        "spec": {**recipe.spec.identity(), "on_invalid": ""},
        "filters": asdict(recipe.filters),
        "held_out": recipe.held_out,
    }
    if recipe.separator or recipe.bos != AUTO:
        plain["marks"] = [recipe.separator, recipe.bos]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def hold_out(
    config: RunConfig, recipes: dict[str, Recipe], places: dict[str, str], show: ProgressCallback = no_progress
) -> None:
    """Create the folders of tokenizer and held-out text of a streaming run, where they are missing.

    Raises ConfigError or DataError for sources that cannot be used, or that differ from those that a folder was made from.
    """
    if any(recipe.deduplicate for recipe in recipes.values()):
        raise ConfigError("data.filters.deduplicate needs all documents beforehand: prepare the data, or set it to false")
    for place in places.values():
        if is_remote(place) or is_megatron(place):
            raise ConfigError(
                f"data.path = {place!r}: a stream keeps its tokenizer and held-out text in a folder of its own: give one"
            )
    wanted = config.eval.batches * config.train.global_batch * config.train.context + 1
    sources = {name: open_source(recipe.spec) for name, recipe in recipes.items()}

    named = config.data.tokenizer
    given = load_tokenizer(named).digest if named and Path(named).is_file() else None

    def missing() -> list[str]:
        return [name for name in recipes if not _is_complete(Path(places[name]), recipes[name], sources[name], wanted, given)]

    if not missing():
        return
    with locked_folder(Path(config.data.path), _PATIENCE) as (built, _):  # one rank of a node makes it, the others wait
        left = missing()
        tokenizer = _tokenizer_for(recipes, [Path(place) for place in places.values() if (Path(place) / INDEX).exists()], show)
        for name in left:
            made, folder = built / "dataset", Path(places[name])
            shutil.rmtree(made, ignore_errors=True)
            made.mkdir()
            _hold_out(made, recipes[name], sources[name], tokenizer, wanted)
            folder.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(folder, ignore_errors=True)  # one of too little held-out text
            commit_folder(folder, made)
        shutil.rmtree(built, ignore_errors=True)


def _tokenizer_for(recipes: dict[str, Recipe], made: list[Path], show: ProgressCallback) -> Tokenizer:
    """The tokenizer that is named, else that of a folder that was `made` before, else one trained on all. One that is named and
    made a folder goes on as it is there, unless other marks are asked for."""
    first = next(iter(recipes.values()))
    named = None if first.tokenizer is None else first.load_tokenizer()
    if not made:
        return named or train_shared_tokenizer(recipes, show)
    saved = _saved_tokenizer(made[0])
    asked = first.separator or first.bos != AUTO
    return saved if named is None or (named.digest == saved.digest and not asked) else named


def _saved_tokenizer(folder: Path) -> Tokenizer:
    return parse_tokenizer((folder / TOKENIZER).read_bytes(), str(folder / TOKENIZER), read_index(folder).boundaries)


def _is_complete(folder: Path, recipe: Recipe, source: Source, wanted: int, tokenizer: str | None) -> bool:
    """Whether the folder holds what the run needs. `tokenizer`: the digest of the one that the user names."""
    if not folder.exists():
        return False
    if not (folder / INDEX).exists():
        raise DataError(f"data.path: {folder} exists and is not a dataset: give another path")
    info = read_index(folder)
    if "stream" not in info.report:
        raise DataError(
            f"data.path: {folder} is prepared data: set data.stream = false to train on it, or give the stream another path"
        )
    if info.recipe not in (stream_fingerprint(recipe, source), stream_fingerprint(recipe, source, before=True)):
        raise DataError(
            f"data.path: {folder} was set apart for a stream of other files or settings: a run goes on with those that it was "
            "begun with alone: put them back, or begin another run with another data.path"
        )
    if tokenizer is not None and tokenizer != _saved_tokenizer(folder).digest:
        raise DataError(
            f"data.tokenizer: {folder} was set apart with another tokenizer, or its file has changed since: put it back, or "
            "begin another run with another data.path"
        )
    before = read_contents(folder / SOURCES)
    now = contents_of(source.files, before, sampled=True)
    if before is not None and (name := now.first_difference(before)):
        raise DataError(
            f"data.path: {folder} was set apart for a stream of other files: {name} has changed since: put it back, or begin "
            "another run with another data.path"
        )
    if now != before:
        with suppress(OSError):  # where it cannot be written the files are read again the next time
            write_file(folder / SOURCES, now.to_json())
    return info.tokens(HELD_OUT) >= wanted or bool(info.report["exhausted"])


def _hold_out(made: Path, recipe: Recipe, source: Source, tokenizer: Tokenizer, wanted: int) -> None:
    selection, documents, count = _selection(recipe, source, tokenizer), list[Any](), 0
    counts = {split: np.zeros(tokenizer.vocab, np.int64) for split in (TRAIN, HELD_OUT)}
    tally, exhausted = Tally(), True
    before = contents_of(source.files, None, sampled=True)
    for document in chain.from_iterable(usable_documents(selection, piece, tally) for piece in pieces(source, PIECE_BYTES)):
        side = HELD_OUT if is_held_out(text_digest(document.split_key), recipe.held_out) else TRAIN
        if side == TRAIN and counts[TRAIN].sum() >= _COUNTED_TOKENS:
            continue
        ((ids, learned),) = encode_documents(tokenizer, [document])
        counts[side] += np.bincount(ids, minlength=tokenizer.vocab)
        if side == HELD_OUT:
            documents.append((ids, np.ones(len(ids), bool) if learned is None else learned))
            count += len(ids)
        if count >= wanted and counts[TRAIN].sum():
            exhausted = False
            break
    if not count or not counts[TRAIN].sum():
        raise DataError(
            f"data.source: no document of {recipe.spec.source!r} {'is held out' if counts[TRAIN].sum() else 'can be used'} "
            f"({tally.invalid} cannot be read, {tally.empty} empty): give more text, or change data.held_out"
        )
    flags = [flags for _, flags in documents]
    prompts = None if all(f.all() for f in flags) else flags
    shard = write_shard(
        made / f"{HELD_OUT}-00000.shard", [ids for ids, _ in documents], bytes_per_token(tokenizer.vocab), prompts
    )
    splits = {TRAIN: [], HELD_OUT: [shard]}
    tokenizer.save(made / TOKENIZER)
    write_file(made / SOURCES, before.to_json())
    write_index(made, DatasetInfo(
        dataset_fingerprint(tokenizer.fingerprint, splits), stream_fingerprint(recipe, source), tokenizer.fingerprint,
        tokenizer.vocab, tokenizer.separator, splits, unigram_nats(counts[TRAIN], counts[HELD_OUT]),
        {"source": recipe.spec.source, "stream": True, "exhausted": exhausted, "files": source.report},
        tokenizer.bos, tuple(sorted(tokenizer.stops)),
    ))  # fmt: skip


def _selection(recipe: Recipe, source: Source, tokenizer: Tokenizer) -> Selection:
    specials = tokenizer.special_tokens if source.chat is not None else frozenset()
    return Selection(source, recipe.filters, specials, -1)  # how many may be left out is asked of all lanes together


def streams(
    config: RunConfig, recipes: dict[str, Recipe], tokenizer: Tokenizer, made: Mapping[str, str]
) -> tuple[tuple[Stream, ...], dict[str, str], int]:
    """The streams of a run's sources, the sources' fingerprints, and the number of lanes. `made`: the fingerprints by which
    their folders were set apart, which stay where an earlier version told them so."""
    batch = config.train.global_batch
    lanes = config.data.lanes or max(n for n in range(1, min(_MOST_LANES, batch) + 1) if batch % n == 0)
    out, prints = [], {}
    for name, recipe in recipes.items():
        source = open_source(recipe.spec)
        earlier = made[name] == stream_fingerprint(recipe, source, before=True)
        prints[name] = made[name] if earlier else stream_fingerprint(recipe, source)
        target = min(PIECE_BYTES, max(1 << 12, source.bytes // (4 * _MOST_LANES)))
        parts = pieces(source, target)
        selection = _selection(recipe, source, tokenizer)
        shares = -(-lanes // len(parts))  # what comes in fewer pieces than there are lanes is shared out document by document
        out.append(Stream(name, selection, parts, shares, tokenizer, recipe.held_out, config.run.seed))
    return tuple(out), prints, lanes
