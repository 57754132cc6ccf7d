"""Decompression, member by member: everything before a break is yielded, and a break raises."""

from __future__ import annotations

import bz2
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, cast

from mikoshi.data.errors import DataError

_BLOCK = 1 << 20
_READ = 1 << 14  # bytes given to a decoder at once: what they can swell to stays small
_LARGEST_WINDOW = 1 << 31  # of zstd --ultra --long=31


class Unreadable(Exception):
    """Why the rest of a file cannot be read, as "kind: detail"."""


def unpacked(stored: Iterator[bytes], compression: str) -> Iterator[bytes]:
    """The decompressed bytes of a stream.

    compression: ".gz", ".bz2", ".xz" or ".zst", with any number of members in a row; "" for none.

    Raises Unreadable if the file is broken, ends within a member, or is empty.
    """
    if not compression:
        yield from stored
        return
    name, begin, errors = _decoder(compression)
    stream = stream_of(stored)
    decoder, begun, rest, ended = begin(), False, b"", False
    while data := rest or stream.read(_READ):
        if not begun and not (data := data.lstrip(b"\0")):  # members may be filled up with zeros
            rest = b""
            continue
        try:
            block = decoder.decompress(data)
        except errors as error:
            raise Unreadable(f"unreadable file: not a whole {name} file: {error}") from None
        begun, rest = True, b""
        if decoder.eof:
            decoder, begun, rest, ended = begin(), False, decoder.unused_data, True
        if block:
            yield block
    if begun or not ended:
        why = "it ends too soon" if begun else "there is nothing in it"
        raise Unreadable(f"unreadable file: not a whole {name} file: {why}")


def _decoder(compression: str) -> tuple[str, Callable[[], Any], tuple[type[Exception], ...]]:
    """The format's name, a function that makes a decoder for one member, and the errors that it raises."""
    match compression:
        case ".gz":
            return "gzip", lambda: zlib.decompressobj(wbits=31), (zlib.error,)
        case ".bz2":
            return "bzip2", bz2.BZ2Decompressor, (OSError, ValueError)
        case ".xz":
            return "xz", lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ), (lzma.LZMAError,)
    try:
        import zstandard
    except ImportError:
        raise DataError("data.source: .zst files need the package zstandard: pip install zstandard") from None
    return "zstd", lambda: zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW).decompressobj(), (zstandard.ZstdError,)


class _Stream(io.RawIOBase):
    """Blocks of bytes as a stream to read from."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self.pieces, self.rest = pieces, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, into: Any) -> int:
        while not self.rest:
            block = next(self.pieces, None)
            if block is None:
                return 0
            self.rest = memoryview(block)
        size = min(len(into), len(self.rest))
        into[:size] = self.rest[:size]
        self.rest = self.rest[size:]
        return size


def stream_of(pieces: Iterator[bytes]) -> BinaryIO:
    """Blocks of bytes as a file that can be read in order."""
    return cast(BinaryIO, io.BufferedReader(_Stream(pieces), _BLOCK))
