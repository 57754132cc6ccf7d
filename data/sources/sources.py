"""Where text comes from: reading all pieces of a source in order gives each document once, however it is cut.

`datasets` finds what a Hub dataset consists of. Files are read by their own readers rather than through it, because
its JSON reader gives up a whole block for one broken line (and takes strings that look like dates for dates), and none
of its readers says at which row of which file a document stood.
"""

from __future__ import annotations

import itertools
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mikoshi.data.errors import DataError
from mikoshi.data.io.files import File, blocks, find_files, local_file, told
from mikoshi.data.io.kinds import JSON, JSONL, PARQUET, Chosen, choose, format_of, refuse_format, refuse_unread
from mikoshi.data.io.unpack import Unreadable
from mikoshi.data.sources.chat import ChatTemplate, Part, load_chat
from mikoshi.data.sources.columns import row_group_bytes
from mikoshi.data.sources.formats import Span, read_span
from mikoshi.data.sources.hub import hub_files
from mikoshi.data.sources.json_rows import has_lines
from mikoshi.data.sources.text import Document, SourceSpec, reading

__all__ = ["Document", "Part", "Piece", "Source", "SourceSpec", "Span", "documents", "open_source", "pieces"]

PYTHON_STDLIB = "python-stdlib"
"""The name of the corpus that every machine has: the source code of Python's own standard library."""


@dataclass(frozen=True)
class Source:
    """The files of a corpus, sorted by name, how to read them, and what is said of the choice of files. It can be pickled
    for worker processes."""

    spec: SourceSpec
    files: tuple[File, ...]
    format: str
    chat: ChatTemplate | None = None
    report: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def bytes(self) -> int:
        return sum(file.size for file in self.files)

    def describe(self, before: bool = False) -> list[tuple[str, int]]:
        """Names and sizes of the files: what a prepared dataset remembers of its origin. Where the store gives one, a
        name is followed by "#" and the tag of the file's version; a chat template counts as a file. `before`: as earlier
        versions told it."""
        told = [(f"{file.name}#{file.etag}" if file.etag else file.name, file.size) for file in self.files]
        if self.chat is not None:
            now = self.chat.fingerprint[:16], len(self.chat.text.encode())
            digest, size = self.chat.before if before else now
            told.append((f"{self.spec.chat}#{digest}", size))
        return told


@dataclass(frozen=True)
class Piece:
    """A unit of work, the same whatever the workers. `bytes`: its share of the source's; those of all pieces are all."""

    number: int
    spans: tuple[Span, ...]
    bytes: int


def open_source(spec: SourceSpec) -> Source:
    """The source that `spec` names, its files listed. Raises DataError if there is nothing to read, or the spec says
    what cannot be."""
    refuse_format(spec.format)
    for key, value in (("on_invalid", spec.on_invalid), ("on_broken", spec.on_broken)):
        if value not in ("error", "skip"):
            raise DataError(f"{key} = {value!r} is neither 'error' nor 'skip'")
    chat = load_chat(spec.chat, spec.chat_date) if spec.chat else None
    if chat is not None and spec.template:
        raise DataError("template and chat: a source has one or the other; the chat template says how messages become text")
    reading(spec, chat)
    kind = spec.format
    if spec.source == PYTHON_STDLIB:
        chosen = Chosen(_python_stdlib(), {})
    elif spec.source.startswith("hub:"):
        files, found = hub_files(spec.source)
        kind, chosen = found if kind == "auto" else kind, Chosen(files, {})
    else:
        chosen = choose(*find_files(spec.source), kind)
    refuse_unread(chosen.files, kind)
    return Source(spec, chosen.files, kind, chat, chosen.report(kind))


def _python_stdlib() -> tuple[File, ...]:
    root = Path(sysconfig.get_paths()["stdlib"]).resolve()
    paths = [p for p in root.rglob("*.py") if "site-packages" not in p.parts and "__pycache__" not in p.parts]
    files = [local_file(p.relative_to(root).as_posix(), p) for p in paths]
    return tuple(sorted(files, key=lambda file: file.name))


def pieces(source: Source, target: int) -> tuple[Piece, ...]:
    """The source in pieces of about `target` bytes: small files together, plain JSON lines cut anywhere, a Parquet
    between row groups; any other file stays whole."""
    cut: list[Piece] = []
    spans: list[Span] = []
    held = 0
    for span, size in _units(source, target):
        if spans and held + size > target:
            cut.append(Piece(len(cut), tuple(spans), held))
            spans, held = [], 0
        spans.append(span)
        held += size
    return (*cut, Piece(len(cut), tuple(spans), held))


def _units(source: Source, target: int) -> Iterator[tuple[Span, int]]:
    """What is not cut further, with its bytes."""
    for number, file in enumerate(source.files):
        kind = format_of(file, source.format)
        whole = [(Span(number, 0, -1), file.size)]
        if file.size > target and not file.compression and (kind == JSONL or (kind == JSON and _has_lines(file))):
            count = -(-file.size // target)
            ends = [file.size * i // count for i in range(count + 1)]
            yield from ((Span(number, a, b), b - a) for a, b in itertools.pairwise(ends))
        elif file.size > target and kind == PARQUET:
            with told(file.name):
                sizes = row_group_bytes(file)
            yield from ((Span(number, i, i + 1), size) for i, size in enumerate(sizes)) if sizes else whole
        else:
            yield from whole


def _has_lines(file: File) -> bool:
    with told(file.name):
        try:
            return has_lines(file)
        except Unreadable:
            return False


def documents(source: Source, piece: Piece, specials: Iterable[str] = ()) -> Iterator[Document]:
    """The documents of a piece in order. `specials`: the tokenizer's special tokens, which a conversation's messages may
    not hold. What cannot be read raises DataError by name, or with on_invalid "skip" comes as a Document without text,
    as one does that the source's filter drops."""
    how = reading(source.spec, source.chat, frozenset(specials))
    for span in piece.spans:
        file = source.files[span.file]
        with told(file.name):
            for document in read_span(file, format_of(file, source.format), span, how):
                if document.text is None and not document.dropped:
                    _refuse(document, file, source.spec)
                yield from document.texts()


def _refuse(document: Document, file: File, spec: SourceSpec) -> None:
    """Raises DataError for what cannot be read, unless it is to be left out."""
    if document.broken and spec.on_broken == "error":
        way = 'mend or remove the file; data.on_broken = "skip" leaves out and counts what is lost'
        raise DataError(f"{document.name}: {document.problem} ({way})")
    if not document.broken and spec.on_invalid == "error":
        name = _with_line(document.name, file)
        column = "data.text_column names it, " if document.problem.startswith("no column") else ""
        raise DataError(f'{name}: {document.problem} ({column}data.on_invalid = "skip" leaves such out)')


def _with_line(name: str, file: File) -> str:
    """A line that is known by its first byte is told by its number as well, where counting costs no transfer."""
    head, _, byte = name.rpartition(":byte ")
    if not head or file.remote:
        return name
    at, line = int(byte), 1
    for block in blocks(file):
        line += block[:at].count(b"\n")
        at -= len(block)
        if at <= 0:
            break
    return f"{head}:{line}"
