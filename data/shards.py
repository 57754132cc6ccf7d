"""Token shards on disk: memory-mapped, self-describing, refused when anything about them is not as written.

A shard is one file: a 64-byte header (magic, version, bytes a token, counts, SHA-256 of what follows), the tokens as
little-endian uint16 or uint32, padding to 8 bytes, and the end offset of every document as uint64. A dataset is a
folder of shards, a tokenizer.json and a dataset.json that lists them with their digests.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data.errors import DataError

MAGIC = b"MKSHARD\0"
VERSION = 1
_HEADER = struct.Struct("<8sIIQQ32s")
INDEX = "dataset.json"
TOKENIZER = "tokenizer.json"

Tokens = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]


@dataclass(frozen=True)
class ShardInfo:
    """One line of the dataset's index."""

    file: str
    tokens: int
    documents: int
    sha256: str


@dataclass(frozen=True)
class Shard:
    """An open shard: `tokens` and `ends` (exclusive end of every document, in tokens) are views of the mapped file."""

    path: Path
    tokens: Tokens
    ends: npt.NDArray[np.uint64]


def token_bytes(vocab: int) -> int:
    return 2 if vocab <= 1 << 16 else 4


def _body_size(width: int, tokens: int, documents: int) -> int:
    return -(-width * tokens // 8) * 8 + 8 * documents


def write_shard(path: Path, documents: Iterable[npt.NDArray[Any]], width: int) -> ShardInfo:
    """Write documents (arrays of ids, separator included) as one shard with `width` bytes a token."""
    arrays = [np.asarray(d, dtype=f"<u{width}") for d in documents]
    ends = np.cumsum([len(a) for a in arrays], dtype="<u8")
    tokens = np.concatenate(arrays)
    body = tokens.tobytes()
    body += b"\0" * (-len(body) % 8) + ends.tobytes()
    digest = hashlib.sha256(body)
    header = _HEADER.pack(MAGIC, VERSION, width, len(tokens), len(arrays), digest.digest())
    with path.open("wb") as out:
        out.write(header)
        out.write(body)
    return ShardInfo(path.name, len(tokens), len(arrays), digest.hexdigest())


def open_shard(path: Path, expected: ShardInfo | None = None) -> Shard:
    """Map a shard. Raises DataError if it is missing, not a shard, of another length than its header says, or not
    the one `expected`. Digests of the bytes are checked by verify_shard, which reads everything."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(_HEADER.size)
    except OSError as error:
        raise DataError(f"{path}: cannot read the shard: {error.strerror}; prepare the data again") from None
    if len(head) < _HEADER.size or not head.startswith(MAGIC):
        raise DataError(f"{path}: not a token shard (no header); prepare the data again")
    _, version, width, tokens, documents, digest = _HEADER.unpack(head)
    if version != VERSION or width not in (2, 4):
        raise DataError(f"{path}: shard format version {version} is not {VERSION}; prepare the data again")
    whole = _HEADER.size + _body_size(width, tokens, documents)
    if size != whole:
        raise DataError(f"{path}: the shard has {size} bytes, its header says {whole}: truncated; prepare the data again")
    if expected and (tokens, documents, digest.hex()) != (expected.tokens, expected.documents, expected.sha256):
        raise DataError(f"{path}: not the shard that {INDEX} lists; prepare the data again")
    mapped = np.memmap(path, dtype=np.uint8, mode="r", offset=_HEADER.size)
    ids = mapped[: tokens * width].view(f"<u{width}")
    return Shard(path, ids, mapped[whole - _HEADER.size - 8 * documents :].view("<u8"))


def verify_shard(path: Path) -> None:
    """Read the whole shard and compare its digest. Raises DataError if a single bit differs."""
    open_shard(path)
    with path.open("rb") as file:
        digest = _HEADER.unpack(file.read(_HEADER.size))[-1]
        if hashlib.file_digest(file, "sha256").digest() != digest:
            raise DataError(f"{path}: the shard's bytes do not match its digest; prepare the data again")


@dataclass(frozen=True)
class DatasetInfo:
    """dataset.json: what is in the folder and what it was made from.

    `fingerprint` covers tokenizer and shards: equal fingerprints mean equal tokens, as far as the shards are intact
    (`mikoshi prepare` verifies those that are there). `unigram_nats` is the loss that a model knowing only token
    frequencies (of the training split) has on the held-out split.
    """

    fingerprint: str
    recipe: str
    tokenizer: str
    vocab: int
    separator: int
    splits: dict[str, list[ShardInfo]]
    unigram_nats: float
    report: dict[str, Any]

    def tokens(self, split: str) -> int:
        return sum(shard.tokens for shard in self.splits[split])


def fingerprint(tokenizer: str, splits: dict[str, list[ShardInfo]]) -> str:
    shards = {name: [s.sha256 for s in infos] for name, infos in splits.items()}
    return hashlib.sha256(json.dumps([VERSION, tokenizer, shards], sort_keys=True).encode()).hexdigest()


def write_index(folder: Path, info: DatasetInfo) -> None:
    (folder / INDEX).write_text(json.dumps({"format": VERSION, **asdict(info)}, indent=1) + "\n")


def read_index(folder: Path) -> DatasetInfo:
    """Read and check dataset.json. Raises DataError if there is no dataset or its index does not hold together."""
    path = folder / INDEX
    if not path.exists():
        raise DataError(f"data.path: no prepared dataset at {folder}; make it with `mikoshi prepare CONFIG`")
    try:
        raw = json.loads(path.read_text())
        if raw.pop("format") != VERSION:
            raise DataError(f"{path}: made by another version of the format; prepare the data again")
        splits = {name: [ShardInfo(**s) for s in shards] for name, shards in raw.pop("splits").items()}
        info = DatasetInfo(splits=splits, **raw)
    except DataError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:  # the last: not JSON, or not UTF-8
        raise DataError(f"{path}: the index is damaged ({error}); prepare the data again") from None
    for shard in (s for shards in splits.values() for s in shards):
        if Path(shard.file).name != shard.file:
            raise DataError(f"{path}: shard {shard.file!r} is not a name in this folder")
    if info.fingerprint != fingerprint(info.tokenizer, splits):
        raise DataError(f"{path}: the fingerprint does not match the shards listed; prepare the data again")
    return info
