"""Sources of text: reading all pieces of a source in order gives each document once, however the source is cut.

`datasets` only finds the files of a Hub dataset. They are read by our own readers, since its JSON reader gives up a whole block
for one broken line (and parses strings that look like dates), and none of its readers tells in which row of which file a
document was.
"""

from __future__ import annotations

import itertools
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mikoshi.data.errors import DataError
from mikoshi.data.io.files import File, blocks, find_files, local_file, source_errors_named
from mikoshi.data.io.kinds import JSON, JSONL, PARQUET, SelectedFiles, check_format, check_readable, format_of, select_files
from mikoshi.data.io.unpack import Unreadable
from mikoshi.data.sources.chat import ChatTemplate, Part, load_chat_template
from mikoshi.data.sources.columns import row_group_bytes
from mikoshi.data.sources.formats import Span, read_span
from mikoshi.data.sources.hub import hub_files
from mikoshi.data.sources.json_rows import has_lines
from mikoshi.data.sources.text import Document, SourceSpec, row_reader

__all__ = ["Document", "Part", "Piece", "Source", "SourceSpec", "Span", "documents", "open_source", "pieces"]

PYTHON_STDLIB = "python-stdlib"
"""The name of the corpus that every machine has: the source code of Python's own standard library."""


@dataclass(frozen=True)
class Source:
    """The files of a corpus, sorted by name, and how to read them. It can be pickled for worker processes.

    report: which files were selected, as SelectedFiles.report has it.
    """

    spec: SourceSpec
    files: tuple[File, ...]
    format: str
    chat: ChatTemplate | None = None
    report: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def bytes(self) -> int:
        """Stored bytes of all files."""
        return sum(file.size for file in self.files)

    def describe(self, legacy: bool = False) -> list[tuple[str, int]]:
        """Names and sizes of the files, which a prepared dataset records as its origin.

        A name is followed by "#" and the store's tag of the version, if there is one; a chat template counts as a file.

        legacy: as earlier versions recorded it.
        """
        described = [(f"{file.name}#{file.etag}" if file.etag else file.name, file.size) for file in self.files]
        if self.chat is not None:
            now = self.chat.fingerprint[:16], len(self.chat.text.encode())
            digest, size = self.chat.legacy_fingerprint if legacy else now
            described.append((f"{self.spec.chat}#{digest}", size))
        return described


@dataclass(frozen=True)
class Piece:
    """A unit of work, independent of the number of workers.

    bytes: its share of the source's bytes; the shares add up to all.
    """

    number: int
    spans: tuple[Span, ...]
    bytes: int


def open_source(spec: SourceSpec) -> Source:
    """The source that `spec` describes, with its files listed. Raises DataError if there is nothing to read or the spec is
    invalid."""
    check_format(spec.format)
    for key, value in (("on_invalid", spec.on_invalid), ("on_broken", spec.on_broken)):
        if value not in ("error", "skip"):
            raise DataError(f"{key} = {value!r} is neither 'error' nor 'skip'")
    chat = load_chat_template(spec.chat, spec.chat_date) if spec.chat else None
    if chat is not None and spec.template:
        raise DataError("template and chat: a source has one or the other; the chat template says how messages become text")
    row_reader(spec, chat)
    kind = spec.format
    if spec.source == PYTHON_STDLIB:
        chosen = SelectedFiles(_python_stdlib(), {})
    elif spec.source.startswith("hub:"):
        files, found = hub_files(spec.source)
        kind, chosen = found if kind == "auto" else kind, SelectedFiles(files, {})
    else:
        chosen = select_files(*find_files(spec.source), kind)
    check_readable(chosen.files, kind)
    return Source(spec, chosen.files, kind, chat, chosen.report(kind))


def _python_stdlib() -> tuple[File, ...]:
    root = Path(sysconfig.get_paths()["stdlib"]).resolve()
    paths = [p for p in root.rglob("*.py") if "site-packages" not in p.parts and "__pycache__" not in p.parts]
    files = [local_file(p.relative_to(root).as_posix(), p) for p in paths]
    return tuple(sorted(files, key=lambda file: file.name))


def pieces(source: Source, target: int) -> tuple[Piece, ...]:
    """The source in pieces of about `target` bytes: small files together, plain JSON lines cut at any line, Parquet between
    row groups. Any other file stays whole."""
    cut: list[Piece] = []
    spans: list[Span] = []
    size_so_far = 0
    for span, size in _units(source, target):
        if spans and size_so_far + size > target:
            cut.append(Piece(len(cut), tuple(spans), size_so_far))
            spans, size_so_far = [], 0
        spans.append(span)
        size_so_far += size
    return (*cut, Piece(len(cut), tuple(spans), size_so_far))


def _units(source: Source, target: int) -> Iterator[tuple[Span, int]]:
    """The smallest parts of the source, with their bytes."""
    for number, file in enumerate(source.files):
        kind = format_of(file, source.format)
        whole = [(Span(number, 0, -1), file.size)]
        if file.size > target and not file.compression and (kind == JSONL or (kind == JSON and _has_lines(file))):
            count = -(-file.size // target)
            ends = [file.size * i // count for i in range(count + 1)]
            yield from ((Span(number, a, b), b - a) for a, b in itertools.pairwise(ends))
        elif file.size > target and kind == PARQUET:
            with source_errors_named(file.name):
                sizes = row_group_bytes(file)
            yield from ((Span(number, i, i + 1), size) for i, size in enumerate(sizes)) if sizes else whole
        else:
            yield from whole


def _has_lines(file: File) -> bool:
    with source_errors_named(file.name):
        try:
            return has_lines(file)
        except Unreadable:
            return False


def documents(source: Source, piece: Piece, specials: Iterable[str] = ()) -> Iterator[Document]:
    """The documents of a piece, in order.

    specials: the tokenizer's special tokens, which the messages of a conversation may not contain.

    Unreadable documents raise DataError with their name; with on_invalid "skip" they come as documents without text, as do
    those that the source's filter drops.
    """
    reader = row_reader(source.spec, source.chat, frozenset(specials))
    for span in piece.spans:
        file = source.files[span.file]
        with source_errors_named(file.name):
            for document in read_span(file, format_of(file, source.format), span, reader):
                if document.text is None and not document.dropped:
                    _refuse(document, file, source.spec)
                yield from document.texts()


def _refuse(document: Document, file: File, spec: SourceSpec) -> None:
    """Raises DataError for an unreadable document, unless the source leaves such out."""
    if document.broken and spec.on_broken == "error":
        remedy = 'mend or remove the file; data.on_broken = "skip" leaves out and counts what is lost'
        raise DataError(f"{document.name}: {document.problem} ({remedy})")
    if not document.broken and spec.on_invalid == "error":
        name = _with_line(document.name, file)
        column = "data.text_column names it, " if document.problem.startswith("no column") else ""
        raise DataError(f'{name}: {document.problem} ({column}data.on_invalid = "skip" leaves such out)')


def _with_line(name: str, file: File) -> str:
    """The name with a line number in place of a byte offset, if counting needs no transfer."""
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
