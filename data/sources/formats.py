"""The documents of one stretch of one file, for each format: every row gives one, readable or with its problem."""

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
from mikoshi.data.sources.json_rows import BOM, Broken, Json, read_json, read_lines
from mikoshi.data.sources.text import Document, Reading, Row

_BLOCK = 512  # of a tar


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of file number `file`: bytes `start` to `stop` of plain JSON lines (those that begin there), row groups
    of a Parquet, or with stop = -1 the whole file."""

    file: int
    start: int
    stop: int


def read_span(file: File, kind: str, span: Span, reading: Reading) -> Iterator[Document]:
    """The documents that begin in the span, in order. Where the file breaks off, what is lost is a `broken` document without
    text under the file's name. Raises OSError or the store's error where it cannot be reached."""
    last = ""
    try:
        for document in _documents(file, kind, span, reading):
            last = document.name
            yield document
    except Unreadable as problem:
        lost = f"it was read up to {last}, how much is lost is not known" if last else "none of it could be read"
        yield Document(file.name, None, f"{problem}; {lost}", broken=True)


def _documents(file: File, kind: str, span: Span, reading: Reading) -> Iterator[Document]:
    if kind == JSONL or (kind == JSON and span.stop >= 0):
        return read_lines(file, span.start, span.stop, reading)
    if kind == JSON:
        return read_json(file, reading)
    if kind == TEXT:
        return _text(file, reading)
    if kind == WEBDATASET:
        return _webdataset(file, reading)
    return read_parquet(file, span.start, span.stop, reading) if kind == PARQUET else read_arrow(file, reading)


def _text(file: File, reading: Reading) -> Iterator[Document]:
    try:
        text = b"".join(content(file)).removeprefix(BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        yield Document(file.name, None, f"not UTF-8: byte {error.start} cannot be read")
        return
    yield Document(file.name, text) if reading.only_text else reading.row(file.name, {reading.spec.column: text})


def _webdataset(file: File, reading: Reading) -> Iterator[Document]:
    """A row is a run of members whose names are alike up to the first dot; its columns are what follows that dot, and
    the keys of its member "json". Members that are not looked at are passed over unread."""
    read = _Counted(content(file))
    try:
        with tarfile.open(fileobj=stream_of(read), mode="r|") as tar:
            held: dict[str, Any] = {}
            key = ""
            for member in tar:
                folder, slash, last = member.name.rpartition("/")
                stem, dot, suffix = last.partition(".")
                if not member.isfile() or not stem or not dot:
                    continue
                if f"{folder}{slash}{stem}" != key and held:
                    yield row_of(f"{file.name}:{key}", _with_json(held, reading), reading)
                    held = {}
                key = f"{folder}{slash}{stem}"
                if suffix in held:
                    held[suffix] = Broken(f"twice there: the member {suffix!r} of {key!r}")
                else:
                    held[suffix] = _member(tar, member, suffix, reading)
            if held:
                yield row_of(f"{file.name}:{key}", _with_json(held, reading), reading)
            _check_end(read, tar.offset)
    except (tarfile.TarError, EOFError) as error:
        raise Unreadable(f"unreadable file: not a whole tar file: {error}") from None


class _Counted:
    """A stream of blocks that knows how many bytes came, and where the last that is not 0 stood."""

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
    """Read the rest of an archive whose members end at byte `end`. Raises Unreadable where no end mark comes there, as where
    it is cut between two members, or where more than that comes."""
    for _ in itertools.chain(read):
        pass
    if read.size < end + _BLOCK:
        raise Unreadable("unreadable file: not a whole tar file: it ends without an end mark")
    if read.last > end:
        raise Unreadable("unreadable file: not one tar file: more follows its end mark")


def _member(tar: tarfile.TarFile, member: tarfile.TarInfo, suffix: str, reading: Reading) -> Any:
    if suffix != "json" and suffix not in reading.columns:
        return None
    stream = tar.extractfile(member)
    data = stream.read() if stream else b""
    if suffix == "json":
        return Json().value(data.removeprefix(BOM))
    try:
        return data.removeprefix(BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        return Broken(f"not UTF-8: byte {error.start} of the member {suffix!r} cannot be read")


def _with_json(held: dict[str, Any], reading: Reading) -> Row:
    """The row with the keys of its member "json". A column that stands in both, not alike, is Broken: one would be lost."""
    inner = held.get("json")
    if not isinstance(inner, dict):
        return held
    both = (name for name in reading.columns & inner.keys() & held.keys() if name != "json" and inner[name] != held[name])
    twice = {name: Broken(f"twice there: {name!r} is a member and a key of the member 'json'") for name in sorted(both)}
    return {**inner, **held, **twice}
