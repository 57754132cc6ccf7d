"""The rows of Parquet and Arrow files. Only the columns that are needed are read."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mikoshi.data.io.files import File, open_binary
from mikoshi.data.io.unpack import Unreadable
from mikoshi.data.sources.json_rows import UnreadableValue
from mikoshi.data.sources.text import Document, Row, RowReader

_ROWS = 4096
_BYTES = 64 << 20  # of a batch of rows, about
_MOST = 1 << 40  # rows that a file may claim to have lost
_END_MARKS = (b"\xff\xff\xff\xff\0\0\0\0", b"\0\0\0\0")


@contextmanager
def _arrow_errors_named(kind: str) -> Iterator[None]:
    """Turn Arrow's errors about a file's content into Unreadable. Errors of reaching the file pass through."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError, MemoryError) as error:  # out of memory: by a broken length
        if _is_disk_error(error):
            raise
        why = "".join(filter(str.isprintable, (str(error).splitlines() or [""])[0])) or type(error).__name__
        raise Unreadable(f"unreadable file: not a whole {kind} file: {why}") from None


def _is_disk_error(error: Exception) -> bool:
    """Whether the file could not be reached. Arrow reports bad content as a bare OSError without an error number."""
    return isinstance(error, OSError) and (error.errno is not None or type(error) is not OSError)


def row_group_bytes(file: File) -> list[int]:
    """For each row group its share of the file's bytes, adding up to all; [] if the metadata cannot be read."""
    import pyarrow.parquet as pq

    try:
        with open_binary(file) as stream, _arrow_errors_named("Parquet"):
            metadata = pq.ParquetFile(stream, pre_buffer=False).metadata
            sizes = [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]
    except Unreadable:
        return []
    whole, ends, done = max(sum(sizes), 1), [0], 0
    for size in sizes:
        done += size
        ends.append(file.size * done // whole)
    return [b - a for a, b in itertools.pairwise(ends)]


def read_parquet(file: File, start: int, stop: int, reader: RowReader) -> Iterator[Document]:
    """The documents of row groups `start` to `stop` (-1: to the last).

    Rows lost in a broken row group come as one Document that counts them, and reading goes on with the next group. A problem of
    the whole file is reported with the first group.
    """
    import pyarrow.parquet as pq

    with open_binary(file) as stream:
        with _arrow_errors_named("Parquet"):
            # Without a buffer read ahead by threads of Arrow's: one that waits for the interpreter when that ends aborts the
            # process (https://github.com/apache/arrow/issues/34314).
            table = pq.ParquetFile(stream, page_checksum_verification=True, pre_buffer=False)
            schema = table.schema_arrow
            groups = [table.metadata.row_group(i) for i in range(table.metadata.num_row_groups)]
            counts, sizes = [group.num_rows for group in groups], [group.total_byte_size for group in groups]
        row = sum(counts[:start])
        if problem := _schema_problem(schema, reader):
            if start == 0:
                yield Document(file.name, None, problem, count=_clamped_count(sum(counts)))
            return
        wanted = [name for name in schema.names if name in reader.columns]
        for group in range(start, len(groups) if stop < 0 else stop):
            at, end = row, row + counts[group]
            size = max(1, min(_ROWS, _BYTES // max(1, sizes[group] // max(counts[group], 1))))
            broken = "unreadable file: not a whole Parquet file: a row group is short"
            try:
                with _arrow_errors_named("Parquet"):
                    batches = table.iter_batches(batch_size=size, row_groups=[group], columns=wanted, use_threads=False)
                    for document in _rows(batches, at, file, reader):
                        at += 1
                        yield document
            except Unreadable as problem:
                broken = str(problem)
            if at < end:
                lost = f"rows {at + 1} to {end} of {sum(counts)} are lost"
                yield Document(file.name, None, f"{broken}; {lost}", count=_clamped_count(end - at), broken=True)
            row = end


def read_arrow(file: File, reader: RowReader) -> Iterator[Document]:
    """The documents of an Arrow file or stream."""
    import pyarrow as pa

    with open_binary(file) as stream, _arrow_errors_named("Arrow"):
        seekable = stream.read(6) == b"ARROW1"
        stream.seek(0, 2)
        stream.seek(max(0, stream.tell() - 8))
        whole = seekable or stream.read(8).endswith(_END_MARKS)
        stream.seek(0)
        if seekable:
            table = pa.ipc.open_file(stream)
            batches = (table.get_batch(i) for i in range(table.num_record_batches))
        else:
            table = batches = pa.ipc.open_stream(stream)
        if problem := _schema_problem(table.schema, reader):
            yield Document(file.name, None, problem, count=_clamped_count(sum(batch.num_rows for batch in batches)))
        else:
            yield from _rows((part for batch in batches for part in _cut(batch, reader)), 0, file, reader)
        if not whole:  # a stream that is cut between two batches reads like a whole one
            raise Unreadable("unreadable file: not a whole Arrow file: it ends without an end mark")


def _clamped_count(rows: int) -> int:
    return max(1, min(rows, _MOST))


def _cut(batch: Any, reader: RowReader) -> Iterator[Any]:
    import pyarrow as pa

    chosen = batch.select([name for name in batch.schema.names if name in reader.columns])
    for column in chosen.columns:
        # Offsets come from the file as they are: unchecked, a broken one would be read far outside it. As bytes,
        # because what is not UTF-8 spoils a row only.
        kind = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}.get(column.type)
        (column.view(kind) if kind is not None else column).validate(full=True)
    rows = max(1, min(_ROWS, chosen.num_rows * _BYTES // max(chosen.nbytes, 1)))
    return (chosen.slice(at, rows) for at in range(0, chosen.num_rows, rows))


def _schema_problem(schema: Any, reader: RowReader) -> str:
    """What is wrong with a file's columns, for all of its rows; "" for nothing."""
    if missing := reader.missing_columns(schema.names):
        return missing
    for name in sorted(reader.columns & set(schema.names)):
        if (count := schema.names.count(name)) > 1:
            return f"twice there: the file has {count} columns called {name!r}"
        if twice := _field_twice(schema.field(name).type, name):
            return f"twice there: the file has two fields called {twice!r}"
    return ""


def _field_twice(kind: Any, path: str) -> str:
    import pyarrow as pa

    fields = [kind.field(i) for i in range(kind.num_fields)] if pa.types.is_nested(kind) else []
    names = [field.name for field in fields]
    if pa.types.is_struct(kind):
        for name in names:
            if names.count(name) > 1:
                return f"{path}.{name}"
    inside = (_field_twice(field.type, f"{path}.{field.name}" if pa.types.is_struct(kind) else path) for field in fields)
    return next((found for found in inside if found), "")


def _rows(batches: Iterator[Any], row: int, file: File, reader: RowReader) -> Iterator[Document]:
    """The documents of batches of rows; `row` is the number of rows before them."""
    for batch in batches:
        columns = {name: _values(column) for name, column in zip(batch.schema.names, batch.columns, strict=True)}
        if reader.only_text:
            for value in columns[reader.spec.column]:
                row += 1
                place = f"{file.name}:{row}"
                yield Document(place, None, value.why) if isinstance(value, UnreadableValue) else reader.text(place, value)
            continue
        for values in zip(*columns.values(), strict=True):
            row += 1
            yield row_of(f"{file.name}:{row}", dict(zip(columns, values, strict=True)), reader)


def row_of(name: str, row: Row, reader: RowReader) -> Document:
    """The document of a row. Values may be UnreadableValue, which makes the document one without text."""
    broken = next((value for value in row.values() if isinstance(value, UnreadableValue)), None)
    return Document(name, None, broken.why) if broken else reader.row(name, row)


def _values(column: Any) -> list[Any]:
    """A column as Python values. A value that is not UTF-8 becomes UnreadableValue and leaves the others intact."""
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        values: list[Any] = []
        for scalar in column:
            try:
                values.append(scalar.as_py())
            except UnicodeDecodeError as error:
                values.append(UnreadableValue(f"not UTF-8: byte {error.start} of the text cannot be read"))
        return values
