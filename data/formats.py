"""The documents of one stretch of one file, for each format: every row gives one, readable or with its problem."""

from __future__ import annotations

import itertools
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from data.errors import DataError
from data.files import File, Unreadable, blocks, content, open_binary, stream_of
from data.text import Document, Reading, Row

JSONL, PARQUET, ARROW, TEXT, WEBDATASET = "jsonl", "parquet", "arrow", "text", "webdataset"
FORMATS = (JSONL, PARQUET, ARROW, TEXT, WEBDATASET)

_SUFFIXES = {".jsonl": JSONL, ".ndjson": JSONL, ".parquet": PARQUET, ".arrow": ARROW, ".tar": WEBDATASET, ".tgz": WEBDATASET}
_BOM = b"\xef\xbb\xbf"
_ROWS = 4096
_BYTES = 64 << 20  # of a batch of rows, about


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of file number `file`: bytes `start` to `stop` of plain JSON lines (those that begin there), row groups
    of a Parquet, or with stop = -1 the whole file."""

    file: int
    start: int
    stop: int


def format_of(file: File, wanted: str) -> str:
    """`wanted`, or with "auto" what the file's suffix says: any that is not known is one document of text."""
    return _SUFFIXES.get(file.suffix, TEXT) if wanted == "auto" else wanted


def read_span(file: File, kind: str, span: Span, reading: Reading) -> Iterator[Document]:
    """The documents that begin in the span, in order. What is broken in a file beyond its rows is a document without
    text under the file's name. Raises OSError or the store's error where it cannot be reached."""
    try:
        if kind == JSONL:
            yield from _jsonl(file, span, reading)
        elif kind == TEXT:
            yield _text(file, reading)
        elif kind == WEBDATASET:
            yield from _webdataset(file, reading)
        else:
            yield from _columns(file, kind, span, reading)
    except Unreadable as problem:
        yield Document(file.name, None, str(problem))


def _text(file: File, reading: Reading) -> Document:
    try:
        text = b"".join(content(file)).removeprefix(_BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        return Document(file.name, None, f"not UTF-8: byte {error.start} cannot be read")
    if reading.only_text:
        return Document(file.name, text)
    return reading.row(file.name, {reading.spec.column: text})


def lines(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """The lines of a stream without their newlines, whatever blocks it comes in. A last one without newline counts."""
    held: list[bytes] = []
    for block in pieces:
        parts = block.split(b"\n")
        if len(parts) == 1:
            held.append(block)
            continue
        held.append(parts[0])
        yield b"".join(held)
        yield from parts[1:-1]
        held = [parts[-1]]
    if last := b"".join(held):
        yield last


def _jsonl(file: File, span: Span, reading: Reading) -> Iterator[Document]:
    start, stop = span.start, span.stop
    stored, at = content(file), start
    if start:
        # From one byte before: whether a line begins right at the span's start depends on it.
        stored = blocks(file, start - 1, stop)
        for block in stored:
            end = block.find(b"\n")
            if end >= 0:
                at += end
                stored = itertools.chain([block[end + 1 :]], stored)
                break
            at += len(block)
            if at >= stop:
                return
    for number, line in enumerate(lines(stored), 1):
        if 0 <= stop <= at:
            return
        size = len(line) + 1
        if at == 0:
            line = line.removeprefix(_BOM)
        if line and not line.isspace():
            place = f"{file.name}:byte {at}" if start else f"{file.name}:{number}"
            yield _json_line(place, line, reading)
        at += size


def _json_line(name: str, line: bytes, reading: Reading) -> Document:
    row = _json(line)
    if isinstance(row, _Broken):
        return Document(name, None, row.why)
    if not isinstance(row, dict):
        return Document(name, None, f"not an object: the line holds a {type(row).__name__}")
    if reading.only_text and reading.spec.column in row:
        return reading.text(name, row[reading.spec.column])
    return reading.row(name, row)


@dataclass(frozen=True)
class _Broken:
    why: str


def _json(data: bytes) -> Any:
    try:
        return json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        return _Broken(f"not UTF-8: byte {error.start} of the line cannot be read")
    except json.JSONDecodeError as error:
        return _Broken(f"not JSON: {error.msg} at character {error.pos + 1}")
    except (ValueError, RecursionError) as error:  # a number of too many digits, brackets without end
        return _Broken(f"not JSON: {str(error).splitlines()[0]}")


def _of_the_disk(error: Exception) -> bool:
    """Whether the file could not be reached: what Arrow says of its content is a bare OSError without a number."""
    return isinstance(error, OSError) and (error.errno is not None or type(error) is not OSError)


def row_group_bytes(file: File) -> list[int]:
    """The share of the file's bytes that each of its row groups takes, together all; [] where it cannot be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with open_binary(file) as stream:
            metadata = pq.ParquetFile(stream).metadata
            sizes = [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]
    except (pa.ArrowException, OSError, UnicodeDecodeError, MemoryError) as error:
        if _of_the_disk(error):
            raise
        return []
    whole, ends, done = max(sum(sizes), 1), [0], 0
    for size in sizes:
        done += size
        ends.append(file.size * done // whole)
    return [b - a for a, b in itertools.pairwise(ends)]


def _columns(file: File, kind: str, span: Span, reading: Reading) -> Iterator[Document]:
    """Parquet and Arrow: batches of the columns that are looked at, and no others."""
    import pyarrow as pa

    stream = open_binary(file)
    try:
        with stream:
            table = _parquet(stream, span, reading) if kind == PARQUET else _arrow(stream, reading)
            yield from _rows(table, file, reading)
    except (pa.ArrowException, OSError, UnicodeDecodeError, MemoryError) as error:  # out of memory: by a broken length
        if _of_the_disk(error):
            raise
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise Unreadable(f"unreadable file: not a whole {kind.capitalize()} file: {why}") from None


@dataclass(frozen=True)
class _Table:
    """All columns of a file, how many rows come before the stretch to read, and the batches of that."""

    columns: list[str]
    before: int
    batches: Iterator[Any]


def _rows(table: _Table, file: File, reading: Reading) -> Iterator[Document]:
    row = table.before
    if missing := reading.lacks(table.columns):
        if row == 0:  # once for the file, however many spans it is cut in
            yield Document(file.name, None, missing)
        return
    for batch in table.batches:
        columns = {name: _values(column) for name, column in zip(batch.schema.names, batch.columns, strict=True)}
        if reading.only_text:
            for value in columns[reading.spec.column]:
                row += 1
                place = f"{file.name}:{row}"
                yield Document(place, None, value.why) if isinstance(value, _Broken) else reading.text(place, value)
            continue
        for values in zip(*columns.values(), strict=True):
            row += 1
            yield _row_of(f"{file.name}:{row}", dict(zip(columns, values, strict=True)), reading)


def _row_of(name: str, row: Row, reading: Reading) -> Document:
    broken = next((value for value in row.values() if isinstance(value, _Broken)), None)
    return Document(name, None, broken.why) if broken else reading.row(name, row)


def _parquet(stream: Any, span: Span, reading: Reading) -> _Table:
    import pyarrow.parquet as pq

    table = pq.ParquetFile(stream)
    metadata = table.metadata
    groups = range(span.start, metadata.num_row_groups if span.stop < 0 else span.stop)
    first = sum(metadata.row_group(i).num_rows for i in range(span.start))
    names = table.schema_arrow.names
    wanted = [name for name in names if name in reading.columns]
    sizes = [metadata.row_group(i).total_byte_size // max(metadata.row_group(i).num_rows, 1) for i in groups]
    rows = max(1, min(_ROWS, _BYTES // max([1, *sizes])))
    batches = table.iter_batches(batch_size=rows, row_groups=list(groups), columns=wanted, use_threads=False)
    return _Table(names, first, batches)


def _arrow(stream: Any, reading: Reading) -> _Table:
    import pyarrow as pa

    def cut(batch: Any) -> Iterator[Any]:
        chosen = batch.select([name for name in batch.schema.names if name in reading.columns])
        for column in chosen.columns:
            # Offsets come from the file as they are: unchecked, a broken one would be read far outside it. As bytes,
            # because what is not UTF-8 spoils a row only.
            kind = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}.get(column.type)
            (column.view(kind) if kind is not None else column).validate(full=True)
        rows = max(1, min(_ROWS, chosen.num_rows * _BYTES // max(chosen.nbytes, 1)))
        return (chosen.slice(at, rows) for at in range(0, chosen.num_rows, rows))

    whole = stream.read(6) == b"ARROW1"
    stream.seek(0)
    if whole:
        table = pa.ipc.open_file(stream)
        batches = (table.get_batch(i) for i in range(table.num_record_batches))
    else:
        table = batches = pa.ipc.open_stream(stream)
    return _Table(table.schema.names, 0, (part for batch in batches for part in cut(batch)))


def _values(column: Any) -> list[Any]:
    """A column as Python's values; one that is not UTF-8 spoils itself and no other."""
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        values: list[Any] = []
        for scalar in column:
            try:
                values.append(scalar.as_py())
            except UnicodeDecodeError as error:
                values.append(_Broken(f"not UTF-8: byte {error.start} of the text cannot be read"))
        return values


def _webdataset(file: File, reading: Reading) -> Iterator[Document]:
    """A row is a run of members whose names are alike up to the first dot; its columns are what follows that dot, and
    the keys of its member "json". Members that are not looked at are passed over unread."""
    try:
        with tarfile.open(fileobj=stream_of(content(file)), mode="r|") as tar:
            held: dict[str, Any] = {}
            key = ""
            for member in tar:
                folder, slash, last = member.name.rpartition("/")
                stem, dot, suffix = last.partition(".")
                if not member.isfile() or not stem or not dot:
                    continue
                if f"{folder}{slash}{stem}" != key and held:
                    yield _row_of(f"{file.name}:{key}", _with_json(held), reading)
                    held = {}
                key = f"{folder}{slash}{stem}"
                if suffix in held:
                    held[suffix] = _Broken(f"twice there: the member {suffix!r} of {key!r}")
                else:
                    held[suffix] = _member(tar, member, suffix, reading)
            if held:
                yield _row_of(f"{file.name}:{key}", _with_json(held), reading)
    except (tarfile.TarError, EOFError) as error:
        raise Unreadable(f"unreadable file: not a whole tar file: {error}") from None


def _member(tar: tarfile.TarFile, member: tarfile.TarInfo, suffix: str, reading: Reading) -> Any:
    if suffix != "json" and suffix not in reading.columns:
        return None
    stream = tar.extractfile(member)
    data = stream.read() if stream else b""
    if suffix == "json":
        return _json(data.removeprefix(_BOM))
    try:
        return data.removeprefix(_BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        return _Broken(f"not UTF-8: byte {error.start} of the member {suffix!r} cannot be read")


def _with_json(held: dict[str, Any]) -> Row:
    inner = held.get("json")
    return {**inner, **held} if isinstance(inner, dict) else held


def refuse_format(wanted: str) -> None:
    """Raises DataError for a format that there is not."""
    if wanted not in ("auto", *FORMATS):
        raise DataError(f"format = {wanted!r} is not one of auto, {', '.join(FORMATS)}")
