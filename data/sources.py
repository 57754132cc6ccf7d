"""Where text comes from: each source is a list of files, and a document is one (name, text), always in one order."""

from __future__ import annotations

import json
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data.errors import DataError

PYTHON_STDLIB = "python-stdlib"
"""The name of the corpus that every machine has: the source code of Python's own standard library."""

_JSONL = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class Document:
    """`name` says where it stands, for messages; `text` is None where it could not be read, and `problem` says why."""

    name: str
    text: str | None
    problem: str = ""


@dataclass(frozen=True)
class Source:
    """The files of a corpus under `root`, sorted, and the column their rows keep text in."""

    root: Path
    files: tuple[Path, ...]
    column: str

    @property
    def bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files)

    def describe(self) -> list[tuple[str, int]]:
        """Names and sizes of the files: what a prepared dataset remembers of its origin."""
        return [(path.relative_to(self.root).as_posix(), path.stat().st_size) for path in self.files]


def open_source(spec: str, column: str) -> Source:
    """The source called `spec`: `python-stdlib`, or the path of a file or folder.

    In a folder every visible file counts: .jsonl/.ndjson (a document a line, in `column`), .parquet (a document a
    row, in `column`), any other as one document of UTF-8 text. Raises DataError if there is nothing to read.
    """
    if spec == PYTHON_STDLIB:
        root = Path(sysconfig.get_paths()["stdlib"]).resolve()
        files = [p for p in root.rglob("*.py") if "site-packages" not in p.parts and "__pycache__" not in p.parts]
    else:
        root = Path(spec).expanduser()
        if not os.path.lexists(root):
            raise DataError(f"data.source: {spec!r} is neither a file or folder here nor {PYTHON_STDLIB!r}")
        files = [root] if root.is_file() else list(_visible_files(root))
        root = root.parent if root.is_file() else root
    if not files:
        raise DataError(f"data.source: the folder {spec!r} holds no files to read: put .txt, .jsonl or .parquet there")
    return Source(root, tuple(sorted(files, key=lambda p: p.relative_to(root).as_posix())), column)


def _visible_files(root: Path) -> Iterator[Path]:
    """Every file under `root` that is not hidden. What cannot be entered or followed raises DataError: no part of a
    corpus goes missing in silence."""

    def refuse(error: OSError) -> None:
        raise DataError(f"data.source: {error.filename} cannot be read: {error.strerror}")

    for folder, below, names in os.walk(root, onerror=refuse):
        below[:] = [name for name in below if not name.startswith(".")]
        for name in names:
            if name.startswith("."):
                continue
            path = Path(folder) / name
            if not path.is_file():
                raise DataError(f"data.source: {path} cannot be read: not a file, or a link that leads nowhere")
            yield path


def documents(source: Source, on_invalid: Literal["error", "skip"]) -> Iterator[Document]:
    """Every document of the source in order. What cannot be read raises DataError by name, or with "skip" comes as a
    Document without text, so that it can be counted."""
    for path in source.files:
        name = path.relative_to(source.root).as_posix()
        read = _jsonl if path.suffix in _JSONL else _parquet if path.suffix == ".parquet" else _text
        for document in _readable(read(path, name, source.column), name):
            if document.text is None and on_invalid == "error":
                raise DataError(f'{document.name}: {document.problem} (data.on_invalid = "skip" leaves such out)')
            yield document


def _readable(stream: Iterator[Document], name: str) -> Iterator[Document]:
    try:
        yield from stream
    except OSError as error:
        raise DataError(f"data.source: {name} cannot be read: {error.strerror or error}") from None


def _text(path: Path, name: str, _column: str) -> Iterator[Document]:
    try:
        yield Document(name, path.read_bytes().decode("utf-8"))
    except UnicodeDecodeError as error:
        yield Document(name, None, f"not UTF-8 text: byte {error.start} cannot be read")


def _jsonl(path: Path, name: str, column: str) -> Iterator[Document]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _json_line(f"{name}:{number}", line, column)


def _json_line(name: str, line: bytes, column: str) -> Document:
    try:
        row = json.loads(line)
    except UnicodeDecodeError as error:
        return Document(name, None, f"not UTF-8 text: byte {error.start} of the line cannot be read")
    except json.JSONDecodeError as error:
        return Document(name, None, f"not JSON: {error.msg} at column {error.colno}")
    if not isinstance(row, dict) or not isinstance(row.get(column), str):
        has = f"its keys are {', '.join(row)}" if isinstance(row, dict) else f"it is a {type(row).__name__}"
        return Document(name, None, f"no text under data.text_column = {column!r}; {has}")
    try:
        row[column].encode()
    except UnicodeEncodeError as error:
        return Document(name, None, f"not text: half of a surrogate pair at character {error.start}")
    return Document(name, row[column])


def _parquet(path: Path, name: str, column: str) -> Iterator[Document]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(path)
        columns = table.schema_arrow.names
        if column not in columns:
            problem = f"no column data.text_column = {column!r}; it has {', '.join(columns)}"
            yield Document(name, None, problem)
            return
        row = 0
        for batch in table.iter_batches(columns=[column]):
            for text in batch.column(0).to_pylist():
                row += 1
                valid = isinstance(text, str)
                yield Document(f"{name}:{row}", text if valid else None, "" if valid else "the row holds no text")
    except pa.ArrowException as error:
        yield Document(name, None, f"not a readable Parquet file: {str(error).splitlines()[0]}")
