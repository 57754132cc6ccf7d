"""The documents of one part of one file, for every format: each row gives one document, readable or with its problem."""

from __future__ import annotations

import itertools
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mikoshi.data.io.files import File, content
from mikoshi.data.io.kinds import JSON, JSONL, PARQUET, TEXT, WEBDATASET
from mikoshi.data.io.unpack import Unreadable, stream_of
from mikoshi.data.sources.columns import read_arrow, read_parquet, row_of
from mikoshi.data.sources.json_rows import BOM, JsonDecoder, UnreadableValue, read_json, read_lines
from mikoshi.data.sources.text import Document, Row, RowReader

_BLOCK = 512  # of a tar


@dataclass(frozen=True, slots=True)
class Span:
    """A part of file number `file`: bytes `start` to `stop` of plain JSON lines (the lines that begin there), row groups of
    a Parquet file, or with stop = -1 the whole file."""

    file: int
    start: int
    stop: int


def read_span(file: File, kind: str, span: Span, reader: RowReader) -> Iterator[Document]:
    """The documents that begin in the span, in order.

    If the file is broken, the lost rest is a `broken` document without text, named by the file. Raises OSError or the store's
    error if the file cannot be reached.
    """
    last = ""
    try:
        for document in _documents(file, kind, span, reader):
            last = document.name
            yield document
    except Unreadable as problem:
        lost = f"it was read up to {last}, how much is lost is not known" if last else "none of it could be read"
        yield Document(file.name, None, f"{problem}; {lost}", broken=True)


def _documents(file: File, kind: str, span: Span, reader: RowReader) -> Iterator[Document]:
    if kind == JSONL or (kind == JSON and span.stop >= 0):
        return read_lines(file, span.start, span.stop, reader)
    if kind == JSON:
        return read_json(file, reader)
    if kind == TEXT:
        return _text(file, reader)
    if kind == WEBDATASET:
        return _webdataset(file, reader)
    return read_parquet(file, span.start, span.stop, reader) if kind == PARQUET else read_arrow(file, reader)


def _text(file: File, reader: RowReader) -> Iterator[Document]:
    try:
        text = b"".join(content(file)).removeprefix(BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        yield Document(file.name, None, f"not UTF-8: byte {error.start} cannot be read")
        return
    yield Document(file.name, text) if reader.only_text else reader.row(file.name, {reader.spec.column: text})


def _webdataset(file: File, reader: RowReader) -> Iterator[Document]:
    """A row is a run of members with the same name up to the first dot. Its columns are the suffixes, and the keys of its
    "json" member. Members that are not needed are skipped unread."""
    read = _Counted(content(file))
    try:
        with tarfile.open(fileobj=stream_of(read), mode="r|") as tar:
            row: dict[str, Any] = {}
            key = ""
            for member in tar:
                folder, slash, last = member.name.rpartition("/")
                stem, dot, suffix = last.partition(".")
                if not member.isfile() or not stem or not dot:
                    continue
                if f"{folder}{slash}{stem}" != key and row:
                    yield row_of(f"{file.name}:{key}", _with_json(row, reader), reader)
                    row = {}
                key = f"{folder}{slash}{stem}"
                if suffix in row:
                    row[suffix] = UnreadableValue(f"twice there: the member {suffix!r} of {key!r}")
                else:
                    row[suffix] = _member(tar, member, suffix, reader)
            if row:
                yield row_of(f"{file.name}:{key}", _with_json(row, reader), reader)
            _check_end(read, tar.offset)
    except (tarfile.TarError, EOFError) as error:
        raise Unreadable(f"unreadable file: not a whole tar file: {error}") from None


class _Counted:
    """A stream of blocks that counts its bytes and records where the last non-zero byte was."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks, self.size, self.last = blocks, 0, 0

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        block = next(self._blocks)
        if filled := len(block.rstrip(b"\0")):
            self.last = self.size + filled
        self.size += len(block)
        return block


def _check_end(read: _Counted, end: int) -> None:
    """Read the rest of an archive whose members end at byte `end`. Raises Unreadable if no end mark follows, as when it is
    cut between two members, or if anything follows the mark."""
    for _ in itertools.chain(read):
        pass
    if read.size < end + _BLOCK:
        raise Unreadable("unreadable file: not a whole tar file: it ends without an end mark")
    if read.last > end:
        raise Unreadable("unreadable file: not one tar file: more follows its end mark")


def _member(tar: tarfile.TarFile, member: tarfile.TarInfo, suffix: str, reader: RowReader) -> Any:
    if suffix != "json" and suffix not in reader.columns:
        return None
    stream = tar.extractfile(member)
    data = stream.read() if stream else b""
    if suffix == "json":
        return JsonDecoder().value(data.removeprefix(BOM))
    try:
        return data.removeprefix(BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        return UnreadableValue(f"not UTF-8: byte {error.start} of the member {suffix!r} cannot be read")


def _with_json(row: dict[str, Any], reader: RowReader) -> Row:
    """The row with the keys of its "json" member. A column with two different values becomes UnreadableValue."""
    inner = row.get("json")
    if not isinstance(inner, dict):
        return row
    both = (name for name in reader.columns & inner.keys() & row.keys() if name != "json" and inner[name] != row[name])
    twice = {
        name: UnreadableValue(f"twice there: {name!r} is a member and a key of the member 'json'") for name in sorted(both)
    }
    return {**inner, **row, **twice}
