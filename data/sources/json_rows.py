"""The rows of JSON files: an object a line, an array of objects, or one object. Each row is read or has its problem."""

from __future__ import annotations

import codecs
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from mikoshi.data.io.files import File, blocks, content
from mikoshi.data.io.unpack import Unreadable
from mikoshi.data.sources.text import Document, RowReader

BOM = b"\xef\xbb\xbf"
_HEAD = 1 << 16  # bytes in which a file's first line tells what kind of JSON it is
_LOOKAHEAD = 16  # characters before the end of what is there, in which an error may only mean that more is to come
_SPACE = " \t\r\n"
_LITERALS = ("true", "false", "null")


@dataclass(frozen=True)
class UnreadableValue:
    """Stands for a value that cannot be read.

    why: the problem, as "kind: detail".
    cut: the value's end is missing.
    """

    why: str
    cut: bool = False


class JsonDecoder:
    """Decodes JSON as Python does, but reports duplicate keys of an object, one of which would be lost. Not thread-safe."""

    def __init__(self) -> None:
        self._twice: str | None = None
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs) and self._twice is None:
            keys = [key for key, _ in pairs]
            self._twice = next(key for key in keys if keys.count(key) > 1)
        return found

    def _checked(self, value: Any) -> Any:
        twice, self._twice = self._twice, None
        return value if twice is None else UnreadableValue(f"twice there: the key {twice!r} stands twice in one object")

    def value(self, data: bytes) -> Any:
        """The decoded value, or UnreadableValue."""
        self._twice = None
        try:
            return self._checked(self._decoder.decode(data.decode("utf-8")))
        except UnicodeDecodeError as error:
            return UnreadableValue(
                f"not UTF-8: byte {error.start} of the line cannot be read", error.reason == "unexpected end of data"
            )
        except json.JSONDecodeError as error:
            rest = error.doc[error.pos :].rstrip(_SPACE)
            cut = error.msg.startswith("Unterminated") or any(literal.startswith(rest) for literal in _LITERALS)
            return UnreadableValue(f"not JSON: {error.msg} at character {error.pos + 1}", cut)
        except (ValueError, RecursionError) as error:  # a number of too many digits, brackets without end
            return UnreadableValue(f"not JSON: {str(error).splitlines()[0]}")

    def next(self, text: str, at: int) -> tuple[Any, int]:
        """The value that begins at `at` (UnreadableValue if a key is duplicated) and where it ends. Raises ValueError or
        RecursionError."""
        self._twice = None
        value, end = self._decoder.raw_decode(text, at)
        return self._checked(value), end


class _Pieces:
    """The blocks of a stream, and whether all have been read."""

    def __init__(self, stored: Iterator[bytes]) -> None:
        self._stored, self.ended = stored, False

    def __iter__(self) -> Iterator[bytes]:
        yield from self._stored
        self.ended = True


def lines(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The lines of a stream without their newlines. A last line without newline counts."""
    parts_of_line: list[bytes] = []
    for block in pieces:
        parts = block.split(b"\n")
        if len(parts) == 1:
            parts_of_line.append(block)
            continue
        parts_of_line.append(parts[0])
        yield b"".join(parts_of_line)
        yield from parts[1:-1]
        parts_of_line = [parts[-1]]
    if last := b"".join(parts_of_line):
        yield last


def read_lines(file: File, start: int, stop: int, reader: RowReader) -> Iterator[Document]:
    """Documents of a file with an object a line: of the lines that begin in bytes `start` to `stop` (-1: to the end)."""
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
    yield from _rows_of_lines(file, stored, at, stop, reader)


def _rows_of_lines(file: File, stored: Iterator[bytes], at: int, stop: int, reader: RowReader) -> Iterator[Document]:
    """Documents of lines. Raises Unreadable if the last line is incomplete and without newline, as in a truncated file."""
    decoder, by_byte, pieces = JsonDecoder(), at > 0, _Pieces(stored)
    for number, line in enumerate(lines(pieces), 1):
        if 0 <= stop <= at:
            return
        size = len(line) + 1
        if at == 0:
            line = line.removeprefix(BOM)
        if line and not line.isspace():
            place = f"{file.name}:byte {at}" if by_byte else f"{file.name}:{number}"
            row = decoder.value(line)
            if pieces.ended and isinstance(row, UnreadableValue) and row.cut:
                raise Unreadable(f"unreadable file: it ends within a line: {row.why}")
            yield _row(place, row, "the line", reader)
        at += size


def _row(name: str, row: Any, what: str, reader: RowReader) -> Document:
    if isinstance(row, UnreadableValue):
        return Document(name, None, row.why)
    if not isinstance(row, dict):
        return Document(name, None, f"not an object: {what} holds a {type(row).__name__}")
    if reader.only_text and reader.spec.column in row:
        return reader.text(name, row[reader.spec.column])
    return reader.row(name, row)


def has_lines(file: File) -> bool:
    """Whether a JSON file has an object a line. Raises Unreadable, DataError or OSError as reading it does."""
    return _kind(_peek(content(file))[0]) == "lines"


def read_json(file: File, reader: RowReader) -> Iterator[Document]:
    """Documents of a JSON file: an object a line, an array of rows, or one object, as its beginning shows. A row is named by
    the number of its line or element."""
    head, stored = _peek(content(file))
    kind = _kind(head)
    if kind == "lines":
        yield from _rows_of_lines(file, stored, 0, -1, reader)
    elif kind == "array":
        for number, value in enumerate(_elements(stored), 1):
            yield _row(f"{file.name}:{number}", value, "the element", reader)
    else:
        data = b"".join(stored)
        whole = JsonDecoder().value(data.removeprefix(BOM))
        if isinstance(whole, dict) or not _second_line_is_a_row(data):
            if isinstance(whole, UnreadableValue) and whole.why.startswith("not JSON"):
                raise Unreadable(f"unreadable file: {whole.why}")
            yield _row(f"{file.name}:1", whole, "the file", reader)
        else:
            yield from _rows_of_lines(file, iter([data]), 0, -1, reader)


def _peek(stored: Iterator[bytes]) -> tuple[bytes, Iterator[bytes]]:
    """The beginning of a stream, and the whole stream."""
    head_blocks, size = list[bytes](), 0
    for block in stored:
        head_blocks.append(block)
        size += len(block)
        if size >= _HEAD:
            break
    return b"".join(head_blocks), itertools.chain(head_blocks, stored)


def _kind(head: bytes) -> str:
    head = head.removeprefix(BOM).lstrip()
    line, newline, _ = head.partition(b"\n")
    if head.startswith(b"["):
        return "lines" if newline and isinstance(JsonDecoder().value(line), list) and head[len(line) :].strip() else "array"
    return "lines" if not newline or not isinstance(JsonDecoder().value(line), UnreadableValue) else "object"


def _second_line_is_a_row(data: bytes) -> bool:
    """Whether the second line is an object: then the file has an object a line, and only its first line is broken."""
    following = (line for line in data.splitlines()[1:] if line.strip())
    return isinstance(JsonDecoder().value(next(following, b"")), dict)


def _elements(stored: Iterator[bytes]) -> Iterator[Any]:
    """The elements of an array, one after another, with UnreadableValue for those with duplicate keys. Raises Unreadable if
    the array is not whole."""
    decoder, decode = JsonDecoder(), codecs.getincrementaldecoder("utf-8")()
    text, at, more = "", 0, True

    def fill() -> None:
        nonlocal text, at, more
        text, at = text[at:], 0
        blocks_read, size = [text], 0
        while more and size <= len(text):  # twice as much each time: no value is begun anew more often than that
            block = next(stored, None)
            more = block is not None
            blocks_read.append(decode.decode(block or b"", final=not more))
            size += len(blocks_read[-1])
        text = "".join(blocks_read)

    def ahead() -> str:
        nonlocal at
        while True:
            while at < len(text) and (text[at] in _SPACE or text[at] == "\ufeff"):
                at += 1
            if at < len(text) or not more:
                return text[at : at + 1]
            fill()

    def element() -> Any:
        nonlocal at
        while True:
            try:
                value, end = decoder.next(text, at)
            except json.JSONDecodeError as error:
                if not more or not (error.msg.startswith("Unterminated") or error.pos + _LOOKAHEAD > len(text)):
                    raise
            else:
                if end < len(text) or not more:
                    at = end
                    return value
            fill()

    try:
        ahead()
        at += 1  # the bracket
        while ahead() != "]":
            yield element()
            if ahead() == ",":
                at += 1
            elif ahead() != "]":
                raise Unreadable(f"unreadable file: not a whole JSON array: {'it ends too soon' if not more else 'no comma'}")
        at += 1
        if ahead():
            raise Unreadable("unreadable file: not a JSON array alone: more follows its end")
    except UnicodeDecodeError:
        raise Unreadable("unreadable file: not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"unreadable file: not a whole JSON array: {str(error).splitlines()[0]}") from None
