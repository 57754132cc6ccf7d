"""One piece of a source, worked on alone: the same files whoever does it, whenever, and however often it was begun before.

A piece is finished when its record stands in the working folder: it is written last, in one step. Nothing is forced to disk
before the dataset is whole; instead, what an earlier process finished is read again before it is relied on.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from mikoshi.data.dataset.shards import HELD_OUT, TOKENIZER, TRAIN, ShardInfo, token_bytes, verify_shard, write_shard
from mikoshi.data.errors import DataError
from mikoshi.data.io.atomic import write_file
from mikoshi.data.prepare.pool import Tell
from mikoshi.data.prepare.quality import Filters, count_hashes, doubles, why_dropped, write_hashes
from mikoshi.data.sources.sources import Document, Part, Piece, Source, documents
from mikoshi.data.tokenizer.special_tokens import Marks
from mikoshi.data.tokenizer.tokenizer import Tokenizer, parse_tokenizer

SPLITS = (TRAIN, HELD_OUT)
_BATCH_CHARACTERS = 1 << 20
_KINDS = 100  # of problems told apart; what comes after counts as "others"
_NAMES = 20

Ids = npt.NDArray[Any]
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Selection:
    """Which documents of a source are used. `specials`: the tokenizer's special tokens, which no message of a conversation
    may hold. `most_invalid`: how many unreadable documents a piece may have (-1: any number)."""

    source: Source
    filters: Filters
    specials: frozenset[str]
    most_invalid: int


@dataclass(frozen=True)
class Work:
    """What is the same for all pieces, and where in the working folder a piece's files are. `tokenizer`: the fingerprint of
    the one that is there, and `marks` what it is told of documents."""

    folder: Path
    selection: Selection
    tokenizer: str
    held_out: float
    shard_tokens: int
    deduplicate: bool
    marks: Marks

    def record(self, piece: int) -> Path:
        return self.folder / "records" / f"{piece:05d}.json"

    def counts(self, piece: int) -> Path:
        return self.folder / "records" / f"{piece:05d}.npz"

    def hashes(self, piece: int) -> Path:
        return self.folder / "hashes" / f"{piece:05d}"

    def doubles(self, piece: int) -> Path:
        return self.folder / "doubles" / f"{piece:05d}"

    def part(self, name: str) -> Path:
        return self.folder / "parts" / name


@dataclass(frozen=True)
class Job:
    """A piece, and how it is called in messages."""

    piece: Piece
    name: str

    def __str__(self) -> str:
        return self.name


@dataclass
class Tally:
    """What became of the documents. `bytes`: of their text in UTF-8; `lengths[n]`: documents of 2**n tokens up to twice
    that; `dropped` and `problems` count by reason, `names` says the first problems in full, `broken` those of files that break
    off."""

    documents: int = 0
    bytes: int = 0
    empty: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    problems: Counter[str] = field(default_factory=Counter)
    names: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    lengths: list[int] = field(default_factory=lambda: [0] * 48)
    shards: dict[str, list[ShardInfo]] = field(default_factory=lambda: {split: [] for split in SPLITS})

    @property
    def invalid(self) -> int:
        return sum(self.problems.values())

    def problem(self, document: Document) -> None:
        kind = document.problem.partition(":")[0]
        self.problems[kind if kind in self.problems or len(self.problems) < _KINDS else "others"] += document.count
        for names in (self.names, *((self.broken,) if document.broken else ())):
            if len(names) < _NAMES:
                names.append(f"{document.name}: {document.problem}")

    def add(self, other: Tally) -> None:
        """Take in the tally of the piece that comes next."""
        self.documents, self.bytes = self.documents + other.documents, self.bytes + other.bytes
        self.empty += other.empty
        self.dropped += other.dropped
        for kind, count in other.problems.items():
            self.problems[kind if kind in self.problems or len(self.problems) < _KINDS else "others"] += count
        self.names += other.names[: _NAMES - len(self.names)]
        self.broken += other.broken[: _NAMES - len(self.broken)]
        self.lengths = [a + b for a, b in zip(self.lengths, other.lengths, strict=True)]
        for split in SPLITS:
            self.shards[split] = self.shards[split] + other.shards[split]


def finished(work: Work, piece: int) -> Tally | None:
    """The tally of a piece that was finished, every byte of it read again; None if it was not, or is damaged."""
    try:
        raw = json.loads(work.record(piece).read_bytes())
        shards = {split: [ShardInfo(**info) for info in raw["shards"][split]] for split in SPLITS}
        for info in (info for split in SPLITS for info in shards[split]):
            verify_shard(work.part(info.file), info)
        read_counts(work, piece)
    except (FileNotFoundError, ValueError, KeyError, TypeError, BadZipFile):
        return None
    return Tally(**raw | {"shards": shards, "dropped": Counter(raw["dropped"]), "problems": Counter(raw["problems"])})


def read_counts(work: Work, piece: int) -> Counts:
    """How often each token stands in each split of a finished piece, [2, vocab]."""
    counts: Counts = np.load(work.counts(piece))["counts"]
    return counts


def usable(selection: Selection, piece: Piece, tally: Tally) -> Iterator[Document]:
    """The documents of a piece that have text and pass the filters, in order; what becomes of the others is counted.

    Raises DataError for an unreadable one under on_invalid = "error", and where they are more than may be.
    """
    for document in documents(selection.source, piece, selection.specials):
        if document.dropped:
            tally.dropped[document.problem] += 1
        elif document.text is None:
            tally.problem(document)
            check_invalid(selection.most_invalid, tally)
        elif not document.text:
            tally.empty += 1
        elif reason := why_dropped(document.text, selection.filters):
            tally.dropped[reason] += 1
        else:
            yield document


def check_invalid(most: int, tally: Tally) -> None:
    """Raises DataError when more documents than `most` could not be read (-1: any number may be)."""
    if 0 <= most < tally.invalid:
        kinds = ", ".join(f"{count} {kind!r}" for kind, count in tally.problems.most_common(5))
        raise DataError(
            f"data.max_invalid: {tally.invalid} documents cannot be used, more than {most} ({kinds}): "
            + "; ".join(tally.names[:3])
        )


def digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def is_held_out(head: bytes, share: float) -> bool:
    """Decided by the text's digest alone: a copy of a document never stands on the other side."""
    return int.from_bytes(head[:8], "little") < share * 2**64


def hash_piece(work: Work, job: Job, tell: Tell) -> int:
    """Write down the digests of a piece's usable documents; returns their number."""
    heads = bytearray()
    waiting = 0
    for document in usable(work.selection, job.piece, Tally()):
        assert document.text is not None
        heads += digest(document.text)[:16]
        waiting += len(document.text)
        if waiting >= _BATCH_CHARACTERS:
            tell(waiting, 0)
            waiting = 0
    return write_hashes(work.hashes(job.piece.number), bytes(heads))


def tokenize_piece(work: Work, job: Job, tell: Tell) -> Tally:
    """Write a piece's shards, token counts and record; returns the record."""
    number = job.piece.number
    tokenizer = _tokenizer(work.folder / TOKENIZER, work.tokenizer, work.marks)
    tally = Tally()
    writers = {split: _PartWriter(work, f"{split}-{number:05d}", token_bytes(tokenizer.vocab)) for split in SPLITS}
    counts = np.zeros((len(SPLITS), tokenizer.vocab), dtype=np.int64)
    for batch in _batches(_unique(work, number, usable(work.selection, job.piece, tally), tally)):
        if not tally.documents:
            _check_tokenizer(tokenizer, batch, job)
        sizes = []
        held: tuple[list[Ids], list[Ids]] = ([], [])
        for document, (ids, learned) in zip(batch, encode(tokenizer, batch), strict=True):
            assert document.text is not None
            text = document.text.encode()
            side = int(is_held_out(digest(document.side), work.held_out))
            writers[SPLITS[side]].add(ids, learned)
            held[side].append(ids)
            sizes.append(len(ids))
            tally.bytes += len(text)
        tally.documents += len(batch)
        for bucket, documents_in in enumerate(np.bincount(np.log2(sizes).astype(np.int64)).tolist()):
            tally.lengths[bucket] += documents_in
        for side in (0, 1):
            counts[side] += np.bincount(np.concatenate(held[side] or [np.zeros(0, np.int64)]), minlength=tokenizer.vocab)
        tell(sum(len(document.text or "") for document in batch), sum(sizes))
    tally.shards = {split: writer.close() for split, writer in writers.items()}
    packed = io.BytesIO()
    np.savez_compressed(packed, counts=counts)
    write_file(work.counts(number), packed.getvalue(), durable=False)
    plain = vars(tally) | {"shards": {split: [asdict(info) for info in infos] for split, infos in tally.shards.items()}}
    write_file(work.record(number), json.dumps(plain).encode(), durable=False)
    return tally


@functools.lru_cache(1)
def _tokenizer(path: Path, wanted: str, marks: Marks) -> Tokenizer:
    tokenizer = parse_tokenizer(path.read_bytes(), str(path), marks)
    if tokenizer.fingerprint != wanted:
        raise DataError(f"{path}: the tokenizer was changed by someone else while it was in use; begin anew")
    return tokenizer


def _unique(work: Work, number: int, stream: Iterator[Document], tally: Tally) -> Iterator[Document]:
    """Leave out what hash_piece and find_doubles found to be said before. The counting is theirs: usable documents."""
    if not work.deduplicate:
        yield from stream
        return
    known = count_hashes(work.hashes(number))
    again = set(doubles(work.doubles(number)).tolist())
    place = -1
    for place, document in enumerate(stream):
        if place in again:
            tally.dropped["duplicate"] += 1
        else:
            yield document
    if place + 1 != known:
        raise DataError(f"data.source: piece {number} has {place + 1} documents, and had {known} when it was first read")


def encode(tokenizer: Tokenizer, batch: list[Document]) -> Iterator[tuple[Ids, Ids | None]]:
    """Ids of every document, the separator after them, and where there are parts, which of them are learned. The separator is
    where a learned answer ends the document, unless the template ends that with a special token, at which generation stops:
    then what is learned is what the template writes, and the separator keeps documents apart. Plain text begins with the
    tokenizer's bos, if it has one; parts are all that a template writes."""
    plain = iter(tokenizer.encode_arrays([document.text for document in batch if document.text and not document.parts]))
    begin = np.array([] if tokenizer.bos is None else [tokenizer.bos], dtype=np.uint32)
    for document in batch:
        learned = None
        if document.parts:
            found, flags = tokenizer.encode_parts(document.parts)
            ends = _learns_end(tokenizer, document.parts, found)
            ids, learned = np.array(found, dtype=np.uint32), np.array([*flags, ends], dtype=bool)
        else:
            ids = np.concatenate((begin, next(plain))) if len(begin) else next(plain)
        if len(ids) and ids.max() >= tokenizer.vocab:
            raise DataError(
                f"{document.name}: the tokenizer gives id {ids.max()}, beyond its vocabulary of {tokenizer.vocab}: "
                "give another data.tokenizer"
            )
        yield np.append(ids, np.uint32(tokenizer.separator)), learned


def _learns_end(tokenizer: Tokenizer, parts: tuple[Part, ...], ids: list[int]) -> bool:
    """Whether the separator after a document of these parts and ids is learned."""
    said = [part for part in parts if part.text.strip()]
    if not said or not said[-1].learned:
        return False
    last = next((i for i in reversed(ids) if tokenizer.decode([i]).strip()), None)
    if last is None or last in tokenizer.stops:
        return False
    # What is learned on its own behind the end of a turn leads on to the separator: a line end, in the built-in template.
    leads_on = parts[-1].learned and not parts[-1].text.strip()
    return leads_on or tokenizer.backend.id_to_token(last) not in tokenizer.special_tokens


def _check_tokenizer(tokenizer: Tokenizer, batch: list[Document], job: Job) -> None:
    """What the fast backend finds is compared with what defines the tokenizer, on a little of every piece."""
    if not tokenizer.agrees([(document.text or "")[:1024] for document in batch[:8]]):
        raise DataError(
            f"data.tokenizer: {tokenizer.backend_name} and `tokenizers` give other ids in {job}: other versions of the two "
            "packages may agree; please report it"
        )


def _batches(stream: Iterator[Document]) -> Iterator[list[Document]]:
    """Runs of documents of about _BATCH_CHARACTERS together: bounded in memory, and progress is seen."""
    batch: list[Document] = []
    size = 0
    for document in stream:
        batch.append(document)
        size += len(document.text or "")
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _PartWriter:
    """Cuts a piece's documents of one split into shards of `shard_tokens` tokens or little more (the last may be shorter)."""

    def __init__(self, work: Work, name: str, width: int) -> None:
        self.work, self.name, self.width = work, name, width
        self.flags = work.selection.source.chat is not None
        self.ids: list[Ids] = []
        self.learned: list[Ids] = []
        self.size = 0  # tokens waiting
        self.shards: list[ShardInfo] = []

    def add(self, ids: Ids, learned: Ids | None) -> None:
        if self.size >= self.work.shard_tokens:
            self._flush()
        self.ids.append(ids.astype(f"<u{self.width}"))
        if self.flags:
            self.learned.append(np.ones(len(ids), dtype=bool) if learned is None else learned)
        self.size += len(ids)

    def _flush(self) -> None:
        path = self.work.part(f"{self.name}-{len(self.shards):03d}")
        self.shards.append(write_shard(path, self.ids, self.width, self.learned if self.flags else None))
        self.ids, self.learned, self.size = [], [], 0

    def close(self) -> list[ShardInfo]:
        if self.ids:
            self._flush()
        return self.shards
