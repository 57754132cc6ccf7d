"""Megatron's indexed datasets: `prefix.bin` is mapped in place as a shard, and shards are written as such a dataset.

`prefix.idx` has a header (magic, version 1, type of the ids, number of sequences, length of the list of documents), the length
of every sequence (int32), its first byte in the .bin (int64), the documents (int64: the first sequence of each, and at the end
the number of sequences) and, only in multimodal corpora, a mode per sequence (int8). `prefix.bin` holds the ids. Both are
little-endian. A prefix may be named with either suffix or with none.
"""

from __future__ import annotations

import hashlib
import mmap
import struct
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mikoshi.data.dataset.shards import Shard, Tokens
from mikoshi.data.errors import DataError, storage_error
from mikoshi.data.io.atomic import fsync_path, new_file, temporary_path

MAGIC = b"MMIDIDX\0\0"
_HEADER = struct.Struct("<9sQBQQ")
_TYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
_READABLE = {3: 2, 4: 4, 5: 8, 8: 2}  # bytes an id, of the types that ids come in
_CODES = {2: 8, 4: 4}  # what is written, by bytes a token
_CHUNK = 1 << 20
PAGE, PAGES = 4096, 64

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class MegatronIndex:
    """An open .idx; the arrays are views of the mapped file.

    lengths: of each sequence, in ids.
    pointers: first byte of each sequence in the .bin.
    documents: first sequence of each document.
    code: type of the ids.
    bytes: size of the .bin.
    """

    path: Path
    bin: Path
    code: int
    bytes: int
    lengths: npt.NDArray[np.int32]
    pointers: Ids
    documents: Ids

    @property
    def width(self) -> int:
        """Bytes an id in the .bin."""
        return _READABLE[self.code]


def corpus_files(prefix: Path | str) -> tuple[Path, Path]:
    """The .bin and the .idx of a prefix."""
    path = Path(prefix)
    stem = path.name.removesuffix(".bin").removesuffix(".idx")
    return path.with_name(f"{stem}.bin"), path.with_name(f"{stem}.idx")


def read_idx(prefix: Path | str) -> MegatronIndex:
    """Map the .idx and check that it is whole. Raises DataError if a file is missing, or if the .idx is not an index of ids
    of the length that its header says."""
    bin_path, path = corpus_files(prefix)
    try:
        size, ids = path.stat().st_size, bin_path.stat().st_size
        with path.open("rb") as file:
            head = file.read(_HEADER.size)
    except OSError as error:
        raise storage_error(error, f"{error.filename}: cannot read the Megatron corpus: {error.strerror}") from None
    if len(head) < _HEADER.size or not head.startswith(MAGIC):
        raise DataError(f"{path}: not a Megatron index (it does not begin with MMIDIDX); name the prefix of a .bin/.idx pair")
    _, version, code, sequences, listed = _HEADER.unpack(head)
    if version != 1:
        raise DataError(f"{path}: version {version} of Megatron's index is not 1; build the corpus again")
    if code not in _READABLE:
        kind = np.dtype(_TYPES[code]).name if code in _TYPES else "unknown"
        raise DataError(f"{path}: its ids are of type {code} ({kind}); token ids are uint16, int16, int32 or int64")
    whole = _HEADER.size + 12 * sequences + 8 * listed
    if size not in (whole, whole + sequences):
        raise DataError(f"{path}: the index has {size} bytes, its header says {whole}: truncated; copy or build it again")
    mapped = np.memmap(path, dtype=np.uint8, mode="r")
    if mapped[whole:].any():
        place = int(np.flatnonzero(mapped[whole:])[0])
        raise DataError(f"{path}: sequence {place} has mode {mapped[whole + place]}, so is no text; take it out of the corpus")
    after = _HEADER.size + 4 * sequences
    lengths, pointers = mapped[_HEADER.size : after].view("<i4"), mapped[after : after + 8 * sequences].view("<i8")
    return MegatronIndex(path, bin_path, code, ids, lengths, pointers, mapped[after + 8 * sequences : whole].view("<i8"))


def _check_sequences(index: MegatronIndex, in_order: bool) -> None:
    """Check that every sequence is inside the .bin and, with `in_order`, begins where the one before ends, up to the last
    byte."""
    reached = 0
    for start in range(0, len(index.lengths), _CHUNK):
        lengths = index.lengths[start : start + _CHUNK].astype(np.int64)
        pointers = index.pointers[start : start + _CHUNK]
        ends = reached + index.width * np.cumsum(lengths)
        bad = (lengths < 0) | (pointers < 0) | (pointers > index.bytes - index.width * lengths)
        if bad.any():
            at = int(np.argmax(bad))
            raise DataError(
                f"{index.bin}: has {index.bytes} bytes, but sequence {start + at} is {lengths[at]} ids of {index.width} bytes "
                f"at byte {pointers[at]}: truncated, or not the .bin of this .idx; copy or build it again"
            )
        apart = pointers != ends - index.width * lengths
        if in_order and apart.any():
            at = int(np.argmax(apart))
            raise DataError(
                f"{index.path}: sequence {start + at} is at byte {pointers[at]}, where the one before it ends at "
                f"{ends[at] - index.width * lengths[at]}: not in the order of the .bin; write it in order with "
                "`mikoshi data in-order`"
            )
        reached = int(ends[-1])
    if in_order and reached != index.bytes:
        raise DataError(
            f"{index.bin}: has {index.bytes} bytes, but the sequences of {index.path.name} add up to {reached}; "
            "copy or build both again"
        )


def _check_documents(index: MegatronIndex) -> None:
    """Check that the list of documents begins at sequence 0, ascends, and ends after the last sequence."""
    listed, sequences = index.documents, len(index.lengths)
    if len(listed) < 2 or listed[0] != 0 or listed[-1] != sequences:
        span = f"from {listed[0]} to {listed[-1]}" if len(listed) else "nowhere"
        raise DataError(f"{index.path}: its documents go {span}, its sequences from 0 to {sequences}; build the index again")
    for start in range(0, len(listed) - 1, _CHUNK):
        down = np.diff(listed[start : start + _CHUNK + 1]) < 0
        if down.any():
            at = start + int(np.argmax(down))
            raise DataError(
                f"{index.path}: document {at} goes from sequence {listed[at]} to {listed[at + 1]}; build the index again"
            )


def _ends(index: MegatronIndex) -> npt.NDArray[np.uint64]:
    """Exclusive end of every document that is not empty, in tokens."""
    ends = np.empty(len(index.documents) - 1, dtype=np.uint64)
    for start in range(0, len(ends), _CHUNK):
        after = index.documents[start + 1 : start + 1 + _CHUNK]
        inside = after < len(index.lengths)
        here = np.full(len(after), index.bytes, dtype=np.int64)
        here[inside] = index.pointers[after[inside]]
        ends[start : start + len(after)] = here // index.width
    return ends[np.diff(ends, prepend=np.uint64(0)) > 0]


def _mapped(index: MegatronIndex) -> npt.NDArray[Any]:
    with index.bin.open("rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=np.uint8)


def _ids(index: MegatronIndex) -> Tokens:
    """The .bin as unsigned ids. For int64 only the lower half is used; _check_ids verifies that the upper one is zero."""
    mapped = _mapped(index)
    return mapped.view("<u4")[::2] if index.width == 8 else mapped.view(f"<u{index.width}")


def _check_ids(index: MegatronIndex, raw: bytes | npt.NDArray[np.uint8], first: int, vocab: int | None) -> None:
    """Check that ids of the .bin, `raw` from byte `first` on, are valid for a model."""
    ids = np.frombuffer(raw, dtype=_TYPES[index.code], count=len(raw) // index.width)
    for bad, what, remedy in (
        (ids < 0, "is negative", "the corpus is damaged, or is no list of token ids"),
        (ids >= 1 << 31, "does not fit 31 bits", "the corpus is damaged, or is no list of token ids"),
        (
            ids >= (vocab or 1 << 31),
            f"is outside the vocabulary of {vocab}",
            "name the tokenizer that made the corpus",
        ),
    ):
        if bad.any():
            at = int(np.argmax(bad))
            raise DataError(f"{index.bin}: token {first // index.width + at} is {ids[at]}, which {what}; {remedy}")


def _sample(index: MegatronIndex, vocab: int | None) -> str:
    digest = hashlib.sha256()
    with index.path.open("rb") as file:
        digest.update(hashlib.file_digest(file, "sha256").digest())
    digest.update(index.bytes.to_bytes(8, "little"))
    count = -(-index.bytes // PAGE)
    pages = list(range(min(count, PAGES)))
    if count > PAGES:
        raw = hashlib.shake_256(digest.digest()).digest(8 * (PAGES - 2))
        drawn = (int.from_bytes(raw[i : i + 8], "little") % count for i in range(0, len(raw), 8))
        pages = sorted({0, count - 1, *drawn})
    with index.bin.open("rb") as file:
        for page in pages:
            file.seek(page * PAGE)
            raw = file.read(PAGE)
            _check_ids(index, raw, page * PAGE, vocab)
            digest.update(raw)
    return digest.hexdigest()


def open_megatron(prefix: Path | str, vocab: int | None = None, expected: str | None = None) -> Shard:
    """Map the corpus as one shard with Megatron's documents, whatever their sequences.

    `tokens` are a view of the .bin: uint16 as it is, int16 and int32 as unsigned, int64 by its lower half. `ends` take 8 bytes
    of memory a document and leave out empty documents. The index is read in full; of the ids only a sample is checked
    (verify_megatron reads all).

    Raises DataError if the files do not match or are truncated, if the .bin is not in the order of the .idx, if a sampled id is
    negative or not below `vocab`, or if the corpus's sampled_digest is not `expected`.
    """
    index = read_idx(prefix)
    if not index.bytes:
        raise DataError(f"{index.bin}: the corpus is empty")
    _check_sequences(index, in_order=True)
    _check_documents(index)
    sampled = _sample(index, vocab)
    if expected and sampled != expected:
        raise DataError(f"{index.bin}: not the corpus that this run began with; put that one back or begin a new run")
    return Shard(index.bin, _ids(index), _ends(index))


def sampled_digest(prefix: Path | str) -> str:
    """SHA-256 in hex of the whole .idx, the size of the .bin and 64 of its pages: the first, the last and 62 that the .idx
    determines. It identifies corpus and tokenization, but misses damage outside of these pages."""
    return _sample(read_idx(prefix), None)


def verify_megatron(prefix: Path | str, vocab: int | None = None, expected: str | None = None) -> str:
    """Read both files in full. Returns the SHA-256 in hex over the digests of .idx and .bin.

    Raises DataError as open_megatron does, for any id rather than a sampled one, and if the digest is not `expected`.
    """
    open_megatron(prefix, vocab)
    index = read_idx(prefix)
    inside = hashlib.sha256()
    with index.bin.open("rb") as file:
        for first in range(0, index.bytes, 8 * _CHUNK):
            raw = file.read(8 * _CHUNK)
            _check_ids(index, raw, first, vocab)
            inside.update(raw)
    digest = _whole_digest(index.path, inside.digest())
    if expected and digest != expected:
        raise DataError(f"{index.bin}: the corpus does not match its digest; copy it again from where it came")
    return digest


def _whole_digest(index: Path, inside: bytes) -> str:
    with index.open("rb") as file:
        return hashlib.sha256(hashlib.file_digest(file, "sha256").digest() + inside).hexdigest()


def rewrite_in_order(source: Path | str, target: Path | str) -> MegatronInfo:
    """Copy a corpus with its documents in the order of its .idx, which a corpus needs before it can be opened if its index
    alone was shuffled or deduplicated.

    Ids of more than two bytes become int32. Raises DataError as open_megatron does, except for the order, and as write_megatron
    does.
    """
    index = read_idx(source)
    _check_sequences(index, in_order=False)
    _check_documents(index)
    return write_megatron(target, _gathered(index), 2 if index.width == 2 else 4)


def _gathered(index: MegatronIndex) -> Iterator[Shard]:
    """The documents as small shards in memory, some mebibytes of ids each (or one document, if that is larger)."""
    if index.bytes == 0:
        return
    raw = _mapped(index)
    pieces: list[npt.NDArray[Any]] = []
    ends: list[int] = []
    size = 0
    for first, after in zip(index.documents[:-1].tolist(), index.documents[1:].tolist(), strict=True):
        for number in range(first, after):
            start = int(index.pointers[number])
            piece = raw[start : start + index.width * int(index.lengths[number])]
            _check_ids(index, piece, start, None)
            pieces.append(piece.view(_TYPES[index.code]))
            size += len(pieces[-1])
        ends.append(size)
        if size >= _CHUNK:
            yield _in_memory(index.bin, pieces, ends)
            pieces, ends, size = [], [], 0
    if ends:
        yield _in_memory(index.bin, pieces, ends)


def _in_memory(path: Path, pieces: list[npt.NDArray[Any]], ends: list[int]) -> Shard:
    ids: npt.NDArray[Any] = np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.uint16)
    return Shard(path, ids.astype(f"<u{min(ids.itemsize, 4)}"), np.array(ends, dtype=np.uint64))


@dataclass(frozen=True)
class MegatronInfo:
    """What was written, with the digest that verify_megatron returns."""

    prefix: Path
    documents: int
    tokens: int
    bytes: int
    digest: str


def write_megatron(prefix: Path | str, shards: Iterable[Shard], width: int) -> MegatronInfo:
    """Write the shards' documents as one corpus, one sequence a document: uint16 if `width` is 2, int32 if it is 4.

    Memory is bounded. Both files are built aside, flushed and renamed, the .bin first, so that an interrupted call leaves no
    .idx and thus no corpus; the next call cleans up.

    Raises DataError if there is an .idx already, if there is no token, if a shard has loss bits (Megatron's files cannot store
    them), if an id does not fit the type, or if a document has 2^31 tokens.
    """
    bin_path, idx_path = corpus_files(prefix)
    if idx_path.exists():
        raise DataError(f"{idx_path}: exists already; remove it or name another prefix")
    bin_path.parent.mkdir(parents=True, exist_ok=True)
    built, built_idx = temporary_path(bin_path), temporary_path(idx_path)
    lengths_path = temporary_path(bin_path.with_suffix(".lengths"))
    digest, documents, tokens = hashlib.sha256(), 0, 0
    with ExitStack() as stack:
        for path in (lengths_path, built, built_idx):
            stack.callback(_remove, path)
        out, spool = (stack.enter_context(new_file(path)) for path in (built, lengths_path))
        for shard in shards:
            if shard.learned is not None:
                raise DataError(f"{shard.path}: has tokens that are not predicted, which Megatron's files cannot say")
            for raw in _encoded(shard, width):
                digest.update(raw)
                out.write(raw)
            for lengths in _lengths(shard):
                spool.write(lengths.tobytes())
            documents += len(shard.ends)
            tokens += len(shard.tokens)
        out.flush()
        spool.flush()
        if not tokens:
            raise DataError(f"{bin_path}: there is not one token to write")
        _write_idx(built_idx, lengths_path, documents, width)
        written = _whole_digest(built_idx, digest.digest())
        if idx_path.exists():
            raise DataError(f"{idx_path}: another process has just written it; remove it or name another prefix")
        for path, target in ((built, bin_path), (built_idx, idx_path)):
            fsync_path(path)
            path.rename(target)
        fsync_path(idx_path.parent)
    return MegatronInfo(idx_path.with_suffix(""), documents, tokens, width * tokens, written)


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink()


def _encoded(shard: Shard, width: int) -> Iterator[bytes]:
    """The ids as Megatron stores them, some mebibytes at a time."""
    limit = 1 << 16 if width == 2 else 1 << 31
    for start in range(0, len(shard.tokens), _CHUNK):
        ids = shard.tokens[start : start + _CHUNK]
        if (ids >= limit).any():
            at = int(np.argmax(ids >= limit))
            kind = np.dtype(_TYPES[_CODES[width]]).name
            raise DataError(f"{shard.path}: token {start + at} is {ids[at]}, which {kind} does not hold; write 4 bytes a token")
        yield ids.astype(_TYPES[_CODES[width]]).tobytes()


def _lengths(shard: Shard) -> Iterator[npt.NDArray[np.int32]]:
    before = 0
    for start in range(0, len(shard.ends), _CHUNK):
        ends = shard.ends[start : start + _CHUNK].astype(np.int64)
        lengths = np.diff(ends, prepend=before)
        if (lengths >= 1 << 31).any():
            at = start + int(np.argmax(lengths))
            raise DataError(
                f"{shard.path}: document {at} has {lengths.max()} tokens, more than Megatron's index holds; split it"
            )
        yield lengths.astype("<i4")
        before = int(ends[-1])


def _write_idx(path: Path, spool: Path, documents: int, width: int) -> None:
    """The index of `documents` sequences whose lengths lie in `spool`, read some at a time."""
    if documents:
        lengths = np.memmap(spool, dtype="<i4", mode="r")
    with new_file(path) as out:
        out.write(_HEADER.pack(MAGIC, 1, _CODES[width], documents, documents + 1))
        for start in range(0, documents, _CHUNK):
            out.write(lengths[start : start + _CHUNK].tobytes())
        reached = 0
        for start in range(0, documents, _CHUNK):
            ends = reached + width * np.cumsum(lengths[start : start + _CHUNK], dtype="<i8")
            out.write(np.concatenate(([reached], ends[:-1])).astype("<i8").tobytes())
            reached = int(ends[-1])
        for start in range(0, documents + 1, _CHUNK):
            out.write(np.arange(start, min(start + _CHUNK, documents + 1), dtype="<i8").tobytes())
