"""The rows of JSON files: an object a line, an array of objects, or one object; each row is read or has its problem."""

from __future__ import annotations

import codecs
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from mikoshi.data.io.files import File, blocks, content
from mikoshi.data.io.unpack import Unreadable
from mikoshi.data.sources.text import Document, Reading

BOM = b"\xef\xbb\xbf"
_HEAD = 1 << 16  # bytes in which a file's first line tells what kind of JSON it is
_NEAR = 16  # characters before the end of what is there, in which an error may only mean that more is to come
_SPACE = " \t\r\n"
_WORDS = ("true", "false", "null")


@dataclass(frozen=True)
class Broken:
    """Stands for a value that cannot be read, and says why. `cut`: its end is missing."""

    why: str
    cut: bool = False


class Json:
    """Decodes JSON as Python does, but for keys that stand twice in one object, of which one would be lost. Not to be
    shared by threads."""

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
        return value if twice is None else Broken(f"twice there: the key {twice!r} stands twice in one object")

    def value(self, data: bytes) -> Any:
        """The value, or Broken."""
        self._twice = None
        try:
            return self._checked(self._decoder.decode(data.decode("utf-8")))
        except UnicodeDecodeError as error:
            return Broken(f"not UTF-8: byte {error.start} of the line cannot be read", error.reason == "unexpected end of data")
        except json.JSONDecodeError as error:
            rest = error.doc[error.pos :].rstrip(_SPACE)
            cut = error.msg.startswith("Unterminated") or any(word.startswith(rest) for word in _WORDS)
            return Broken(f"not JSON: {error.msg} at character {error.pos + 1}", cut)
        except (ValueError, RecursionError) as error:  # a number of too many digits, brackets without end
            return Broken(f"not JSON: {str(error).splitlines()[0]}")

    def next(self, text: str, at: int) -> tuple[Any, int]:
        """The value that begins there, or Broken for a key that stands twice, and where it ends. Raises ValueError or
        RecursionError."""
        self._twice = None
        value, end = self._decoder.raw_decode(text, at)
        return self._checked(value), end


class _Pieces:
    """The blocks of a stream, and whether they have all been read."""

    def __init__(self, stored: Iterator[bytes]) -> None:
        self._stored, self.ended = stored, False

    def __iter__(self) -> Iterator[bytes]:
        yield from self._stored
        self.ended = True


def lines(pieces: Iterable[bytes]) -> Iterator[bytes]:
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


def read_lines(file: File, start: int, stop: int, reading: Reading) -> Iterator[Document]:
    """An object a line: the lines that begin in bytes `start` to `stop` (-1: to the end)."""
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
    yield from _rows_of_lines(file, stored, at, stop, reading)


def _rows_of_lines(file: File, stored: Iterator[bytes], at: int, stop: int, reading: Reading) -> Iterator[Document]:
    """Raises Unreadable where the last line has neither its end nor a newline, as a file that is cut leaves it."""
    decoder, by_byte, pieces = Json(), at > 0, _Pieces(stored)
    for number, line in enumerate(lines(pieces), 1):
        if 0 <= stop <= at:
            return
        size = len(line) + 1
        if at == 0:
            line = line.removeprefix(BOM)
        if line and not line.isspace():
            place = f"{file.name}:byte {at}" if by_byte else f"{file.name}:{number}"
            row = decoder.value(line)
            if pieces.ended and isinstance(row, Broken) and row.cut:
                raise Unreadable(f"unreadable file: it ends within a line: {row.why}")
            yield _row(place, row, "the line", reading)
        at += size


def _row(name: str, row: Any, what: str, reading: Reading) -> Document:
    if isinstance(row, Broken):
        return Document(name, None, row.why)
    if not isinstance(row, dict):
        return Document(name, None, f"not an object: {what} holds a {type(row).__name__}")
    if reading.only_text and reading.spec.column in row:
        return reading.text(name, row[reading.spec.column])
    return reading.row(name, row)


def has_lines(file: File) -> bool:
    """Whether a file of JSON has an object a line. Raises Unreadable, DataError or OSError as reading it does."""
    return _kind(_peeked(content(file))[0]) == "lines"


def read_json(file: File, reading: Reading) -> Iterator[Document]:
    """An object a line, an array whose elements are rows, or one object, as the file's beginning says. A row is named by the
    number of its line or element."""
    head, stored = _peeked(content(file))
    kind = _kind(head)
    if kind == "lines":
        yield from _rows_of_lines(file, stored, 0, -1, reading)
    elif kind == "array":
        for number, value in enumerate(_elements(stored), 1):
            yield _row(f"{file.name}:{number}", value, "the element", reading)
    else:
        data = b"".join(stored)
        whole = Json().value(data.removeprefix(BOM))
        if isinstance(whole, dict) or not _second_line_is_a_row(data):
            if isinstance(whole, Broken) and whole.why.startswith("not JSON"):
                raise Unreadable(f"unreadable file: {whole.why}")
            yield _row(f"{file.name}:1", whole, "the file", reading)
        else:
            yield from _rows_of_lines(file, iter([data]), 0, -1, reading)


def _peeked(stored: Iterator[bytes]) -> tuple[bytes, Iterator[bytes]]:
    """The beginning of a stream, and all of it."""
    held, size = list[bytes](), 0
    for block in stored:
        held.append(block)
        size += len(block)
        if size >= _HEAD:
            break
    return b"".join(held), itertools.chain(held, stored)


def _kind(head: bytes) -> str:
    head = head.removeprefix(BOM).lstrip()
    line, newline, _ = head.partition(b"\n")
    if head.startswith(b"["):
        return "lines" if newline and isinstance(Json().value(line), list) and head[len(line) :].strip() else "array"
    return "lines" if not newline or not isinstance(Json().value(line), Broken) else "object"


def _second_line_is_a_row(data: bytes) -> bool:
    """A broken first line among others makes no other kind of file."""
    following = (line for line in data.splitlines()[1:] if line.strip())
    return isinstance(Json().value(next(following, b"")), dict)


def _elements(stored: Iterator[bytes]) -> Iterator[Any]:
    """The elements of an array as they come, or Broken in their places. Raises Unreadable where it is no whole array."""
    decoder, decode = Json(), codecs.getincrementaldecoder("utf-8")()
    text, at, more = "", 0, True

    def fill() -> None:
        nonlocal text, at, more
        text, at = text[at:], 0
        held, size = [text], 0
        while more and size <= len(text):  # twice as much each time: no value is begun anew more often than that
            block = next(stored, None)
            more = block is not None
            held.append(decode.decode(block or b"", final=not more))
            size += len(held[-1])
        text = "".join(held)

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
                if not more or not (error.msg.startswith("Unterminated") or error.pos + _NEAR > len(text)):
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
