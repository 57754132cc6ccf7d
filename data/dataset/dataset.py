"""A prepared dataset wherever it is: a folder, a remote store read through a local cache, or a Megatron corpus.

Readers see the same in all cases: an index, shards that open by their entry in it, and small files by name.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mikoshi.data.dataset import megatron
from mikoshi.data.dataset.shards import (
    HEADER_BYTES,
    HELD_OUT,
    INDEX,
    PREPARE_AGAIN,
    TOKENIZER,
    TRAIN,
    DatasetInfo,
    Shard,
    ShardInfo,
    dataset_fingerprint,
    open_shard,
    parse_index,
    read_index,
    unigram_nats,
    verify_shard,
)
from mikoshi.data.errors import DataError, os_errors_named
from mikoshi.data.io.cache import IndexedFile
from mikoshi.data.io.fetch import CacheLimits, Store, open_store
from mikoshi.data.tokenizer.special_tokens import AUTO, NONE
from mikoshi.data.tokenizer.tokenizer import load_tokenizer

_SAMPLED_TOKENS = 1 << 24


@dataclass(frozen=True)
class Dataset:
    """An open dataset.

    place: as the user named it.
    shard: opens a shard.
    verify: reads a shard in full and checks it.
    read: gives the bytes of a small file.
    mapped: gives the bytes of a file of known size and SHA-256.
    folder: where files can be added beside the shards; None if they cannot.
    prefetch: takes the shards that will be needed soon; None if they are local.

    The functions raise DataError, or StorageError if the same may succeed later.
    """

    place: str
    info: DatasetInfo
    shard: Callable[[ShardInfo], Shard]
    verify: Callable[[ShardInfo], None]
    read: Callable[[str], bytes]
    mapped: Callable[[str, int, str], npt.NDArray[np.uint8]]
    folder: Path | None = None
    prefetch: Callable[[Sequence[ShardInfo]], None] | None = None

    def shards(self, split: str) -> list[ShardInfo]:
        """The shards of a split. Raises DataError if there is no such split."""
        if split not in self.info.splits:
            raise DataError(f"data.path: {self.place} has no split {split!r}; it has {', '.join(self.info.splits)}")
        return self.info.splits[split]


def is_remote(place: str) -> bool:
    """Whether the place is an URL."""
    return "://" in place


def is_megatron(place: str) -> bool:
    """Whether the place names a Megatron corpus: its prefix, or one of its files."""
    return not is_remote(place) and not Path(place).is_dir() and megatron.corpus_files(place)[1].exists()


def open_dataset(
    place: str, cache: CacheLimits, tokenizer: str | None = None, held_out: float = 0.01, marks: tuple[str, str] = ("", AUTO)
) -> Dataset:
    """Open the dataset at a folder, an URL (through the `cache`) or a Megatron prefix.

    tokenizer: the one that made a Megatron corpus; required there.
    held_out: share of a Megatron corpus's tokens, in its last documents, that is its held-out split.
    marks: names of the tokens that end and begin documents, if the user gives them. Nothing else tells which token begins the
        documents of a Megatron corpus.

    Raises DataError if there is no dataset or its files are missing, StorageError if that cannot be determined now.
    """
    if is_remote(place):
        return _open_remote(place, cache)
    with os_errors_named(place, PREPARE_AGAIN):
        if is_megatron(place):
            return _megatron(place, tokenizer, held_out, *marks)
        return _open_folder(Path(place))


def _open_folder(folder: Path) -> Dataset:
    info = read_index(folder)
    _check_sizes(folder, [shard for split in info.splits.values() for shard in split])

    def read(name: str) -> bytes:
        with os_errors_named(folder / name, PREPARE_AGAIN):
            return (folder / name).read_bytes()

    def mapped(name: str, size: int, _digest: str) -> npt.NDArray[np.uint8]:
        found = _map(folder / name)
        if len(found) != size:
            raise DataError(f"{folder / name}: has {len(found)} bytes, {size} are listed; prepare the data again")
        return found

    return Dataset(
        str(folder), info, lambda shard: open_shard(folder / shard.file, shard),
        lambda shard: verify_shard(folder / shard.file, shard), read, mapped, folder,
    )  # fmt: skip


def _check_sizes(folder: Path, shards: Sequence[ShardInfo]) -> None:
    """Raises DataError for missing or truncated shards, with one listing of the folder however many shards there are."""
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    for shard in shards:
        if shard.file not in sizes:
            raise DataError(f"{folder / shard.file}: cannot read the shard: no such file; prepare the data again")
        if sizes[shard.file] != shard.bytes:
            raise DataError(
                f"{folder / shard.file}: the shard has {sizes[shard.file]} bytes, {shard.bytes} are listed: truncated or "
                "altered; prepare the data again"
            )


def _map(path: Path) -> npt.NDArray[np.uint8]:
    with os_errors_named(path, PREPARE_AGAIN), path.open("rb") as file:
        empty = not file.seek(0, 2)
        return np.frombuffer(b"" if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=np.uint8)


@lru_cache(maxsize=64)
def _store(place: str, limits: CacheLimits) -> Store:
    """One store per process and place, so that its threads and its cache stay open."""
    return open_store(place, limits)


def _open_remote(place: str, limits: CacheLimits) -> Dataset:
    store = _store(place, limits)
    info = parse_index(store.read(INDEX), f"{place.rstrip('/')}/{INDEX}")

    def indexed(shard: ShardInfo) -> IndexedFile:
        return IndexedFile(shard.file, shard.bytes, shard.sha256, HEADER_BYTES, lambda path: _check(path, shard))

    def opened(shard: ShardInfo) -> Shard:
        with store.fetch(indexed(shard)) as path:
            return open_shard(path, shard)

    def verify(shard: ShardInfo) -> None:
        with store.fetch(indexed(shard)) as path:
            verify_shard(path, shard)

    def mapped(name: str, size: int, digest: str) -> npt.NDArray[np.uint8]:
        with store.fetch(IndexedFile(name, size, digest, 0)) as path:
            return _map(path)

    return Dataset(
        place, info, opened, verify, store.read, mapped, None, lambda shards: store.prefetch([indexed(s) for s in shards])
    )


def _check(path: Path, shard: ShardInfo) -> None:
    open_shard(path, shard)


def _megatron(place: str, tokenizer_name: str | None, held_out: float, separator: str, bos: str) -> Dataset:
    if tokenizer_name is None:
        raise DataError(f"data.tokenizer: missing: {place} is a Megatron corpus: name the tokenizer that made it")
    tokenizer = load_tokenizer(tokenizer_name, separator=separator, bos=NONE if bos == AUTO else bos)
    whole = megatron.open_megatron(place, tokenizer.vocab)
    digest = megatron.sampled_digest(place)
    cut = min(len(whole.ends) - 1, max(1, int(np.searchsorted(whole.ends, int(len(whole.tokens) * (1 - held_out))))))
    if len(whole.ends) < 2:
        raise DataError(f"{place}: the corpus has one document, and one more is needed to hold out: add it to the corpus")
    at = int(whole.ends[cut - 1])
    parts = {
        TRAIN: Shard(whole.path, whole.tokens[:at], whole.ends[:cut]),
        HELD_OUT: Shard(whole.path, whole.tokens[at:], whole.ends[cut:] - at),
    }
    size = megatron.corpus_files(place)[0].stat().st_size
    splits = {
        split: [ShardInfo(split, len(shard.tokens), len(shard.ends), size, digest)] for split, shard in parts.items()
    }  # fmt: skip
    sampled = [
        np.bincount(shard.tokens[:_SAMPLED_TOKENS], minlength=tokenizer.vocab).astype(np.int64) for shard in parts.values()
    ]
    info = DatasetInfo(
        dataset_fingerprint(tokenizer.digest, splits), "", tokenizer.digest, tokenizer.vocab, tokenizer.separator,
        splits, unigram_nats(*sampled), {"source": place, "format": "megatron"}, tokenizer.bos, tuple(sorted(tokenizer.stops)),
    )  # fmt: skip

    def read(name: str) -> bytes:
        if name != TOKENIZER:
            raise DataError(f"{place}: a Megatron corpus has no {name}")
        return tokenizer.backend.to_str().encode()

    def mapped(name: str, _size: int, _digest: str) -> npt.NDArray[np.uint8]:
        raise DataError(f"{place}: a Megatron corpus has no {name}")

    return Dataset(
        place, info, lambda shard: replace(parts[shard.file]), lambda _: _verify_megatron(place, tokenizer.vocab), read, mapped
    )


def _verify_megatron(place: str, vocab: int) -> None:
    megatron.verify_megatron(place, vocab)
