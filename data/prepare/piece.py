"""One piece of a source, processed alone: its files are the same whichever process makes them, however often it was begun
before.

A piece is finished once its record is in the working folder, which is written last and in one step. Nothing is flushed to disk
before the dataset is whole; instead, what an earlier process finished is verified before it is used.
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

from mikoshi.data.dataset.shards import HELD_OUT, TOKENIZER, TRAIN, ShardInfo, bytes_per_token, verify_shard, write_shard
from mikoshi.data.errors import DataError
from mikoshi.data.io.atomic import write_file
from mikoshi.data.prepare.pool import Report
from mikoshi.data.prepare.quality import Filters, count_hashes, read_duplicates, why_dropped, write_hashes
from mikoshi.data.sources.sources import Document, Part, Piece, Source, documents
from mikoshi.data.tokenizer.special_tokens import BoundaryTokens
from mikoshi.data.tokenizer.tokenizer import Tokenizer, parse_tokenizer

SPLITS = (TRAIN, HELD_OUT)
_BATCH_CHARACTERS = 1 << 20
_KINDS = 100  # of problems told apart; what comes after counts as "others"
_NAMES = 20

Ids = npt.NDArray[Any]
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Selection:
    """Which documents of a source are used.

    specials: the tokenizer's special tokens, which no message of a conversation may contain.
    most_invalid: how many unreadable documents a piece may have (-1: any number).
    """

    source: Source
    filters: Filters
    specials: frozenset[str]
    most_invalid: int


@dataclass(frozen=True)
class PieceContext:
    """What all pieces share, and where the files of a piece are in the working folder.

    tokenizer: fingerprint of the tokenizer there.
    boundaries: its boundary tokens.
    """

    folder: Path
    selection: Selection
    tokenizer: str
    held_out: float
    shard_tokens: int
    deduplicate: bool
    boundaries: BoundaryTokens

    def record(self, piece: int) -> Path:
        """The record of a finished piece."""
        return self.folder / "records" / f"{piece:05d}.json"

    def counts(self, piece: int) -> Path:
        """The token counts of a piece."""
        return self.folder / "records" / f"{piece:05d}.npz"

    def hashes(self, piece: int) -> Path:
        """The digests of a piece's documents."""
        return self.folder / "hashes" / f"{piece:05d}"

    def doubles(self, piece: int) -> Path:
        """The numbers of a piece's duplicate documents."""
        return self.folder / "doubles" / f"{piece:05d}"

    def part(self, name: str) -> Path:
        """A shard of a piece."""
        return self.folder / "parts" / name


@dataclass(frozen=True)
class Job:
    """A piece, and its name in messages."""

    piece: Piece
    name: str

    def __str__(self) -> str:
        return self.name


@dataclass
class Tally:
    """What became of the documents.

    bytes: of their text in UTF-8.
    lengths: lengths[n] counts documents of 2**n to 2**(n+1) - 1 tokens.
    dropped, problems: counts by reason.
    names: the first problems in full.
    broken: the first problems of files that break off.
    """

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
        """The number of unreadable documents."""
        return sum(self.problems.values())

    def problem(self, document: Document) -> None:
        """Count a document that could not be read."""
        kind = document.problem.partition(":")[0]
        self.problems[kind if kind in self.problems or len(self.problems) < _KINDS else "others"] += document.count
        for names in (self.names, *((self.broken,) if document.broken else ())):
            if len(names) < _NAMES:
                names.append(f"{document.name}: {document.problem}")

    def add(self, other: Tally) -> None:
        """Add the tally of the piece that follows."""
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


def load_finished(work: PieceContext, piece: int) -> Tally | None:
    """The tally of a finished piece, after reading all of its bytes again; None if it is not finished or is damaged."""
    try:
        raw = json.loads(work.record(piece).read_bytes())
        shards = {split: [ShardInfo(**info) for info in raw["shards"][split]] for split in SPLITS}
        for info in (info for split in SPLITS for info in shards[split]):
            verify_shard(work.part(info.file), info)
        read_counts(work, piece)
    except (FileNotFoundError, ValueError, KeyError, TypeError, BadZipFile):
        return None
    return Tally(**raw | {"shards": shards, "dropped": Counter(raw["dropped"]), "problems": Counter(raw["problems"])})


def read_counts(work: PieceContext, piece: int) -> Counts:
    """How often each token stands in each split of a finished piece, [2, vocab]."""
    counts: Counts = np.load(work.counts(piece))["counts"]
    return counts


def usable_documents(selection: Selection, piece: Piece, tally: Tally) -> Iterator[Document]:
    """The documents of a piece that have text and pass the filters, in order. All others are counted in `tally`.

    Raises DataError for an unreadable document under on_invalid = "error", and if there are more than allowed.
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


def text_digest(text: str) -> bytes:
    """SHA-256 of a text in UTF-8."""
    return hashlib.sha256(text.encode()).digest()


def is_held_out(head: bytes, share: float) -> bool:
    """Whether a document is in the held-out split, by its text's digest alone, so that copies of a document are on the same
    side.

    head: the digest, of which 8 bytes are used.
    share: share of documents held out.
    """
    return int.from_bytes(head[:8], "little") < share * 2**64


def hash_piece(context: PieceContext, job: Job, report: Report) -> int:
    """Write the digests of a piece's usable documents. Returns their number."""
    heads = bytearray()
    waiting = 0
    for document in usable_documents(context.selection, job.piece, Tally()):
        assert document.text is not None
        heads += text_digest(document.text)[:16]
        waiting += len(document.text)
        if waiting >= _BATCH_CHARACTERS:
            report(waiting, 0)
            waiting = 0
    return write_hashes(context.hashes(job.piece.number), bytes(heads))


def tokenize_piece(context: PieceContext, job: Job, report: Report) -> Tally:
    """Write a piece's shards, token counts and record. Returns the record."""
    number = job.piece.number
    tokenizer = _tokenizer(context.folder / TOKENIZER, context.tokenizer, context.boundaries)
    tally = Tally()
    writers = {split: _PartWriter(context, f"{split}-{number:05d}", bytes_per_token(tokenizer.vocab)) for split in SPLITS}
    counts = np.zeros((len(SPLITS), tokenizer.vocab), dtype=np.int64)
    for batch in _batches(_unique(context, number, usable_documents(context.selection, job.piece, tally), tally)):
        if not tally.documents:
            _check_tokenizer(tokenizer, batch, job)
        sizes = []
        ids_by_split: tuple[list[Ids], list[Ids]] = ([], [])
        for document, (ids, learned) in zip(batch, encode_documents(tokenizer, batch), strict=True):
            assert document.text is not None
            text = document.text.encode()
            side = int(is_held_out(text_digest(document.split_key), context.held_out))
            writers[SPLITS[side]].add(ids, learned)
            ids_by_split[side].append(ids)
            sizes.append(len(ids))
            tally.bytes += len(text)
        tally.documents += len(batch)
        for bucket, documents_in in enumerate(np.bincount(np.log2(sizes).astype(np.int64)).tolist()):
            tally.lengths[bucket] += documents_in
        for side in (0, 1):
            counts[side] += np.bincount(
                np.concatenate(ids_by_split[side] or [np.zeros(0, np.int64)]), minlength=tokenizer.vocab
            )
        report(sum(len(document.text or "") for document in batch), sum(sizes))
    tally.shards = {split: writer.close() for split, writer in writers.items()}
    packed = io.BytesIO()
    np.savez_compressed(packed, counts=counts)
    write_file(context.counts(number), packed.getvalue(), durable=False)
    plain = vars(tally) | {"shards": {split: [asdict(info) for info in infos] for split, infos in tally.shards.items()}}
    write_file(context.record(number), json.dumps(plain).encode(), durable=False)
    return tally


@functools.lru_cache(1)
def _tokenizer(path: Path, wanted: str, marks: BoundaryTokens) -> Tokenizer:
    tokenizer = parse_tokenizer(path.read_bytes(), str(path), marks)
    if tokenizer.fingerprint != wanted:
        raise DataError(f"{path}: the tokenizer was changed by someone else while it was in use; begin anew")
    return tokenizer


def _unique(work: PieceContext, number: int, stream: Iterator[Document], tally: Tally) -> Iterator[Document]:
    """Leave out duplicates, by the numbers that find_duplicates wrote, which count usable documents."""
    if not work.deduplicate:
        yield from stream
        return
    known = count_hashes(work.hashes(number))
    duplicates = set(read_duplicates(work.doubles(number)).tolist())
    place = -1
    for place, document in enumerate(stream):
        if place in duplicates:
            tally.dropped["duplicate"] += 1
        else:
            yield document
    if place + 1 != known:
        raise DataError(f"data.source: piece {number} has {place + 1} documents, and had {known} when it was first read")


def encode_documents(tokenizer: Tokenizer, batch: list[Document]) -> Iterator[tuple[Ids, Ids | None]]:
    """For every document its ids, ending with the separator, and for documents in parts which ids are learned (else None).

    The separator is learned if a learned answer ends the document, unless the template ends that with a special token at which
    generation stops; then the separator only keeps documents apart. Plain text begins with the tokenizer's bos, if it has one;
    documents in parts have only what the template writes.
    """
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
    visible = [part for part in parts if part.text.strip()]
    if not visible or not visible[-1].learned:
        return False
    last = next((i for i in reversed(ids) if tokenizer.decode([i]).strip()), None)
    if last is None or last in tokenizer.stops:
        return False
    # What is learned on its own behind the end of a turn leads on to the separator: a line end, in the built-in template.
    leads_on = parts[-1].learned and not parts[-1].text.strip()
    return leads_on or tokenizer.backend.id_to_token(last) not in tokenizer.special_tokens


def _check_tokenizer(tokenizer: Tokenizer, batch: list[Document], job: Job) -> None:
    """Compare the fast backend with `tokenizers` on a few texts of every piece. Raises DataError if they differ."""
    if not tokenizer.backends_agree([(document.text or "")[:1024] for document in batch[:8]]):
        raise DataError(
            f"data.tokenizer: {tokenizer.backend_name} and `tokenizers` give other ids in {job}: other versions of the two "
            "packages may agree; please report it"
        )


def _batches(stream: Iterator[Document]) -> Iterator[list[Document]]:
    """Runs of documents of about _BATCH_CHARACTERS together, which bounds memory and keeps progress visible."""
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
    """Writes a piece's documents of one split as shards of `shard_tokens` tokens or slightly more (the last may be shorter)."""

    def __init__(self, work: PieceContext, name: str, width: int) -> None:
        self.work, self.name, self.width = work, name, width
        self.flags = work.selection.source.chat is not None
        self.ids: list[Ids] = []
        self.learned: list[Ids] = []
        self.size = 0  # tokens waiting
        self.shards: list[ShardInfo] = []

    def add(self, ids: Ids, learned: Ids | None) -> None:
        """Add a document."""
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
        """Write what is left. Returns all shards."""
        if self.ids:
            self._flush()
        return self.shards
