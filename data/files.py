"""The files of a source, listed in one order and read as bytes, wherever they are; nothing of it goes missing in silence."""

from __future__ import annotations

import glob
import io
import os
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from data.errors import DataError, of_storage, passes

REMOTE = ("s3", "gs", "az", "hf")
COMPRESSED = (".gz", ".zst")

_BLOCK = 1 << 20
_REMOTE_BLOCK = 8 << 20  # a request to an object store takes as long as some megabytes do
_BEYOND = 1 << 18
_MAGIC = frozenset("*?[")


@dataclass(frozen=True, slots=True)
class File:
    """A file: its name inside the source, where it is (a local path or an URL), its size in bytes, and what its store
    calls this version of it ("" for local files)."""

    name: str
    url: str
    size: int
    etag: str = ""

    @property
    def remote(self) -> bool:
        return _protocol(self.url) in REMOTE

    @property
    def suffix(self) -> str:
        """What the file is, with no regard to its compression: ".jsonl" for a.jsonl.zst."""
        path = PurePosixPath(self.name)
        return (PurePosixPath(path.stem) if path.suffix in COMPRESSED else path).suffix.lower()

    @property
    def compression(self) -> str:
        suffix = PurePosixPath(self.name).suffix
        return suffix if suffix in COMPRESSED else ""


class Unreadable(Exception):
    """What is wrong inside a file, as "kind: detail"; the rest of it cannot be read."""


@contextmanager
def told(name: str) -> Iterator[None]:
    """What fails in reaching a file or store comes out as a DataError that names it, or where it may pass as a StorageError."""
    try:
        yield
    except OSError as error:
        raise of_storage(error, f"data.source: {name} cannot be read: {error.strerror or _line(error)}") from None
    except _remote_errors() as error:
        raise of_storage(error, f"data.source: {name} cannot be read: {_line(error)}") from None


def _remote_errors() -> tuple[type[Exception], ...]:
    """The errors of those clients that are in use: they need not be OSErrors."""
    names = (("obstore.exceptions", "BaseError"), ("httpx", "HTTPError"), ("httpx2", "HTTPError"))
    return tuple(getattr(sys.modules[module], name) for module, name in names if module in sys.modules)


def _line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _protocol(url: str) -> str:
    return url.partition("://")[0] if "://" in url else "file"


@lru_cache(maxsize=8)
def _filesystem(protocol: str) -> Any:
    """The fsspec file system of an URL's protocol. Endpoint and credentials come from where the clients look for them."""
    try:
        if protocol == "hf":
            from huggingface_hub import HfFileSystem

            return HfFileSystem()
        from obstore.fsspec import FsspecStore

        store: Any = FsspecStore
        return store(protocol, retry_config={"max_retries": 5, "retry_timeout": timedelta(seconds=60)})
    except ImportError as error:
        package = "huggingface_hub" if protocol == "hf" else "obstore fsspec"
        raise DataError(f"data.source: {protocol}:// needs {error.name}: pip install {package}") from None


def list_files(where: str) -> tuple[File, ...]:
    """The files at a path, glob or URL, sorted by name. In a folder every file counts whose name and folders do not
    begin with a dot. Raises DataError where there is nothing, or something that cannot be read; StorageError where that may
    pass."""
    protocol = _protocol(where)
    if protocol in REMOTE:
        with told(where):
            files = _remote_files(where)
    elif protocol == "file":
        with told(where):
            files = _local_files(where.removeprefix("file://"))
    else:
        raise DataError(f"data.source: {where!r}: {protocol}:// is not known; there are {', '.join(p + '://' for p in REMOTE)}")
    if not files:
        raise DataError(f"data.source: {where!r} holds no files to read: put .txt, .jsonl or .parquet there")
    return tuple(sorted(files, key=lambda file: file.name))


def _local_files(where: str) -> list[File]:
    root = Path(where).expanduser()
    if _there(root):
        paths = [root] if root.is_file() else list(visible_files(root))
        root = root.parent if root.is_file() else root
    elif _MAGIC & set(where):
        fixed = root.parts[: next(i for i, part in enumerate(root.parts) if _MAGIC & set(part))]
        paths = [_checked(p) for p in map(Path, glob.glob(str(root), recursive=True)) if not p.is_dir()]  # noqa: PTH207
        root = Path(*fixed)
        if not paths:
            raise DataError(f"data.source: no file matches {where!r}")
    else:
        raise DataError(f"data.source: {where!r} is neither a file, folder or glob here nor 'python-stdlib'")
    return [File(path.relative_to(root).as_posix(), str(path), path.stat().st_size) for path in paths]


def _there(path: Path) -> bool:
    try:
        path.lstat()
    except (OSError, ValueError) as error:
        if passes(error):
            raise
        return False
    return True


def visible_files(root: Path) -> Iterator[Path]:
    """Every file under `root` that is not hidden, links followed. Raises DataError for what cannot be entered or
    followed, and for a folder that a link leads to a second time."""

    def refuse(error: OSError) -> None:
        raise of_storage(error, f"data.source: {error.filename} cannot be read: {error.strerror}")

    seen = {root.resolve()}
    for folder, below, names in os.walk(root, onerror=refuse, followlinks=True):
        below[:] = sorted(name for name in below if not name.startswith("."))
        for path in (Path(folder) / name for name in below):
            real = path.resolve()
            if real in seen:
                raise DataError(f"data.source: {path} leads to {real}, which is read already: remove the link")
            seen.add(real)
        yield from (_checked(Path(folder) / name) for name in names if not name.startswith("."))


def _checked(path: Path) -> Path:
    if not path.is_file():
        raise DataError(f"data.source: {path} cannot be read: not a file, or a link that leads nowhere")
    return path


def _remote_files(where: str) -> list[File]:
    protocol, _, path = where.partition("://")
    store = _filesystem(protocol)
    path = path.rstrip("/")
    if _MAGIC & set(path):
        parts = path.split("/")
        root = "/".join(parts[: next(i for i, part in enumerate(parts) if _MAGIC & set(part))])
        found = store.glob(path, detail=True)
    else:
        info = store.info(path)
        single = info["type"] == "file"
        root = path.rpartition("/")[0] if single else path
        found = {path: info} if single else store.find(path, detail=True)
    files = []
    for full, info in found.items():
        # A Hub path names its revision, written out or as the default's, in the root as well: cut by length.
        name = full.removeprefix(root).lstrip("/")
        if info["type"] == "file" and not full.endswith("/") and not any(part.startswith(".") for part in name.split("/")):
            etag = next((str(info[key]) for key in ("e_tag", "ETag", "etag", "blob_id") if info.get(key)), "")
            files.append(File(name, f"{protocol}://{full}", int(info["size"]), etag.strip('"')))
    return files


def open_binary(file: File) -> BinaryIO:
    """The file as it is stored, to seek in. Raises OSError or the store's own error."""
    if not file.remote:
        return Path(file.url).open("rb")
    protocol, _, path = file.url.partition("://")
    return cast(BinaryIO, _filesystem(protocol).open(path, "rb"))


def blocks(file: File, start: int = 0, stop: int = -1) -> Iterator[bytes]:
    """The file's bytes from `start`, as stored, to its end: with `stop`, little is fetched at once of what comes after it,
    for a reader who goes on to the end of a line. Raises DataError if they end sooner than when the file was listed."""
    at = start
    if file.remote:
        protocol, _, path = file.url.partition("://")
        while at < file.size:
            size = _REMOTE_BLOCK if stop < 0 else min(max(stop - at, _BEYOND), _REMOTE_BLOCK)
            block = _filesystem(protocol).cat_file(path, start=at, end=min(at + size, file.size))
            if not block:
                break
            at += len(block)
            yield block
    else:
        with Path(file.url).open("rb") as stream:
            stream.seek(start)
            while block := stream.read(_BLOCK):
                at += len(block)
                yield block
    if at < file.size:
        raise DataError(f"data.source: {file.name} changed while it was read: {at} bytes of {file.size} are left; begin anew")


def content(file: File) -> Iterator[bytes]:
    """The file's bytes, uncompressed. Raises Unreadable where a compressed file is broken or cut off."""
    stored = blocks(file)
    match file.compression:
        case ".gz":
            yield from _gunzip(stored)
        case ".zst":
            yield from _unzstd(stored)
        case _:
            yield from stored


def _gunzip(stored: Iterator[bytes]) -> Iterator[bytes]:
    """Member by member, so that all that comes before a break is read."""
    stream = stream_of(stored)
    decoder, begun, rest = zlib.decompressobj(wbits=31), False, b""
    while data := rest or stream.read(1 << 16):
        if not begun and not data.strip(b"\0"):  # some archives are filled up with zeros
            rest = b""
            continue
        try:
            block = decoder.decompress(data, _BLOCK)
        except zlib.error as error:
            raise Unreadable(f"unreadable file: not a whole gzip file: {error}") from None
        begun, rest = True, decoder.unconsumed_tail
        if decoder.eof:
            decoder, begun, rest = zlib.decompressobj(wbits=31), False, decoder.unused_data.lstrip(b"\0")
        if block:
            yield block
    if begun:
        raise Unreadable("unreadable file: not a whole gzip file: it ends too soon")


def _unzstd(stored: Iterator[bytes]) -> Iterator[bytes]:
    """Frame by frame, because only a frame's own decoder knows whether its end was seen."""
    try:
        import zstandard
    except ImportError:
        raise DataError("data.source: .zst files need the package zstandard: pip install zstandard") from None
    stream = stream_of(stored)
    decoder, begun, rest = zstandard.ZstdDecompressor().decompressobj(), False, b""
    while data := rest or stream.read(1 << 14):
        try:
            block = decoder.decompress(data)
        except zstandard.ZstdError as error:
            raise Unreadable(f"unreadable file: not a whole zstd file: {error}") from None
        begun, rest = True, b""
        if decoder.eof:
            decoder, begun, rest = zstandard.ZstdDecompressor().decompressobj(), False, decoder.unused_data
        if block:
            yield block
    if begun:
        raise Unreadable("unreadable file: not a whole zstd file: it ends too soon")


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
    """Blocks of bytes as a file to read in order."""
    return cast(BinaryIO, io.BufferedReader(_Stream(pieces), _BLOCK))
