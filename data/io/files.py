"""The files of a source, listed in one order and read as bytes, local or remote. What is left out is named."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from mikoshi.data.errors import DataError, is_transient, storage_error
from mikoshi.data.io.unpack import unpacked

REMOTE = ("s3", "gs", "az", "hf")

_COMPRESSED = {".gz": ".gz", ".gzip": ".gz", ".zst": ".zst", ".zstd": ".zst", ".xz": ".xz", ".bz2": ".bz2"}
_PACKED_TARS = {
    ".tgz": ".gz", ".taz": ".gz", ".tzst": ".zst", ".txz": ".xz", ".tbz2": ".bz2", ".tbz": ".bz2",
    ".tb2": ".bz2", ".tz2": ".bz2",
}  # fmt: skip

_BLOCK = 1 << 20
_REMOTE_BLOCK = 8 << 20  # a request to an object store takes as long as some megabytes do
_BEYOND = 1 << 18
_MAGIC = frozenset("*?[")

Stamp = tuple[int, int, int]
"""Size in bytes, time of the last change in ns, and inode of a local file."""


@dataclass(frozen=True, slots=True)
class File:
    """A file of a source.

    name: its name inside the source.
    url: a local path or an URL.
    size: bytes.
    etag: the store's tag of this version ("" for local files).
    stamp: what identifies the version of a local file (None: not checked).
    """

    name: str
    url: str
    size: int
    etag: str = ""
    stamp: Stamp | None = None

    @property
    def remote(self) -> bool:
        """Whether the file is in an object store or on the Hub."""
        return _protocol(self.url) in REMOTE

    @property
    def suffix(self) -> str:
        """The format's suffix in lower case, without that of the compression: ".jsonl" for a.JSONL.zst."""
        path = PurePosixPath(self.name)
        suffix = path.suffix.lower()
        if suffix in _PACKED_TARS:
            return ".tar"
        return (PurePosixPath(path.stem) if suffix in _COMPRESSED else path).suffix.lower()

    @property
    def compression(self) -> str:
        """The canonical suffix of the compression: ".gz", ".zst", ".xz", ".bz2", or "" for none."""
        suffix = PurePosixPath(self.name).suffix.lower()
        return _COMPRESSED.get(suffix) or _PACKED_TARS.get(suffix, "")


@contextmanager
def source_errors_named(name: str) -> Iterator[None]:
    """Turn errors of a file or store in the block into a DataError that names it, or a StorageError if they may be
    transient."""
    try:
        yield
    except OSError as error:
        raise storage_error(error, f"data.source: {name} cannot be read: {error.strerror or _line(error)}") from None
    except _remote_errors() as error:
        raise storage_error(error, f"data.source: {name} cannot be read: {_line(error)}") from None


def _remote_errors() -> tuple[type[Exception], ...]:
    """The base errors of the store clients that are imported, which need not be OSErrors."""
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
    """The files at a path, glob or URL, in the order of `find_files`."""
    return find_files(where)[0]


def find_files(where: str) -> tuple[tuple[File, ...], tuple[str, ...]]:
    """The files at a path, glob or URL, sorted by name, and the names of hidden ones.

    In a folder, a file is hidden if its name or a folder's begins with a dot. Raises DataError if nothing is there or it cannot
    be read, StorageError if that may be transient.
    """
    protocol, hidden = _protocol(where), list[str]()
    if protocol in REMOTE:
        with source_errors_named(where):
            files = _remote_files(where, hidden)
    elif protocol == "file":
        with source_errors_named(where):
            files = _local_files(where.removeprefix("file://"), hidden)
    else:
        raise DataError(f"data.source: {where!r}: {protocol}:// is not known; there are {', '.join(p + '://' for p in REMOTE)}")
    if not files:
        raise DataError(f"data.source: {where!r} holds no files to read: put .txt, .jsonl or .parquet there")
    return tuple(sorted(files, key=lambda file: file.name)), tuple(sorted(hidden))


def _local_files(where: str, hidden: list[str]) -> list[File]:
    root = Path(where).expanduser()
    if _there(root):
        paths = [root] if root.is_file() else list(visible_files(root, hidden))
        root = root.parent if root.is_file() else root
    elif _MAGIC & set(where):
        fixed = root.parts[: next(i for i, part in enumerate(root.parts) if _MAGIC & set(part))]
        paths = [_checked(p) for p in map(Path, glob.glob(str(root), recursive=True)) if not p.is_dir()]  # noqa: PTH207
        root = Path(*fixed)
        if not paths:
            raise DataError(f"data.source: no file matches {where!r}")
    else:
        raise DataError(f"data.source: {where!r} is neither a file, folder or glob here nor 'python-stdlib'")
    return [local_file(path.relative_to(root).as_posix(), path) for path in paths]


def local_file(name: str, path: Path) -> File:
    """A local file as it is now. Raises OSError."""
    status = path.stat()
    return File(name, str(path), status.st_size, stamp=stamp_of(status))


def stamp_of(status: os.stat_result) -> Stamp:
    """What identifies the version of a local file without reading it."""
    return status.st_size, status.st_mtime_ns, status.st_ino


def _there(path: Path) -> bool:
    try:
        path.lstat()
    except (OSError, ValueError) as error:
        if is_transient(error):
            raise
        return False
    return True


def visible_files(root: Path, hidden: list[str]) -> Iterator[Path]:
    """Every file under `root` that is not hidden, following links. Names of hidden files and folders are appended to `hidden`.

    Raises DataError for what cannot be entered or followed, and for a folder that is reached twice.
    """

    def refuse(error: OSError) -> None:
        raise storage_error(error, f"data.source: {error.filename} cannot be read: {error.strerror}")

    seen = {root.resolve()}
    for folder, below, names in os.walk(root, onerror=refuse, followlinks=True):
        inside = Path(folder).relative_to(root)
        hidden += [(inside / name).as_posix() for name in (*below, *names) if name.startswith(".")]
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


def _remote_files(where: str, hidden: list[str]) -> list[File]:
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
        if info["type"] != "file" or full.endswith("/"):
            continue
        if any(part.startswith(".") for part in name.split("/")):
            hidden.append(name)
        else:
            etag = next((str(info[key]) for key in ("e_tag", "ETag", "etag", "blob_id") if info.get(key)), "")
            files.append(File(name, f"{protocol}://{full}", int(info["size"]), etag.strip('"')))
    return files


def open_binary(file: File) -> BinaryIO:
    """Open the file as it is stored, seekable. Raises OSError or the store's own error; DataError if a local file has
    changed since it was listed."""
    if not file.remote:
        stream = Path(file.url).open("rb")  # noqa: SIM115 - the caller's to close
        if file.stamp not in (None, stamp_of(os.fstat(stream.fileno()))):
            stream.close()
            raise _changed(file, "it is not the file that was listed")
        return stream
    protocol, _, path = file.url.partition("://")
    return cast(BinaryIO, _filesystem(protocol).open(path, "rb"))


def _changed(file: File, how: str) -> DataError:
    return DataError(f"data.source: {file.name} changed while it was read: {how}; begin anew")


def blocks(file: File, start: int = 0, stop: int = -1) -> Iterator[bytes]:
    """The file's stored bytes from `start` to its end.

    stop: a hint that little beyond this byte is needed, so that less is fetched at once.

    Raises DataError if the file ends sooner than when it was listed.
    """
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
        with open_binary(file) as stream:
            stream.seek(start)
            while block := stream.read(_BLOCK):
                at += len(block)
                yield block
    if at < file.size:
        raise _changed(file, f"{at} bytes of {file.size} are left")


def content(file: File) -> Iterator[bytes]:
    """The file's bytes, decompressed. Raises Unreadable if a compressed file is broken or truncated."""
    return unpacked(blocks(file), file.compression)
