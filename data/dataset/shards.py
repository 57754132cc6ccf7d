"""Token shards on disk: memory-mapped, self-describing, and refused if anything differs from what was written.

A shard is one file: a 64-byte header (magic, version, bytes a token, whether loss bits follow, counts, SHA-256 of the rest),
the tokens as little-endian uint16 or uint32, padding to 8 bytes, the end offset of every document as uint64, and, if some
tokens are not predicted (a prompt), one bit a token, set where it is predicted. A dataset is a folder of shards, a
tokenizer.json, and a dataset.json that lists them with their digests.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import struct
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mikoshi.data.errors import DataError, os_errors_named
from mikoshi.data.tokenizer.special_tokens import BoundaryTokens

MAGIC = b"MKSHARD\0"
VERSION = 2
_HEADER = struct.Struct("<8sIHHQQ32s")
HEADER_BYTES = _HEADER.size
INDEX = "dataset.json"
TOKENIZER = "tokenizer.json"
TRAIN, HELD_OUT = "train", "held_out"
PREPARE_AGAIN = "prepare the data again"

Tokens = npt.NDArray[np.uint16] | npt.NDArray[np.uint32] | npt.NDArray[np.int32]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class ShardInfo:
    """An entry of the dataset's index.

    bytes: size of the whole file.
    sha256: hex digest of everything after the header.
    """

    file: str
    tokens: int
    documents: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Shard:
    """An open shard; the arrays are views of the mapped file.

    tokens: ids of all documents.
    ends: exclusive end of every document, in tokens.
    learned: one bit a token, set where it is predicted, lowest bit first; None if all are.
    """

    path: Path
    tokens: Tokens
    ends: npt.NDArray[Any]
    learned: npt.NDArray[np.uint8] | None = None


def bytes_per_token(vocab: int) -> int:
    """Bytes of a stored token: 2 if all ids fit, else 4."""
    return 2 if vocab <= 1 << 16 else 4


def _sections(width: int, tokens: int, documents: int, flagged: int) -> tuple[int, int, int]:
    """Bytes of the token, document and loss-bit sections."""
    return -(-width * tokens // 8) * 8, 8 * documents, -(-tokens // 8) if flagged else 0


def write_shard(
    path: Path, documents: Iterable[npt.NDArray[Any]], width: int, learned: Iterable[Flags] | None = None
) -> ShardInfo:
    """Write documents as one shard.

    documents: arrays of ids, separator included.
    width: bytes a token.
    learned: for each document which of its tokens are predicted.
    """
    arrays = [np.asarray(d, dtype=f"<u{width}") for d in documents]
    ends = np.cumsum([len(a) for a in arrays], dtype="<u8")
    tokens = np.concatenate(arrays) if arrays else np.zeros(0, f"<u{width}")
    parts = [tokens.tobytes(), b"\0" * (-width * len(tokens) % 8), ends.tobytes()]
    if learned is not None:
        parts.append(np.packbits(np.concatenate(list(learned)), bitorder="little").tobytes())
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    header = _HEADER.pack(MAGIC, VERSION, width, learned is not None, len(tokens), len(arrays), digest.digest())
    with path.open("wb") as out:
        for part in (header, *parts):
            out.write(part)
    size = HEADER_BYTES + sum(map(len, parts))
    return ShardInfo(path.name, len(tokens), len(arrays), size, digest.hexdigest())


def open_shard(path: Path, expected: ShardInfo | None = None) -> Shard:
    """Map a shard.

    Raises DataError if it is missing, not a shard, not of the length that its header says, or not the one `expected`;
    StorageError if it cannot be read now. The digest is checked by verify_shard, which reads everything.
    """
    with os_errors_named(path, PREPARE_AGAIN, "cannot read the shard"), path.open("rb") as file:
        head = file.read(HEADER_BYTES)
        size = file.seek(0, 2)
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
    if len(head) < HEADER_BYTES or not head.startswith(MAGIC):
        raise DataError(f"{path}: not a token shard (no header); prepare the data again")
    _, version, width, flagged, tokens, documents, digest = _HEADER.unpack(head)
    if version != VERSION or width not in (2, 4):
        raise DataError(f"{path}: shard format version {version} is not {VERSION}; prepare the data again")
    sections = _sections(width, tokens, documents, flagged)
    whole = HEADER_BYTES + sum(sections)
    if size != whole:
        raise DataError(f"{path}: the shard has {size} bytes, its header says {whole}: truncated; prepare the data again")
    if expected and (tokens, documents, digest.hex()) != (expected.tokens, expected.documents, expected.sha256):
        raise DataError(f"{path}: not the shard that {INDEX} lists; prepare the data again")
    ids = np.frombuffer(mapped, dtype=f"<u{width}", count=tokens, offset=HEADER_BYTES)
    ends = np.frombuffer(mapped, dtype="<u8", count=documents, offset=HEADER_BYTES + sections[0])
    bits = np.frombuffer(mapped, dtype=np.uint8, offset=whole - sections[2]) if flagged else None
    return Shard(path, ids, ends, bits)


def verify_shard(path: Path, expected: ShardInfo | None = None) -> None:
    """Read the whole shard and compare its digest. Raises DataError if a bit differs."""
    open_shard(path, expected)
    with os_errors_named(path, PREPARE_AGAIN, "cannot read the shard"), path.open("rb") as file:
        digest = _HEADER.unpack(file.read(HEADER_BYTES))[-1]
        if hashlib.file_digest(file, "sha256").digest() != digest:
            raise DataError(f"{path}: the shard's bytes do not match its digest; prepare the data again")


@dataclass(frozen=True)
class DatasetInfo:
    """dataset.json: what is in the folder and what it was made from.

    fingerprint: covers tokenizer and shards; equal fingerprints mean equal tokens, as far as the shards are intact (`mikoshi
        prepare` verifies those that exist).
    recipe: digest of the recipe.
    tokenizer: its fingerprint.
    unigram_nats: held-out loss of a model that knows only the token frequencies of the training split.
    separator, bos, stops: the tokenizer's boundary tokens.
    """

    fingerprint: str
    recipe: str
    tokenizer: str
    vocab: int
    separator: int
    splits: dict[str, list[ShardInfo]]
    unigram_nats: float
    report: dict[str, Any]
    bos: int | None = None
    stops: tuple[int, ...] = ()

    @property
    def boundaries(self) -> BoundaryTokens:
        """The tokenizer's boundary tokens."""
        return BoundaryTokens(self.separator, self.bos, frozenset({self.separator, *self.stops}))

    def tokens(self, split: str) -> int:
        """The number of tokens in a split."""
        return sum(shard.tokens for shard in self.splits[split])


def unigram_nats(train: npt.NDArray[np.int64], held_out: npt.NDArray[np.int64]) -> float:
    """Cross-entropy in nats a token of the held-out split under the training split's token frequencies, each count plus one.

    train, held_out: counts of each id, [vocab].
    """
    p = (train + 1) / (train + 1).sum()
    return float(-(held_out * np.log(p)).sum() / held_out.sum())


def dataset_fingerprint(tokenizer: str, splits: dict[str, list[ShardInfo]]) -> str:
    """The fingerprint of a dataset, from that of its tokenizer and the digests of its shards."""
    shards = {name: [s.sha256 for s in infos] for name, infos in splits.items()}
    return hashlib.sha256(json.dumps([VERSION, tokenizer, shards], sort_keys=True).encode()).hexdigest()


def write_index(folder: Path, info: DatasetInfo) -> None:
    """Write dataset.json."""
    (folder / INDEX).write_text(json.dumps({"format": VERSION, **asdict(info)}, indent=1) + "\n")


def read_index(folder: Path) -> DatasetInfo:
    """Read and check a folder's dataset.json. Raises DataError if there is no dataset or the index is inconsistent."""
    path = folder / INDEX
    with os_errors_named(path, PREPARE_AGAIN):
        if not path.exists():
            raise DataError(f"data.path: no prepared dataset at {folder}; make it with `mikoshi prepare CONFIG`")
        content = path.read_bytes()
    return parse_index(content, str(path))


def parse_index(content: bytes, name: str) -> DatasetInfo:
    """Parse dataset.json, called `name` in messages. Raises DataError if it is inconsistent."""
    try:
        raw = json.loads(content)
        if raw.pop("format") != VERSION:
            raise DataError(f"{name}: made by another version of the format; prepare the data again")
        splits = {split: [ShardInfo(**s) for s in shards] for split, shards in raw.pop("splits").items()}
        info = DatasetInfo(splits=splits, stops=tuple(raw.pop("stops", ())), **raw)
        _check_types(info)
    except DataError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:  # the last: not JSON, or not UTF-8
        raise DataError(f"{name}: the index is damaged ({error}); prepare the data again") from None
    for shard in (s for shards in splits.values() for s in shards):
        if "/" in shard.file or shard.file.startswith("."):
            raise DataError(f"{name}: shard {shard.file!r} is not a name in this folder")
    if info.fingerprint != dataset_fingerprint(info.tokenizer, splits):
        raise DataError(f"{name}: the fingerprint does not match the shards listed; prepare the data again")
    return info


def _check_types(info: DatasetInfo) -> None:
    """Raises ValueError for what this version does not write."""
    texts, numbers = (info.fingerprint, info.recipe, info.tokenizer), (info.vocab, info.separator)
    shards = [shard for shards in info.splits.values() for shard in shards]
    counts = (n for shard in shards for n in (shard.tokens, shard.documents, shard.bytes))
    marks = (*(() if info.bos is None else (info.bos,)), *info.stops)
    if not all(type(n) is int and 0 <= n < info.vocab for n in (info.separator, *marks)):
        raise ValueError("a token that begins or ends documents is none of the vocabulary")
    if not all(isinstance(t, str) for t in (*texts, *(s.file for s in shards), *(s.sha256 for s in shards))):
        raise ValueError("a name or digest is no text")
    if not all(type(n) is int and 0 <= n < 1 << 62 for n in (*numbers, *counts)) or not 0 < info.vocab <= 1 << 32:
        raise ValueError("a count is no number, or out of range")
    if not isinstance(info.report, dict) or not isinstance(info.unigram_nats, (int, float)):
        raise ValueError("the report or the unigram figure is missing")
