"""Text to token shards: read, split off the held-out part, tokenize on all cores, write, and only then exist."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from data.atomic import whole_folder
from data.errors import DataError
from data.shards import (
    INDEX,
    TOKENIZER,
    DatasetInfo,
    ShardInfo,
    fingerprint,
    read_index,
    token_bytes,
    verify_shard,
    write_index,
    write_shard,
)
from data.sources import Document, Source, documents, open_source
from data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

TRAIN, HELD_OUT = "train", "held_out"
_BATCH_BYTES = 8 << 20
_TRAINING_BYTES = 64 << 20


@dataclass(frozen=True)
class Recipe:
    """What a dataset is made from. `tokenizer`: a tokenizer.json, or None to train one with `vocab` tokens on the text."""

    source: str
    column: str = "text"
    tokenizer: Path | None = None
    vocab: int = 8192
    held_out: float = 0.01
    on_invalid: Literal["error", "skip"] = "error"
    shard_tokens: int = 1 << 26


@dataclass
class Progress:
    """How far it is, handed to the caller's `show` after every batch."""

    phase: str
    total_bytes: int
    done_bytes: int = 0
    tokens: int = 0
    started: float = field(default_factory=time.monotonic)


Show = Callable[[Progress], None]


def recipe_digest(recipe: Recipe, source: Source) -> str:
    """Changes when a setting or a source file's name or size does."""
    plain = {**asdict(recipe), "tokenizer": None, "files": source.describe()}
    if recipe.tokenizer is not None:
        plain["tokenizer"] = load_tokenizer(recipe.tokenizer).fingerprint
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def prepare(recipe: Recipe, folder: Path, show: Show = lambda _: None) -> tuple[DatasetInfo, bool]:
    """Make the dataset at `folder`; if it is there already from the same recipe, only verify it (second value False).

    Raises DataError for input that cannot be used or a folder that holds another dataset. Whatever goes wrong,
    nothing half-made is left at `folder`.
    """
    source = open_source(recipe.source, recipe.column)
    digest = recipe_digest(recipe, source)
    if folder.exists():
        if not (folder / INDEX).exists():
            raise DataError(f"data.path: {folder} exists and is not a prepared dataset: give another path")
        if read_index(folder).recipe != digest:
            raise DataError(
                f"data.path: {folder} holds data made from another source or settings: remove it or give another path"
            )
        info = read_index(folder)
        for shard in (s for shards in info.splits.values() for s in shards):
            verify_shard(folder / shard.file)
        return info, False
    try:
        with whole_folder(folder) as partial:
            info = _build(recipe, source, digest, partial, show)
    except OSError as error:
        raise DataError(f"data.path: cannot write {folder}: {error.strerror or error}; nothing was left behind") from error
    return info, True


def _build(recipe: Recipe, source: Source, digest: str, folder: Path, show: Show) -> DatasetInfo:
    tokenizer = _tokenizer(recipe, source, show)
    tokenizer.save(folder / TOKENIZER)
    width = token_bytes(tokenizer.vocab)
    writers = {name: _SplitWriter(folder, name, width, recipe.shard_tokens) for name in (TRAIN, HELD_OUT)}
    counts = {name: np.zeros(tokenizer.vocab, dtype=np.int64) for name in writers}
    report: dict[str, Any] = {"documents": 0, "bytes": 0, "empty": 0, "skipped": 0, "skipped_names": []}
    progress = Progress("tokenizing", source.bytes)
    for batch in _batches(documents(source, recipe.on_invalid)):
        kept = [d.text for d in batch if d.text]
        report["empty"] += sum(d.text == "" for d in batch)
        bad = [d for d in batch if d.text is None]
        report["skipped"] += len(bad)
        report["skipped_names"] += [f"{d.name}: {d.problem}" for d in bad[: 20 - len(report["skipped_names"])]]
        for text, ids in zip(kept, tokenizer.encode_batch(kept), strict=True):
            split = HELD_OUT if _held_out(text, recipe.held_out) else TRAIN
            array = np.array([*ids, tokenizer.separator], dtype=f"<u{width}")
            writers[split].add(array)
            counts[split] += np.bincount(array, minlength=tokenizer.vocab)
            progress.tokens += len(array)
        size = sum(len(text.encode()) for text in kept)
        progress.done_bytes += size
        report["bytes"] += size
        report["documents"] += len(kept)
        show(progress)
    if not (writers[HELD_OUT].size or writers[HELD_OUT].shards):
        tail = writers[TRAIN].cut_tail(recipe.held_out)
        writers[HELD_OUT].add(tail)
        moved = np.bincount(tail, minlength=tokenizer.vocab)
        counts[TRAIN], counts[HELD_OUT] = counts[TRAIN] - moved, counts[HELD_OUT] + moved
    if not report["documents"]:
        why = report["skipped_names"][0] if report["skipped"] else "it is empty"
        counts_told = f"{report['skipped']} skipped, {report['empty']} empty"
        raise DataError(f"data.source: no document of {recipe.source!r} could be used ({counts_told}): {why}")
    splits = {name: writer.close() for name, writer in writers.items()}
    for name, shards in splits.items():
        if not sum(shard.tokens for shard in shards):
            raise DataError(
                f"data.source: no document of {recipe.source!r} fell in the {name} split "
                f"({report['documents']} read, {report['skipped']} skipped, {report['empty']} empty): "
                "give more text, or change data.held_out"
            )
    info = DatasetInfo(
        fingerprint=fingerprint(tokenizer.fingerprint, splits),
        recipe=digest,
        tokenizer=tokenizer.fingerprint,
        vocab=tokenizer.vocab,
        separator=tokenizer.separator,
        splits=splits,
        unigram_nats=unigram_nats(counts[TRAIN], counts[HELD_OUT]),
        report={**report, "source": recipe.source},
    )
    write_index(folder, info)
    return info


def unigram_nats(train: npt.NDArray[np.int64], held_out: npt.NDArray[np.int64]) -> float:
    """Held-out cross-entropy, nats a token, of the training split's token frequencies (each count plus one)."""
    p = (train + 1) / (train + 1).sum()
    return float(-(held_out * np.log(p)).sum() / held_out.sum())


def _tokenizer(recipe: Recipe, source: Source, show: Show) -> Tokenizer:
    if recipe.tokenizer is not None:
        return load_tokenizer(recipe.tokenizer)
    progress = Progress("training the tokenizer", min(source.bytes, _TRAINING_BYTES))

    def texts() -> Iterator[str]:
        for document in documents(source, recipe.on_invalid):
            if not document.text or _held_out(document.text, recipe.held_out):
                continue
            if progress.done_bytes >= _TRAINING_BYTES:
                return
            progress.done_bytes += len(document.text.encode())
            show(progress)
            yield document.text

    return train_tokenizer(texts(), recipe.vocab)


def _held_out(text: str, share: float) -> bool:
    """Decided by the text alone: a copy of a document never stands on the other side."""
    head = hashlib.sha256(text.encode()).digest()[:8]
    return int.from_bytes(head, "little") < share * 2**64


def _batches(stream: Iterator[Document]) -> Iterator[list[Document]]:
    """Runs of documents of about _BATCH_BYTES together: enough for all cores, bounded in memory."""
    batch: list[Document] = []
    size = 0
    for document in stream:
        batch.append(document)
        size += len(document.text or "")
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _SplitWriter:
    """Cuts a stream of documents into numbered shards of at least `shard_tokens` tokens (the last may be shorter)."""

    def __init__(self, folder: Path, split: str, width: int, shard_tokens: int) -> None:
        self.folder, self.split, self.width, self.shard_tokens = folder, split, width, shard_tokens
        self.waiting: list[npt.NDArray[Any]] = []
        self.size = 0  # tokens waiting
        self.shards: list[ShardInfo] = []

    def add(self, document: npt.NDArray[Any]) -> None:
        if self.size >= self.shard_tokens:  # not sooner: the last document must still be here for cut_tail
            self.flush()
        self.waiting.append(document)
        self.size += len(document)

    def flush(self) -> None:
        name = f"{self.split}-{len(self.shards):05d}.shard"
        self.shards.append(write_shard(self.folder / name, self.waiting, self.width))
        self.waiting, self.size = [], 0

    def cut_tail(self, share: float) -> npt.NDArray[Any]:
        """Take the last `share` of the waiting tokens out of the last document: for a text too short in documents
        for any of them to have been held out, such as one long file."""
        if not self.waiting:
            return np.zeros(0, dtype=f"<u{self.width}")
        last = self.waiting.pop()
        keep = max(0, len(last) - int(np.ceil(self.size * share)))
        self.size -= len(last) - keep
        if keep:
            self.waiting.append(last[:keep])
        return last[keep:]

    def close(self) -> list[ShardInfo]:
        if self.waiting:
            self.flush()
        return self.shards
