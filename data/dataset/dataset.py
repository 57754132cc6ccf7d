"""A prepared dataset wherever it is kept: a folder, a store far away read through a local cache, or a Megatron corpus.

Whoever reads rows sees the same: an index, shards that open by their line of it, and small files by name.
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
    AGAIN,
    HEADER_BYTES,
    HELD_OUT,
    INDEX,
    TOKENIZER,
    TRAIN,
    DatasetInfo,
    Shard,
    ShardInfo,
    fingerprint,
    open_shard,
    parse_index,
    read_index,
    unigram_nats,
    verify_shard,
)
from mikoshi.data.errors import DataError, reading
from mikoshi.data.io.cache import Wanted
from mikoshi.data.io.fetch import CacheLimits, Store, open_store
from mikoshi.data.tokenizer.special_tokens import AUTO, NONE
from mikoshi.data.tokenizer.tokenizer import load_tokenizer

_SAMPLED_TOKENS = 1 << 24


@dataclass(frozen=True)
class Dataset:
    """An open dataset. `place`: as the user named it; `shard` opens and `verify` reads one whole; `read` gives a small
    file's bytes and `mapped` those of a file of known size and digest (sha256 of all of it), or raise DataError or, where
    the same may work later, StorageError.

    `folder`: where more can be written beside the shards; None where it cannot. `ahead`: told what is wanted soon.
    """

    place: str
    info: DatasetInfo
    shard: Callable[[ShardInfo], Shard]
    verify: Callable[[ShardInfo], None]
    read: Callable[[str], bytes]
    mapped: Callable[[str, int, str], npt.NDArray[np.uint8]]
    folder: Path | None = None
    ahead: Callable[[Sequence[ShardInfo]], None] | None = None

    def shards(self, split: str) -> list[ShardInfo]:
        if split not in self.info.splits:
            raise DataError(f"data.path: {self.place} has no split {split!r}; it has {', '.join(self.info.splits)}")
        return self.info.splits[split]


def is_remote(place: str) -> bool:
    return "://" in place


def is_megatron(place: str) -> bool:
    """Whether the place names a Megatron corpus: a prefix that an .idx file has, or the file."""
    return not is_remote(place) and not Path(place).is_dir() and megatron.files(place)[1].exists()


def open_dataset(
    place: str, cache: CacheLimits, tokenizer: str | None = None, held_out: float = 0.01, marks: tuple[str, str] = ("", AUTO)
) -> Dataset:
    """Open the dataset at a folder, an URL (through the `cache`) or a Megatron prefix. The last needs the `tokenizer`
    that made it, and its last documents, `held_out` of its tokens, are its held-out split. `marks`: the tokens that end and
    begin its documents, where the user names them; nothing else tells of one that begins them.

    Raises DataError if there is none or if what the index lists is not there, StorageError if it cannot be told now.
    """
    if is_remote(place):
        return _far(place, cache)
    with reading(place, AGAIN):
        if is_megatron(place):
            return _megatron(place, tokenizer, held_out, *marks)
        return _near(Path(place))


def _near(folder: Path) -> Dataset:
    info = read_index(folder)
    _check_sizes(folder, [shard for split in info.splits.values() for shard in split])

    def read(name: str) -> bytes:
        with reading(folder / name, AGAIN):
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
    """One look at the folder finds what is missing or cut short, however many shards there are."""
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
    with reading(path, AGAIN), path.open("rb") as file:
        empty = not file.seek(0, 2)
        return np.frombuffer(b"" if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=np.uint8)


@lru_cache(maxsize=64)
def _store(place: str, limits: CacheLimits) -> Store:
    """One for a process and a place: its threads and its hold on the cache are kept."""
    return open_store(place, limits)


def _far(place: str, limits: CacheLimits) -> Dataset:
    store = _store(place, limits)
    info = parse_index(store.read(INDEX), f"{place.rstrip('/')}/{INDEX}")

    def wanted(shard: ShardInfo) -> Wanted:
        return Wanted(shard.file, shard.bytes, shard.sha256, HEADER_BYTES, lambda path: _check(path, shard))

    def opened(shard: ShardInfo) -> Shard:
        with store.fetch(wanted(shard)) as path:
            return open_shard(path, shard)

    def verify(shard: ShardInfo) -> None:
        with store.fetch(wanted(shard)) as path:
            verify_shard(path, shard)

    def mapped(name: str, size: int, digest: str) -> npt.NDArray[np.uint8]:
        with store.fetch(Wanted(name, size, digest, 0)) as path:
            return _map(path)

    return Dataset(
        place, info, opened, verify, store.read, mapped, None, lambda shards: store.ahead([wanted(s) for s in shards])
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
    size = megatron.files(place)[0].stat().st_size
    splits = {
        split: [ShardInfo(split, len(shard.tokens), len(shard.ends), size, digest)] for split, shard in parts.items()
    }  # fmt: skip
    sampled = [
        np.bincount(shard.tokens[:_SAMPLED_TOKENS], minlength=tokenizer.vocab).astype(np.int64) for shard in parts.values()
    ]
    info = DatasetInfo(
        fingerprint(tokenizer.digest, splits), "", tokenizer.digest, tokenizer.vocab, tokenizer.separator,
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
